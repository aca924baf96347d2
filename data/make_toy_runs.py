"""Toy runs whose logs the notebooks 11b_ttur, 17_toy_dmd2 and 18_beyond show.

    python data/make_toy_runs.py --workers 16 --minutes 8.5 --out data/runs

Single-thread jobs, the most important first; each appends its rows to data/runs/toy_*.csv when it ends and is entered in
toy_jobs.csv. Jobs entered there are skipped, so a second call goes on. A job that would pass the time limit is left out."""
import argparse, csv, os, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from copy import deepcopy
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond, Guided, dsm_loss
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.fake_score import empirical_denoiser
from dmd2_nb.metrics import hist_kl, mmd, mode_coverage, mode_share, sliced_wasserstein
from dmd2_nb.nets import ToyNet
from dmd2_nb.noise import karras_sigmas, sample_sigma
from dmd2_nb.regression import TeacherPairs
from dmd2_nb.sampling import few_step_states, few_step_sample, heun_sample
from dmd2_nb.sdxl.adapter import FlowDenoiser
from dmd2_nb.toy import Mixture, ring, tree
from dmd2_nb.train import train
from dmd2_nb.ttur import ratio_sweep

recipe = DMD2Config(
    levels=(2.5,),
    ttur=5,
    batch=512,
    lr_g=1e-3,
    lr_fake=2e-3,
    lr_head=2e-3,
    betas_g=(0.0, 0.99),
    betas_fake=(0.0, 0.99),
    gan_g=0.0,
    gan_d=0.0,
    dm_bins=(150, 650),
    fake_bins=(50, 750),
    gan_bins=(50, 700),
    warmup_fake=100,
    ema_halflife=50,
    dtype='float32',
)
shared, rates = 1e-3, (3e-4, 1e-3, 2e-3)
scale = float(os.environ.get('TOY_SCALE', 1))  # shortens all runs, to try the script
# generator updates at ratio 5 and 10; ratio 1 goes on to three times as many, about the time of
# ratio 5
updates = int(1000*scale)
gan_weights = (0., 0.03, 0.1, 0.3, 1.)
dists = dict(ring=lambda: ring(8), tree=tree)

