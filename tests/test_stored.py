"""Formats are promises: what earlier versions wrote opens, goes on and draws the same

Weights are read bit by bit. What is computed from them may differ in its last digits on another
processor or another PyTorch, so samples are compared to 1e-4, and ten more iterations by their
distance from the stored ones as a share of the way that the run went. Other instructions, threads
and kernels came to 0.03 at most (Adam without a mean turns the sign of what is nearly zero); a lost
optimiser state came to 0.36 and more, and a run that stands still is at 1. The bound is 0.1."""
import json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import make_stored
from dmd2_nb import load_generator
from dmd2_nb.system.checkpoint import load_folder, steps
from dmd2_nb.system.tensors import read_tensors

versions = sorted(Path(__file__).parent.glob('stored_*'))
each = pytest.mark.parametrize('stored', versions, ids=lambda p: p.name)


def distance(a, b): return sum((a[k].double()-v.double()).square().sum() for k, v in b.items()).sqrt()


def test_there_are_some(): assert versions


@each
def test_a_generator_draws_the_same(stored):
    "Its weights as they lie in the file, its samples to 1e-4"
    g = load_generator(stored/'generator')
    raw = read_tensors(stored/'generator'/'generator.safetensors')[0]
    assert all(torch.equal(g.G.state_dict()[k], v) for k, v in raw.items())
    with np.load(stored/'samples.npz') as f: want = torch.from_numpy(f['x'])
    assert (g.sample(4, seed=5)-want).abs().max() < 1e-4


@each
def test_a_checkpoint_opens(stored):
    "Both of the last two, whole: their sums are checked on reading"
    run = next((stored/'begun'/'runs').iterdir())
    found = [load_folder(p)[1]['step'] for p in steps(run/'state')]
    assert found == [make_stored.first, 10]
    assert json.loads((run/'config.json').read_text())['config']['levels'] == [10., 1.]


@each
def test_a_run_goes_on(stored, tmp_path, monkeypatch):
    "The same command with more iterations continues it, and each network goes the way it went then"
    shutil.copytree(stored/'begun', tmp_path/'begun')
    monkeypatch.chdir(tmp_path/'begun')
    code, said = make_stored.give(make_stored.later)
    assert code == 0 and f'goes on at iteration {make_stored.first}' in said, said
    assert [p.name for p in Path('runs').iterdir()] == ['fashion16-1']
    state = Path('runs/fashion16-1/state')
    for n in make_stored.networks:
        begun, now, then = (
            read_tensors(p/f'{n}.safetensors')[0]
            for p in (
                stored/'begun'/state/f'step-{make_stored.first}',
                state/f'step-{make_stored.later}',
                stored/'later',
            )
        )
        assert begun.keys() == now.keys() == then.keys()
        share = distance(now, then)/distance(begun, then)
        assert share < .1, (n, share)
