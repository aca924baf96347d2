"""What guard, log and dashboard cost of a run: python tests/gpu_guard_cost.py --out DIR writes DIR/guard_cost.json

    python tests/gpu_guard_cost.py --recipe emoji32                    # on a GPU, replayed as CUDA
    graphs; about a minute
    python tests/gpu_guard_cost.py --recipe fashion16 --device cpu     # also toy

On a GPU three runs of one seed go on side by side, some iterations each in turn: bare, with log
and dashboard, and with the guard too. A turn of
the bare run is what the next turns of the others are compared with; the median over all rounds is
given, and how far the rounds scatter. On
a CPU, where other processes disturb more than there is to measure, one run's own calls are timed
(`--turns` for the former).
Before that, a watched run and a bare one are compared with deterministic algorithms: they must
have the same weights, bit by bit."""
import argparse, json, os, sys, tempfile, threading, time, traceback
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'data'), str(ROOT/'tests')]
import torch

from _long_work import Clock
from dmd2_nb import guards
from dmd2_nb.core import cond_to
from dmd2_nb.dashboard import Dashboard
from dmd2_nb.distill import DMD2
from dmd2_nb.guards import Guard
from dmd2_nb.images import to_float
from dmd2_nb.jobs import COLUMNS, first_networks, open_data, open_teacher
from dmd2_nb.logs import CsvLog, Means
from dmd2_nb.recipes import recipe
from dmd2_nb.runs import Run, batches, cond_batches, follow
from dmd2_nb.train import train

KINDS = ('bare', 'log', 'guard')
WORDS = {
    'bare': 'bare',
    'log': 'log and dashboard',
    'guard': 'log, dashboard and guard',
    'guard alone': 'guard alone',
}


def toy(device, graph):
    "As in lab.health_runs: the smallest iterations there are"
    from dmd2_nb.lab.health_runs import toy_run
    dmd, guard, reals = toy_run(0, gan_start=0, warmup_fake=10)
    dmd.fake_step = type(dmd).fake_step.__get__(dmd)  # not watched yet
    return dmd, None, reals(), guard.ref, 20


@lru_cache
def opened(name, device):
    r = recipe(name)
    data, _ = open_data(r)
    return r, data, open_teacher(r, data, None, device)[0]


def images(name, device, graph):
    "A recipe's run as `distill_job` makes it, with the GAN on from the start"
    r, data, T = opened(name, device)
    cfg = replace(r.config, gan_start=0, warmup_fake=10)
    make = DMD2
    if graph: from dmd2_nb.graphs import GraphedDMD2 as make
    dmd = make(T, *first_networks(r, T), cfg, probe=cond_to(data.conds(torch.arange(1)), device))
    x = to_float(data.images[:2000])
    return (
        dmd,
        cond_batches(data, cfg.batch, cfg.seed + 2, 0, device),
        batches(data, cfg.batch, cfg.seed + 1, 0, device),
        (x.mean().item(), x.std().item()),
        r.every['log'],
    )


