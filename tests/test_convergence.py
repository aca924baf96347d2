"DMD2 distils: a short seeded run in 2D comes near the data, and with the gradient's sign flipped it does not"
from dataclasses import replace

import pytest
import torch

import dmd2_nb.distill
from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, toy_config
from dmd2_nb.metrics import sliced_wasserstein
from dmd2_nb.nets import ToyNet
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.toy import ring
from dmd2_nb.train import train

mix, n, steps = ring(8, std=.15), 2000, 800


@pytest.fixture(scope='module')
def floor():
    "Distance between two sets of data samples"
    return (
        sum(
            sliced_wasserstein(mix.sample(n, seed=2 * i), mix.sample(n, seed=2 * i + 1))
            for i in range(5)
        )
        / 5
    )


def distance_after(steps):
    "Distance of the average generator's samples from the data"
    torch.manual_seed(0)
    cfg = replace(
        toy_config, batch=256, ttur=1, lr_g=7e-4, lr_fake=1e-3, warmup_fake=50, ema_halflife=120.0
    )
    dmd = DMD2.from_teacher(
        mix, cfg, init=EDMPrecond(ToyNet(width=96), sigma_data=mix.std, sigma_max=20.0)
    )
    for _ in train(dmd, None, steps): pass
    x = few_step_sample(dmd.ema.net, torch.randn(n, 2, generator=rng(5)), dmd.sigmas)
    return sliced_wasserstein(x, mix.sample(n, seed=99)) if x.isfinite().all() else float('inf')


def test_a_run_comes_below_twice_the_floor(floor):
    start = distance_after(0)
    end = distance_after(steps)
    assert end < 2*floor < start


def test_uphill_it_does_not(monkeypatch, floor):
    true_loss = dmd2_nb.distill.dmd_loss
    monkeypatch.setattr(
        dmd2_nb.distill, 'dmd_loss', lambda x, real_x0, fake_x0: -true_loss(x, real_x0, fake_x0)
    )
    assert distance_after(steps) > 4*floor


def test_without_the_critic_it_does_not(monkeypatch, floor):
    "With the sample itself in place of the fake score's answer the modes shrink"
    true_loss = dmd2_nb.distill.dmd_loss
    monkeypatch.setattr(
        dmd2_nb.distill, 'dmd_loss', lambda x, real_x0, fake_x0: true_loss(x, real_x0, x.detach())
    )
    assert distance_after(300) > 2*floor
