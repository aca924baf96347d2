"""SDXL on one GPU: memory against plan, seconds per iteration, recordings against plain passes.

    python tests/gpu_sdxl.py predict                 # on any machine, before the GPU run: writes
    data/runs/sdxl_plan.json
    python tests/gpu_sdxl.py run                     # on the GPU: everything below, in this order,
    within --limit seconds
    python tests/gpu_sdxl.py run --only check,bf16   # some rows
    python tests/gpu_sdxl.py run --tiny              # a dry run on the CPU, a minute or two
    python tests/gpu_sdxl.py merge $OUT/sdxl_gpu.json   # rows of a run into
    data/runs/sdxl_gpu.json; those of the same name are replaced

Full-size U-Nets are built from their config with random weights on the GPU; nothing is downloaded.
A row (or a group of rows) has a
process of its own, so that none can spoil another; rows go to $OUT/sdxl_gpu.json (or
runs/sdxl_gpu.json) as they come, one line each is
printed, and the table comes last."""
import argparse, gc, json, os, subprocess, sys, tempfile, threading, time, traceback
from dataclasses import asdict, replace
from pathlib import Path

born = time.time()
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
import torch

from dmd2_nb.sdxl.adapter import SD15_UNET, TINY_SD15, TINY_SDXL, EpsDenoiser, make_unet
from dmd2_nb.sdxl.conditioning import SDXLCond, micro_ids, zero_uncond
from dmd2_nb.sdxl.graphs import EchoRecorder, Graphs
from dmd2_nb.sdxl.memory import GiB
from dmd2_nb.sdxl.recipe import sdxl_dmd2, sdxl_lora_config
from dmd2_nb.sdxl.roles import FullCopies, Setup, SharedBase, memory_plan

PLAN, LOG = root/'data'/'runs'/'sdxl_plan.json', root/'data'/'runs'/'sdxl_gpu.json'
base = Setup()
rec = replace(base, recorded=True)
# Rows: setup, and how it is run. cap: GiB the allocator may take; flash=False leaves what a T4 has;
# compile: kinds of blocks through inductor;
# seconds: after which no further cycle is begun; group: rows that share a process; after: run only
# if that row failed
ROWS = {
    # the bars: 50 iterations in 14 GiB, in bfloat16 and as on a T4; rank 16 at 768 px in 11 GiB;
    # seconds per iteration
    'bf16': dict(setup=rec, cap=14.0, iters=50, seconds=100),
    'bf16_plain': dict(setup=base, cap=14.0, iters=50, seconds=120, after='bf16'),
    'fp16_t4': dict(
        setup=replace(rec, dtype='float16'), cap=14.0, iters=50, seconds=100, flash=False
    ),
    'fp16_plain': dict(
        setup=replace(base, dtype='float16'),
        cap=14.0,
        iters=50,
        seconds=120,
        flash=False,
        after='fp16_t4',
    ),
    'rank16_768': dict(setup=replace(base, rank=16, px=768), cap=11.0, iters=10, seconds=40),
    'speed': dict(setup=replace(rec, checkpointing=False), iters=20, seconds=50),
    'check': dict(),  # recorded against plain, numbers against numbers
    # the plan on setups that tuned nothing; two iterations to a generator update, and a cycle goes
    # before, so that all states are in place
    'p_rank16': dict(setup=replace(base, rank=16), group='plan'),
    'p_batch2': dict(setup=replace(base, batch=2), group='plan'),
    'p_batch4_768': dict(setup=replace(base, batch=4, px=768, rank=32), group='plan'),
    'p_512_no_gan': dict(setup=replace(base, px=512, gan=False, rank=8), group='plan'),
    'p_no_ckpt': dict(setup=replace(base, checkpointing=False, px=768), group='plan'),
    'p_unguided': dict(setup=replace(base, guidance=False, rank=128), group='plan'),
    'p_ema_gpu': dict(setup=replace(base, ema='gpu', batch=3, px=640), group='plan'),
    'p_sd15': dict(setup=replace(base, unet=SD15_UNET, px=512, batch=8), group='plan'),
    'compiled': dict(setup=rec, iters=20, seconds=170, compile=('BasicTransformerBlock',)),
    # more of these, after the plan learnt of allocator and autocast; only when named
    'n_896': dict(setup=replace(base, rank=32, px=896), group='new', asked=True),
    'n_no_ckpt': dict(
        setup=replace(base, rank=16, px=640, batch=2, checkpointing=False), group='new', asked=True
    ),
    'n_fp16_512': dict(
        setup=replace(base, px=512, batch=4, guidance=False, dtype='float16'),
        group='new',
        asked=True,
    ),
    'n_1280': dict(setup=replace(base, rank=8, px=1280, ema='gpu'), group='new', asked=True),
    'n_sd15': dict(
        setup=replace(
            base, unet=SD15_UNET, px=512, batch=4, rank=32, gan=False, checkpointing=False
        ),
        group='new',
        asked=True,
    ),
    'n_rec_768': dict(setup=replace(rec, px=768, batch=2), plan=True, asked=True),
    'n_rec_640': dict(
        setup=replace(rec, px=640, rank=32, checkpointing=False), plan=True, asked=True
    ),
    # what `adapt` needs at 768 px
    'adapt_768': dict(setup=replace(rec, px=768), cap=14.0, plan=True, asked=True),
    # three full networks, for a card of 140 GB
    'full': dict(setup=replace(base, kind='full'), plan=True, asked=True),
}
for _n, r in ROWS.items():
    if r.get('group') or r.get('plan'):
        r |= dict(
            warm=1 + r['setup'].recorded,
            ttur=2,
            iters=2 * (2 + r['setup'].recorded),
            seconds=60,
            plan=True,
        )
