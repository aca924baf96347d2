"""Several GPUs of one machine: SDXL in pieces (FSDP2), the ImageNet-64 step in copies (DDP), a
checkpoint from many processes to one.

    python tests/gpu_parallel.py run                     # all parts on all GPUs of this machine, within --limit seconds
    python tests/gpu_parallel.py run --only imagenet64   # some parts
    python tests/gpu_parallel.py run --tiny              # a dry run on the CPU with gloo, some minutes
    torchrun --nproc_per_node=2 tests/gpu_parallel.py part imagenet64   # one part by hand

Networks are built from their config with random weights on the GPUs; nothing is downloaded. Each
part is a torchrun of its own with a time
limit of its own, so that none can spoil another. Rows go to $OUT/parallel_gpu.json (or
runs/parallel_gpu.json) as they come, a table comes last."""
import argparse, gc, hashlib, itertools, json, math, os, shutil, signal, socket
import subprocess, sys, tempfile, threading, time, traceback
from dataclasses import replace
from pathlib import Path

born = time.time()
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
import torch

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2Config
from dmd2_nb.fused import fused
from dmd2_nb.graphs import GraphRunner
from dmd2_nb.launch import launch
from dmd2_nb.parallel import World, each_rank, setup
from dmd2_nb.parallel_run import ParallelDMD2, load_parallel, save_parallel
from dmd2_nb.train import train
from dmd2_nb.unet import ADMUNet

started = time.time()
GiB = 2**30
GOAL = 0.92  # of DDP from one to two GPUs


class Rows:
    "Results of a part: told to the driver as they come, by the first process alone"
    def __init__(self, a, world): self.a, self.world, self.end = a, world, a.until
    @property
    def left(self): return self.end-time.time()
    def __call__(self, **row):
        row = {
            k: round(v, 4)
            if isinstance(v, float) and abs(v) >= 0.1
            else float(f'{v:.4g}')
            if isinstance(v, float)
            else v
            for k, v in row.items()
        }
        if self.world.main: print('ROW '+json.dumps(row), flush=True)
        return row
    def time_for(self, seconds):
        "Whether that much is left: one answer for all processes"
        return min(each_rank(self.left)) > seconds


def sync(w):
    if w.device.type == 'cuda': torch.cuda.synchronize()
def fresh(w):
    gc.collect()
    if w.device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
def peaks(w, together=True):
    "Of each process: GiB allocated and reserved at the peak"
    if w.device.type != 'cuda': return {}
    mine = [torch.cuda.max_memory_allocated()/GiB, torch.cuda.max_memory_reserved()/GiB]
    got = each_rank(mine) if together else [mine]
    return dict(peak_gib=[round(p, 2) for p, _ in got], reserved_gib=[round(r, 2) for _, r in got])
def small(e): return f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'


def timed(dmd, stream, cycles, w, rows=None, cycle_end=0., together=True):
    """Seconds an iteration over whole 1:ttur cycles, nothing waited for inside a cycle; a list of
    one number a cycle, and the last log"""
    out, last = [], {}
    for _ in range(cycles):
        sync(w)
        t = time.perf_counter()
        for log in train(dmd, *stream(dmd.cfg.ttur)): last = log
        sync(w)
        out.append((time.perf_counter()-t)/dmd.cfg.ttur)
        if rows is not None:
            need = max(out)*dmd.cfg.ttur+cycle_end
            if not (rows.time_for(need) if together else rows.left > need): break
    return out, {k: float(v) for k, v in last.items()}


# -- ImageNet-64 --
def network(a, device):
    "EDM's network with random weights, nothing left at zero"
    kw = dict(img_resolution=64, label_dim=1000, dropout=0.)
    if a.tiny:
        kw |= dict(
            model_channels=32,
            num_blocks=1,
            channel_mult=(1, 2),
            img_resolution=16,
            attn_resolutions=(8,),
            label_dim=10,
        )
    torch.manual_seed(0)
    with torch.device(device): net = ADMUNet(**kw)
    with torch.no_grad():
        for _n, p in net.named_parameters():
            if p.ndim > 1 and p.std() < 1e-4: p.normal_(0, 0.02)
    return EDMPrecond(net).eval().requires_grad_(False)


def labelled(a, w, batch, like=None):
    """Streams for `train`, drawn from the position for the whole batch, cut for this process;
    `like` is the shape of a sample and the number of classes"""
    (shape, classes), n, at = like or dmd_shape(network, a), batch//w.size, itertools.count()
    def stream(steps, start=None):
        idx = (
            list(range(start, start + steps))
            if start is not None
            else [next(at) for _ in range(steps)]
        )
        def draw(i, k):
            g = rng(7, i, k, device=w.device)
            return torch.randint(classes, (batch,), device=w.device, generator=g), g
        conds = (draw(i, 0)[0][w.rows(n)] for i in idx)
        def reals():
            for i in idx:
                y, g = draw(i, 1)
                yield (
                    torch.randn(batch, *shape, device=w.device, generator=g).clamp(-1, 1)[
                        w.rows(n)
                    ],
                    y[w.rows(n)],
                )
        return conds, steps, reals()
    return stream


