"""Measure the ImageNet-64 network on this GPU: python tests/gpu_edm.py --out DIR writes
DIR/edm_h100.json, the stored log with this run added

Random weights of the published geometry. Parts, each printed and written as soon as it is known:
the bf16 matrix rate, Triton's kernels
against plain operations, the whole network's error, one-step sampling, the training step, the
emoji recipe's step alone and with several runs on one card. --tiny runs the same on a CPU, without
graphs."""
import argparse, gc, json, sys, time, traceback
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dmd2_nb import fused as kernels, graphs
from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.fused import fused, norm_silu_plain
from dmd2_nb.gan import GanHead
from dmd2_nb.recipes import recipe
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.train import train
from dmd2_nb.unet import ADMUNet
from dmd2_nb.weights import build_denoiser

GIB = 2**30
CUDA = torch.cuda.is_available()
DEV = 'cuda' if CUDA else 'cpu'
BARS = dict(error=1.5, sample_ms=180, train_ms=220, train_gib=20)

def sync():
    if CUDA: torch.cuda.synchronize()
def clean():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
def exact():
    "Full float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
def quick():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
def clock(f, n, warm=5):
    "ms a call"
    for _ in range(warm): f()
    sync()
    t = time.perf_counter()
    for _ in range(n): f()
    sync()
    return (time.perf_counter()-t)/n*1e3
def rel(a, b):
    "Relative error of lists of tensors"
    num = sum((x.double()-y.double()).square().sum().item() for x,y in zip(a, b))
    return (num/sum(y.double().square().sum().item() for y in b))**.5