ROWS['full'] |= dict(iters=6, seconds=150)


def tiny(row):
    "The same row on a toy network"
    s = row['setup']
    unet, unit = (TINY_SDXL, 32) if s.unet is not SD15_UNET else (TINY_SD15, 64)
    small = replace(
        s,
        unet=unet,
        px=max(s.px // 8 // unit, 1) * unit,
        tokens=7,
        rank=min(s.rank, 4),
        batch=min(s.batch, 2),
        dtype='float32',
    )
    return row | dict(setup=small, iters=min(row['iters'], 6), cap=None, compile=None)


def say(**out): print('RESULT '+json.dumps(out), flush=True)


def failure(e):
    return dict(
        error=f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:300]}',
        trace=traceback.format_exc()[-1500:],
    )


def conds(s, device):
    b, u = s.batch, s.unet
    g = torch.Generator().manual_seed(1)
    text = torch.randn(b, s.tokens, u['cross_attention_dim'], generator=g).to(device)
    if u.get('addition_embed_type') != 'text_time': return text
    pooled = u['projection_class_embeddings_input_dim']-6*u['addition_time_embed_dim']
    return SDXLCond(
        text, torch.randn(b, pooled, generator=g).to(device), micro_ids(b, s.px, device=device)
    )


@torch.no_grad()
def random_unet(config, device, dtype):
    "Made without data, then filled where it is to live"
    torch.manual_seed(0)
    unet = make_unet(config, device='meta', dtype=dtype).to_empty(device=device)
    for n, p in unet.named_parameters():
        if p.ndim > 1: p.normal_(0, (3*p[0].numel())**-0.5)
        else: p.fill_(float(n.endswith('weight')))
    return unet


def make(row, device):
    s = row['setup']
    n = s.px//8
    dtype = getattr(torch, s.dtype)
    D = EpsDenoiser(
        random_unet(s.unet, device, dtype if s.kind == 'shared' else torch.float32), shape=(4, n, n)
    )
    roles = (
        SharedBase(D, s.rank, checkpointing=s.checkpointing)
        if s.kind == 'shared'
        else FullCopies(D, s.checkpointing, dtype)
    )
    cfg = replace(
        sdxl_lora_config,
        batch=s.batch,
        dtype=s.dtype,
        guidance=8.0 if s.guidance else 1.0,
        gan_g=5e-3 * s.gan,
        gan_d=1e-2 * s.gan,
        ema_halflife=0.0 if s.ema == 'none' else 100.0,
        ttur=row.get('ttur', 5),
    )
    c = conds(s, device)
    uncond = zero_uncond if isinstance(c, SDXLCond) else torch.zeros_like(c[:1])
    dmd = sdxl_dmd2(roles, cfg, c, uncond=uncond, ema_device='cpu' if s.ema == 'cpu' else None)
    if row.get('compile'): roles.base.compile(row['compile'])
    if s.recorded:
        if device == 'cuda': roles.record()
        else:
            Graphs(
                roles.teacher.net,
                roles.generator.net,
                roles.fake.net,
                recorder=EchoRecorder(),
                share_grads=True,
            )
    return roles, dmd, c