def edm_run(a, w, batch, mode='ddp', kind='plain', make=network, **changes):
    "A run with random weights: 'plain', with 'fused' kernels, or with those as 'graphs'"
    net = make(a, w.device)
    fast = kind != 'plain'
    if fast: net = net.to(memory_format=torch.channels_last)
    fused(fast)
    cfg = DMD2Config(batch=batch, **dict(dtype='bfloat16') | changes)
    more = dict(runner=GraphRunner()) if kind == 'graphs' and w.device.type == 'cuda' else {}
    dmd = ParallelDMD2.from_teacher(net, cfg, world=w, mode=mode, check_every=0, **more)
    if mode == 'ddp': dmd.teacher.to(dmd.dtype)
    return dmd


def garments(a, device):
    "A network for 32 x 32 garments: 32 channels, multipliers 1-2-4"
    kw = dict(
        img_resolution=32,
        in_channels=1,
        out_channels=1,
        label_dim=10,
        model_channels=32,
        channel_mult=(1, 2, 4),
        num_blocks=2,
        attn_resolutions=(8,),
        dropout=0.0,
    )
    if a.tiny: kw |= dict(num_blocks=1, img_resolution=16, channel_mult=(1, 2))
    torch.manual_seed(0)
    with torch.device(device): net = ADMUNet(**kw)
    with torch.no_grad():
        for _n, p in net.named_parameters():
            if p.ndim > 1 and p.std() < 1e-4: p.normal_(0, 0.02)
    return EDMPrecond(net).eval().requires_grad_(False)


def median(v): return sorted(v)[len(v)//2]


def graphed(a, w, rows, name, make, batch, cycles, **changes):
    """One GPU while the others wait, all GPUs at the same batch each, all GPUs at the same batch
    in all; graphs, fused kernels.
    Median over the cycles of `ttur` iterations, after all kinds of turn are recorded"""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    alone, got, logs, begun = World(device=w.device), {}, {}, {}
    plans = dict(one=(alone, batch), each=(w, batch*w.size), same=(w, batch))
    for plan, (world, n) in plans.items():
        each_rank(0)
        if plan == 'one' and not w.main:
            each_rank(0)
            continue
        fresh(w)
        t = time.perf_counter()
        dmd, stream = (
            edm_run(a, world, n, kind='graphs', make=make, **changes),
            labelled(a, world, n, dmd_shape(make, a)),
        )
        # three plain calls of each kind, the recordings, and one replay
        timed(dmd, stream, 5, world)
        begun[plan] = time.perf_counter()-t
        got[plan], logs[plan] = timed(
            dmd, stream, cycles if plan != 'same' else max(2, cycles // 2), world
        )
        mem = peaks(w, together=plan != 'one')
        if plan == 'one': each_rank(0)
        if w.main or plan != 'one': got[plan+'_gib'] = mem.get('peak_gib')
        del dmd
        fresh(w)
    slow = {
        k: max(
            o[k] for o in each_rank({k: median(v) for k, v in got.items() if k in ('each', 'same')})
        )
        for k in ('each', 'same')
    }
    one = each_rank(median(got['one']) if w.main else None)[0]
    spread = lambda v: [round(1e3*o, 2) for o in (min(v), median(v), max(v))]
    rows(
        what='graphs',
        name=name,
        ranks=w.size,
        batch=batch,
        iterations=5 * cycles,
        one_ms=1e3 * one,
        each_ms=1e3 * slow['each'],
        same_ms=1e3 * slow['same'],
        efficiency=one / slow['each'],
        faster=one / slow['same'],
        images_s=batch * w.size / slow['each'],
        spread_each_ms=spread(got['each']),
        spread_one_ms=spread(got['one']) if w.main else None,
        begun_s={k: round(v, 1) for k, v in begun.items()},
        each_gib=got['each_gib'],
        one_gib=got.get('one_gib'),
        finite=all(math.isfinite(v) for v in logs['each'].values()),
        goal=GOAL,
        ok=one / slow['each'] >= GOAL,
    )


def dmd_shape(make, a):
    if make is garments: return ((1, 16, 16) if a.tiny else (1, 32, 32)), 10
    return ((3, 16, 16), 10) if a.tiny else ((3, 64, 64), 1000)


def fashion32(a, w, rows):
    "The small network as graphs"
    graphed(
        a,
        w,
        rows,
        'fashion32',
        garments,
        8 if a.tiny else 128,
        2 if a.tiny else 40,
        levels=(80.0, 1.0, 0.3),
    )


def imagenet64(a, w, rows):
    "The ImageNet-64 step as graphs"
    graphed(a, w, rows, 'imagenet64', network, 4 if a.tiny else 40, 1 if a.tiny else 40)


# -- SDXL, full fine-tuning --
def sdxl_shape(a):
    from dmd2_nb.sdxl.adapter import SDXL_UNET, TINY_SDXL
    return (TINY_SDXL, 16, 7) if a.tiny else (SDXL_UNET, 128, 77)


def random_weights(w):
    "The same on all processes: named by part and parameter, with the spread of PyTorch's own layers"
    def make(part, name, shape):
        g = torch.Generator(w.device).manual_seed(
            int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], 'big')
        )
        if len(shape) < 2:
            return torch.full(
                shape, float('norm' in name and name.endswith('weight')), device=w.device
            )
        return torch.randn(shape, device=w.device, generator=g)/math.sqrt(3*math.prod(shape[1:]))
    return make


