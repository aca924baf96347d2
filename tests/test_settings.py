"Settings mean one thing: each is a number of its kind within its bounds, or one line names it"
import json
import math
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch

from dmd2_nb.core import check_torch, plain_torch, rng, stream_seed, torch_settings
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config, calibrate_gan_weight, toy_config
from dmd2_nb.nets import ToyNet
from dmd2_nb.recipes import RECIPES, config_changes
from dmd2_nb.toy import ring
from dmd2_nb.train import load_state, save_state, train

NUMBERS = [f.name for f in fields(DMD2Config) if type(f.default) in (int, float)]
WHOLE = [f.name for f in fields(DMD2Config) if type(f.default) is int]
SEVERAL = [f.name for f in fields(DMD2Config) if type(f.default) is tuple]


def refused(name, value, *words):
    "One line that names field and value"
    with pytest.raises(ValueError) as e: DMD2Config(**{name: value})
    text = str(e.value)
    assert name in text and len(text.splitlines()) == 1 and len(text) < 300
    for w in words: assert w in text
    return text


@pytest.mark.parametrize('name', NUMBERS)
def test_every_number(name):
    for bad in (
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        '5',
        'many',
        [1.0],
        (),
        {},
        10**400,
        1e300,
        1j,
        torch.tensor(math.nan),
        torch.zeros(2),
        np.array([1, 2]),
        np.bool_(True),
    ):
        refused(name, bad)
    if name != 'seed': refused(name, -1, '-1')


@pytest.mark.parametrize('name', WHOLE)
def test_every_count(name):
    refused(name, 2.5, '2.5', 'whole')
    for v in (3, 3., np.int64(3), np.float32(3), torch.tensor(3)):
        got = getattr(DMD2Config(**{name: v}), name)
        assert got == 3 and type(got) is int


@pytest.mark.parametrize('name', SEVERAL)
def test_every_list_of_numbers(name):
    for bad in (
        (),
        [1, math.nan],
        [math.inf, 1],
        [True, False],
        '12',
        [1, '2'],
        [None, 1],
        [[1, 2], [3, 4]],
        {1: 2},
        [1, 1e300],
        None,
    ):
        refused(name, bad)
    if name != 'levels':
        for bad in (0.5, [1], [1, 2, 3]): refused(name, bad, '2 numbers')


def test_what_the_numbers_mean():
    refused('betas_g', (0., 1.), 'below 1')
    refused('betas_fake', (-.1, .9), 'negative')
    refused('dm_bins', (20.5, 980), 'whole')
    refused('gan_bins', (700, 100), 'lo <= hi')
    refused('fake_bins', (0, 1000), '999')
    refused('levels', (5., 80.), 'fall')
    refused('levels', (80., 0.), 'above 0')
    refused('lr_g', 0, 'above 0')
    refused('rollout', 5)
    refused('dtype', torch.float16)
    refused('dtype', ['float16'])
    with pytest.raises(ValueError, match='dm_bins 20, 980 reach outside of fake_bins 100, 900'):
        DMD2Config(dm_bins=(20, 980), fake_bins=(100, 900))
    assert DMD2Config(dm_bins=(20, 980), fake_bins=(100, 900), w_dm=0.).dm_bins == (20, 980)
    assert DMD2Config(lr_fake=0, clip=0, ema_halflife=0).clip == 0.
    assert (
        DMD2Config(levels=torch.tensor([80.0, 5.0])).levels
        == (80.0, 5.0)
        == DMD2Config(levels=np.array([80.0, 5.0])).levels
    )
    json.dumps(
        asdict(DMD2Config(ttur=np.int64(3), gan_g=np.float32(0.5), dm_bins=np.array([20, 980])))
    )


@pytest.mark.parametrize('name', list(RECIPES))
def test_recipes_are_as_they_were(name):
    c = RECIPES[name].config
    assert DMD2Config.from_dict(json.loads(json.dumps(asdict(c)))) == c