# -- pieces --
def init_net(D, seed, steps=600, width=64, depth=4, lr=2e-3, std=None):
    "A network fitted to the samples of mixture `D`: what a teacher's copy is where the teacher has weights"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = EDMPrecond(ToyNet(width=width, depth=depth), sigma_data=std or D.std, sigma_max=20.)
    opt, steps = torch.optim.Adam(net.parameters(), lr), int(steps*min(1, 4*scale))
    for i in range(steps):
        for g in opt.param_groups: g['lr'] = lr*(1-i/steps)
        loss = dsm_loss(
            net,
            D.sample(512, generator=rng(seed, 1, i)),
            sample_sigma(net, 512, generator=rng(seed, 2, i)),
            noise=torch.randn(512, 2, generator=rng(seed, 3, i)),
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net

def wrong_teacher(mix, name):
    "Wrong in a known way"
    if name=='exact': return mix
    if name=='wide': return mix.change(widths=1.6)
    if name=='missing': return mix.change(drop=(0,))
    if name=='eighth':
        w = mix.weights.clone()
        w[0] /= 8
        return mix.change(weights=w)
    raise ValueError(f"no teacher '{name}'")

def exact_kl(p, q, n=200_000):
    "KL(p || q) of two mixtures by sampling from p"
    x = p.sample(n, seed=0)
    return (p.logp(x)-q.logp(x)).mean().item()

def reals(mix, seed, n=512):
    "Endless real batches"
    i = 0
    while True:
        yield mix.sample(n, generator=rng(seed, 9, i)), None
        i += 1

class Judge:
    "All distances of one seed: the same noises and the same reference for every row"
    def __init__(self, mix, seed, n=4096):
        self.mix, self.n = mix, n
        self.z, self.ref = torch.randn(n, 2, generator=rng(seed, 77)), mix.sample(n, seed=1000+seed)
        self.fresh = mix.sample(n, seed=5000+seed)
        self.fair = mode_share(mix.sample(50_000, seed=7), mix)
    def __call__(self, x):
        share = mode_share(x, self.mix)
        return dict(
            sw=sliced_wasserstein(x, self.ref, 64),
            mmd=mmd(x[:1000], self.ref[:1000]),
            cover=mode_coverage(share, 0.2, self.fair),
            near=share.sum().item(),
            least=(share / self.fair)[:8].min().item(),
            kl=hist_kl(x, self.ref),
        )

class Oracle(nn.Module):
    "A critic that is never late: the exact denoiser of a fresh cloud"
    def __init__(self, net):
        super().__init__()
        self.net, self.exact = net, None
    def forward(self, x, sigma, cond=None): return self.exact(x, sigma)
    def sample_sigma(self, *args, **kw): return self.net.sample_sigma(*args, **kw)

class OracleDMD2(DMD2):
    "DMD2 whose fake score needs no training"
    def generator_step(self, cond=None, real=None):
        noise = torch.randn(self.cloud, 2, generator=rng(self.cfg.seed, self.step, 99))
        self.fake.exact = empirical_denoiser(few_step_sample(self.G, noise, self.sigmas))
        return super().generator_step(cond, real)
    def fake_step(self, x, cond=None, real=None):
        self.step += 1
        return {}

def oracle_run(teacher, net, cfg, cloud=2048):
    run = OracleDMD2(
        teacher, deepcopy(net), Oracle(deepcopy(net)), replace(cfg, ttur=1, warmup_fake=0)
    )
    run.cloud = cloud
    return run

class PerThousand(nn.Module):
    "A network with time in 0..1, called with time in 0..1000"
    def __init__(self, net):
        super().__init__()
        self.net, self.shape = net, net.shape
    def forward(self, x, t, cond=None): return self.net(x, t/1000, cond)
    def encode(self, x, t, cond=None): return self.net.encode(x, t/1000, cond)

def flow_teacher(mix, seed, steps=1500, lr=2e-3, classes=8):
    "A conditional flow-matching network, a sixth of its labels dropped"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        D = FlowDenoiser(PerThousand(ToyNet(width=64, depth=4, label_dim=classes)))
    opt, steps = torch.optim.Adam(D.parameters(), lr), int(steps*min(1, 4*scale))
    for i in range(steps):
        for g in opt.param_groups: g['lr'] = lr*(1-i/steps)
        g = rng(seed, 4, i)
        c = torch.randint(classes, (512,), generator=g)
        x, noise, t = (
            mix.sample(512, cond=c, generator=g),
            torch.randn(512, 2, generator=g),
            torch.rand(512, generator=g),
        )
        row = nn.functional.one_hot(c, classes)*(torch.rand(512, 1, generator=g)>1/6).float()
        loss = (D.net((1-t[:,None])*x + t[:,None]*noise, 1000*t, row) - (noise-x)).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return D.requires_grad_(False)

def precision_recall(x, ref, k=5):
    "Share of samples within the reference's k-neighbour balls, and the reverse"
    def inside(a, b):
        return (
            (torch.cdist(a, b) <= torch.cdist(b, b).kthvalue(k + 1, 1).values)
            .any(1)
            .float()
            .mean()
            .item()
        )
    return inside(x, ref), inside(ref, x)

# -- running --
class OutOfTime(Exception): pass
deadline = [float('inf')]

def follow(run, steps, at, judge, real=None, conds=None):
    """Train, calling `judge(run, seconds)` at the generator updates in `at`; the seconds are
    processor time of training alone"""
    at, used, last, res = set(at), 0., 0, []
    t = time.process_time()
    for _ in train(run, conds, steps, real):
        if run.g_updates!=last:
            last = run.g_updates
            if last%20==0 and time.time()>deadline[0]: raise OutOfTime
            if last in at:
                used += time.process_time()-t
                res += judge(run, used)
                t = time.process_time()
    return res

def both(judge, head):
    "Rows for the raw and the averaged generator"
    def f(run, used):
        return [
            dict(
                **head,
                net=n,
                updates=run.g_updates,
                iters=run.step,
                seconds=used,
                **judge(few_step_sample(G, judge.z, run.sigmas)),
            )
            for n, G in (('raw', run.G), ('ema', run.ema))
        ]
    return f

def cloud(name, x, n=150):
    return [dict(name=name, points=' '.join(f'{v:.2f}' for v in x[:n].flatten().tolist()))]

def match(dist, ratio, lr, seed, times=1, reg=0., gan=0.):
    "One row of the matching table"
    mix = dists[dist]()
    row = (
        f'r{ratio}'
        + (f'_fake_x{times}' if times > 1 else '')
        + (f'_reg{reg:g}' if reg else '')
        + (f'_gan{gan:g}' if gan else '')
    )
    cfg = replace(
        recipe,
        ttur=ratio,
        lr_g=lr,
        lr_fake=recipe.lr_fake * times,
        w_reg=reg,
        gan_g=gan,
        gan_d=0.1 if gan else 0.0,
        seed=seed,
    )
    pairs = TeacherPairs(mix, karras_sigmas(20, 0.01, 20.), 4096, (2,), seed=seed) if reg else None
    run = DMD2.from_teacher(mix, cfg, init=init_net(mix, seed), pairs=pairs)
    n = int(updates*(3 if lr==shared else 2.2)) if ratio==1 else updates
    judge = Judge(mix, seed)
    rows = follow(
        run,
        cfg.warmup_fake + n * ratio - ratio + 1,
        range(0, n + 1, max(1, n // 4 if lr != shared else n // 12 if ratio == 1 else n // 8)),
        both(judge, dict(dist=dist, row=row, lr=lr, seed=seed)),
        real=reals(mix, seed) if gan else None,
    )
    res = dict(toy_match=rows)
    if seed==0 and lr==shared and dist=='ring':
        res['toy_clouds'] = [
            o
            for k, G in (('raw', run.G), ('ema', run.ema))
            for o in cloud(f'match {dist} {row} {k}', few_step_sample(G, judge.z, run.sigmas))
        ]
    return res

def lines(seed):
    "Sample-to-sample floor, and what each wrong teacher would score"
    rows = []
    for dist in dists:
        mix = dists[dist]()
        judge = Judge(mix, seed)
        rows.append(dict(dist=dist, teacher='floor', seed=seed, exact_kl=0., **judge(judge.fresh)))
        for t in ('wide', 'missing', 'eighth') if dist=='ring' else ('wide',):
            T = wrong_teacher(mix, t)
            rows.append(
                dict(
                    dist=dist,
                    teacher=t,
                    seed=seed,
                    exact_kl=exact_kl(T, mix),
                    **judge(T.sample(judge.n, seed=6000 + seed)),
                )
            )
        T = init_net(mix, seed, steps=150)
        rows.append(
            dict(
                dist=dist,
                teacher='brief',
                seed=seed,
                exact_kl=float('nan'),
                **judge(heun_sample(T, judge.z, karras_sigmas(20, 0.01, 20.0))),
            )
        )
    return dict(toy_lines=rows)

def gan(dist, teacher, weight, seed, ratio=5, n=600):
    "Matching a wrong teacher, with the GAN at one weight"
    n = int(n*scale)
    mix = dists[dist]()
    cfg = replace(
        recipe, ttur=ratio, gan_g=weight, gan_d=0.1 if weight else 0.0, warmup_fake=200, seed=seed
    )
    if teacher=='brief':
        T = init_net(mix, seed, steps=150)
        run = DMD2.from_teacher(T, cfg)
    else:
        T = wrong_teacher(mix, teacher)
        run = DMD2.from_teacher(T, cfg, init=init_net(T, seed, std=mix.std))
    judge = Judge(mix, seed)
    rows = follow(
        run,
        cfg.warmup_fake + n * cfg.ttur - cfg.ttur + 1,
        (n // 2, n),
        both(judge, dict(dist=dist, teacher=teacher, weight=weight, seed=seed)),
        real=reals(mix, seed) if weight else None,
    )
    res = dict(toy_gan=rows)
    if seed==0 and dist=='ring' and teacher=='wide':
        res['toy_clouds'] = cloud(
            f'gan {dist} {teacher} {weight:g}', few_step_sample(run.ema, judge.z, run.sigmas)
        )
    return res

def multi(dist, rollout, width, seed, n=600):
    "Two steps of a small generator; distance after each"
    n = int(n*scale)*(1 if rollout=='one' else 2)  # each update trains one of the two steps
    mix = dists[dist]()
    levels = (10.,) if rollout=='one' else (10., 1.)
    cfg = replace(recipe, levels=levels, rollout='sim' if rollout=='one' else rollout, seed=seed)
    G, fake = init_net(mix, seed, width=width, depth=2), init_net(mix, seed)
    run = DMD2(mix, G, fake, cfg)
    judge = Judge(mix, seed)
    def after_each(run, used):
        rows = []
        for net, g in (('raw', run.G), ('ema', run.ema)):
            with torch.no_grad():
                xs = [
                    g(x, s)
                    for x, s in few_step_states(g, judge.z, run.sigmas, generator=rng(seed, 78))
                ]
            rows += [
                dict(
                    dist=dist,
                    rollout=rollout,
                    width=width,
                    seed=seed,
                    net=net,
                    updates=run.g_updates,
                    seconds=used,
                    step=i + 1,
                    **judge(x),
                )
                for i, x in enumerate(xs)
            ]
        return rows
    rows = follow(
        run, cfg.warmup_fake + n * cfg.ttur - cfg.ttur + 1, (n,), after_each, real=reals(mix, seed)
    )
    res = dict(toy_multi=rows)
    if seed==0 and dist=='ring' and width==24:
        with torch.no_grad():
            xs = [
                run.ema(x, s)
                for x, s in few_step_states(run.ema, judge.z, run.sigmas, generator=rng(seed, 78))
            ]
        res['toy_clouds'] = sum(
            (cloud(f'multi {rollout} step {i + 1}', x) for i, x in enumerate(xs)), []
        )
    return res

def paths(kind, seed=0, n=600):
    "Eight noises through a training, and where many noises land at its end"
    n = int(n*scale)
    mix = dists['ring']()
    cfg = replace(
        recipe,
        ttur=1 if kind == 'reg' else int(kind[1:]),
        w_reg=1.0 if kind == 'reg' else 0.0,
        seed=seed,
    )
    pairs = (
        TeacherPairs(mix, karras_sigmas(20, 0.01, 20.0), 4096, (2,), seed=seed)
        if kind == 'reg'
        else None
    )
    run = DMD2.from_teacher(mix, cfg, init=init_net(mix, seed), pairs=pairs)
    z8, z = torch.randn(8, 2, generator=rng(3)), torch.randn(400, 2, generator=rng(4))[:300]
    def where(run, used):
        return [
            dict(kind=kind, updates=run.g_updates, i=i, x=a, y=b)
            for i, (a, b) in enumerate(few_step_sample(run.G, z8, run.sigmas).tolist())
        ]
    n = 3*n if kind in ('reg', 'r1') else n
    rows = follow(
        run, cfg.warmup_fake + n * cfg.ttur - cfg.ttur + 1, range(0, n + 1, max(1, n // 40)), where
    )
    land = [
        dict(kind=kind, zx=a, zy=b, x=c, y=d)
        for (a, b), (c, d) in zip(z.tolist(), few_step_sample(run.ema, z, run.sigmas).tolist())
    ]
    if kind=='reg':
        land += [
            dict(kind='teacher', zx=a, zy=b, x=c, y=d)
            for (a, b), (c, d) in zip(
                z.tolist(), heun_sample(mix, z, karras_sigmas(20, 0.01, 20.0)).tolist()
            )
        ]
    return dict(toy_paths=rows, toy_landing=land)

def film(critic, seed=0, n=400):
    "The same start, with a learned critic at ratio 1 and 5 and with an exact one"
    n = int(n*scale)
    marks = (1, *(n*i//40 for i in (1, 3, 10, 20, 40)))
    mix = dists['ring']()
    net = init_net(mix, seed)
    cfg = replace(recipe, ttur=5 if critic=='learned5' else 1, seed=seed)
    run = oracle_run(mix, net, cfg) if critic=='oracle' else DMD2.from_teacher(mix, cfg, init=net)
    judge = Judge(mix, seed, 2048)
    def frame(run, used):
        x = few_step_sample(run.G, judge.z, run.sigmas)
        return [
            dict(
                critic=critic,
                updates=run.g_updates,
                sw=sliced_wasserstein(x, judge.ref, 64),
                near=mode_share(x, mix).sum().item(),
                seconds=used,
                cloud=' '.join(f'{v:.2f}' for v in x[:120].flatten().tolist())
                if run.g_updates in marks
                else '',
            )
        ]
    return dict(
        toy_film=follow(
            run,
            run.cfg.warmup_fake + n * cfg.ttur - cfg.ttur + 1,
            {1, *range(0, n + 1, max(1, n // 40))},
            frame,
        )
    )

def chase_run(ratio, times, seed, critic='learned', width=32, depth=2, target=2., std=0.5, lr=1e-3):
    """One Gaussian chases another; generator and critic both know the start. The critic's learning
    rate is `times` the generator's"""
    start, teacher = (
        Mixture(torch.ones(1), torch.tensor([[m, 0.0]]), std**2 * torch.eye(2)[None])
        for m in (-target, target)
    )
    net = init_net(start, seed, steps=300, width=width, depth=depth, std=std)
    cfg = replace(
        recipe, ttur=ratio, lr_g=lr, lr_fake=times * lr, batch=256, warmup_fake=100, seed=seed
    )
    return (
        oracle_run(teacher, net, cfg)
        if critic == 'oracle'
        else DMD2.from_teacher(teacher, cfg, init=net)
    )

def chase(critic, ratio, times, seed, n=200):
    "Overshoot and settling of the mean"
    n = int(n*scale)
    z = torch.randn(1024, 2, generator=rng(5))
    def measure(run): return few_step_sample(run.G, z, run.sigmas)[:,0].mean().item()
    track = ratio_sweep(lambda r, l: chase_run(r, l, seed, critic), (ratio,), (times,), n, measure)[
        ratio, times
    ]
    return dict(
        toy_chase=[
            dict(
                critic=critic,
                ratio=ratio,
                times=times,
                seed=seed,
                mean=' '.join(f'{v:.2f}' for v in track[::4]),
            )
        ]
    )

def beyond(guidance, weight, seed, n=400):
    "A flow teacher, distilled by the same DMD2"
    n = int(n*scale)
    mix = ring(8, std=0.45)
    T = flow_teacher(mix, seed)
    cfg = replace(
        recipe,
        guidance=guidance,
        gan_g=weight,
        gan_d=0.1 if weight else 0.0,
        dm_bins=(20, 850),
        fake_bins=(5, 950),
        gan_bins=(5, 900),
        warmup_fake=200,
        seed=seed,
    )
    run = DMD2.from_teacher(T, cfg)
    def label(i): return torch.randint(8, (512,), generator=rng(seed, 11, i))
    def conds(i=0):
        while True:
            yield label(i)
            i += 1
    def real(i=0):
        while True:
            c = label(1_000_000+i)
            yield mix.sample(512, cond=c, generator=rng(seed, 12, i)), c
            i += 1
    c = torch.arange(2000)%8
    z, ref = torch.randn(2000, 2, generator=rng(seed, 77)), mix.sample(2000, cond=c, seed=1000+seed)
    def score(x):
        p, r = precision_recall(x, ref)
        return dict(
            precision=p, recall=r, sw=sliced_wasserstein(x, ref, 64), mmd=mmd(x[:1000], ref[:1000])
        )
    head = dict(guidance=guidance, weight=weight, seed=seed)
    rows = follow(
        run,
        cfg.warmup_fake + n * cfg.ttur - cfg.ttur + 1,
        (n,),
        lambda run, used: [
            dict(**head, net=k, seconds=used, **score(few_step_sample(g, z, run.sigmas, c)))
            for k, g in (('raw', run.G), ('ema', run.ema))
        ],
        real=real(),
        conds=conds(),
    )
    if weight==0:
        rows.append(
            dict(
                **head,
                net='teacher',
                seconds=0.0,
                **score(heun_sample(Guided(T, guidance), z, karras_sigmas(20, 0.01, 20.0), c)),
            )
        )
        if guidance==1:
            rows.append(
                dict(
                    **head,
                    net='data',
                    seconds=0.0,
                    **score(mix.sample(2000, cond=c, seed=5000 + seed)),
                )
            )
    res = dict(toy_beyond=rows)
    if seed==0 and weight in (0., 0.3):
        res['toy_clouds'] = cloud(
            f'beyond {guidance:g} {weight:g}', few_step_sample(run.ema, z, run.sigmas, c)
        )
    return res

functions = dict(
    match=match,
    lines=lines,
    gan=gan,
    multi=multi,
    paths=paths,
    film=film,
    chase=chase,
    beyond=beyond,
)

def jobs(seeds):
    "All jobs, the most important first; (function, arguments)"
    S, both_d = range(seeds), tuple(dists)
    yield from (('lines', (s,)) for s in S)
    yield from (('match', (d, r, shared, s)) for s, d, r in product(S, both_d, (10, 5, 1)))
    yield from (
        ('match', (d, 1, shared, s, *more))
        for s, d, more in product(S, both_d, ((5,), (1, 0.25), (1, 1.0)))
    )
    yield from (('match', (d, 5, shared, s, 1, 0., 0.1)) for s, d in product(S, both_d))
    yield from (('film', (c,)) for c in ('learned5', 'learned', 'oracle'))
    yield from (('paths', (k,)) for k in ('r5', 'r1', 'reg'))
    yield from (
        ('gan', ('ring', 'wide', w, s, 2, 3000))
        for s, w in product(S, (0.0, 0.1, 0.3, 1.0, 3.0, 10.0))
    )
    yield from (
        ('chase', ('learned', r, l, s))
        for s, r, l in product(range(min(seeds, 3)), (10, 5, 4, 2, 1), (0.1, 0.3, 0.5, 1.0))
    )
    yield from (('chase', ('oracle', 1, 1., s)) for s in range(min(seeds, 3)))
    yield from (('multi', ('ring', r, 24, s)) for s, r in product(S, ('sim', 'real', 'mix', 'one')))
    yield from (('gan', ('ring', 'brief', w, s)) for s, w in product(S, (0., 0.03, 0.1, 0.3, 1.)))
    yield from (
        ('match', (d, r, l, s))
        for s, d, r, l in product(S, both_d, (10, 5, 1), [l for l in rates if l != shared])
    )
    yield from (
        ('beyond', (g, w, s))
        for s, g, w in product(range(min(seeds, 3)), (4.0, 2.0, 1.0), (0.0, 0.1, 0.3))
    )
    yield from (
        ('gan', ('ring', t, w, s)) for s, t, w in product(S, ('missing', 'eighth'), gan_weights)
    )
    yield from (('gan', ('tree', 'wide', w, s)) for s, w in product(S, (0., 0.1, 0.3, 1.)))
    yield from (('multi', ('tree', r, 24, s)) for s, r in product(S, ('sim', 'real', 'mix', 'one')))

def work(name, args, until):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    deadline[0] = until
    t = time.process_time()
    try:
        if time.time()>until: raise OutOfTime
        return functions[name](*args), time.process_time()-t
    except OutOfTime: return None, 0.

def short(v): return f'{v:.3g}' if isinstance(v, float) else v

def key(name, args): return '/'.join(map(str, (name, *args)))

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--out', default='data/runs')
    ap.add_argument('--workers', type=int, default=os.cpu_count())
    ap.add_argument('--minutes', type=float, default=8.5)
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--only', default='', help='start of the job name, such as gan/ring/wide')
    ap.add_argument('--list', action='store_true', help='list what is left to do')
    a = ap.parse_args()
    out, until = Path(a.out), time.time()+60*a.minutes
    out.mkdir(parents=True, exist_ok=True)
    done = (
        {r['job'] for r in csv.DictReader(open(out / 'toy_jobs.csv'))}
        if (out / 'toy_jobs.csv').exists()
        else set()
    )
    todo = [
        (n, x) for n, x in jobs(a.seeds) if key(n, x).startswith(a.only) and key(n, x) not in done
    ]
    if a.list:
        print(*(key(*j) for j in todo), sep='\n')
        sys.exit()
    left = 0
    def append(name, rows):
        new = not (out/f'{name}.csv').exists()
        with open(out/f'{name}.csv', 'a', newline='') as f:
            w = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
            if new: w.writeheader()
            w.writerows({k: short(v) for k, v in r.items()} for r in rows)
    with ProcessPoolExecutor(a.workers, mp_context=get_context('spawn')) as pool:
        futures = {pool.submit(work, n, x, until): key(n, x) for n, x in todo}
        for i, f in enumerate(as_completed(futures)):
            res, took = f.result()
            if res is None:
                left += 1
                continue
            for name, rows in res.items(): append(name, rows)
            append('toy_jobs', [dict(job=futures[f], seconds=took)])
            print(f'{i+1}/{len(todo)} {futures[f]} {took:.0f} s', flush=True)
    print(f'{left} of {len(todo)} jobs did not fit the time')
