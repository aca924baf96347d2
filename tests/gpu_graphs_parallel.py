"""CUDA graphs and several processes together, on this machine's GPUs:

    python tests/gpu_graphs_parallel.py                  # everything, within --limit seconds; rows
    in $OUT/graphs_parallel.json
    python tests/gpu_graphs_parallel.py --nets small     # the small network alone
    python tests/gpu_graphs_parallel.py --tiny           # a dry run on the CPU with gloo and the recorder of the tests

Random weights; nothing is downloaded. First one process that is a group of its own (gradients go
through NCCL, and meet nobody), then two where there
are two GPUs. `agree`: the same float32 run plain, as graphs, as a process of a group, and both,
compared by losses and weights. `pace`: milliseconds an
iteration in bfloat16, the median over whole cycles of 1 generator turn and 4 more of the critic;
with two processes also the efficiency, which is the time
of one GPU alone over that of both, at the same batch a GPU."""
import argparse, gc, json, math, os, signal, socket, subprocess, sys, tempfile, threading, time, traceback
from dataclasses import dataclass
from pathlib import Path
from statistics import median

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'tests')]
import torch
import torch.distributed as dist

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.fused import fused
from dmd2_nb.graphs import GraphRunner
from dmd2_nb.parallel import World, each_rank
from dmd2_nb.parallel_run import ParallelDMD2
from dmd2_nb.train import train
from dmd2_nb.unet import ADMUNet

GiB = 2**30


@dataclass(frozen=True)
class Group(World):
    "Processes that exchange gradients even where there is only one"
    @property
    def many(self): return True


NETS = dict(
    small=dict(
        net=dict(
            img_resolution=32,
            in_channels=1,
            out_channels=1,
            label_dim=10,
            model_channels=32,
            channel_mult=(1, 2, 4),
            num_blocks=2,
            attn_resolutions=(8,),
            dropout=0.0,
        ),
        batch=128,
    ),
    imagenet64=dict(net=dict(img_resolution=64, label_dim=1000, dropout=0.0), batch=40),
    tiny=dict(
        net=dict(
            img_resolution=8,
            in_channels=1,
            out_channels=1,
            label_dim=4,
            model_channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            dropout=0.0,
        ),
        batch=4,
    ),
)


def network(name, device):
    "EDM's network with random weights, nothing left at zero"
    torch.manual_seed(0)
    with torch.device(device): net = ADMUNet(**NETS[name]['net'])
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1 and p.std() < 1e-4: p.normal_(0, 0.02)
    net = net.to(memory_format=torch.channels_last)
    return EDMPrecond(net).eval().requires_grad_(False)


