"What `train` is fed: streams of every kind work or end in one clear line, and a GAN never loses half of its conditions"
import inspect
from dataclasses import replace
from importlib import import_module
from itertools import repeat

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dmd2_nb.core import batch_stream, cond_cat, cond_len, cond_map
from dmd2_nb.denoiser import EDMPrecond, Guided
from dmd2_nb.distill import DMD2, calibrate_gan_weight, toy_config
from dmd2_nb.nets import ToyNet
from dmd2_nb.sdxl.conditioning import SDXLCond
from dmd2_nb.teacher import train_teacher
from dmd2_nb.toy import ring
from dmd2_nb.train import train

LABELS = torch.arange(8) % 4
x = torch.linspace(-1, 1, 16).reshape(8, 2)
mid_run = dict(levels=(10., 2.), rollout='real')


def run(labels=4, **kw):
    torch.manual_seed(0)
    cfg = replace(
        toy_config, batch=8, warmup_fake=0, dtype='float32', **dict(gan_g=0.1, gan_d=0.1) | kw
    )
    net = EDMPrecond(ToyNet(width=8, label_dim=labels), sigma_data=1.4, sigma_max=20.)
    return DMD2.from_teacher(ring() if not labels else net, cfg, init=net, shape=(2,))


def losses(conds, reals, steps=4, **kw):
    return [float(o['fake_loss']) for o in train(run(**kw), conds, steps, reals)]


def line(call, *words, kind=ValueError):
    with pytest.raises(kind) as e: call()
    text = str(e.value)
    assert len(text.splitlines()) == 1 and len(text) < 400
    for w in words: assert w in text, text


# -- what works --
def test_every_kind_of_stream_is_the_same_stream():
    pairs = [(torch.randn(8, 2), torch.randint(4, (8,))) for _ in range(4)]
    conds = [torch.randint(4, (8,)) for _ in range(4)]
    want = losses(iter(conds), iter(pairs))
    assert want == losses(conds, pairs) == losses(tuple(conds), (list(p) for p in pairs))
    data = TensorDataset(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))
    assert (
        want
        == losses(conds, DataLoader(data, batch_size=8))
        == losses(conds, DataLoader(data, batch_size=8, shuffle=False, drop_last=True))
    )
    assert want == losses(DataLoader(torch.cat(conds), batch_size=8), pairs)
    assert want == losses(conds, [(p.double(), c) for p, c in pairs]), (
        'float64 pixels are taken as float32'
    )


def test_sizes_may_differ():
    assert (
        len(
            losses(
                [LABELS, LABELS[:3], LABELS],
                [(x[:5], LABELS[:5]), (x, LABELS), (x[:2], LABELS[:2])],
                3,
            )
        )
        == 3
    )


def test_nothing_is_drawn_beyond_what_is_used():
    conds, reals = iter([LABELS]*3), iter([(x, LABELS)]*3)
    assert len(losses(conds, reals, 2)) == 2
    assert len(list(conds)) == len(list(reals)) == 1


def test_as_long_as_there_are_batches():
    assert (
        len(losses([LABELS] * 3, repeat((x, LABELS)), None))
        == 3
        == len(losses(repeat(LABELS), [(x, LABELS)] * 3, None))
    )
    assert (
        losses([], repeat((x, LABELS)), None)
        == []
        == losses(None, None, 0, labels=0, gan_g=0.0, gan_d=0.0)
    )


# -- what ends too early, or was never there --
@pytest.mark.parametrize('n', [0, 1, 3])
@pytest.mark.parametrize('kind', [list, iter, lambda o: (b for b in o)])
def test_streams_that_run_out(n, kind):
    seen = []
    def go(conds, reals):
        seen.clear()
        for log in train(run(), conds, 8, reals): seen.append(log)
    line(
        lambda: go(kind([LABELS] * n), repeat((x, LABELS))),
        f'conds ended after {n} batch',
        'of the 8 wanted',
    )
    assert len(seen) == n
    line(
        lambda: go(repeat(LABELS), kind([(x, LABELS)] * n)),
        f'reals ended after {n} batch',
        'of the 8 wanted',
    )
    assert len(seen) == n


def test_a_loader_that_runs_out():
    loader = DataLoader(TensorDataset(x, LABELS), batch_size=4)
    line(lambda: losses(repeat(LABELS), loader, 5), 'reals ended after 2 batches of the 5 wanted')
    line(
        lambda: losses(
            repeat(LABELS), DataLoader(TensorDataset(x[:0], LABELS[:0]), batch_size=4), 5
        ),
        'reals ended after 0',
    )


