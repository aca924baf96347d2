"""Killed runs on a GPU, with deterministic algorithms: python tests/gpu_resume.py --out DIR writes
DIR/resume_gpu.json, about a minute

Each run is the bundled fashion16 recipe, shortened and with the GAN on early, in a process of its
own; several share the card. It is
killed at a random iteration after its first checkpoint, and the same command goes on; its tensors
and its log are compared with those of
an unbroken run, bit by bit. Plain passes and CUDA graphs; `--device cpu --iters 40 --kills 2` for
a look without a GPU."""
import argparse, hashlib, json, os, random, select, signal, sys, tempfile, time, traceback, warnings
from dataclasses import replace
from pathlib import Path

born = time.time()
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # the parent never asks for the card: only its children do, so that they can be forked
from dmd2_nb import jobs
from dmd2_nb.system.checkpoint import load_folder, steps
from dmd2_nb.recipes import recipe


def job(folder, a, graph):
    """One run, or the rest of it; what PyTorch says of operations that are not deterministic, and
    the card's name, go to facts.json"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    r = recipe('fashion16')
    r = replace(
        r,
        every=dict(log=a.iters // 16 or 1, show=0, save=a.save, eval=0),
        config=replace(r.config, warmup_fake=10, gan_start=10),
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        jobs.distill_job(
            r,
            out=folder,
            name='run',
            device=a.device,
            iters=a.iters,
            n_eval=32,
            graph=graph,
            keep_state=True,
            say=None,
        )
    name = torch.cuda.get_device_name() if a.device == 'cuda' else 'cpu'
    (folder / 'facts.json').write_text(
        json.dumps(
            dict(
                device=name,
                not_deterministic=sorted(
                    {
                        str(w.message).split('.')[0][:100]
                        for w in told
                        if 'determinis' in str(w.message)
                    }
                ),
            )
        )
    )


class Child:
    "A forked process; `kill`: the iteration of its own after which it is killed"
    def __init__(self, folder, a, graph, kill=None):
        self.folder, self.kill, self.seen, self.due, self.code, self.begun = (
            folder,
            kill,
            0,
            None,
            None,
            time.time(),
        )
        folder.mkdir(exist_ok=True)
        self.get, put = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(put)
            return
        try:
            for n in (1, 2):
                os.dup2(os.open(folder/'said', os.O_CREAT | os.O_WRONLY | os.O_APPEND), n)
            follow = jobs.follow
            def ticks(logs):
                for o in logs:
                    os.write(put, b'.')
                    yield o
            jobs.follow = lambda logs, *args, **kwargs: follow(ticks(logs), *args, **kwargs)
            job(folder, a, graph)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    def look(self, dice):
        "Count iterations, kill when it is time, and see whether it has ended"
        if self.get is not None and select.select([self.get], [], [], 0)[0]:
            got = os.read(self.get, 4096)
            self.seen += len(got)
            if not got:
                os.close(self.get)
                self.get = None
        if self.kill and self.due is None and self.seen >= self.kill:
            self.due = time.time()+dice.uniform(0, 0.03)
        if self.due and time.time() >= self.due:
            os.kill(self.pid, signal.SIGKILL)
            self.due = 1e12
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid: self.code, self.took = os.waitstatus_to_exitcode(status), time.time()-self.begun
        return self.code is not None


def together(todo, n, dice, until):
    "At most `n` of the processes at once; those that are not begun by `until` are left out"
    todo, now, done = list(todo), [], []
    while todo or now:
        while todo and len(now) < n and time.time() < until: now.append(todo.pop(0)())
        if time.time() >= until: todo = []
        if time.time() >= until+60:
            # one that hangs shall not take the others' results with it
            for c in now: os.kill(c.pid, signal.SIGKILL)
        for c in [c for c in now if c.look(dice)]:
            now.remove(c)
            done.append(c)
        time.sleep(0.002)
    return {c.folder.name: c for c in done}


def digest(folder):
    "All tensors and counters of the last checkpoint, and the log without its seconds"
    tensors, state = load_folder(steps(folder/'run'/'state')[0])
    state['extra'].pop('seconds')
    h = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for n in sorted(tensors):
        if n == 'random': continue  # of the process, not of the run
        for k, v in sorted(tensors[n].items()):
            h.update(f'{n} {k}'.encode())
            h.update(v.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for line in (folder/'run'/'log.csv').read_text().splitlines():
        cells = line.split(',')
        h.update(','.join(cells[:1]+cells[2:]).encode())
    return h.hexdigest()


def said(folder):
    return ' '.join((folder/'said').read_text().split())[-600:] if (folder/'said').exists() else ''


def main(a):
    dice, modes, until = (
        random.Random(a.seed),
        ('plain', 'graphs')[: 1 + (a.device == 'cuda')],
        born + a.seconds,
    )
    a.save = max(2, a.iters//7)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        def start(mode, name, kill=None):
            return lambda: Child(d/f'{mode}-{name}', a, mode == 'graphs', kill)
        first = [start(m, n) for m in modes for n in ('one', 'two')] + [
            start(m, f'k{i}', dice.randint(a.save + 1, a.iters - a.save // 2))
            for i in range(a.kills)
            for m in modes
        ]
        begun = together(first, a.jobs, dice, until)
        killed = {n: c for n, c in begun.items() if '-k' in n}
        at = {
            n: next((s.name for s in steps(c.folder / 'run' / 'state')), None)
            for n, c in killed.items()
        }
        ended = together(
            [start(*n.split('-')) for n, c in killed.items() if c.code == -9], a.jobs, dice, until
        )
        res = dict(
            torch=torch.__version__,
            iterations=a.iters,
            save_every=a.save,
            jobs=a.jobs,
            runs={},
            errors={n: said(c.folder) for n, c in (begun | ended).items() if c.code not in (0, -9)},
        )
        for m in modes:
            one, two = (begun.get(f'{m}-{n}') for n in ('one', 'two'))
            want, again = (digest(c.folder) if c and c.code == 0 else None for c in (one, two))
            rows = [
                dict(
                    iteration=c.kill,
                    at=at[n],
                    code=c.code,
                    went_on=ended[n].code if n in ended else None,
                    same=n in ended and ended[n].code == 0 and digest(c.folder) == want,
                )
                for n, c in sorted(killed.items())
                if n.startswith(m)
            ]
            facts = json.loads((one.folder/'facts.json').read_text()) if want else {}
            res['device'] = facts.get('device', a.device)
            res['runs'][m] = dict(
                sha256=want,
                unbroken_agree=want is not None and want == again,
                seconds=one and round(one.took, 1),
                not_deterministic=facts.get('not_deterministic'),
                killed=rows,
            )
    res['seconds'] = round(time.time()-born, 1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    (Path(a.out)/'resume_gpu.json').write_text(json.dumps(res, indent=1)+'\n')
    for n, text in res['errors'].items(): print(f'{n} failed: {text}')
    print(
        f"{res['device']}, torch {res['torch']}, {a.iters} iterations, a checkpoint every "
        f"{a.save}; {res['seconds']:.0f} s in all"
    )
    for m, o in res['runs'].items():
        print(
            f"{m:7} two unbroken runs agree: {o['unbroken_agree']}; sha256 "
            f"{str(o['sha256'])[:16]}; {o['seconds']} s a run; operations said not to be "
            f"deterministic: {len(o['not_deterministic'] or ())}"
        )
        for k in o['killed']:
            print(
                f"{'':7} killed at iteration {k['iteration']:4}, went on from {k['at']}: "
                f"{'same bits' if k['same'] else 'OTHER BITS' if k['went_on'] == 0 else 'did not end'}"
            )
    good = all(
        o['unbroken_agree'] and o['killed'] and all(k['same'] for k in o['killed'])
        for o in res['runs'].values()
    )
    print(
        'all killed runs ended in the bits of the unbroken one'
        if good
        else 'NOT all ended in the same bits'
    )
    return not good


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', default='.')
    p.add_argument('--device', default='cuda')
    p.add_argument('--kills', type=int, default=5, help='of each kind')
    p.add_argument('--iters', type=int, default=240)
    p.add_argument('--jobs', type=int, default=7, help='processes at once')
    p.add_argument(
        '--seconds',
        type=float,
        default=150,
        help='no process is begun later, and none goes on for more than a minute after',
    )
    p.add_argument('--seed', type=int, default=0)
    sys.exit(main(p.parse_args()))