class Report:
    "Rows of one run; the file is whole after each"
    def __init__(self, args):
        self.path, self.rows, self.start, self.limit = (
            Path(args.out) / 'edm_h100.json',
            [],
            time.perf_counter(),
            args.seconds,
        )
        self.rate = self.iteration = self.image = 0.
        old = ROOT/'data/runs/edm_h100.json'
        self.log = json.loads(old.read_text()) if old.exists() else dict(note='', runs=[])
        self.log['runs'] = [*self.log['runs'], dict(run=args.run, rows=self.rows)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
    @property
    def gone(self): return time.perf_counter()-self.start
    def add(self, **row):
        row = {
            k: round(v, 3)
            if isinstance(v, float) and abs(v) >= 0.1
            else float(f'{v:.3g}')
            if isinstance(v, float)
            else v
            for k, v in row.items()
        }
        self.rows.append(row)
        print(f'[{self.gone:5.1f} s] {json.dumps(row)}', flush=True)
        self.path.write_text(json.dumps(self.log, indent=1))
    def part(self, f, *args, needs=0.):
        "One part; its error costs one line"
        if needs and self.gone+needs>self.limit:
            return print(
                f"[{self.gone:5.1f} s] {' '.join((f.__name__, *args[1:]))} left out: no time",
                flush=True,
            )
        try: f(self, *args)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            self.add(
                what='failed',
                name=' '.join((f.__name__, *args[1:])),
                error=f'{type(e).__name__}: {" ".join(str(e).split())[:300]} ({Path(at.filename).name}:{at.lineno})',
            )
        fused(True)
        clean()

def geometry(args):
    kw = dict(img_resolution=64, label_dim=1000, dropout=0.)  # the other defaults are ImageNet-64's
    return kw | (
        dict(
            model_channels=32,
            num_blocks=1,
            channel_mult=(1, 2),
            img_resolution=16,
            attn_resolutions=(8,),
        )
        if args.tiny
        else {}
    )

def network(args):
    "Random weights with nothing left at zero, so that no kernel works on zeros"
    torch.manual_seed(0)
    with torch.device(DEV): net = ADMUNet(**geometry(args))
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim>1 and p.std()<1e-4: p.normal_(0, 0.02)
    return EDMPrecond(net).eval().requires_grad_(False)

def draws(D, n, *key):
    g = rng(*key, device=DEV)
    return torch.randn(n, *D.shape, device=DEV, generator=g), torch.arange(n, device=DEV)%1000

def flops(args):
    "Of one image: whole network, encoder, head; forwards"
    D = network(args)
    head = GanHead(D.model.bottleneck).to(DEV)
    z,y = draws(D, 1, 0)
    s = torch.ones(1, device=DEV)
    def count(f):
        with (
            FlopCounterMode(display=False) as c,
            torch.no_grad(),
            torch.autocast(DEV, torch.bfloat16),
        ):
            f()
        return c.get_total_flops()
    fused(False)
    return (
        count(lambda: D(z, s, y)),
        count(lambda: D.encode(z, s, y)),
        count(lambda: head(torch.zeros(1, *D.model.bottleneck, device=DEV))),
    )

def rate(rep, args):
    n = 256 if args.tiny else 8192
    a,b = (torch.randn(n, n, device=DEV, dtype=torch.bfloat16) for _ in range(2))
    rep.rate = 2*n**3/clock(lambda: a@b, 30)/1e9
    rep.add(
        what='card',
        name=torch.cuda.get_device_name() if CUDA else 'cpu',
        torch=torch.__version__,
        bf16_tflops=rep.rate,
    )

def work(rep, args):
    """Samples; fake score there and back; encoder and head on real and fake; every fifth time
    teacher, fake score, GAN and the generator's way back"""
    f,e,h = flops(args)
    rep.iteration,rep.image = (4*f + 6*(e+h) + (4*f + 2*(e+h))/5)*args.batch/1e12,f/1e12
    rep.add(
        what='work',
        unit='TFLOP',
        image=rep.image,
        iteration=rep.iteration,
        samples_256=256 * rep.image,
    )

def speed(rep, tflop, ms):
    return dict(tflops=tflop/ms*1e3, share=tflop/ms*1e3/rep.rate) if tflop and rep.rate else {}

def kernel_errors(rep, args):
    "Results and gradients of the fused functions, in units of a float64 reference; beside them the plain operations'"
    exact()
    shapes = (
        [(2, 32, 8, 8), (3, 96, 6, 6)]
        if args.tiny
        else [(8, 192, 64, 64), (4, 576, 32, 32), (8, 768, 8, 8), (4, 1536, 8, 8), (3, 96, 6, 10)]
    )
    fast = dict(
        norm_silu=kernels._NormSilu.apply if CUDA else norm_silu_plain,
        residual=kernels._Residual.apply if CUDA else None,
        halve=(lambda x: kernels._Resize.apply(x, 'pool')) if CUDA else None,
        double=(lambda x: kernels._Resize.apply(x, 'spread')) if CUDA else None,
    )
    plain = dict(
        norm_silu=norm_silu_plain,
        residual=lambda x, h, b: x + h + b[:, None, None].to(x.dtype),
        halve=lambda x: F.avg_pool2d(x, 2),
        double=lambda x: F.interpolate(x, scale_factor=2.0, mode='nearest'),
    )
    def cases(name, n, c, h, w, g):
        r = lambda *s: torch.randn(*s, device=DEV, generator=g)
        x = r(n, c, h, w)*2 + r(n, c, 1, 1)
        if name=='norm_silu':
            rows = [
                (x, 1 + 0.3 * r(n, c), r(n, c), min(32, c // 4), 1e-5, pre, act)
                for pre in (None, r(n, c))
                for act in (True, False)
            ]
            return rows + [
                (x, 1 + 0.3 * r(c), r(c), min(32, c // 4), 1e-5, pre, True, 0.3 * r(n, c), r(n, c))
                for pre in (None, r(c), r(n, c))
            ]
        return [(x, r(n, c, h, w), r(c))] if name=='residual' else [(x,)]
    for dtype in (torch.float32, torch.bfloat16):
        for name in fast:
            err = dict(fused=0., plain=0.)
            for s in shapes:
                for inputs in cases(name, *s, rng(3, *s, device=DEV)):
                    cast = lambda t: (
                        t
                        if not isinstance(t, torch.Tensor)
                        else t.to(dtype).contiguous(memory_format=torch.channels_last)
                        if t.ndim == 4
                        else t
                    )
                    inputs = [cast(t) for t in inputs]
                    def run(f, wide=False):
                        ins = [
                            t.double() if wide and isinstance(t, torch.Tensor) else t
                            for t in inputs
                        ]
                        ins = [
                            t.detach().clone().requires_grad_()
                            if isinstance(t, torch.Tensor)
                            else t
                            for t in ins
                        ]
                        y = f(*ins)
                        dy = (
                            torch.randn(y.shape, device=DEV, generator=rng(4, device=DEV))
                            .to(dtype)
                            .to(y.dtype)
                        )
                        return [
                            y.detach(),
                            *torch.autograd.grad(
                                y, [t for t in ins if isinstance(t, torch.Tensor)], dy
                            ),
                        ]
                    ref = run(plain[name], wide=True)
                    for k,f in (('fused', fast[name] or plain[name]), ('plain', plain[name])):
                        err[k] = max(err[k], *(rel([a], [b]) for a,b in zip(run(f), ref)))
            rep.add(
                what='kernel',
                name=name,
                dtype=str(dtype).split('.')[1],
                **err,
                note='largest relative error of results and gradients',
            )

def network_error(rep, args):
    """Forwards at three levels, the bottleneck, and the gradient of all weights: fast bf16 and
    plain bf16 against float32"""
    n = 4 if args.tiny else 16
    D = network(args)
    z,y = draws(D, n, 0)
    parts = {
        f'D at sigma {s}': (lambda D, s=s: D(z * max(s, 0.5), torch.full((n,), s, device=DEV), y))
        for s in (80.0, 2.0, 0.1)
    }
    parts['bottleneck at sigma 2'] = lambda D: D.encode(z*2, torch.full((n,), 2., device=DEV), y)
    def outs(D, bf16):
        with torch.no_grad(), torch.autocast(DEV, torch.bfloat16, enabled=bf16):
            return {k: f(D).float() for k,f in parts.items()}
    def grads(D, bf16):
        D.requires_grad_(True)
        m = max(n//2, 1)
        with torch.autocast(DEV, torch.bfloat16, enabled=bf16):
            x = D(z[:m]*2, torch.full((m,), 2., device=DEV), y[:m])
        g = torch.autograd.grad(x.float(), list(D.parameters()), z[-m:])
        D.requires_grad_(False)
        return g
    exact()
    fused(False)
    want,want_g = outs(D, False),grads(D, False)
    quick()
    plain,plain_g = outs(D, True),rel(grads(D, True), want_g)
    fused(True)
    D = D.to(memory_format=torch.channels_last)
    train_o,train_g = outs(D, True),rel(grads(D, True), want_g)
    half = outs(deepcopy(D).to(torch.bfloat16), True)
    rows = [
        (k, 'float32 weights', rel([train_o[k]], [want[k]]), rel([plain[k]], [want[k]]))
        for k in parts
    ]
    rows += [
        (k, 'bf16 weights, as in sampling', rel([half[k]], [want[k]]), rel([plain[k]], [want[k]]))
        for k in parts
    ]
    rows += [('gradient of all weights', 'float32 weights', train_g, plain_g)]
    for k,weights,f,p in rows:
        rep.add(
            what='error',
            name=k,
            weights=weights,
            fast_bf16=f,
            plain_bf16=p,
            ratio=f / p,
            bar=BARS['error'],
        )
    worst = max(f/p for _,_,f,p in rows)
    rep.add(
        what='error',
        name='largest ratio',
        ratio=worst,
        bar=BARS['error'],
        ok=worst <= BARS['error'],
    )

def sampling(rep, args):
    "256 images in one step: replayed graph, eager fused, plain"
    quick()
    D,n = network(args),8 if args.tiny else 256
    z,y = draws(D, n, 0)
    levels = torch.tensor([80.])
    def sample(D, z, y):
        with torch.no_grad(), torch.autocast(DEV, torch.bfloat16):
            return few_step_sample(D, z, levels, y)
    half = deepcopy(D).to(torch.bfloat16).to(memory_format=torch.channels_last)
    fast = lambda z,y: sample(half, z.to(memory_format=torch.channels_last), y)
    for name, f, on in ([('graphed bf16', graphs.CudaGraph(fast), True)] if CUDA else []) + [
        ('fused bf16', fast, True),
        ('plain bf16', lambda z, y: sample(D, z, y), False),
    ]:
        fused(on)
        clean()
        try: ms = clock(lambda: f(z, y), *((1, 1) if args.tiny else (10, 5)))
        except Exception as e:
            rep.add(
                what='failed',
                name=f'sample {name}',
                error=f'{type(e).__name__}: {" ".join(str(e).split())[:300]}',
            )
            continue
        rep.add(
            what='sample',
            name=name,
            n=n,
            ms=ms,
            **(dict(peak_gib=torch.cuda.max_memory_allocated() / GIB) if CUDA else {}),
            **speed(rep, n * rep.image, ms),
            bar_ms=BARS['sample_ms'],
            ok=ms <= BARS['sample_ms'],
        )

def stream(args, shape=None):
    x = None if shape is None else torch.randn(args.batch, *shape, device=DEV).clamp(-1, 1)
    while True:
        y = torch.randint(1000, (args.batch,), device=DEV)
        yield y if x is None else (x, y)

def training(rep, args, kind='graphed'):
    """ms an iteration over whole 1:5 cycles, and memory: of eager warm-up calls, while a graph is
    captured, and replaying"""
    quick()
    fused(kind!='plain')
    clean()
    net = network(args)
    if kind!='plain': net = net.to(memory_format=torch.channels_last)
    peaks = dict(eager=0, capture=0)
    if kind=='graphed' and CUDA:
        class Watched(graphs_CudaGraph):
            """Peaks of the calls before and at the capture: its allocations are counted while it is
            recorded, not when it is replayed"""
            def __call__(self, *a):
                if self.graph is not None: return super().__call__(*a)
                k = 'eager' if self.calls<self.warmup else 'capture'
                sync()
                torch.cuda.reset_peak_memory_stats()
                out = super().__call__(*a)
                peaks[k] = max(peaks[k], torch.cuda.max_memory_allocated())
                return out
        graphs.CudaGraph = Watched
    graph = kind=='graphed' and CUDA
    dmd = (graphs.GraphedDMD2 if graph else DMD2).from_teacher(
        net, DMD2Config(dtype='bfloat16', batch=args.batch)
    )
    del net
    if kind!='plain': dmd.teacher.to(torch.bfloat16)
    conds,reals = stream(args),stream(args, dmd.shape)
    it = lambda n: list(train(dmd, conds, n, reals))
    t = time.perf_counter()
    it(25 if graph else 1 if args.tiny else 5)
    sync()
    warm = time.perf_counter()-t
    clean()
    n,t = 5*(1 if args.tiny else 6 if graph else 2),time.perf_counter()
    logs = it(n)
    sync()
    ms = (time.perf_counter()-t)/n*1e3
    mem = {}
    if CUDA:
        replay,reserved = torch.cuda.max_memory_allocated(),torch.cuda.max_memory_reserved()
        mem = dict(peak_gib=max([replay, *peaks.values()])/GIB, reserved_gib=reserved/GIB)
        if graph:
            segs = [
                s
                for s in torch.cuda.memory_snapshot()
                if tuple(s.get('segment_pool_id', ())) == tuple(dmd.runner.pool)
            ]
            whole,live = sum(s['total_size'] for s in segs),sum(s['allocated_size'] for s in segs)
            mem |= dict(
                eager_gib=peaks['eager'] / GIB,
                capture_gib=peaks['capture'] / GIB,
                outside_pool_gib=(replay - live) / GIB,
                pool_gib=whole / GIB,
                total_gib=(replay - live + whole) / GIB,
            )
    bad = sorted({k for o in logs for k,v in o.items() if not v.isfinite().all()})
    rep.add(
        what='train',
        name=kind if graph or kind != 'graphed' else 'fused',
        batch=args.batch,
        ms=ms,
        **mem,
        warmup_s=warm,
        **speed(rep, rep.iteration, ms),
        fake_loss=logs[-1]['fake_loss'].item(),
        **(dict(not_finite=bad) if bad else {}),
        bar_ms=BARS['train_ms'],
        bar_gib=BARS['train_gib'],
        ok=not bad and ms <= BARS['train_ms'] and mem.get('peak_gib', 0) <= BARS['train_gib'],
    )

def emoji(rep, args, together=(1, 2, 4)):
    """The 32x32 network of the emoji recipe, random weights and images: ms an iteration of each
    kind, alone and when several runs share the card"""
    quick()
    fused(True)
    r = recipe('emoji32')
    cfg = replace(
        r.config,
        warmup_fake=0,
        gan_start=0,
        **(dict(dtype='bfloat16') | (dict(batch=4) if args.tiny else {})),
    )
    make = graphs.GraphedDMD2 if CUDA else DMD2
    torch.manual_seed(0)
    with torch.device(DEV): net = build_denoiser(r.net)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim>1 and p.std()<1e-4: p.normal_(0, 0.02)
    net = net.to(memory_format=torch.channels_last)
    cond, real = (
        torch.zeros(cfg.batch, r.net['args']['label_dim'], device=DEV),
        torch.randn(cfg.batch, *net.shape, device=DEV).clamp(-1, 1),
    )
    same = lambda o: iter(lambda: o, None)
    for n in (1, 2) if args.tiny else together:
        clean()
        streams = [torch.cuda.Stream() if CUDA else None for _ in range(n)]
        runs = [make.from_teacher(net, replace(cfg, seed=i)) for i in range(n)]
        loops = [train(d, same(cond), 10**6, same((real, cond))) for d in runs]
        def turn():
            for s,l in zip(streams, loops):
                with torch.cuda.stream(s) if CUDA else nullcontext(): out.append(next(l))
            del out[:-n]
        out = []
        if CUDA:
            torch.cuda.synchronize()
            # recorded one after the other: while one records, the others rest
            for i,l in enumerate(loops):
                with torch.cuda.stream(streams[i]):
                    for _ in range(12): next(l)
                torch.cuda.synchronize()
        k = 2 if args.tiny else 100
        ms = clock(turn, k, 2)
        row = dict(
            what='emoji',
            name='graphed' if CUDA else 'eager',
            batch=cfg.batch,
            ttur=cfg.ttur,
            together=n,
            turn_ms=ms,
            ms=ms / n,
        )
        if CUDA: row['peak_gib'] = torch.cuda.max_memory_allocated()/GIB
        if n==1:
            row['kernels'] = (
                count_kernels(lambda: [turn() for _ in range(cfg.ttur)]) / cfg.ttur
                if CUDA
                else None
            )
            row |= {f'{k}_ms': v for k,v in turns(runs[0], turn, 2 if args.tiny else 50).items()}
        bad = sorted({k for o in out for k,v in o.items() if not v.isfinite().all()})
        rep.add(**row, **(dict(not_finite=bad) if bad else {}), ok=not bad)
        runs = loops = turn = None  # their memory is free before the next number of runs begins

def turns(dmd, turn, n):
    "ms of iterations with and without a generator update, each by itself"
    spent = {True: [], False: []}
    for _ in range(n*dmd.cfg.ttur):
        kind = dmd.generators_turn()
        sync()
        t = time.perf_counter()
        turn()
        sync()
        spent[kind].append((time.perf_counter()-t)*1e3)
    return dict(
        generator=sum(spent[True]) / len(spent[True]), critic=sum(spent[False]) / len(spent[False])
    )

def count_kernels(f):
    "Kernels that run in `f`"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        f()
        sync()
    return sum(
        e.device_type == torch.autograd.DeviceType.CUDA
        and not e.name.startswith(('Memcpy', 'Memset'))
        for e in p.events()
    )

graphs_CudaGraph = graphs.CudaGraph

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--out', default='.')
    ap.add_argument('--tiny', action='store_true')
    ap.add_argument('--batch', type=int, default=40)
    ap.add_argument(
        '--seconds', type=float, default=85, help='no optional part begins when it would end later'
    )
    ap.add_argument(
        '--run', default='one process, alone on the machine', help='what the json calls this run'
    )
    args = ap.parse_args()
    if not CUDA and not args.tiny: ap.error('no CUDA device here: --tiny runs the same on a CPU')
    if args.tiny: args.batch = 4
    rep = Report(args)
    rep.part(rate, args)
    rep.part(work, args)
    rep.part(training, args)
    graphs.CudaGraph = graphs_CudaGraph
    rep.part(sampling, args)
    rep.part(network_error, args)
    rep.part(kernel_errors, args)
    rep.part(emoji, args)
    # launched from Python, for comparison
    for kind in ('fused', 'plain'): rep.part(training, args, kind, needs=15)
    print(f'{rep.path} written after {rep.gone:.0f} s')

if __name__=='__main__': main()