def sdxl_run(a, w, each, optim='adamw', keep=False):
    "Three whole networks that no process ever holds whole when there are several; bf16 inside, recomputed activations"
    from dmd2_nb.sdxl.adapter import EpsDenoiser, make_unet
    from dmd2_nb.sdxl.conditioning import SDXLCond, micro_ids
    from dmd2_nb.sdxl.recipe import sdxl_config, sdxl_dmd2
    from dmd2_nb.sdxl.roles import FullCopies
    unet, side, tokens = sdxl_shape(a)
    D = EpsDenoiser(make_unet(unet, device='meta'), shape=(4, side, side))
    roles = FullCopies(D, checkpointing=True, teacher_dtype=torch.bfloat16)
    n = each*w.size
    cfg = replace(sdxl_config, batch=n, dtype='bfloat16')
    pooled = unet['projection_class_embeddings_input_dim']-6*unet['addition_time_embed_dim']
    at = itertools.count()
    def cond(i, k):
        g = rng(11, i, k, device=w.device)
        r = lambda *s: torch.randn(each, *s, device=w.device, generator=g)
        return SDXLCond(
            r(tokens, unet['cross_attention_dim']),
            r(pooled),
            micro_ids(each, 8 * side, device=w.device),
        )
    def stream(steps):
        idx = [next(at)*w.size+w.rank for _ in range(steps)]
        x = lambda i: torch.randn(
            each, 4, side, side, device=w.device, generator=rng(11, i, 2, device=w.device)
        )
        return (cond(i, 0) for i in idx), steps, ((x(i), cond(i, 1)) for i in idx)
    dmd = sdxl_dmd2(
        roles,
        cfg,
        cond(0, 0),
        make=ParallelDMD2,
        world=w,
        mode='fsdp',
        keep=keep,
        weights=random_weights(w),
        check_every=0,
    )
    if optim == 'sgd':  # no averages: 16 bytes a parameter less, for the card that cannot hold them
        for n in ('opt_g', 'opt_fake'):
            groups = [
                dict(params=g['params'], lr=g['lr'], base_lr=g['base_lr'])
                for g in getattr(dmd, n).param_groups
            ]
            setattr(dmd, n, torch.optim.SGD(groups, foreach=False))
            getattr(dmd, n).register_step_post_hook(
                lambda opt, *args: opt.zero_grad(set_to_none=True)
            )
    return dmd, stream


