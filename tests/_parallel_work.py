"What the processes of test_parallel.py run; each function returns JSON-able facts of its rank"
import functools, itertools, os, signal, time
from dataclasses import replace

import torch

from dmd2_nb.core import cond_index
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.nets import ToyNet, UNet
from dmd2_nb.parallel import World, in_step, setup
from dmd2_nb.parallel_run import ParallelDMD2, load_parallel, save_parallel
from dmd2_nb.regression import TeacherPairs
from dmd2_nb.train import train
from dmd2_nb.unet import ADMUNet

cfg = DMD2Config(
    levels=(10.0, 2.0),
    batch=16,
    ttur=2,
    lr_g=1e-3,
    lr_fake=1e-3,
    lr_head=1e-3,
    gan_g=1e-2,
    gan_d=1e-2,
    guidance=2.0,
    ema_halflife=3.0,
    clip=0.5,
    dtype='float64',
    seed=3,
)


def net(seed=0, kind='toy'):
    torch.manual_seed(seed)
    make = dict(
        toy=lambda: ToyNet(width=16, depth=2, label_dim=4),
        unet=lambda: UNet(8, 1, 4, channels=(8, 16), emb=16),
        adm=lambda: ADMUNet(
            8,
            1,
            1,
            label_dim=4,
            model_channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            dropout=0.0,
        ),
    )
    D = EDMPrecond(make[kind]()).double()
    for p in D.parameters(): p.data += 0.05*torch.randn_like(p)  # the last layer begins with zeros
    return D


def data(cfg, shape, world=World(), start=0):
    "Conditions and real batches of this rank: its rows of the whole batch, drawn from (7, step)"
    n = cfg.batch//world.size
    for step in itertools.count(start):
        g = torch.Generator().manual_seed(7000+step)
        labels, other = torch.randint(4, (2, cfg.batch), generator=g)
        x = torch.randn(cfg.batch, *shape, generator=g, dtype=torch.float64)
        yield cond_index((labels, (x, other)), world.rows(n))


def run(dmd, steps, world=World(), start=0):
    a, b = itertools.tee(data(dmd.cfg, dmd.shape, world, start))
    return list(train(dmd, (c for c, _ in a), steps, (r for _, r in b)))


def gap(a, b):
    "Largest difference of two lists of logs"
    assert [sorted(o) for o in a] == [sorted(o) for o in b]
    return max(abs(float(x[k]-y[k])) for x, y in zip(a, b) for k in x)


def weights_gap(ref, dmd):
    "Largest difference of the weights of two runs, asked on rank 0"
    from dmd2_nb.parallel import gather_state
    res = 0.
    for n in ('G', 'fake', 'head', 'ema'):
        a, b = (getattr(d, n) for d in (ref, dmd))
        if a is None: continue
        a, b = (m.net if n == 'ema' else m for m in (a, b))
        res = max(
            [
                res,
                *(
                    float((v - w).abs().max())
                    for v, w in zip(a.state_dict().values(), gather_state(b).values())
                ),
            ]
        )
    return res


def make(cls=ParallelDMD2, cfg=cfg, kind='toy', **kwargs):
    kwargs |= (
        dict(
            pairs=TeacherPairs(
                net(1, kind),
                torch.tensor([10.0, 1.0]),
                32,
                net(1, kind).shape,
                torch.arange(32) % 4,
            )
        )
        if cfg.w_reg
        else {}
    )
    return cls.from_teacher(net(1, kind), cfg, init=net(0, kind), **kwargs)


@functools.cache
def alone(steps, cfg, kind, data):
    "The run in one process: its logs and the finished run"
    ref = make(DMD2, cfg, kind)
    return run(ref, steps) if data else list(train(ref, None, steps)), ref


def alike(world, steps=6, cfg=cfg, kind='toy', data=True, **kwargs):
    "How far a run over all ranks is from the same run in one process"
    (logs, ref), dmd = (
        alone(steps, cfg, kind, data),
        make(cfg=cfg, kind=kind, world=world, check_every=1, **kwargs),
    )
    return [
        gap(logs, run(dmd, steps, world) if data else list(train(dmd, None, steps))),
        weights_gap(ref, dmd),
    ]