def streams(dmd, world, classes):
    "Labels and real images of this process: its rows of the whole batch, drawn from the iteration"
    batch, rows, device = dmd.cfg.batch, world.rows(dmd.cfg.batch//world.size), dmd.device
    def labels(i, key):
        return torch.randint(
            classes, (batch,), generator=rng(7, i, key, device=device), device=device
        )[rows]
    def images(i):
        return torch.randn(
            batch, *dmd.shape, generator=rng(7, i, 3, device=device), device=device
        ).clamp(-1, 1)[rows]
    def conds():
        i = dmd.step
        while True:
            yield labels(i, 1)
            i += 1
    def reals():
        i = dmd.step
        while True:
            yield images(i), labels(i, 2)
            i += 1
    return conds(), reals()


def make(a, name, world, graph, dtype, batch):
    "A run; `world` None is the plain class"
    device = a.device
    cfg = DMD2Config(batch=batch, dtype=dtype, warmup_fake=0, lr_g=1e-5, lr_fake=1e-5, lr_head=1e-5)
    if a.tiny: from _echo import EchoRunner as runner
    else: runner = GraphRunner
    parts = dict(runner=runner()) if graph else {}
    if world is None: dmd = DMD2.from_teacher(network(name, device), cfg, **parts)
    else:
        dmd = ParallelDMD2.from_teacher(
            network(name, device), cfg, world=world, check_every=0, **parts
        )
    if dtype == 'bfloat16': dmd.teacher.to(torch.bfloat16)
    return dmd


def sync(a):
    if a.device.type == 'cuda': torch.cuda.synchronize()
def fresh(a):
    gc.collect()
    if a.device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
def precise(on):
    "Full float32, or TF32 where PyTorch may"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not on
    torch.backends.cudnn.deterministic = on


def losses(a, dmd, world, classes, steps):
    "Logs as numbers, and all weights of generator, fake score, head and average on the CPU"
    conds, reals = streams(dmd, world or World(device=a.device), classes)
    logs = [{k: float(v) for k, v in o.items()} for o in train(dmd, conds, steps, reals)]
    nets = [m for m in (dmd.G, dmd.fake, dmd.head, dmd.ema.net) if m is not None]
    return logs, torch.cat(
        [p.detach().float().cpu().flatten() for m in nets for p in m.parameters()]
    )


def agree(a, w, rows):
    "The same float32 run in all ways, 40 iterations; plain twice says what this GPU's own order of additions does"
    name = 'tiny' if a.tiny else 'small'
    classes, batch, steps = (
        NETS[name]['net']['label_dim'],
        NETS[name]['batch'],
        12 if a.tiny else 40,
    )
    fused(False)
    precise(True)
    start = make(a, name, None, False, 'float32', batch)
    first = torch.cat(
        [
            p.detach().float().cpu().flatten()
            for m in (start.G, start.fake, start.head, start.ema.net)
            for p in m.parameters()
        ]
    )
    del start
    ways = {
        'plain': (None, False),
        'plain again': (None, False),
        'graph': (None, True),
        'group': (w, False),
        'group and graph': (w, True),
    }
    ref = None
    for way, (world, graph) in ways.items():
        fresh(a)
        dmd = make(a, name, world, graph, 'float32', batch)
        logs, weights = losses(a, dmd, world, classes, steps)
        ref = ref or (logs, weights)
        gap = {
            k: max(abs(x[k] - y[k]) for x, y in zip(ref[0], logs) if k in x)
            / max(abs(x[k]) for x in ref[0] if k in x)
            for k in ('dmd_loss', 'fake_loss', 'gan_g_loss', 'gan_d_loss')
        }
        moved = float((ref[1]-first).norm())
        # rounding grows with the iterations: an optimiser that divides by a gradient's size makes
        # much of little
        rows(
            what='agree',
            name=way,
            ranks=w.size,
            batch=batch,
            iterations=steps,
            loss_gap=max(gap.values()),
            weights_gap=float((weights - ref[1]).norm()) / moved,
            finite=all(map(math.isfinite, (v for o in logs for v in o.values()))),
            recordings=len(getattr(dmd.runner, 'turns', {})),
            ok=max(gap.values()) < 1e-2,
        )
        del dmd
    precise(False)


def cycles(a, dmd, world, classes, iters, seconds):
    "Milliseconds an iteration, one number a cycle; nothing is waited for inside"
    conds, reals = streams(dmd, world or World(device=a.device), classes)
    ttur, out, logs = dmd.cfg.ttur, [], []
    cuda = a.device.type == 'cuda'
    # each kind of turn: three calls as written, then the recording
    warm = (2 if a.tiny else 5)*ttur
    t = time.perf_counter()
    list(train(dmd, conds, warm, reals))
    sync(a)
    warm_s = time.perf_counter()-t
    if cuda: torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for i in range(max(1, iters//ttur)):
        t = time.perf_counter()
        logs = list(train(dmd, conds, ttur, reals))
        sync(a)
        out.append((time.perf_counter()-t)/ttur*1e3)
        late = time.perf_counter()-begun > seconds
        if late if world is None else any(each_rank(late)) if i % 10 == 9 else False: break
    return out, warm_s, all(math.isfinite(float(v)) for o in logs for v in o.values())


def pace_of(a, w, rows, name, way, world, graph, kernels):
    "One row: a run in one way"
    fresh(a)
    each, classes = NETS[name]['batch'], NETS[name]['net']['label_dim']
    fused(kernels)
    dmd = make(
        a,
        name,
        world,
        graph,
        'float32' if a.tiny else 'bfloat16',
        each * (world.size if world else 1),
    )
    ms, warm_s, finite = cycles(a, dmd, world, classes, 10 if a.tiny else a.iters, a.seconds)
    peak = torch.cuda.max_memory_reserved()/GiB if a.device.type == 'cuda' else 0.
    row = dict(
        what='pace',
        net=name,
        name=way,
        ranks=world.size if world else 1,
        batch_each=each,
        fused=kernels,
        iterations=len(ms) * dmd.cfg.ttur,
        ms=median(ms),
        best_ms=min(ms),
        worst_ms=max(ms),
        images_s=each * (world.size if world else 1) / median(ms) * 1e3,
        warm_s=warm_s,
        reserved_gib=peak,
        finite=finite,
    )
    del dmd
    fresh(a)
    return rows(**row)


def pace(a, w, rows, name):
    "One GPU in all ways; with several, one alone while the others wait, then all together"
    kernels = a.device.type == 'cuda'
    for graph in (False, True):
        way = 'graph' if graph else 'plain'
        one = None
        if w.main: one = pace_of(a, w, rows, name, way, None, graph, kernels)
        each_rank(0)  # the others wait here
        all_ = pace_of(a, w, rows, name, f'group, {way}', w, graph, kernels)
        both = each_rank(all_['ms'])
        if one:
            rows(
                what='efficiency',
                net=name,
                name=way,
                ranks=w.size,
                batch_each=one['batch_each'],
                one_ms=one['ms'],
                all_ms=max(both),
                efficiency=one['ms'] / max(both),
            )


def worker(a):
    "One process of a group"
    local, n = int(os.environ['LOCAL_RANK']), int(os.environ['WORLD_SIZE'])
    a.device = torch.device('cpu') if a.tiny else torch.device('cuda', local)
    if not a.tiny: torch.cuda.set_device(a.device)
    else: torch.set_num_threads(1)
    dist.init_process_group('gloo' if a.tiny else 'cpu:gloo,cuda:nccl')
    w = Group(dist.get_rank(), n, a.device)
    def rows(**row):
        row = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()}
        if w.main: print('ROW '+json.dumps(row), flush=True)
        return row
    jobs = [('agree', lambda: agree(a, w, rows))] + [
        (f'pace {o}', lambda o=o: pace(a, w, rows, o)) for o in a.nets.split(',')
    ]
    rows(
        what='card',
        name=torch.cuda.get_device_name() if not a.tiny else 'cpu',
        ranks=n,
        torch=torch.__version__,
    )
    for what, f in jobs:
        t = time.perf_counter()
        try: f()
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            print(
                'ROW '
                + json.dumps(
                    dict(
                        what='failed',
                        name=what,
                        ranks=n,
                        rank=w.rank,
                        error=(
                            f'{type(e).__name__}: {" ".join(str(e).split())[:300]} '
                            f'({Path(at.filename).name}:{at.lineno})'
                        ),
                        trace=traceback.format_exc()[-1500:],
                    )
                ),
                flush=True,
            )
            if n > 1: os._exit(1)  # the others may wait in a collective: torchrun stops them
        else: rows(what='end', name=what, ranks=n, seconds=time.perf_counter()-t)
    dist.barrier()
    dist.destroy_process_group()


def drive(a, n, until, note):
    "One torchrun, its rows as they come; stopped when its time is up"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(
        os.environ,
        NCCL_NVLS_ENABLE='0',
        TORCH_SYMM_MEM_DISABLE_MULTICAST='1',
        NVSHMEM_DISABLE_NVLS='1',
        OMP_NUM_THREADS='1' if a.tiny else '4',
    )
    if a.no_async_errors: env['TORCH_NCCL_ASYNC_ERROR_HANDLING'] = '0'
    if Path('/sys/class/net/lo').exists(): env.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    cmd = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nnodes=1',
        f'--nproc_per_node={n}',
        '--master_addr=127.0.0.1',
        f'--master_port={port}',
        __file__,
        '--worker',
        '--nets',
        a.nets,
        '--iters',
        str(a.iters),
        '--seconds',
        str(a.seconds),
    ] + ['--tiny'] * a.tiny
    err = tempfile.TemporaryFile('w+')
    p = subprocess.Popen(
        cmd, stdout=subprocess.PIPE, stderr=err, text=True, env=env, start_new_session=True
    )
    timer = threading.Timer(max(1, until-time.time()), lambda: os.killpg(p.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        for l in p.stdout:
            if l.startswith('ROW '): note(json.loads(l[4:]))
    finally:
        p.wait()
        timer.cancel()
    if p.returncode:
        err.seek(0)
        note(
            dict(
                what='failed',
                name='torchrun',
                ranks=n,
                error=f'exit code {p.returncode}',
                trace=err.read()[-2000:],
            )
        )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        '--nets',
        default='small,imagenet64',
        help='networks to time, separated by commas: ' + ', '.join(NETS),
    )
    p.add_argument(
        '--ranks',
        default='1,2',
        help='processes of each group, separated by commas; more than there are GPUs are left out',
    )
    p.add_argument('--iters', type=int, default=200, help='iterations to time after the warm-up')
    p.add_argument('--seconds', type=float, default=30., help='at most this long for one way')
    p.add_argument('--limit', type=float, default=570., help='seconds for everything')
    p.add_argument('--tiny', action='store_true', help='a toy network on the CPU')
    p.add_argument(
        '--no-async-errors',
        action='store_true',
        help="NCCL's watchdog off while graphs are recorded (TORCH_NCCL_ASYNC_ERROR_HANDLING=0)",
    )
    p.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.tiny: a.nets = 'tiny'
    if bad := [o for o in a.nets.split(',') if o not in NETS]:
        p.error(f'unknown networks: {", ".join(bad)}')
    if a.worker: return worker(a)
    if not a.tiny and not torch.cuda.is_available():
        p.error('there is no GPU here: use --tiny for a dry run')
    folder, rows, start = Path(os.environ.get('OUT') or root/'runs'), [], time.time()
    folder.mkdir(parents=True, exist_ok=True)
    def note(r):
        rows.append(r)
        (folder / 'graphs_parallel.json').write_text(
            json.dumps(
                dict(tiny=a.tiny, began=time.strftime('%Y-%m-%d', time.gmtime(start)), rows=rows),
                indent=1,
            )
            + '\n'
        )
        print(
            f'[{time.time() - start:4.0f} s] '
            + ' '.join(f'{k}={v}' for k, v in r.items() if k != 'trace'),
            flush=True,
        )
        if 'trace' in r: print(r['trace'], flush=True)
    for n in map(int, a.ranks.split(',')):
        if a.tiny or n <= torch.cuda.device_count(): drive(a, n, start+a.limit, note)
    bad = [
        r for r in rows if r['what'] == 'failed' or r.get('ok') is False or r.get('finite') is False
    ]
    print(
        f'{time.time() - start:.0f} s; rows in {folder / "graphs_parallel.json"}; '
        + (f'{len(bad)} bad' if bad else 'all well')
    )
    sys.exit(bool(bad))


if __name__ == '__main__': main()
