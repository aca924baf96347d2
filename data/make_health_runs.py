"""Healthy runs that `health` learns its bands from, and one that is not, as runs/good/*.csv and runs/sick_toy.csv.

    python data/make_health_runs.py --out data/runs [--toy | --fashion] [--workers 4]
    python data/make_health_runs.py --add emoji32 runs/emoji32-1 other/log.csv data/runs/emoji32_sweep.csv:p1   # logs that are there already
    python data/make_health_runs.py --check                                                                     # each log, judged by the others of its recipe

Toy runs: the ring, 2,000 iterations with the GAN on, watched by a `Guard` that must not raise an alarm. fashion16: the bundled recipe
under other seeds. A log that is added is a run's folder, its log.csv, or FILE:ROW of a table of several runs; it counts from then on, and the
check that follows tells whether the others of its recipe agree. Columns that `health` does not use are left out. The sick run is a toy run whose learning rates are ten times the recipe's, unwatched."""
import argparse, csv, os, shutil, sys, tempfile
os.environ.setdefault('OMP_NUM_THREADS', '1')
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond, dsm_loss
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.guards import Guard
from dmd2_nb.health import bands, good_logs, health, kind_of, signals
from dmd2_nb.jobs import COLUMNS, distill_job
from dmd2_nb.nets import ToyNet
from dmd2_nb.recipes import recipe
from dmd2_nb.runs import CsvLog, Run, follow, read_log
from dmd2_nb.toy import ring
from dmd2_nb.train import train

toy = DMD2Config(
    levels=(2.5,),
    ttur=5,
    batch=256,
    lr_g=1e-3,
    lr_fake=2e-3,
    lr_head=2e-3,
    betas_g=(0.0, 0.99),
    betas_fake=(0.0, 0.99),
    gan_g=0.03,
    gan_d=0.1,
    dm_bins=(150, 650),
    fake_bins=(50, 750),
    gan_bins=(50, 700),
    gan_start=40,
    warmup_fake=100,
    ema_halflife=50.0,
    dtype='float32',
)


def toy_net(mix, seed, steps=400):
    "A small denoiser fitted to the ring: what a copy of the teacher would be"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = EDMPrecond(ToyNet(width=48), sigma_data=mix.std, sigma_max=20.)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for i in range(steps):
        for g in opt.param_groups: g['lr'] = 2e-3*(1-i/steps)
        loss = dsm_loss(
            net,
            mix.sample(256, generator=rng(seed, 1, i)),
            torch.exp(1.5 * torch.randn(256, generator=rng(seed, 2, i)) - 0.5),
            noise=torch.randn(256, 2, generator=rng(seed, 3, i)),
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net


def toy_run(seed, **changes):
    "`(run, guard, real batches from an iteration on)` of a toy run with the GAN"
    mix = ring()
    cfg = replace(toy, seed=seed, **changes)
    dmd = DMD2.from_teacher(mix, cfg, init=toy_net(mix, seed))
    def reals(start=0):
        for i in count(start): yield mix.sample(cfg.batch, generator=rng(seed, 9, i)), None
    return dmd, Guard(dmd, (0., mix.std)), reals


def toy_job(out, seed, name, steps=2000, fast=1., watch=True):
    dmd, guard, reals = toy_run(
        seed, lr_g=toy.lr_g * fast, lr_fake=toy.lr_fake * fast, lr_head=toy.lr_head * fast
    )
    logs = train(dmd, None, steps, reals())
    with tempfile.TemporaryDirectory() as d:
        follow(
            guard.watch(logs) if watch else looked_at(guard, logs),
            Run(d),
            COLUMNS,
            steps,
            log_every=20,
            extra=lambda: dict(g_updates=dmd.g_updates) | guard.numbers(),
        )
        shutil.copy(Path(d)/'log.csv', Path(out)/name)
    return name


def looked_at(guard, logs):
    "Collects the guard's numbers without its alarms"
    for log in logs:
        if guard.given is not None and guard.dmd.step%10==0:
            a, b = guard.errors()
            guard.lag = a/b
        yield log


def fashion_job(out, seed, name):
    with tempfile.TemporaryDirectory() as d:
        run = distill_job(recipe('fashion16'), out=d, device='cpu', n_eval=500, seed=seed)
        shutil.copy(run/'log.csv', Path(out)/name)
    return name


USED = (
    'dmd_loss',
    'gan_d_loss',
    'grad_dm',
    'grad_gan',
    'grad_cos',
    'x_mean',
    'x_std',
    'critic_lag',
    'ema_dist',
)


def add(out, kind, source):
    "One more good run: `good/KIND_NAME.csv`"
    file, _, row = str(source).partition(':')
    path = Path(file)/'log.csv' if Path(file).is_dir() else Path(file)
    if row:
        with open(path, newline='', encoding='utf-8') as f:
            rows = [
                {k: float(v) for k, v in o.items() if v and k != 'run'}
                for o in csv.DictReader(f)
                if o['run'] == row
            ]
    else: rows = read_log(path)
    if len(rows) < 20 or len(signals(rows)) < 3:
        raise SystemExit(
            f'{source}: {len(rows)} rows with {len(signals(rows))} signals are too few'
        )
    name = row or next(
        str(i) for i in count(1) if not (Path(out) / 'good' / f'{kind}_{i}.csv').exists()
    )
    file = Path(out)/'good'/f'{kind}_{name}.csv'
    file.unlink(missing_ok=True)
    log = CsvLog(file, ('step', *(k for k in USED if any(k in o for o in rows))))
    for o in rows: log.add(o)
    print(f'{source} is {file}')


def check():
    "Each stored log beside the others of its recipe"
    for name in good_logs():
        others = [rows for n, rows in good_logs(kind_of(name)).items() if n != name]
        h = health(good_logs()[name], bands(others)) if others else ()
        off = [f'{s.name} {s.value:.3g}, others {s.low:.3g} to {s.high:.3g}' for s in h if not s.ok]
        print(
            f"{name:20} {len(others)} others: {'; '.join(off) or ('healthy' if others else 'nothing to compare with')}"
        )


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', default='data/runs')
    p.add_argument('--workers', type=int, default=1)
    p.add_argument('--toy', action='store_true')
    p.add_argument('--fashion', action='store_true')
    p.add_argument('--add', nargs='+', metavar='WORD', help='a recipe, then logs')
    p.add_argument('--check', action='store_true')
    a = p.parse_args()
    if a.add:
        for source in a.add[1:]: add(a.out, a.add[0], source)
    if a.add or a.check:
        check()
        raise SystemExit
    both, out = not (a.toy or a.fashion), Path(a.out)
    (out/'good').mkdir(parents=True, exist_ok=True)
    jobs = []
    if a.toy or both:
        jobs += [(toy_job, out, s, f'good/toy_{s}.csv') for s in range(3)] + [
            (toy_job, out, 0, 'sick_toy.csv', 2000, 10.0, False)
        ]
    if a.fashion or both: jobs += [(fashion_job, out, s, f'good/fashion16_{s}.csv') for s in (1, 2)]
    with ProcessPoolExecutor(a.workers, get_context('spawn')) as pool:
        for f in [pool.submit(*j) for j in jobs]: print(f.result(), flush=True)