def fails(f):
    "What an error says"
    try: f()
    except Exception as e: return f'{type(e).__name__}: {e}'


def channels_last(w, folder):
    "A network in the memory format of a GPU is saved by two ranks and goes on: the largest gap of the losses"
    def begin():
        dmd = make(world=w, kind='unet')
        for m in (dmd.G, dmd.fake): m.to(memory_format=torch.channels_last)
        return dmd
    dmd = begin()
    run(dmd, 3, w)
    save_parallel(dmd, f'{folder}/last', position=3)
    other = begin()
    load_parallel(other, f'{folder}/last')
    return gap(run(dmd, 3, w, 3), run(other, 3, w, 3))


def two_ranks(folder):
    torch.set_default_dtype(torch.float64)
    res = {}
    with setup('cpu', timeout=60) as w:
        other = replace(cfg, gan_g=0., gan_d=0., w_reg=0.5, guidance=1.)
        mixed = replace(cfg, rollout='mix', levels=(10., 5., 2.), gan_start=1, warmup_fake=1)
        res['equal'] = dict(
            ddp=alike(w),
            fsdp=alike(w, mode='fsdp'),
            ddp_unet=alike(w, 4, kind='unet'),
            fsdp_unet=alike(w, 4, kind='unet', mode='fsdp', remat=True),
            ddp_regression=alike(w, 4, other, data=False),
            fsdp_regression=alike(w, 4, other, data=False, mode='fsdp', accum=2),
            ddp_adm=alike(w, 3, kind='adm', remat=True),
            fsdp_adm=alike(w, 3, kind='adm', mode='fsdp', remat=True),
            ddp_mix=alike(w, 8, mixed),
            fsdp_mix=alike(w, 8, mixed, mode='fsdp'),
            fsdp_kept=alike(w, mode='fsdp', keep=True),
            fsdp_kept_mix=alike(w, 8, mixed, mode='fsdp', keep=True),
            fsdp_kept_unet=alike(w, 4, kind='unet', mode='fsdp', remat=True, keep=True, accum=2),
        )
        res['accum'] = {
            f'{m}{s}': alike(w, 4, mode=m, accum=4, sync_each=s)
            for m in ('ddp', 'fsdp')
            for s in (False, True)
        } | dict(remat=alike(w, 4, kind='unet', accum=2, remat=True))
        res['last'] = channels_last(w, folder)
        for m in ('ddp', 'fsdp'):
            dmd = make(world=w, mode=m)
            run(dmd, 3, w)
            torch.manual_seed(20+w.rank)
            save_parallel(dmd, f'{folder}/{m}', position=3)
            drawn = torch.rand(()).item()
            load_parallel(make(world=w, mode=m), f'{folder}/{m}')
            res.setdefault('global', []).append([drawn, torch.rand(()).item()])
        res['empty'] = meta(w)
        res['low'] = low_precision(w)
        # an unequal amount of data
        dmd = make(world=w)
        pairs = list(itertools.islice(data(cfg, dmd.shape, w), 3+2*w.rank))
        a, b = itertools.tee(in_step(pairs))
        res['steps'] = len(list(train(dmd, (c for c, _ in a), None, (r for _, r in b))))
        # what must differ and does not
        same = list(itertools.islice(data(replace(cfg, batch=8), dmd.shape), 4))
        mine = list(itertools.islice(data(cfg, dmd.shape, w), 4))
        res['same_reals'] = fails(
            lambda: list(train(make(world=w), (c for c, _ in mine), 4, (r for _, r in same)))
        )
        res['same_conds'] = fails(
            lambda: list(train(make(world=w), (c for c, _ in same), 4, (r for _, r in mine)))
        )
        res['other_head'] = fails(
            lambda: make(world=w, head=torch.nn.Linear(16, 1).double() if w.rank else None)
        )
        res['uneven'] = fails(lambda: make(world=w, cfg=replace(cfg, batch=15)))
        res['other_config'] = fails(
            lambda: load_parallel(make(world=w, cfg=replace(cfg, lr_g=1.0)), f'{folder}/ddp')
        )
        dmd = make(world=w)
        dmd.step += w.rank
        res['other_step'] = fails(lambda: run(dmd, 1, w))
    return res