def test_reals_that_are_missing():
    line(lambda: losses(repeat(LABELS), None), 'the GAN is on', 'reals')
    for rollout in ('real', 'mix'):
        line(
            lambda: losses(
                repeat(LABELS), None, gan_g=0.0, gan_d=0.0, levels=(10.0, 2.0), rollout=rollout
            ),
            f"rollout '{rollout}' needs real batches",
        )
    assert len(losses(repeat(LABELS), None, gan_g=0., gan_d=0.)) == 4


@pytest.mark.parametrize('steps', [-5, 2.5, True, '3', float('inf')])
def test_iterations(steps):
    line(lambda: losses(repeat(LABELS), repeat((x, LABELS)), steps), 'steps must')


@pytest.mark.parametrize('conds', [LABELS, dict(text=LABELS), 'cat', 5, np.arange(8), SDXLCond(x, x, x), object()])
def test_one_batch_is_no_stream(conds):
    line(
        lambda: losses(conds, repeat((x, LABELS))),
        'conds must be an iterator, a list or a DataLoader',
        type(conds).__name__,
    )


@pytest.mark.parametrize(
    'real, word',
    [
        (x, 'pair (x, cond), got one Tensor'),
        ((x,), 'pair'),
        ((x, LABELS, 1), 'pair'),
        (dict(x=x), 'pair'),
        ((x.numpy(), LABELS), 'ndarray'),
        ((None, LABELS), 'NoneType'),
        ((torch.zeros(8, 2, dtype=torch.uint8), LABELS), 'torch.uint8'),
        ((x.long(), LABELS), 'torch.int64'),
        ((x[:, :1], LABELS), '(8, 1)'),
        ((x[:, :, None], LABELS), '(8, 2, 1)'),
        ((x[:0], LABELS[:0]), '(0, 2)'),
        ((x, LABELS[:3]), '8 samples and 3 conditions'),
        ((x, torch.nn.functional.one_hot(LABELS)), '(8, 4)'),
        ((x, LABELS.float()), 'float32'),
    ],
)
def test_real_batches_that_do_not_fit(real, word):
    line(lambda: losses(repeat(LABELS), [real]*4), word)
    line(lambda: losses(repeat(LABELS), [real]*4, gan_g=0., gan_d=0., **mid_run), word)


def test_an_empty_batch_of_conditions():
    line(lambda: losses([LABELS[:0]]*4, repeat((x, LABELS))), 'empty')


# -- half of the conditions --
NONE_AND_ALL = [
    (None, LABELS),
    (dict(text=x, size=None), dict(text=x, size=LABELS)),
    ((x, None), (x, LABELS)),
    (SDXLCond(x, None, x), SDXLCond(x, x, x)),
    (dict(text=x), dict(text=x, size=LABELS)),
    ((x,), (x, LABELS)),
    (LABELS, [LABELS]),
    (dict(a=x), dict(b=x)),
    (None, (x, LABELS)),
]


@pytest.mark.parametrize('pair', NONE_AND_ALL)
def test_trees_of_which_some_are_none(pair):
    for a, b in (pair, pair[::-1]):
        for call in (
            lambda: cond_cat(a, b),
            lambda: cond_map(lambda *o: o[0], a, b),
            lambda: cond_cat(b, b, a),
        ):
            line(call, 'conditions differ')


def test_trees_that_agree():
    for a in (o for pair in NONE_AND_ALL for o in pair):
        joined = cond_cat(a, a)
        assert cond_len(joined) == 2*cond_len(a)


def test_rows_of_one_tree():
    line(lambda: cond_len((x, LABELS[:3])), '8, 3')
    line(lambda: cond_len(dict(a=torch.tensor(3))), 'single value 3')


def everything_that_joins_conditions():
    "name -> call(a, b) with the conditions of both sides; the functions whose arguments hold two of them"
    def critic(cond, other):
        dmd = run()
        try: dmd.fake_step(x, cond, (x, other))
        except ValueError:
            assert dmd.step == 0
            raise
    def loop(cond, other): next(train(run(), repeat(cond), 4, repeat((x, other))))
    def loop_late(cond, other): next(train(run(gan_start=3), repeat(cond), 4, repeat((x, other))))
    def rollout(cond, other):
        next(train(run(gan_g=0., gan_d=0., **mid_run), repeat(cond), 4, repeat((x, other))))
    return {
        'cond_cat': lambda a, b: cond_cat(a, b),
        'cond_map': lambda a, b: cond_map(torch.add, a, b),
        'DMD2.fake_step': critic,
        'train': loop,
        'train, GAN later': loop_late,
        'train, rollout': rollout,
    }