# as in `distill_job`
def settings(a, dmd): return {} if a.recipe == 'toy' else dict(n=min(64, max(16, dmd.cfg.batch//2)))


class Turns:
    "Runs in threads of their own, one at a time; each turn is timed"
    def __init__(self, kinds, length, rounds, now, sync):
        self.length, self.rounds, self.now, self.sync, self.failed = length, rounds, now, sync, []
        self.gates, self.spent = {k: threading.Semaphore(0) for k in kinds}, {k: [] for k in kinds}
        self.back = threading.Semaphore(0)
    def logs(self, kind, it):
        "The iterations of a run; after `length` of them somebody else's turn"
        for i, log in enumerate(islice(it, self.length*self.rounds), 1):
            yield log
            if i % self.length == 0:
                self.sync()
                self.spent[kind].append(self.now()-self.begun)
                if i < self.length*self.rounds:
                    self.back.release()
                    self.wait(kind)  # after the last one `go` says so, when the run has been closed
    def wait(self, kind):
        self.gates[kind].acquire()
        if self.failed: raise SystemExit
        self.begun = self.now()
    def thread(self, kind, f):
        def go():
            try:
                self.wait(kind)
                f()
            except BaseException: self.failed.append(traceback.format_exc())
            finally: self.back.release()
        t = threading.Thread(target=go, daemon=True)
        t.start()
        return t
    def go(self, fs):
        ts = {k: self.thread(k, f) for k, f in fs.items()}
        for i in range(self.rounds):
            order = [*fs][i % len(fs):]+[*fs][:i % len(fs)]
            for k in order:
                self.gates[k].release()
                self.back.acquire()
                if self.failed: raise SystemExit(self.failed[0])
        for t in ts.values(): t.join()
        if self.failed: raise SystemExit(self.failed[0])


def alike(a, new, n):
    """Whether a run that is watched for `n` iterations has the weights of one that is not, bit by
    bit; and how many looks at the critic there were"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    nets, guard = [], None
    for watched in (False, True):
        dmd, conds, reals, ref, _ = new()
        guard, logs = (
            (Guard(dmd, ref, **settings(a, dmd)) if watched else None),
            train(dmd, conds, n, reals),
        )
        for _log in guard.watch(logs) if watched else logs: pass
        nets.append(dmd)
    torch.use_deterministic_algorithms(False)
    return all(
        torch.equal(p, q)
        for m in ('G', 'fake', 'head', 'ema')
        for p, q in zip(*(getattr(d, m).parameters() for d in nets))
    ), len(guard.probes)


def hooks(a, new):
    """Time of one run: of its training, and of what watching consists of. The median over blocks of
    `length` iterations; the first drawing and the last are left out"""
    (dmd, conds, reals, ref, every), n, clock, at = (
        new(),
        a.length * a.rounds,
        Clock(time.perf_counter),
        [],
    )
    guard = Guard(dmd, ref, **settings(a, dmd))
    call, numbers = clock.call('guard', guard.__call__), clock.call('guard', guard.numbers)
    def logs():
        for i, log in enumerate(clock.each('train', train(dmd, conds, n, reals))):
            call(log)
            if i % a.length == 0: at.append(clock.spent | dict(total=clock.now()))
            yield log
        at.append(clock.spent | dict(total=clock.now()))
    with tempfile.TemporaryDirectory() as d, ExitStack() as wrapped:
        board = Dashboard(file=Path(d)/'run.html')
        for part, o, name in (
            ('critic', guard, 'critic'),
            ('weights', guard, 'weights'),
            ('weights', guards, 'distance'),
            ('numbers', guard, 'collect'),
            ('means', Means, 'take'),
            ('file', CsvLog, 'add'),
            ('dashboard', board, 'row'),
            ('dashboard', board, 'update'),
        ):
            wrapped.enter_context(patch.object(o, name, clock.call(part, getattr(o, name))))
        follow(
            logs(),
            Run(Path(d)),
            COLUMNS,
            n + 1,
            log_every=every,
            show='dmd_loss fake_loss',
            extra=lambda: dict(g_updates=dmd.g_updates) | numbers(),
            bar=board.bar,
        )
    blocks = [
        {k: (v[k] - u.get(k, 0)) / (v['total'] - u['total']) for k in v} for u, v in zip(at, at[1:])
    ]
    part = {k: median(b.get(k, 0.) for b in blocks) for k in at[-1] if k != 'total'}
    ours, theirs = part.pop('guard'), 1-part.pop('train')
    # the looks at brightness and discriminator, the bookkeeping
    part['rest of the guard'] = ours-sum(part[k] for k in ('critic', 'weights', 'numbers'))
    # the loop of `follow`
    part['rest of the log'] = theirs-ours-sum(part[k] for k in ('means', 'file', 'dashboard'))
    ms = median((v['train']-u['train'])/a.length for u, v in zip(at, at[1:]))*1000
    return dict(
        batch=dmd.cfg.batch,
        log_every=every,
        iterations=n,
        ms=dict(bare=ms, guard=ms / (1 - theirs)),
        share=dict(log=theirs - ours, guard=theirs) | {'guard alone': ours},
        parts=part,
        quartiles=dict(
            guard=[
                sorted(1 - b['train'] for b in blocks)[i]
                for i in (len(blocks) // 4, -1 - len(blocks) // 4)
            ]
        ),
    )


def side_by_side(a, new, cuda):
    "Three runs in turns"
    turns, runs = (
        Turns(
            KINDS,
            a.length,
            a.warm + a.rounds,
            time.perf_counter if cuda else time.process_time,
            torch.cuda.synchronize if cuda else lambda: None,
        ),
        {k: new() for k in KINDS},
    )
    with tempfile.TemporaryDirectory() as d:
        def bare():
            dmd, conds, reals, *_ = runs['bare']
            for _log in turns.logs('bare', train(dmd, conds, 10**9, reals)): pass
        def followed(kind):
            dmd, conds, reals, ref, every = runs[kind]
            guard = Guard(dmd, ref, **settings(a, dmd)) if kind == 'guard' else None
            logs = train(dmd, conds, 10**9, reals)
            (Path(d)/kind).mkdir()
            follow(
                turns.logs(kind, guard.watch(logs) if guard else logs),
                Run(Path(d) / kind),
                COLUMNS,
                a.length * (a.warm + a.rounds) + 1,
                log_every=every,
                show='dmd_loss fake_loss',
                extra=lambda: dict(g_updates=dmd.g_updates) | (guard.numbers() if guard else {}),
                bar=Dashboard(file=Path(d) / f'{kind}.html').bar,
            )
        turns.go(dict(bare=bare, log=lambda: followed('log'), guard=lambda: followed('guard')))
    spent = {k: v[a.warm:] for k, v in turns.spent.items()}
    shares = {k: [(v-b)/v for v, b in zip(spent[k], spent['bare'])] for k in KINDS[1:]}
    shares['guard alone'] = [(g-l)/g for g, l in zip(spent['guard'], spent['log'])]
    return dict(
        batch=runs['bare'][0].cfg.batch,
        log_every=runs['bare'][4],
        iterations=a.rounds * a.length,
        length=a.length,
        ms={k: 1000 * median(v) / a.length for k, v in spent.items()},
        share={k: median(v) for k, v in shares.items()},
        total_share={k: (sum(spent[k]) - sum(spent['bare'])) / sum(spent[k]) for k in KINDS[1:]},
        quartiles={
            k: [sorted(v)[len(v) // 4], sorted(v)[-1 - len(v) // 4]] for k, v in shares.items()
        },
    )


def main(a):
    begun, cuda = time.perf_counter(), a.device == 'cuda'
    if not cuda: torch.set_num_threads(a.threads)
    graph, device = cuda and not a.plain, torch.device(a.device)
    def new(): return toy(device, graph) if a.recipe == 'toy' else images(a.recipe, device, graph)
    unchanged, looks = alike(a, new, a.check)
    print(
        f'watched for {a.check} iterations, with {looks} looks at the critic: same weights '
        f'{unchanged}; {time.perf_counter() - begun:.0f} s',
        flush=True,
    )
    res = dict(
        recipe=a.recipe,
        device=torch.cuda.get_device_name() if cuda else 'cpu',
        torch=torch.__version__,
        graphs=graph,
        same_weights=unchanged,
        looks_at_the_critic=looks,
    )
    res |= side_by_side(a, new, cuda) if cuda or a.turns else hooks(a, new)
    res['seconds'] = time.perf_counter()-begun
    out = Path(a.out)/'guard_cost.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    was = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(
        json.dumps(
            was | {f"{a.recipe} {res['device']}": res}, indent=1, default=lambda v: round(v, 5)
        )
        + '\n'
    )
    print(
        f"{a.recipe}, batch {res['batch']}, {res['device']}, "
        f"{'CUDA graphs' if graph else 'plain'}, torch {res['torch']}; {res['iterations']} "
        f"iterations; {res['seconds']:.0f} s in all"
    )
    for k, v in res['ms'].items(): print(f"{WORDS[k]:34} {v:8.3f} ms an iteration")
    for k, v in res['share'].items():
        print(
            f"{WORDS[k]:34} {100 * v:8.2f} % of the run's time"
            + (
                f" (middle half of the rounds {100 * res['quartiles'][k][0]:.2f} to "
                f"{100 * res['quartiles'][k][1]:.2f} %)"
                if k in res.get('quartiles', ())
                else ''
            )
        )
    for k, v in sorted(res.get('parts', {}).items()): print(f"{'':6}{k:28} {100*v:8.2f} %")
    print(f"being watched changes no weight: {unchanged}")


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', default='.')
    p.add_argument('--recipe', default='emoji32', help='emoji32, fashion16 or toy')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--plain', action='store_true', help='no CUDA graphs')
    p.add_argument('--turns', action='store_true', help='three runs in turns on a CPU, too')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--check', type=int, default=140, help='iterations of the comparison of weights')
    p.add_argument('--rounds', type=int, default=8)
    p.add_argument(
        '--length', type=int, default=120, help='iterations a turn: whole cycles of the guard'
    )
    p.add_argument('--warm', type=int, default=1, help='rounds that do not count')
    a = p.parse_args()
    main(a)