def sdxl(folder, kinds):
    """Tiny SDXL: how far a run over all ranks is from the same run in one process, by kind of roles
    and mode; then one process goes on where the ranks stopped"""
    from dmd2_nb.sdxl.adapter import TINY_SDXL, EpsDenoiser, make_unet
    from dmd2_nb.sdxl.conditioning import SDXLCond, micro_ids
    from dmd2_nb.sdxl.recipe import distill_sdxl, sdxl_config, sdxl_dmd2
    from dmd2_nb.sdxl.roles import FullCopies, SharedBase
    torch.set_default_dtype(torch.float64)
    c, res, n = (
        replace(
            sdxl_config,
            levels=sdxl_config.levels[:2],
            batch=2,
            ttur=2,
            dtype='float64',
            lr_warmup=0,
            lr_g=1e-4,
            lr_fake=1e-4,
            lr_head=1e-4,
        ),
        {},
        2,
    )
    def rand(i, *size): return torch.randn(n, *size, generator=torch.Generator().manual_seed(i))
    def cond(i): return SDXLCond(rand(i, 7, 64), rand(i+1, 32), micro_ids(n, 96).double())
    def new(kind, make=DMD2, **kwargs):
        D = EpsDenoiser(
            make_unet(
                TINY_SDXL,
                dtype=torch.float64,
                layers_per_block=1,
                transformer_layers_per_block=(1, 1, 1),
                block_out_channels=(16, 32, 32),
            ),
            shape=(4, 12, 12),
        )  # 12: a side that the head must be fitted to
        roles = SharedBase(D, rank=4) if kind == 'lora' else FullCopies(D)
        if kind == 'full': roles.generator.double(), roles.fake.double()
        return sdxl_dmd2(
            roles, replace(c, ema_halflife=3.0 * (kind == 'lora')), cond(0), make=make, **kwargs
        )
    class Shards:
        "Latents with conditions, drawn from seed and position"
        index = dict(kind='latents')
        def batches(self, n, seed, start, device):
            return (
                (rand(100 * i + seed, n, 4, 12, 12)[0], cond(100 * i + seed + 1))
                for i in itertools.count(start)
            )
    def go(dmd, steps, *args): return list(distill_sdxl(dmd, Shards(), steps, Shards(), *args))
    with setup('cpu', timeout=60) as w:
        for kind, mode in kinds:
            ref, dmd, one = (
                new(kind),
                new(kind, ParallelDMD2, world=w, mode=mode, check_every=1),
                new(kind),
            )
            logs, at = go(ref, 3), f'{folder}/{kind}'
            res[f'{kind} {mode}'] = [
                gap(logs, go(dmd, 3, at, 500, save_parallel, load_parallel)),
                weights_gap(ref, dmd),
            ]
            res[f'{kind} resumed'] = [
                gap(go(ref, 4), go(one, 4, at, 500, lambda *o: None)),
                weights_gap(ref, one),
            ]
    return res


def meta(world):
    "A run whose networks never were whole on any rank"
    from dmd2_nb.parallel import on_meta
    whole = {'G': net(0), 'fake': net(0), 'teacher': net(1)}
    def empty(seed): return on_meta(lambda: net(seed))
    def weights(part, name, shape): return whole[part].state_dict()[name]
    dmd = ParallelDMD2(empty(1), empty(0), empty(0), cfg, world=world, mode='fsdp', weights=weights)
    ref = make(DMD2)
    return [gap(run(ref, 4), run(dmd, 4, world)), weights_gap(ref, dmd)]