@pytest.mark.parametrize('name', everything_that_joins_conditions())
def test_half_of_the_conditions_missing(name):
    call = everything_that_joins_conditions()[name]
    for a, b in ((None, LABELS), (LABELS, None)): line(lambda: call(a, b), 'condition')
    call(LABELS, LABELS)


def test_guidance_with_an_empty_condition_of_another_kind():
    net = EDMPrecond(ToyNet(width=8, label_dim=4))
    onehot = torch.nn.functional.one_hot(LABELS, 4).float()
    for uncond in (lambda c: (c, None), lambda c: dict(a=c), (onehot[:1],)):
        line(lambda: Guided(net, 2., uncond)(x, torch.ones(8), onehot), 'conditions differ')
    assert Guided(net, 2., onehot[:1]*0)(x, torch.ones(8), onehot).shape == x.shape


ONE_SIDE = {'dmd2_nb.core': {'cond_cat', 'cond_map'}, 'dmd2_nb.train': {'train'}}


def test_no_function_with_two_conditions_is_forgotten():
    """Every public function or method of the method's modules that is given both a condition and a
    real batch, or several trees, stands in the table above"""
    found = set()
    for name in (
        'core',
        'noise',
        'denoiser',
        'sampling',
        'dmd',
        'gan',
        'fake_score',
        'backsim',
        'regression',
        'distill',
        'train',
    ):
        module = import_module(f'dmd2_nb.{name}')
        for n in module.__all__:
            o = getattr(module, n)
            members = (
                {
                    f'{n}.{k}': v
                    for k, v in vars(o).items()
                    if inspect.isfunction(v) and not k.startswith('_')
                }
                if inspect.isclass(o)
                else {n: o}
            )
            for k, f in members.items():
                if not inspect.isfunction(f) or f.__module__ != module.__name__: continue
                ps = inspect.signature(f).parameters
                if (
                    {'cond', 'real'} <= {*ps}
                    or {'conds', 'reals'} <= {*ps}
                    or any(
                        p.kind is p.VAR_POSITIONAL and p.name in ('cs', 'conds')
                        for p in ps.values()
                    )
                ):
                    found.add(k)
    # these hand both on to one of the table: the generator's turn reads the real batch, with its
    # own conditions, in place of the others
    handed_on = {'DMD2.inputs', 'DMD2.generate', 'DMD2.generator_step'}
    assert found - handed_on == {k for k in everything_that_joins_conditions() if ',' not in k}


def test_calibration_takes_streams():
    dmd = run()
    assert calibrate_gan_weight(dmd, [LABELS]*4) == calibrate_gan_weight(dmd, repeat(LABELS))
    line(lambda: calibrate_gan_weight(dmd, LABELS), 'conds must be an iterator')


def test_the_stream_itself():
    assert list(batch_stream('conds', iter([1, 2]))) == [1, 2]
    assert [v for _, v in zip(range(3), batch_stream('conds', None))] == [None]*3


def test_no_term_for_a_while():
    "A run in pieces whose generator has nothing to learn from until the GAN begins"
    from dmd2_nb.parallel_run import ParallelDMD2
    net = EDMPrecond(ToyNet(width=8, label_dim=4), sigma_data=1.4, sigma_max=20.)
    cfg = replace(
        toy_config,
        batch=8,
        warmup_fake=0,
        ttur=1,
        w_dm=0.0,
        gan_g=0.1,
        gan_d=0.1,
        gan_start=2,
        dtype='float32',
    )
    logs = list(
        train(ParallelDMD2.from_teacher(net, cfg, accum=2), repeat(LABELS), 4, repeat((x, LABELS)))
    )
    assert [float(o['norm_g']) > 0 for o in logs] == [False, False, True, True]


@pytest.mark.parametrize('bad, word', [
    (dict(steps=-1), 'steps'), (dict(steps=2.5), 'steps must be a whole number'),
    (dict(lr=float('nan')), 'lr must be finite'), (dict(halflife=0), 'halflife must be'),
    (dict(label_dropout=1.5), 'label_dropout must be'), (dict(P_std=0), 'P_std must be'),
    (dict(steps=9), 'batches ended after 3 batches of the 9 wanted')])
def test_a_teacher_asked_for_nonsense(bad, word):
    D = EDMPrecond(ToyNet(width=8), sigma_data=0.5)
    batches = [(torch.zeros(4, 2), None)]*3
    with pytest.raises(ValueError, match=word) as e: list(train_teacher(D, batches, **dict(steps=3) | bad))
    assert len(str(e.value)) < 600 and '\n' not in str(e.value)
    assert len(list(train_teacher(D, batches, 3))) == 3
