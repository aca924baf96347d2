"""A seeded run in the plane must arrive, and must not with the gradient turned round; the toy logs
must be what their script writes"""
import csv
from pathlib import Path

import pytest
import torch

from dmd2_nb import distill
from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond, dsm_loss
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.metrics import sample_floor, sliced_wasserstein
from dmd2_nb.nets import ToyNet
from dmd2_nb.noise import sample_sigma
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.toy import ring
from dmd2_nb.train import train

runs = Path(__file__).resolve().parent.parent/'data'/'runs'
n, mix = 512, ring(8)
cfg = DMD2Config(
    levels=(2.5,),
    ttur=3,
    batch=256,
    lr_g=1e-3,
    lr_fake=2e-3,
    betas_g=(0.0, 0.99),
    betas_fake=(0.0, 0.99),
    gan_g=0.0,
    gan_d=0.0,
    dm_bins=(150, 650),
    fake_bins=(50, 750),
    warmup_fake=50,
    ema_halflife=30,
    dtype='float32',
    seed=1,
)


@pytest.fixture(scope='module')
def net():
    "What a teacher's copy is where the teacher has weights"
    torch.manual_seed(0)
    D = EDMPrecond(ToyNet(width=64, depth=3), sigma_data=mix.std, sigma_max=20.)
    opt = torch.optim.Adam(D.parameters(), 2e-3)
    for i in range(150):
        loss = dsm_loss(
            D,
            mix.sample(256, seed=i),
            sample_sigma(D, 256, generator=rng(i)),
            noise=torch.randn(256, 2, generator=rng(i, 1)),
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    return D


@pytest.fixture(scope='module')
def floor():
    seeds = iter(range(100, 200))
    return sample_floor(sliced_wasserstein, lambda k: mix.sample(k, seed=next(seeds)), n, 10)[0]


def distance(net, updates):
    "Sliced Wasserstein distance to the data before and after a run"
    dmd, z, ref = (
        DMD2.from_teacher(mix, cfg, init=net),
        torch.randn(n, 2, generator=rng(7)),
        mix.sample(n, seed=7),
    )
    def now(): return sliced_wasserstein(few_step_sample(dmd.ema, z, dmd.sigmas), ref)
    start = now()
    for _ in train(dmd, None, cfg.warmup_fake+cfg.ttur*updates): pass
    assert dmd.g_updates==updates
    return start, now()


def test_run_arrives(net, floor):
    start, end = distance(net, 200)
    assert start > 4*floor and end < 2*floor


def test_turned_gradient_does_not_arrive(net, floor, monkeypatch):
    right = distill.dmd_loss
    monkeypatch.setattr(distill, 'dmd_loss', lambda *args: -right(*args))
    start, end = distance(net, 100)
    assert end > start > 2*floor


@pytest.mark.parametrize('path', sorted(runs.glob('toy_*.csv')), ids=lambda p: p.stem)
def test_logs_are_whole(path):
    "Each row of a log has each column, and no run is logged twice"
    with open(path, newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert rows and all(None not in r and None not in r.values() for r in rows)
    numbers = {
        'sw',
        'mmd',
        'cover',
        'near',
        'least',
        'kl',
        'seconds',
        'precision',
        'recall',
        'x',
        'y',
        'zx',
        'zy',
        'mean',
        'cloud',
        'points',
        'exact_kl',
    }
    keys = [tuple(v for k, v in r.items() if k not in numbers) for r in rows]
    assert path.stem=='toy_landing' or len(set(keys)) == len(keys)


def test_logs_are_small():
    size = lambda files: sum(p.stat().st_size for p in files if p.is_file())
    assert size(runs.glob('toy_*.csv')) < 400_000 and size(runs.rglob('*')) < 1_500_000