def low_precision(world):
    """Steps in bfloat16 and, with loss scaling, in float16: largest difference from one process,
    and whether ranks keep equal scales"""
    res = {}
    torch.set_default_dtype(torch.float32)
    for name in ('bfloat16', 'float16'):
        c = replace(cfg, dtype=name)
        def nets(): return net(1, 'unet').float(), net(0, 'unet').float(), net(0, 'unet').float()
        def go(dmd, w=World()):
            return [
                {k: float(v) for k, v in o.items()} for o in train(dmd, *batches(c, dmd.shape, w))
            ]
        ref = go(DMD2(*nets(), c))
        for m in ('ddp', 'fsdp'):
            dmd = ParallelDMD2(*nets(), c, world=world, mode=m)
            got = go(dmd, world)
            res[f'{m}_{name}'] = [
                max(
                    abs(a[k] - b[k]) / (abs(a[k]) + 0.1)
                    for a, b in zip(ref, got)
                    for k in ('fake_loss', 'norm_fake', 'x_std')
                ),
                dmd.scaler_fake.get_scale(),
            ]
    # an overflow in the piece of one rank skips the step on all
    for p in dmd.fake.parameters(): p.grad = torch.ones_like(p)
    if world.rank == 1: next(dmd.fake.parameters()).grad.to_local().view(-1)[0] = float('inf')
    before = [p.detach().to_local().clone() for p in dmd.fake.parameters()]
    dmd.scaler_fake.scale(torch.ones(()))
    dmd._update(dmd.opt_fake, dmd.scaler_fake)
    res['skipped'] = [
        sum(float((a - b.to_local()).abs().sum()) for a, b in zip(before, dmd.fake.parameters())),
        dmd.scaler_fake.get_scale(),
    ]
    torch.set_default_dtype(torch.float64)
    return res


def batches(c, shape, world, n=3):
    ds = [(cond, (x.float(), y)) for cond, (x, y) in itertools.islice(data(c, shape, world), n)]
    return (o[0] for o in ds), n, (o[1] for o in ds)


def four_ranks(folder):
    torch.set_default_dtype(torch.float64)
    from dmd2_nb.parallel_run import gather_net
    from dmd2_nb.weights import save_denoiser
    res = {}
    with setup('cpu', timeout=60) as w:
        res['equal'] = {
            'ddp': alike(w, 4),
            'fsdp': alike(w, 4, mode='fsdp'),
            'hybrid': alike(w, 4, mode='fsdp', shards=2),
            'hybrid_unet': alike(w, 3, kind='unet', mode='fsdp', shards=2),
        }
        ref = make(DMD2)
        logs = run(ref, 6)
        for name, mode, shards in (
            ('ddp', 'fsdp', None),
            ('fsdp', 'ddp', None),
            ('fsdp', 'fsdp', 2),
            ('one', 'fsdp', None),
            ('one', 'ddp', None),
        ):
            dmd = make(world=w, mode=mode, shards=shards)
            extra = load_parallel(dmd, f'{folder}/{name}')
            assert dmd.step == 3
            res[f'{name}_{mode}{shards or ""}'] = [
                gap(logs[3:], run(dmd, 3, w, extra['position'])),
                weights_gap(ref, dmd),
            ]
        dmd = make(world=w, mode='fsdp')
        load_parallel(dmd, f'{folder}/fsdp')
        whole = gather_net(dmd.ema.net)
        if w.main: save_denoiser(whole, f'{folder}/export.safetensors')
        save_parallel(dmd, f'{folder}/four', position=3)
        if w.main:
            (
                os.rename(
                    f'{folder}/four/fake/' + sorted(os.listdir(f'{folder}/four/fake'))[1],
                    f'{folder}/gone',
                )
            )
        from dmd2_nb.parallel import each_rank
        each_rank(0)
        res['lost_shard'] = fails(lambda: load_parallel(make(world=w), f'{folder}/four'))
        if w.main:
            os.rename(
                f'{folder}/gone', f'{folder}/four/fake/shard-00002-model-00001-of-00001.safetensors'
            )
        res['unwritable'] = fails(lambda: save_parallel(dmd, f'{folder}/export.safetensors/x'))
    return res