@pytest.mark.parametrize(
    'text, word',
    [
        ('betas_g=0.5', '2 numbers'),
        ('dm_bins=inf', '2 numbers'),
        ('dm_bins=20,inf', 'finite'),
        ('dm_bins=20.5,900', 'whole'),
        ('lr_g=1e300', 'lr_g'),
        ('lr_g=0', 'above 0'),
        ('ttur=2.5', 'whole'),
        ('batch=1e400', 'finite'),
        ('guidance=nan', 'finite'),
        ('ema_halflife=inf', 'finite'),
        ('betas_fake=0,1', 'below 1'),
        ('levels=5,80', 'fall'),
        ('levels=', 'levels'),
        ('seed=99999999999999999999', 'seed'),
        ('ttur=True', 'no int'),
        ('ttur=3,4', 'whole'),
        ('rollout=back', 'rollout'),
        ('dtype=half', 'half'),
        ('warmup_fake=-1', 'negative'),
        ('lr_g=1,2', 'number'),
    ],
)
def test_the_same_from_text(text, word):
    with pytest.raises(ValueError) as e: config_changes([text])
    assert (
        word in str(e.value)
        and f'--set {text}' in str(e.value)
        and len(str(e.value).splitlines()) == 1
    )


def test_text_that_is_right():
    got = config_changes(
        [
            'seed=9007199254740993',
            'ttur=3',
            'lr_g=1e-4',
            'levels=80,5',
            'dm_bins=20,900',
            'betas_g=0,.9',
            'dtype=float16',
            'levels=80',
        ]
    )
    assert got == dict(
        seed=9007199254740993,
        ttur=3,
        lr_g=1e-4,
        levels=(80.0,),
        dm_bins=(20, 900),
        betas_g=(0.0, 0.9),
        dtype='float16',
    )


@pytest.mark.parametrize(
    'change',
    [
        dict(iters=0),
        dict(iters=2.5),
        dict(n_eval=True),
        dict(holdout=1.5),
        dict(decay=math.nan),
        dict(every=dict(log=-1)),
        dict(every=dict(save=2.5)),
        dict(teacher=dict(lr=0)),
        dict(teacher=dict(lr=math.inf)),
        dict(teacher=dict(batch=2.5)),
        dict(teacher=dict(label_dropout=2)),
        dict(teacher=dict(dtype='half')),
        dict(teacher=dict(groups=[17, 0.5])),
        dict(sampler=dict(steps=0)),
        dict(sampler=dict(S_churn=math.nan)),
        dict(four=dict(lr=1.0)),
        dict(four=dict(iters=0)),
        dict(four=dict(lr_g=math.nan)),
        dict(n_watch='500'),
    ],
)
def test_a_recipe_is_checked_too(change):
    with pytest.raises(ValueError) as e: replace(RECIPES['fashion16'], **change)
    assert len(str(e.value).splitlines()) == 1 and any(
        w in str(e.value) for w in (next(iter(change)), "'half'", 'lr_g')
    )


def small(**kw):
    torch.manual_seed(0)
    return DMD2.from_teacher(
        ring(),
        replace(toy_config, batch=8, warmup_fake=0, **kw),
        init=EDMPrecond(ToyNet(width=8), sigma_data=1.4, sigma_max=20.0),
    )


def reals(n=8):
    i = 0
    while True:
        yield ring().sample(n, seed=i), None
        i += 1


def test_clip_0_is_no_clipping():
    "The same weights as under a limit that is never reached; under the smallest limit nothing moves"
    ends = []
    for clip in (0., 1e9, 1e-12):
        dmd = small(clip=clip, gan_g=.1, gan_d=.1)
        start = [p.detach().clone() for p in dmd.G.parameters()]
        for _ in train(dmd, None, 4, reals()): pass
        ends.append(list(dmd.G.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends[:2]))
    assert any(not torch.equal(a, b) for a, b in zip(ends[0], start))