class Watch:
    "Seconds and bytes of each phase; waiting for the GPU at both ends only when asked to"
    def __init__(self, cuda):
        self.cuda, self.peaks, self.held, self.seconds, self.sync_all, self.top = (
            cuda,
            {},
            {},
            {},
            False,
            [0, 0],
        )
    def sync(self):
        if self.cuda: torch.cuda.synchronize()
    def start_over(self):
        self.peaks.clear()
        self.held.clear()
        self.seconds.clear()
    def __call__(self, name, f, *a):
        if self.cuda: torch.cuda.reset_peak_memory_stats()
        if self.sync_all: self.sync()
        t = time.perf_counter()
        r = f(*a)
        if self.sync_all:
            self.sync()
            self.seconds.setdefault(name, []).append(time.perf_counter()-t)
        if self.cuda:
            got = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            for d, v in zip((self.peaks, self.held), got): d[name] = max(d.get(name, 0), v)
            self.top = [max(o) for o in zip(self.top, got)]
        return r


def run_row(name, row, device, until):
    "One row, measured phase by phase; what went wrong is part of the result"
    s, cuda = row['setup'], device == 'cuda'
    out = dict(
        row=name,
        card=torch.cuda.get_device_name() if cuda else 'cpu',
        torch=torch.__version__,
        setup={k: v for k, v in asdict(s).items() if k != 'unet'},
        cap=row.get('cap'),
        compile=bool(row.get('compile')),
        flash=row.get('flash', True),
        imports_s=time.time() - born,
    )
    w, start, iters = Watch(cuda), time.perf_counter(), []
    end = min(start+row['seconds'], start+until-time.time()-8)
    roles = dmd = None
    try:
        if cuda:
            torch.backends.cuda.matmul.allow_tf32 = True
            if row.get('cap'):
                torch.cuda.set_per_process_memory_fraction(
                    min(1.0, row['cap'] * GiB / torch.cuda.get_device_properties(0).total_memory)
                )
            if not row.get('flash', True):
                torch.backends.cuda.enable_flash_sdp(False)
                torch.backends.cuda.enable_cudnn_sdp(False)
        roles, dmd, c = make(row, device)
        real = torch.randn(s.batch, *dmd.shape, device=device), c
        runner = getattr(getattr(roles, 'base', None), 'runner', None)
        w.sync()
        out |= dict(built_s=time.perf_counter()-start, finite=True, ttur=dmd.cfg.ttur)
        def iteration():
            if dmd.generators_turn(): x, log = w('generator update', dmd.generator_step, c, real)
            else: x, log = w('rollout', dmd.generate, c, real), {}
            return log | w('critic update', dmd.fake_step, x, c, real if s.gan else None)
        def check(log): # in float16 a first gradient may overflow until the scale has found its place; losses may not
            bad = [k for k, v in log.items() if not bool(v.isfinite())]
            out['not_finite'] = bad
            out['finite'] &= not any('loss' in k or k.startswith(('x_', 'd_')) for k in bad)
        ttur, quick = dmd.cfg.ttur, row.get('plan', False)
        if not quick:  # two cycles: plain, then recorded or compiled
            for i in range(2*ttur):
                check(iteration())
                if time.perf_counter() > end: break
            out['warmup_s'] = time.perf_counter()-start-out['built_s']
            w.start_over()
        w.sync_all = quick
        w.sync()
        t = time.perf_counter()
        for i in range(row['iters']):  # whole cycles, nothing waits
            log = iteration()
            if (i+1) % ttur == 0:
                w.sync()
                iters.append((time.perf_counter()-t)/ttur)
                t = time.perf_counter()
                check(log)
                # not the first update's bytes: optimisers have no averages before it
                if (i+1)//ttur == row.get('warm'): w.start_over()
                elif t > end-ttur*iters[-1]: break
        out |= dict(
            iterations=i + 1,
            s_per_iteration=sum(iters) / max(len(iters), 1),
            s_first_cycle=iters[0] if iters else None,
            s_best_cycle=min(iters, default=None),
        )
        if s.recorded:
            out['recorded'] = (
                0 if runner is None else sum(len(p.replays) for p in runner.passes.values())
            )
        if s.recorded and runner is not None and runner.failed: out['not_recorded'] = runner.failed
        if s.dtype == 'float16':
            out['scales'] = dmd.scaler_g.get_scale(), dmd.scaler_fake.get_scale()
        if not quick:
            say(**out | sums(w, start))
            w.sync_all = True
            for i in range(ttur): iteration()
        if out.get('recorded'):
            out |= pool(cuda) | dict(passes=replay_seconds(roles, runner, w.sync))
    except Exception as e: out |= failure(e)
    say(**out | sums(w, start))


