"Bad input to the method's modules ends in one clear line that names the value"
import math
from dataclasses import replace

import pytest
import torch

from dmd2_nb.backsim import simulate
from dmd2_nb.core import EMA, compute_dtype, cond_map
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config, calibrate_gan_weight, toy_config
from dmd2_nb.gan import GanHead
from dmd2_nb.nets import FourierEmbedding, ToyNet, UNet
from dmd2_nb.noise import check_sigmas, karras_sigmas, sample_sigma
from dmd2_nb.regression import TeacherPairs
from dmd2_nb.sampling import few_step_sample, heun_sample
from dmd2_nb.toy import Mixture, ring

x, I = torch.zeros(4, 2), torch.eye(2)[None]
D = EDMPrecond(ToyNet(width=8, label_dim=3))
def level(s, n=4): return torch.full((n,), float(s))
def mixture(weights=(1.,), means=torch.zeros(1, 2), covs=I, **kw):
    return Mixture(torch.as_tensor(weights), means, covs, **kw)
def run(**kw):
    return DMD2.from_teacher(
        ring(), replace(toy_config, batch=8, warmup_fake=0, **kw), init=EDMPrecond(ToyNet(width=8))
    )
two_levels = dict(
    levels=(10.0, 1.0),
    rollout='real',
    seed=next(s for s in range(99) if run(levels=(10.0, 1.0), seed=s).k == 1),
)