def test_gan_weight_puts_the_step_back():
    dmd = small(gan_g=.1, gan_d=.1)
    dmd.step = 7
    def broken():
        yield None
        raise OSError('the disk is gone')
    with pytest.raises(OSError): calibrate_gan_weight(dmd, broken())
    assert dmd.step == 7
    with pytest.raises(ValueError, match='conds ended after 2 batches of the 4 wanted'):
        calibrate_gan_weight(dmd, [None, None])
    assert dmd.step == 7
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match='batches'): calibrate_gan_weight(dmd, batches=bad)
    assert calibrate_gan_weight(dmd, [None]*4) == calibrate_gan_weight(dmd) and dmd.step == 7


# -- what is set for all of PyTorch --
ODD = dict(
    float64=(lambda: torch.set_default_dtype(torch.float64), 'float64'),
    float16=(lambda: torch.set_default_dtype(torch.float16), 'float16'),
    bfloat16=(lambda: torch.set_default_dtype(torch.bfloat16), 'bfloat16'),
    device=(lambda: torch.set_default_device('meta'), 'meta'),
)


@pytest.fixture
def as_before():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision('highest')
    assert torch_settings() == torch_settings() | dict(
        default_dtype='float32', default_device='cpu', deterministic=False
    )


@pytest.mark.parametrize('name', ODD)
def test_global_settings_are_refused(name, as_before):
    dmd = small()
    put, word = ODD[name]
    put()
    with pytest.raises(ValueError, match=word) as e: next(train(dmd, None, 1))
    assert len(str(e.value).splitlines()) == 1 and dmd.step == 0


def test_modes_are_refused():
    for mode, word in (
        (torch.no_grad(), 'no_grad'),
        (torch.inference_mode(), 'inference'),
        (torch.autocast('cpu', torch.bfloat16), 'autocast'),
    ):
        dmd = small()
        with mode, pytest.raises(ValueError, match=word): next(train(dmd, None, 1))


def test_float64_throughout_is_no_fault(as_before):
    torch.set_default_dtype(torch.float64)
    check_torch(torch.float64)
    dmd = DMD2.from_teacher(
        ring(),
        replace(toy_config, batch=8, warmup_fake=0, dtype='float64'),
        init=EDMPrecond(ToyNet(width=8)),
        shape=(2,),
    )
    assert next(iter(dmd.G.parameters())).dtype == torch.float64


def test_plain_torch(as_before):
    "Inside all is as PyTorch starts, after an error too all is as it was"
    start = torch_settings()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device('meta')
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision('high')
    mine = torch_settings()
    with pytest.raises(OSError), torch.no_grad(), plain_torch():
        assert (
            torch_settings() == start
            and torch.zeros(1).dtype == torch.float32
            and torch.is_grad_enabled()
        )
        check_torch()
        raise OSError
    assert torch_settings() == mine and torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_run_goes_on_under_the_settings_it_had(tmp_path, as_before):
    dmd = small()
    for _ in train(dmd, None, 2): pass
    save_state(dmd, tmp_path/'run')
    torch.set_float32_matmul_precision('high')
    with pytest.raises(ValueError, match='matmul_precision highest instead of high'):
        load_state(small(), tmp_path/'run')
    torch.set_float32_matmul_precision('highest')
    load_state(again := small(), tmp_path/'run')
    assert again.step == 2


# -- seeds --
def test_streams_of_neighbouring_seeds_have_nothing_in_common():
    seeds = [stream_seed(s, n) for s in range(-20, 200) for n in ('conds', 'reals')]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert len({s % 2**32 for s in seeds}) == len(seeds)
    assert stream_seed(3, 'conds') == stream_seed(3, 'conds')
    assert not torch.equal(
        torch.rand(8, generator=rng(0, 'a')), torch.rand(8, generator=rng(0, 'b'))
    )


def test_what_rng_promises():
    """On the CPU two seeds that agree in 32 bits are one stream, as the docstring says; and the
    draws of named steps stay what they were"""
    a, b = (torch.rand(8, generator=torch.Generator().manual_seed(s)) for s in (5, 5+2**32))
    assert torch.equal(a, b) and '32' in rng.__doc__
    assert [rng(*k).initial_seed() for k in ((0, 7), (-1, 2))] == [
        8508275851452630554,
        8848328423248327416,
    ]
