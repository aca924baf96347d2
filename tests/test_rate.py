"Learning rates that fall, and a guard that knows where a run begins"
from dataclasses import replace

import pytest
import torch

from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, toy_config
from dmd2_nb.guards import Alarm, Guard
from dmd2_nb.jobs import distill_job
from dmd2_nb.nets import ToyNet
from dmd2_nb.recipes import falling_rate, recipe
from dmd2_nb.toy import ring
from dmd2_nb.train import train


def tiny(**changes):
    torch.manual_seed(0)
    return DMD2.from_teacher(
        ring(8),
        replace(toy_config, batch=16, warmup_fake=2, ttur=1, **changes),
        init=EDMPrecond(ToyNet(width=16), sigma_data=1.4),
    )


def test_rates_follow_the_factor():
    dmd = tiny(lr_g=1e-3, lr_fake=4e-3)
    dmd.rate = falling_rate(1., 10, 0.5, 0.01)
    seen = [
        (dmd.opt_g.param_groups[0]['lr'], dmd.opt_fake.param_groups[0]['lr'])
        for _ in train(dmd, None, 10)
    ]
    assert [f for _, f in seen] == pytest.approx([4e-3*dmd.rate(i) for i in range(10)])
    assert [g for g, _ in seen[2:]] == pytest.approx([1e-3*dmd.rate(i) for i in range(2, 10)])
    assert seen[4][1] == 4e-3 and seen[9][1] < 0.15*4e-3


def test_job_passes_its_recipes_decay(tmp_path, monkeypatch):
    from dmd2_nb import jobs
    asked = []
    monkeypatch.setattr(jobs, 'falling_rate', lambda *a: asked.append(a) or falling_rate(*a))
    r = replace(
        recipe('fashion16'),
        config=replace(recipe('fashion16').config, batch=4, warmup_fake=1, gan_start=0),
        every=dict(log=2, show=0, save=0, eval=0),
        decay=0.4,
    )
    distill_job(r, out=tmp_path, name='run', device='cpu', iters=4, stop=3, say=None)
    assert asked == [(1., 4, 0.4, 0.01)]


def test_brightness_counts_from_the_start():
    dmd = tiny()
    guard = Guard(dmd, (0.615, 0.538))
    dark = dict(x_mean=[0.05], x_std=[0.34])  # as `look` gives them
    guard.brightness(dark)  # a copy of the teacher's single guess: nothing has been trained yet
    dmd.g_updates = 1
    guard.brightness(dark)
    with pytest.raises(Alarm, match='brightness'):
        guard.brightness(dict(x_mean=[-0.6], x_std=[0.34]))
    other = Guard(dmd, (0.615, 0.538))
    other.load(guard.state())
    other.brightness(dark)
    with pytest.raises(Alarm, match='brightness'): Guard(dmd, (0.615, 0.538)).brightness(dark)