cases = dict(
    sigma_zero=(lambda: D(x, level(0)), 'above 0 for a network, got 0'),
    sigma_negative=(lambda: D(x, level(-1)), 'above 0 for a network, got -1'),
    sigma_nan=(lambda: D(x, level(math.nan)), 'above 0'),
    sigma_in_encode=(lambda: D.encode(x, level(0)), 'above 0 for a network, got 0'),
    sigma_scalar=(lambda: D(x, torch.tensor(1.0)), 'one level for each sample'),
    sigma_negative_mixture=(lambda: ring()(x, level(-1)), 'must not be negative, got -1'),
    label_too_large=(lambda: D(x, level(1), torch.tensor([0, 1, 2, 3])), '0..2, got 0..3'),
    label_negative=(lambda: D(x, level(1), torch.tensor([0, -1, 2, 1])), '0..2, got -1..2'),
    classes=(lambda: D(x, level(1), torch.zeros(4, 5)), '5 columns, the network knows 3 classes'),
    classes_image=(
        lambda: UNet(8, 1, 3, channels=(8, 8))(
            torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, 4)
        ),
        'knows 3 classes',
    ),
    class_of_mixture=(lambda: ring()(x, level(1), torch.full((4,), 9)), 'class 9'),
    no_labels=(lambda: mixture()(x, level(1), torch.zeros(4).long()), 'no labels'),
    pixels=(lambda: UNet(20, 1, channels=(8, 8, 8, 8)), '20 pixels'),
    odd_embedding=(lambda: FourierEmbedding(5), 'even, got 5'),
    levels_rise=(lambda: check_sigmas([1.0, 10.0]), 'fall, got [1.0, 10.0]'),
    levels_equal=(lambda: check_sigmas([1.0, 1.0]), 'fall'),
    levels_zero=(lambda: check_sigmas([1.0, 0.0]), 'above 0, got [1.0, 0.0]'),
    levels_nan=(lambda: check_sigmas([math.nan]), 'finite'),
    levels_none=(lambda: check_sigmas([]), 'non-empty'),
    levels_in_sampler=(lambda: heun_sample(ring(), x, torch.tensor([1.0, 2.0])), 'fall'),
    levels_in_generator=(lambda: few_step_sample(D, x, torch.tensor([1.0, 2.0])), 'fall'),
    levels_in_config=(lambda: DMD2Config(levels=(1.0, 80.0)), 'fall, got [1.0, 80.0]'),
    ladder_empty=(lambda: karras_sigmas(0), 'at least 1, got 0'),
    ladder_zero=(lambda: karras_sigmas(4, sigma_min=0.0), 'sigma_min must be above 0, got 0'),
    ladder_swapped=(lambda: karras_sigmas(4, 2.0, 1.0), 'sigma_max 1.0 is below sigma_min 2.0'),
    bins=(lambda: sample_sigma(None, 4, 500, 20), '500..20'),
    step=(lambda: simulate(D, x, torch.tensor([2.0, 1.0]), 2), '0..1, got 2'),
    step_negative=(lambda: simulate(D, x, torch.tensor([2.0, 1.0]), -1), '0..1, got -1'),
    ttur=(lambda: DMD2Config(ttur=0), 'ttur'),
    batch=(lambda: DMD2Config(batch=0), 'batch'),
    rate=(lambda: DMD2Config(lr_g=-1e-3), 'lr_g must not be negative, got -0.001'),
    rate_nan=(lambda: DMD2Config(lr_fake=math.nan), 'lr_fake'),
    dm_bins=(lambda: DMD2Config(dm_bins=(20, 1000)), 'dm_bins'),
    rollout=(lambda: DMD2Config(rollout='backwards'), "'backwards'"),
    dtype=(lambda: DMD2Config(dtype='float8'), "'float8'"),
    dtype_named=(lambda: compute_dtype('half'), "'half'"),
    field=(lambda: DMD2Config.from_dict(dict(lr_generator=1.0, ttur=5)), 'lr_generator'),
    fields=(lambda: DMD2Config.from_dict(dict(b=1.0, a=5)), 'fields: a, b'),
    nothing_to_copy=(lambda: DMD2.from_teacher(ring(), toy_config), 'init='),
    pairs_missing=(lambda: run(w_reg=1.0), 'w_reg needs teacher pairs'),
    shape_unknown=(
        lambda: DMD2(lambda x, s, c: x, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), toy_config),
        'shape=',
    ),
    real_missing=(lambda: run(gan_g=0.1, gan_d=0.1).fake_step(torch.zeros(8, 2)), 'no real batch'),
    real_missing_rollout=(lambda: run(**two_levels).inputs(), "'real' needs real batches"),
    gan_off=(lambda: calibrate_gan_weight(run()), 'gan_g'),
    matching_off=(lambda: calibrate_gan_weight(run(gan_g=0.1, gan_d=0.1, w_dm=0.0)), 'w_dm'),
    head_uneven=(lambda: GanHead((8, 4, 8)), '4x8'),
    head_side=(lambda: GanHead((8, 12, 12)), '12x12'),
    head_small=(lambda: GanHead((8, 2, 2)), '2x2'),
    head_dims=(lambda: GanHead((8, 4)), '(8, 4)'),
    pairs_none=(lambda: TeacherPairs(ring(), torch.tensor([1.0]), 0, (2,)), 'at least 1, got 0'),
    pairs_conds=(
        lambda: TeacherPairs(ring(), torch.tensor([1.0]), 4, (2,), torch.zeros(3).long()),
        '4 pairs need 4 conditions, got 3',
    ),
    halflife=(lambda: EMA(torch.nn.Linear(1, 1), -1.0), 'got -1'),
    weights_shape=(lambda: mixture((1.0, 1.0)), 'weights must be (1,), got (2,)'),
    weights_negative=(lambda: mixture((-1.0,)), 'negative'),
    weights_nan=(lambda: mixture((math.nan,)), 'negative'),
    means_shape=(lambda: mixture(means=torch.zeros(2)), 'means must be (k, d), got (2,)'),
    covs_shape=(lambda: mixture(covs=torch.ones(1, 2)), 'covs must be (1, 2, 2), got (1, 2)'),
    covs_negative=(lambda: mixture(covs=-I), 'positive definite, least eigenvalue -1'),
    covs_skew=(lambda: mixture(covs=I + torch.tensor([[0.0, 1.0], [0.0, 0.0]])), 'symmetric'),
    labels_shape=(lambda: mixture(labels=torch.arange(2)), 'labels must be (1,), got 2'),
)


@pytest.mark.parametrize('name', cases)
def test_one_clear_line(name):
    call, words = cases[name]
    with pytest.raises(ValueError) as e: call()
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 200


def test_condition_of_a_strange_type():
    with pytest.raises(TypeError, match='str'): cond_map(lambda t: t, dict(text=['a', 'b']))


def test_what_is_not_bad():
    "A mixture takes sigma 0; one level needs no tuple; whole numbers will do"
    assert torch.allclose(ring()(x+1., level(0)), x+1., atol=1e-6)
    assert (
        DMD2Config(levels=80).levels == (80.0,)
        and DMD2Config(levels=karras_sigmas(3, 1.0, 80.0)).levels[0] == 80.0
    )
    assert DMD2Config(betas_g=(0, .99)).betas_g == (0., .99)
    run(betas_g=(0, .99)).generator_step()
    assert D(x, level(1), None).shape == x.shape


def test_a_failed_step_leaves_the_run_as_it_was():
    "A missing batch is noticed before anything moves"
    dmd = run(gan_g=.1, gan_d=.1)
    before = [p.clone() for p in dmd.fake.parameters()]
    with pytest.raises(ValueError): dmd.fake_step(torch.zeros(8, 2))
    assert dmd.step == 0 and all(torch.equal(a, b) for a, b in zip(before, dmd.fake.parameters()))