def sdxl_row(a, w, rows, each, optim, iters, keep=False):
    "One setup, measured; memory of a whole cycle after the warm-up, and of the whole run"
    fresh(w)
    t = time.perf_counter()
    dmd, stream = sdxl_run(a, w, each, optim, keep)
    sync(w)
    built = time.perf_counter()-t
    rest = torch.cuda.memory_allocated()/GiB if w.device.type == 'cuda' else 0.
    ttur, t = dmd.cfg.ttur, time.perf_counter()
    timed(dmd, stream, 1, w)
    first = time.perf_counter()-t
    timed(dmd, stream, 1, w)
    seconds, log = timed(dmd, stream, max(1, iters//ttur), w, rows, 12, w.many)
    mem = peaks(w, w.many)
    if w.many: seconds = [max(o) for o in zip(*each_rank(seconds))]
    return rows(
        what='sdxl',
        name=f'{optim}',
        ranks=w.size,
        batch_each=each,
        px=8 * dmd.shape[-1],
        optim=optim,
        keep=keep,
        iterations=len(seconds) * ttur,
        s_per_iteration=sum(seconds) / len(seconds),
        s_best_cycle=min(seconds),
        images_s=each * w.size / (sum(seconds) / len(seconds)),
        **mem,
        at_start_gib=rest,
        built_s=built,
        first_cycle_s=first,
        finite=all(math.isfinite(v) for v in log.values()),
        log={k: float(f'{v:.4g}') for k, v in log.items()},
    )


def sdxl(a, w, rows):
    "Batch 2 a GPU, 1024 px: fetched weights stay until they change"
    sdxl_row(a, w, rows, 2, 'adamw', 10 if a.tiny else 20, keep=True)


def sdxl_lean(a, w, rows):
    "The same, fetched for each pass: less memory, more messages"
    sdxl_row(a, w, rows, 2, 'adamw', 5 if a.tiny else 10)


def adapters(a, w, rows):
    """Generator and fake score as adapters on one frozen base per GPU, recorded passes, gradients
    of adapters and head alone travelling; one GPU while the others wait, then all"""
    from dmd2_nb.sdxl.adapter import EpsDenoiser, make_unet
    from dmd2_nb.sdxl.conditioning import SDXLCond, micro_ids
    from dmd2_nb.sdxl.recipe import sdxl_dmd2, sdxl_lora_config
    from dmd2_nb.sdxl.roles import SharedBase
    unet, side, tokens = sdxl_shape(a)
    pooled = unet['projection_class_embeddings_input_dim']-6*unet['addition_time_embed_dim']
    half, each, seconds = torch.bfloat16 if w.device.type == 'cuda' else torch.float32, 1, {}
    torch.manual_seed(0)
    body = make_unet(unet, device='meta', dtype=half).to_empty(device=w.device)
    weights = random_weights(w)
    with torch.no_grad():
        for n, p in body.named_parameters(): p.copy_(weights('unet', n, tuple(p.shape)))
    for plan, world in dict(one=World(device=w.device), all=w).items():
        each_rank(0)
        if plan == 'one' and not w.main:
            each_rank(0)
            continue
        fresh(w)
        roles = SharedBase(EpsDenoiser(body, shape=(4, side, side)), 64 if not a.tiny else 4)
        def cond(i, k):
            g = rng(13+world.rank, i, k, device=w.device)
            r = lambda *s: torch.randn(each, *s, device=w.device, generator=g, dtype=half)
            return SDXLCond(
                r(tokens, unet['cross_attention_dim']),
                r(pooled),
                micro_ids(each, 8 * side, device=w.device).to(half),
            )
        at = itertools.count()
        def stream(steps):
            idx = [next(at) for _ in range(steps)]
            x = lambda i: torch.randn(
                each,
                4,
                side,
                side,
                device=w.device,
                generator=rng(13 + world.rank, i, 2, device=w.device),
            )
            return (cond(i, 0) for i in idx), steps, ((x(i), cond(i, 1)) for i in idx)
        cfg = replace(
            sdxl_lora_config,
            batch=each * world.size,
            dtype='bfloat16' if half == torch.bfloat16 else 'float32',
        )
        dmd = sdxl_dmd2(roles, cfg, cond(0, 0), make=ParallelDMD2, world=world, check_every=0)
        roles.record()
        timed(dmd, stream, 2 if a.tiny else 6, world)
        seconds[plan], log = timed(dmd, stream, 1 if a.tiny else 10, world)
        mem = peaks(w, together=plan != 'one')
        travel = (
            4
            * sum(
                p.numel()
                for o in (dmd.opt_g, dmd.opt_fake)
                for g in o.param_groups
                for p in g['params']
            )
            / 1e9
        )
        if plan == 'one': each_rank(0)
        roles.base.restore()
        del dmd, roles
    mean = lambda v: sum(v)/len(v)
    one = each_rank(mean(seconds['one']) if w.main else None)[0]
    slow = max(each_rank(mean(seconds['all'])))
    rows(
        what='adapters',
        name='three roles on one base',
        ranks=w.size,
        batch_each=each,
        px=8 * side,
        one_s=one,
        all_s=slow,
        efficiency=one / slow,
        gradients_gb=travel,
        **mem,
        finite=all(math.isfinite(v) for v in log.values()),
        goal=0.95,
        ok=one / slow >= 0.95,
    )


def sdxl_plain(a, w, rows):
    "The same without AdamW's averages, to compare with one GPU that has no room for them"
    sdxl_row(a, w, rows, 2, 'sgd', 5 if a.tiny else 10)


def sdxl_one(a, w, rows):
    "On one GPU: batch 2, then 1, then 2 without AdamW's averages"
    for each, optim, iters in ((2, 'adamw', 10), (1, 'adamw', 10), (2, 'sgd', 10)):
        if rows.left < 25:
            rows(what='left out', name=f'{optim}, batch {each}', error='no time left')
            break
        try:
            sdxl_row(a, w, rows, each, optim, 5 if a.tiny else iters)
            if optim == 'adamw' and each == 2 and not a.tiny:  # it fits: the averages may stay
                break
        except torch.OutOfMemoryError as e:
            rows(
                what='no room',
                name=f'{optim}, batch {each}',
                ranks=1,
                batch_each=each,
                optim=optim,
                total_gib=torch.cuda.get_device_properties(0).total_memory / GiB,
                **peaks(w, False),
                error=small(e),
            )
            e.__traceback__ = None
            del e
        fresh(w)


# -- a checkpoint of many processes goes on in one --
def resume(a, w, rows):
    """Five iterations on all GPUs, saved; five more on all, and the same five on the first alone
    with the whole batch, in bf16 and in float32.
    bf16's error is how far the one GPU in bf16 is from itself in float32, or a step of bf16 where
    that is more; two runs with such errors may lie twice that apart"""
    batch, n, base = (4 if a.tiny else 16)*w.size, 5, Path(a.folder)
    changes = dict(warmup_fake=0, ttur=1, lr_g=1e-5, lr_fake=1e-5, lr_head=1e-5)
    take = lambda dmd, stream, start: [
        {k: float(v) for k, v in o.items()} for o in train(dmd, *stream(n, start))
    ]
    def gaps(x, y):
        scale = {k: max(abs(o[k]) for o in x+y if k in o) for k in set().union(*x)}
        return {
            k: max(abs(p[k] - q[k]) for p, q in zip(x, y) if k in p) / max(s, 1e-9)
            for k, s in sorted(scale.items())
        }
    for mode in ('ddp', 'fsdp'):
        if not rows.time_for(5 if a.tiny else 30):
            rows(what='left out', name=mode, error='no time left')
            break
        fresh(w)
        t = time.perf_counter()
        many, stream = edm_run(a, w, batch, mode, **changes), labelled(a, w, batch)
        take(many, stream, 0)
        ready = time.perf_counter()-t
        t = time.perf_counter()
        save_parallel(many, base/mode, position=n)
        saved = time.perf_counter()-t
        after = take(many, stream, n)
        del many
        fresh(w)
        if w.main:
            files = [f for f in (base/mode).rglob('*') if f.is_file()]
            alone, got, loaded = World(device=w.device), {}, []
            for dtype in ('bfloat16', 'float32'):
                t = time.perf_counter()
                one = edm_run(a, alone, batch, 'fsdp' if dtype == 'float32' else mode, **changes)
                at = load_parallel(one, base/mode)['position']
                loaded.append(time.perf_counter()-t)
                one.dtype = getattr(torch, dtype)
                tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
                if dtype == 'float32':
                    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
                got[dtype] = take(one, labelled(a, alone, batch), at)
                if dtype == 'bfloat16':
                    save_parallel(one, base/f'{mode}_back', position=at+n)
                    further = take(one, labelled(a, alone, batch), at+n)
                torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
                del one
                fresh(w)
            off, own = gaps(after, got['bfloat16']), gaps(got['float32'], got['bfloat16'])
            losses = {k: max(own[k], 2**-8) for k in off if k.endswith('loss')}
            short = lambda d: {k: float(f'{v:.3g}') for k, v in d.items()}
            rows(
                what='resume',
                name=mode,
                way=f'{w.size} to 1',
                ranks=w.size,
                batch=batch,
                step=at,
                files=sorted({f.suffix for f in files}),
                gb=sum(f.stat().st_size for f in files) / 1e9,
                built_s=ready,
                save_s=saved,
                load_s=loaded[0],
                loss_gap=max(off[k] for k in losses),
                bf16_error=max(losses.values()),
                ratio=max(off[k] / e for k, e in losses.items()),
                ok=all(off[k] <= 2 * e for k, e in losses.items()),
                gaps=short(off),
                errors=short(own),
                many=[o['fake_loss'] for o in after],
                one=[o['fake_loss'] for o in got['bfloat16']],
            )
        each_rank(0)
        fresh(w)
        t = time.perf_counter()
        many = edm_run(a, w, batch, mode, **changes)  # and back: saved by one, gone on by all
        at = load_parallel(many, base/f'{mode}_back')['position']
        loaded = time.perf_counter()-t
        back = take(many, stream, at)
        del many
        fresh(w)
        if w.main:
            off = gaps(back, further)
            rows(
                what='resume',
                name=mode,
                way=f'1 to {w.size}',
                ranks=w.size,
                batch=batch,
                step=at,
                load_s=loaded,
                loss_gap=max(off[k] for k in losses),
                bf16_error=max(losses.values()),
                ratio=max(off[k] / e for k, e in losses.items()),
                ok=all(off[k] <= 2 * e for k, e in losses.items()),
                gaps={k: float(f'{v:.3g}') for k, v in off.items()},
                many=[o['fake_loss'] for o in back],
                one=[o['fake_loss'] for o in further],
            )
        each_rank(0)


# -- a start from a notebook --
def toy(device, mode):
    "A short run on points, for `launch`: it brings its own imports"
    from dataclasses import replace
    from itertools import count
    import torch
    from dmd2_nb.denoiser import EDMPrecond
    from dmd2_nb.distill import toy_config
    from dmd2_nb.nets import ToyNet
    from dmd2_nb.parallel import setup
    from dmd2_nb.parallel_run import ParallelDMD2
    from dmd2_nb.train import train
    cfg = replace(
        toy_config,
        batch=32,
        levels=(10.0, 2.0),
        gan_g=1e-2,
        gan_d=1e-2,
        ttur=2,
        warmup_fake=2,
        dtype='float32',
    )
    with setup(device) as w:
        torch.manual_seed(0)
        net = EDMPrecond(ToyNet(width=32)).to(w.device)
        dmd = ParallelDMD2.from_teacher(net, cfg, init=net, world=w, mode=mode, check_every=1)
        reals = (
            (
                torch.randn(32, 2, generator=torch.Generator().manual_seed(i)).to(w.device)[
                    w.rows(dmd.batch)
                ],
                None,
            )
            for i in count()
        )
        return dict(
            device=str(w.device), losses=[float(o['fake_loss']) for o in train(dmd, None, 8, reals)]
        )


def notebook(a, w, rows):
    "As from a notebook: this process has used its GPU before it starts one process for each"
    n = 2 if w.device.type == 'cpu' else torch.cuda.device_count()
    torch.zeros(1, device=w.device)
    one = launch(toy, 1, w.device.type, 'ddp', timeout=60)[0]
    for mode in ('ddp', 'fsdp'):
        t = time.perf_counter()
        many = launch(toy, n, w.device.type, mode, timeout=60)
        gap = max(abs(x-y)/abs(x) for x, y in zip(one['losses'], many[0]['losses']))
        rows(
            what='launch',
            name=mode,
            ranks=n,
            devices=[o['device'] for o in many],
            loss_gap=gap,
            seconds=time.perf_counter() - t,
            ok=gap < 1e-4,
        )


def hung(a, w, rows):
    """`dmd2_distill --nproc N` with a process that stands still: the command ends by itself, and
    the same command goes on"""
    n, silence, folder = (
        2 if w.device.type == 'cpu' else torch.cuda.device_count(),
        10,
        Path(tempfile.mkdtemp()),
    )
    words = (
        f'distill fashion16 --device {w.device.type} --features pixels --batch 8 --eval-n 8 '
        f'--eval-every 0 --save-every 50 --nproc {n} --silence {silence}'
    )
    words += f' --iters {400 if a.tiny else 20000} --set warmup_fake=4 --set gan_start=3'
    log = folder/'runs'/'fashion16-1'/'log.csv'
    def done():
        return (
            int(
                (log.read_text().splitlines()[-1:] or ['step'])[0]
                .split(',')[0]
                .replace('step', '0')
                or 0
            )
            if log.exists()
            else 0
        )
    def start():
        return subprocess.Popen(
            [sys.executable, '-m', 'dmd2_nb.cli', *words.split()],
            cwd=folder,
            env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), *sys.path])),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    def children(pid):
        found = []
        for p in Path('/proc').glob('[0-9]*'):
            try: parent = int((p/'stat').read_text().rpartition(')')[2].split()[1])
            except (OSError, ValueError): continue
            if parent == pid: found.append(int(p.name))
        return sorted(found)
    try:
        p = start()
        while done() < 100 and p.poll() is None and rows.left > 5: time.sleep(0.1)
        ranks = children(children(p.pid)[0])[:n]
        os.kill(ranks[-1], signal.SIGSTOP)
        t = time.perf_counter()
        err = p.communicate(timeout=max(5, rows.left-5))[1].strip().splitlines()
        took, at = time.perf_counter()-t, done()
        time.sleep(1)
        left = [
            r
            for r in ranks
            if Path(f'/proc/{r}').exists()
            and (Path(f'/proc/{r}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX')
        ]
        q = start()
        while done() <= at and q.poll() is None and rows.left > 3: time.sleep(0.1)
        on = done()
        q.send_signal(signal.SIGTERM)
        said = q.communicate(timeout=max(5, rows.left))[1].strip().splitlines()
        rows(
            what='hung',
            name='SIGSTOP',
            ranks=n,
            silence_s=silence,
            seconds=took,
            code=p.returncode,
            said=(err or [''])[-1][:200],
            left=len(left),
            at=at,
            went_on_to=on,
            code_after=q.returncode,
            said_after=(said or [''])[-1][:160],
            ok=p.returncode == 2 and took < silence + 20 and not left and on > at,
        )
    finally: shutil.rmtree(folder, ignore_errors=True)


def hello(a, w, rows):
    "What there is, and how fast gradients meet"
    import torch.distributed as dist
    x = torch.ones(2**20 if a.tiny else 2**28, device=w.device)
    if w.many:
        for _ in range(3): dist.all_reduce(x)
        sync(w)
        t = time.perf_counter()
        for _ in range(5): dist.all_reduce(x)
        sync(w)
        s = (time.perf_counter()-t)/5
    name = torch.cuda.get_device_name() if w.device.type == 'cuda' else 'cpu'
    rows(
        what='cards',
        name=name,
        ranks=w.size,
        cards=each_rank(name),
        torch=torch.__version__,
        imports_s=started - born,
        **(
            dict(
                all_reduce_gb_s=2 * (w.size - 1) / w.size * x.nbytes / s / 1e9,
                sum_ok=bool((x == float(w.size) ** 8).all()),
            )
            if w.many
            else {}
        ),
    )


# Name -> function, seconds at most, processes (None: all; 1: without torchrun), the least worth
# starting
PARTS = dict(
    hello=(hello, 50, None, 10),
    fashion32=(fashion32, 90, None, 30),
    imagenet64=(imagenet64, 200, None, 60),
    sdxl=(sdxl, 150, None, 60),
    sdxl_one=(sdxl_one, 130, 1, 40),
    sdxl_lean=(sdxl_lean, 110, None, 50),
    adapters=(adapters, 110, None, 40),
    resume=(resume, 110, None, 40),
    notebook=(notebook, 60, 1, 25),
    hung=(hung, 80, 1, 40),
    sdxl_plain=(sdxl_plain, 75, None, 40),
)


def part(a):
    "Under torchrun: one part"
    device = 'cuda' if torch.cuda.is_available() and not a.tiny else 'cpu'
    if a.tiny: torch.set_num_threads(1)
    with setup(device, timeout=120) as w:
        rows = Rows(a, w)
        t = time.perf_counter()
        try: PARTS[a.name][0](a, w, rows)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            print(
                'ROW '
                + json.dumps(
                    dict(
                        what='failed',
                        name=a.name,
                        rank=w.rank,
                        error=f'{small(e)} ({Path(at.filename).name}:{at.lineno})',
                        trace=traceback.format_exc()[-1500:],
                    )
                ),
                flush=True,
            )
            if w.many: os._exit(1)  # the others may wait in a collective: torchrun stops them
            raise
        rows(what='end', name=a.name, seconds=time.perf_counter()-t)


def drive(name, a, n, end, note, folder):
    "One torchrun, its rows as they come; killed when its time is up"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(
        os.environ,
        NCCL_NVLS_ENABLE='0',
        TORCH_SYMM_MEM_DISABLE_MULTICAST='1',
        NVSHMEM_DISABLE_NVLS='1',
        PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True',
    )
    # a machine without network may not know its own name
    if Path('/sys/class/net/lo').exists(): env.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    env.setdefault('OMP_NUM_THREADS', '1' if a.tiny else str(max(1, (os.cpu_count() or 1)//n)))
    torchrun = [
        '-m',
        'torch.distributed.run',
        '--nnodes=1',
        f'--nproc_per_node={n}',
        '--master_addr=127.0.0.1',
        f'--master_port={port}',
    ]
    cmd = [
        sys.executable,
        *(torchrun if n > 1 else []),
        __file__,
        'part',
        name,
        '--until',
        str(end),
        '--folder',
        folder,
    ] + ['--tiny'] * a.tiny
    err = tempfile.TemporaryFile('w+')
    p = subprocess.Popen(
        cmd, stdout=subprocess.PIPE, stderr=err, text=True, env=env, start_new_session=True
    )
    late = []
    def stop():
        late.append(True)
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    timer = threading.Timer(max(end+5-time.time(), 1), stop)
    timer.daemon = True
    timer.start()
    got = []
    try:
        for l in p.stdout:
            if not l.startswith('ROW '): continue
            r = dict(part=name)|json.loads(l[4:])
            got.append(r)
            note(r)
    finally:
        p.wait()
        timer.cancel()
    if not any(r['what'] in ('end', 'failed') for r in got):
        err.seek(0)
        lines = [l for l in err.read().strip().splitlines() if l.strip()]
        why = next(
            (l for l in reversed(lines) if 'Error' in l or 'error' in l), lines[-1] if lines else ''
        )
        note(
            dict(
                part=name,
                what='failed',
                name=name,
                error=f"{'out of time' if late else f'exit code {p.returncode}'}: {why[:300]}",
                trace='\n'.join(lines[-12:])[-1500:],
            )
        )


def line(r):
    num = lambda v: f'{v:.3f}' if isinstance(v, float) else str(v)
    return f"{r['what']} {r.get('name', '')}: " + ', '.join(
        f'{k} {num(v)}'
        for k, v in r.items()
        if k
        not in (
            'part',
            'what',
            'name',
            'trace',
            'log',
            'gaps',
            'errors',
            'many',
            'one',
            'cycles_one',
            'cycles_ddp',
        )
    )


def table(rows):
    of = lambda what: [r for r in rows if r['what'] == what]
    gib = lambda r: ' '.join(f'{v:.1f}' for v in r.get('peak_gib') or []) or '-'
    print('\nSDXL, three whole networks, 1024 px')
    print(
        f"{'GPUs':>5}{'batch each':>11}{'optimiser':>11}{'iterations':>11}{'s/iteration':>12}{'images/s':>9} "
        " peak GiB of each"
    )
    for r in of('sdxl'):
        print(
            f"{r['ranks']:>5}{r['batch_each']:>11}{r['optim']:>11}{r['iterations']:>11}"
            f"{r['s_per_iteration']:>12.3f}{r['images_s']:>9.2f} "
            f" {gib(r)}{'' if r['finite'] else '  NOT FINITE'}"
        )
    for r in of('no room'):
        print(
            f"{r['ranks']:>5}{r['batch_each']:>11}{r['optim']:>11}   no room on a card of {r['total_gib']:.0f} GiB"
        )
    print('Copies')
    for r in of('graphs'):
        print(
            f"  {r['name']} as graphs: one {r['one_ms']:.2f} ms, {r['ranks']} at the same batch "
            f"each {r['each_ms']:.2f} ms, efficiency {r['efficiency']:.3f} (goal {r['goal']}: "
            f"{'yes' if r['ok'] else 'no'}); at the same batch in all {r['same_ms']:.2f} ms"
        )
    for r in of('adapters'):
        print(
            f"SDXL, {r['name']}: one {r['one_s']:.3f} s, {r['ranks']} {r['all_s']:.3f} s, "
            f"efficiency {r['efficiency']:.3f} (goal {r['goal']}: {'yes' if r['ok'] else 'no'}), "
            f"{r['gradients_gb']:.2f} GB of gradients, peak GiB {gib(r)}"
        )
    for r in of('hung'):
        print(
            f"A process that stands still: the command ended after {r['seconds']:.1f} s with "
            f"{r['code']} ({r['said']}), the same command went on from {r['at']} to "
            f"{r['went_on_to']}: {'yes' if r['ok'] else 'no'}"
        )
    print('Saved and resumed by another number')
    for r in of('resume'):
        print(
            f"  {r['name']}, {r['way']}: largest relative gap of a loss {r['loss_gap']:.2e}, "
            f"bf16's own error {r['bf16_error']:.2e}, largest ratio of the two {r['ratio']:.2f} "
            f"(at most 2: {'yes' if r['ok'] else 'no'})"
        )
    for r in of('launch'):
        print(
            f"Started as from a notebook, {r['name']}: {r['ranks']} processes on "
            f"{', '.join(r['devices'])}, losses off one process's by {r['loss_gap']:.1e} "
            f"({'yes' if r['ok'] else 'no'})"
        )
    for r in of('failed')+of('left out'):
        print(f"  {r['what']}: {r['part']} {r['name']}: {r['error'][:200]}")


def run(a):
    n = a.ranks or (2 if a.tiny else torch.cuda.device_count())
    folder = Path(os.environ.get('OUT') or root/'runs')
    folder.mkdir(parents=True, exist_ok=True)
    start, rows, scratch = time.time(), [], tempfile.mkdtemp()
    def note(r):
        rows.append(r)
        (folder / 'parallel_gpu.json').write_text(
            json.dumps(
                dict(
                    ranks=n,
                    tiny=a.tiny,
                    began=time.strftime('%Y-%m-%d', time.gmtime(start)),
                    rows=rows,
                ),
                indent=1,
            )
            + '\n'
        )
        print(f'[{time.time()-start:4.0f} s] {r["part"]}: {line(r)}', flush=True)
    try:
        for name in [o for o in a.only.split(',') if o] or list(PARTS):
            _, most, ranks, least = PARTS[name]
            if (
                name == 'sdxl_plain'
                and not a.tiny
                and any(
                    r['what'] == 'sdxl'
                    and r['ranks'] == 1
                    and r['optim'] == 'adamw'
                    and r['batch_each'] == 2
                    for r in rows
                )
            ):
                continue
            left = a.limit-(time.time()-start)
            if left < least:
                note(dict(part=name, what='left out', name=name, error=f'{left:.0f} s left'))
                continue
            try:
                drive(
                    name,
                    a,
                    ranks or n,
                    time.time() + min(most * (4 if a.tiny else 1), left - 8),
                    note,
                    scratch,
                )
            except Exception as e: note(dict(part=name, what='failed', name=name, error=small(e)))
    finally: shutil.rmtree(scratch, ignore_errors=True)
    table(rows)
    print(f'all: {time.time()-start:.0f} s; rows in {folder/"parallel_gpu.json"}')
    return any(r['what'] in ('failed', 'left out') for r in rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=('run', 'part'))
    p.add_argument('name', nargs='?', choices=tuple(PARTS))
    p.add_argument('--only', default='', help='parts, separated by commas: '+', '.join(PARTS))
    p.add_argument('--tiny', action='store_true', help='toy networks on the CPU, gloo')
    p.add_argument('--ranks', type=int, help='processes; all GPUs when absent')
    p.add_argument('--limit', type=float, default=470, help='seconds after which nothing goes on')
    p.add_argument('--until', type=float, default=float('inf'), help=argparse.SUPPRESS)
    p.add_argument('--folder', help='for the part resume: where its checkpoints go')
    a = p.parse_args()
    if a.what == 'part':
        if not a.name: p.error(f'which part? {", ".join(PARTS)}')
        a.until = a.until if a.until < 1e12 else time.time()+PARTS[a.name][1]
        if a.name == 'resume' and not a.folder:
            p.error('resume needs --folder, a place for its checkpoints')
        return part(a)
    if bad := [o for o in a.only.split(',') if o and o not in PARTS]:
        p.error(f'unknown parts: {", ".join(bad)}; known are {", ".join(PARTS)}')
    if a.tiny: a.limit = max(a.limit, 900)
    elif torch.cuda.device_count() < 2:
        p.error('fewer than two GPUs here: use --tiny for a dry run')
    if run(a): sys.exit(1)


if __name__ == '__main__': main()