def sums(w, start):
    return dict(
        phases=dict(w.peaks),
        reserved=dict(w.held),
        seconds={k: sorted(v)[len(v) // 2] for k, v in w.seconds.items()},
        peak_allocated=w.top[0],
        peak_reserved=w.top[1],
        total_s=time.perf_counter() - start,
    )


def pool(cuda):
    "What the recordings' own pool holds"
    if not cuda: return {}
    mine = [
        g for g in torch.cuda.memory_snapshot() if tuple(g.get('segment_pool_id', (0, 0))) != (0, 0)
    ]
    return dict(
        pool_reserved=sum(g['total_size'] for g in mine),
        pool_allocated=sum(g['allocated_size'] for g in mine),
    )


def replay_seconds(roles, runner, sync, n=3):
    "Seconds of each recorded pass, nothing else running"
    names = {
        id(roles.teacher.net): 'teacher',
        id(roles.generator.net): 'generator',
        id(roles.fake.net): 'fake',
    }
    res = {}
    for p in runner.passes.values():
        for want, f in p.replays.items():
            f()
            sync()
            t = time.perf_counter()
            for _ in range(n): f()
            sync()
            res[
                f"{names[id(p.net)]} {p.kind} "
                f"{len(p.x)}{' to x' * (want[:1] == (True,))}{' to weights' * (want[1:] == (True,))}"
            ] = (time.perf_counter() - t) / n
    return res


def check(device):
    "Recorded against plain: the same run on a small network in float32"
    out = dict(
        row='check',
        card=torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        torch=torch.__version__,
    )
    start = time.perf_counter()
    s = Setup(unet=TINY_SDXL, px=128, tokens=7, rank=4, batch=2, dtype='float32', ema='none')
    try:
        torch.backends.cudnn.deterministic = True
        logs, weights = {}, {}
        for recorded in (False, True):
            torch.manual_seed(0)
            roles, dmd, c = make(dict(setup=replace(s, recorded=recorded)), device)
            real = (
                torch.randn(2, *dmd.shape, generator=torch.Generator().manual_seed(3)).to(device),
                c,
            )
            logs[recorded] = []
            for _ in range(12 if device == 'cuda' else 6):
                x, log = (
                    dmd.generator_step(c, real)
                    if dmd.generators_turn()
                    else (dmd.generate(c, real), {})
                )
                logs[recorded].append(
                    {k: v.item() for k, v in (log | dmd.fake_step(x, c, real)).items()}
                )
            weights[recorded] = [
                p.detach().clone() for r in (roles.generator, roles.fake) for p in r.parameters()
            ]
            r = roles.base.runner
            if r is not None:
                out |= dict(
                    recorded=sum(len(p.replays) for p in r.passes.values()), not_recorded=r.failed
                )
        out['loss_gap'] = max(
            abs(a[k] - b[k]) / (abs(a[k]) + 1e-6)
            for a, b in zip(*logs.values())
            for k in a
            if k.endswith('loss')
        )
        out['weight_gap'] = max(
            ((a - b).norm() / a.norm().clamp(min=1e-9)).item() for a, b in zip(*weights.values())
        )
        out['ok'] = out['loss_gap'] < 1e-2 and out['weight_gap'] < 1e-2 and not out['not_recorded']
    except Exception as e: out |= failure(e)
    say(**out | dict(total_s=time.perf_counter()-start))


def predict(names):
    """Plans of the rows, written before anything is measured; for a row measured already, under
    `again`, beside what was predicted then"""
    known = {r['row'] for r in json.loads(LOG.read_text())['rows']} if LOG.is_file() else set()
    for n in names:
        t = time.perf_counter()
        p = memory_plan(ROWS[n]['setup'])
        old = json.loads(PLAN.read_text()) if PLAN.is_file() else {}
        new = dict(
            peak=p.peak,
            phases=p.phases,
            rest=p.rest,
            workspace=p.workspace,
            predicted=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        )
        if n in known: old.setdefault(n, {})['again'] = new
        else: old[n] = new
        print(f'{n:<14}{p.peak/GiB:8.2f} GiB  ({time.perf_counter()-t:.0f} s)', flush=True)
        PLAN.parent.mkdir(parents=True, exist_ok=True)
        PLAN.write_text(json.dumps(old, indent=1)+'\n')


def merge(files):
    "Rows of runs into the stored log, with the plans of all"
    log = json.loads(LOG.read_text())
    rows = {r['row']: r for r in log['rows']}
    for f in files: rows |= {r['row']: r for r in json.loads(Path(f).read_text())['rows']}
    LOG.write_text(
        json.dumps(dict(rows=list(rows.values()), plan=json.loads(PLAN.read_text())), indent=1)
        + '\n'
    )
    print(f'{LOG}: {len(rows)} rows')


def one(names, device, small, until):
    "The rows of one process"
    for n in names:
        if time.time() > until-10:
            print(f'{n}: no time left', file=sys.stderr)
            break
        if n == 'check': check(device)
        else: run_row(n, tiny(ROWS[n]) if small else ROWS[n], device, until)
        gc.collect()
        if device == 'cuda': torch.cuda.empty_cache()


def line(r):
    gib = lambda v: f'{v/GiB:.2f}' if v else '-'
    if r['row'] == 'check':
        return ' '.join(f'{k}={r[k]}' for k in r if k not in ('row', 'card', 'torch', 'trace'))
    return (
        f"{r.get('iterations', 0)} iterations, {r.get('s_per_iteration') or float('nan'):.3f} s "
        f"each (best cycle {r.get('s_best_cycle') or float('nan'):.3f}), "
        f"allocated {gib(r.get('peak_allocated'))}, reserved {gib(r.get('peak_reserved'))} GiB, "
        f"recorded {r.get('recorded', '-')}, finite {r.get('finite')}, "
        f"imports {r.get('imports_s', 0):.0f} s, built {r.get('built_s', 0):.0f} s, warm-up "
        f"{r.get('warmup_s', 0):.0f} s, row {r.get('total_s', 0):.0f} s"
        + ''.join(
            f"; {k}: {r[k]}" for k in ('not_recorded', 'not_finite', 'scales', 'error') if r.get(k)
        )
    )


def table(rows, plan):
    gib = lambda v: f'{v/GiB:.2f}' if v else '-'
    print(
        f'{"row":<14}{"phase":<18}{"predicted":>10}{"allocated":>10}{"ratio":>7}{"reserved":>10}{"seconds":>9}'
    )
    for r in rows:
        p = plan.get(r['row'], {}).get('phases', {})
        for k in sorted({**r.get('seconds', {}), **r.get('phases', {})}):
            m, q = r['phases'].get(k), p.get(k)
            # what recorded passes take between start and end
            if m and r.get('pool_reserved'): m += r['pool_reserved']-r['pool_allocated']
            print(
                f'{r["row"]:<14}{k:<18}{gib(q):>10}{gib(m):>10}{(f"{q / m:.3f}" if q and m else "-"):>7}'
                f'{gib(r["reserved"].get(k)):>10}{r["seconds"].get(k, float("nan")):9.3f}'
            )
        if r.get('passes'):
            print(
                f'{r["row"]:<14}passes, ms: '
                + ', '.join(f'{k} {1000 * v:.0f}' for k, v in r['passes'].items())
            )
    print('card:', rows[-1].get('card') if rows else '-')


def child(names, small, until, rows, note):
    "Run rows in a process of their own; each result is kept as it comes"
    err = tempfile.TemporaryFile('w+')
    cmd = [
        sys.executable,
        '-u',
        __file__,
        'one',
        '--only',
        ','.join(names),
        '--until',
        str(until),
    ] + ['--tiny'] * small
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=err, text=True)
    timer = threading.Timer(max(until+5-time.time(), 1), p.kill)
    timer.start()
    try:
        for l in p.stdout:
            if not l.startswith('RESULT '): continue
            r = json.loads(l[7:])
            rows[r['row']] = r
            note(r)
    finally:
        p.wait()
        timer.cancel()
    for n in names:
        if n not in rows:
            err.seek(0)
            rows[n] = dict(
                row=n,
                error=f'exit code {p.returncode}: {(err.read().strip().splitlines() or ["out of time"])[-1][:300]}',
                phases={},
                reserved={},
                seconds={},
            )
            note(rows[n])


def run(names, small, limit, device):
    folder = Path(os.environ.get('OUT') or root/'runs')
    folder.mkdir(parents=True, exist_ok=True)
    plan, rows, start = (
        (json.loads(PLAN.read_text()) if PLAN.is_file() and not small else {}),
        {},
        time.time(),
    )
    for n in names:
        if n in plan:
            print(
                f"{n}: predicted {plan[n]['peak'] / GiB:.2f} GiB at {plan[n]['predicted']}",
                flush=True,
            )
    def note(r):
        (folder / 'sdxl_gpu.json').write_text(
            json.dumps(dict(rows=list(rows.values()), plan=plan), indent=1) + '\n'
        )
        print(f"[{time.time()-start:4.0f} s] {r['row']}: {line(r)}", flush=True)
    left = list(names)
    while left:
        n = left.pop(0)
        row = ROWS[n]
        if row.get('after') in names:
            was = rows.get(row['after'], {})
            if not was.get('error'): continue
        group = [n]+[o for o in left if row.get('group') and ROWS[o].get('group') == row['group']]
        left = [o for o in left if o not in group]
        if limit-(time.time()-start) < 25:
            print(f'{", ".join(group)}: not started, out of time', flush=True)
            continue
        until = (
            start + limit
            if len(group) > 1 or small
            else min(start + limit, time.time() + row.get('seconds', 60) + 60)
        )
        try: child(group, small, until, rows, note)
        except Exception as e: print(f'{n}: {type(e).__name__}: {e}', flush=True)
    table(list(rows.values()), plan)
    print(f'all: {time.time()-start:.0f} s')
    return any('error' in r for r in rows.values())


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('what', choices=('predict', 'run', 'merge', 'one'))
    a.add_argument('files', nargs='*', help='of merge')
    a.add_argument(
        '--only',
        default='',
        help='rows, separated by commas; all that one card of 80 GB can take when absent',
    )
    a.add_argument('--tiny', action='store_true', help='toy networks on the CPU')
    a.add_argument('--limit', type=float, default=450, help='seconds after which nothing goes on')
    a.add_argument('--until', type=float, default=float('inf'), help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.what == 'merge': return merge(a.files)
    names = [n for n in a.only.split(',') if n] or [
        n for n, r in ROWS.items() if not r.get('asked')
    ]
    if bad := [n for n in names if n not in ROWS]:
        sys.exit(f'unknown rows: {", ".join(bad)}; known are {", ".join(ROWS)}')
    if a.what == 'predict':
        return predict([n for n in names if ROWS[n] and not ROWS[n].get('compile')])
    device = 'cuda' if torch.cuda.is_available() and not a.tiny else 'cpu'
    if device == 'cpu' and not a.tiny: sys.exit('no GPU here: use --tiny for a dry run')
    if a.what == 'one':
        return one(names, device, a.tiny, a.until if a.until < 1e12 else time.time()+3600)
    if run(names, a.tiny, a.limit, device): sys.exit(1)


if __name__ == '__main__': main()