def back_at_two(folder):
    "Four ranks' checkpoint goes on at two, with files beside it that a loader of pickles would run"
    torch.set_default_dtype(torch.float64)
    res = {}
    with setup('cpu', timeout=60) as w:
        ref = make(DMD2)
        logs = run(ref, 6)
        for mode in ('fsdp', 'ddp'):
            dmd = make(world=w, mode=mode)
            extra = load_parallel(dmd, f'{folder}/four')
            res[mode] = [gap(logs[3:], run(dmd, 3, w, extra['position'])), weights_gap(ref, dmd)]
    return res


class Bomb:
    "Its pickle leaves a file where it is loaded"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')


def dies(how, folder):
    torch.set_default_dtype(torch.float64)
    with setup('cpu', timeout=30) as w:
        dmd = make(world=w, mode='fsdp')
        for i, _ in enumerate(train(dmd, *batches64(cfg, dmd.shape, w))):
            if w.rank == 1 and i == 1:
                with open(f'{folder}/died', 'w') as f: f.write(str(time.time()))
                if how == 'killed': os.kill(os.getpid(), signal.SIGKILL)
                if how == 'error': raise ValueError('image 7 is broken')
                if how == 'hangs': time.sleep(600)


def batches64(c, shape, world, n=50):
    ds = list(itertools.islice(data(c, shape, world), n))
    return (o[0] for o in ds), n, (o[1] for o in ds)


def command(args):
    from dmd2_nb.cli import distill_main
    return distill_main(args.split())


def listened(f):
    "What `f` gives, and the collectives of tensors that it took part in, in order; texts of ranks are left out"
    import torch.distributed as dist
    calls, own = [], {n: getattr(dist, n) for n in ('all_reduce', 'all_gather')}
    def note(name):
        def call(*args, **kwargs):
            t = args[-1]
            if t.is_floating_point(): calls.append([name, list(t.shape)])
            return own[name](*args, **kwargs)
        return call
    for n in own: setattr(dist, n, note(n))
    try: return f(), calls
    finally:
        for n, g in own.items(): setattr(dist, n, g)


def replayed(folder):
    """Two processes, plain and replayed: gaps between them, and from one process; the order of
    collectives; on from each other's checkpoints"""
    from _echo import EchoRunner, SeenByMany
    torch.set_default_dtype(torch.float64)
    pairs = replace(cfg, w_reg=0.5, ttur=1)
    res = dict(equal={}, alone={})
    with setup('cpu', timeout=120) as w:
        def new(cls=ParallelDMD2, c=cfg, check=0, **kwargs):
            return make(cls, c, world=w, check_every=check, **kwargs)
        def both(name, steps, **kwargs):
            a, b = new(**kwargs), new(**kwargs, runner=EchoRunner())
            (logs, plain), (again, order) = (
                listened(lambda: run(a, steps, w)),
                listened(lambda: run(b, steps, w)),
            )
            res['equal'][name] = [gap(logs, again), weights_gap_here(a, b)]
            return b, logs, plain, order
        b, logs, res['plain'], res['replayed'] = both('whole', 16)
        res['replays'] = [b.runner.replays(kind) for kind in ('generator', 'critic')]
        ref = make(DMD2)
        res['alone']['whole'] = [gap(run(ref, 16), logs), weights_gap(ref, b)]
        both('pieces, regression, checks, view', 9, c=pairs, cls=SeenByMany, accum=2, check=1)
        # saved plain, on replayed
        first, then, whole = new(), new(runner=EchoRunner()), new()
        logs = run(whole, 12, w)
        head = run(first, 2, w)
        save_parallel(first, f'{folder}/run')
        load_parallel(then, f'{folder}/run')
        res['resumed'] = [gap(logs, head+run(then, 10, w, 2)), weights_gap_here(whole, then)]
    return res


def weights_gap_here(a, b):
    "Largest difference of the weights that two runs hold on this rank"
    nets = [(getattr(a, n), getattr(b, n)) for n in ('G', 'fake', 'head')]+[(a.ema.net, b.ema.net)]
    return max(
        float((v - u).abs().max())
        for m, o in nets
        if m is not None
        for v, u in zip(m.state_dict().values(), o.state_dict().values())
    )
