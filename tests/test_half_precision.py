"""float16 with loss scaling, which every T4 runs in, on a CPU: each recipe, each term alone, other
flags of the optimiser, steps that are skipped"""
from copy import deepcopy
from dataclasses import replace
from itertools import repeat

import pytest
import torch

from dmd2_nb import imagenet64
from dmd2_nb.distill import DMD2, toy_config
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.nets import ToyNet
from dmd2_nb.recipes import RECIPES, with_steps
from dmd2_nb.regression import TeacherPairs
from dmd2_nb.sdxl import recipe as sdxl
from dmd2_nb.sdxl.adapter import TINY_SD15, TINY_SDXL, EpsDenoiser, make_unet
from dmd2_nb.sdxl.conditioning import SDXLCond
from dmd2_nb.sdxl.roles import FullCopies, SharedBase
from dmd2_nb.train import load_state, save_state, train
from dmd2_nb.weights import build_denoiser

SMALL = dict(
    UNet=dict(channels=[8, 16], emb=8, img_resolution=16),
    ADMUNet=dict(
        model_channels=16,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[],
        dropout=0.0,
        img_resolution=8,
    ),
)
EDM = (
    RECIPES
    | imagenet64.RECIPES
    | {f'{n}, 4 steps': with_steps(r, steps=4) for n, r in RECIPES.items()}
)
TEXT = dict(
    sdxl=sdxl.sdxl_config,
    lora=sdxl.sdxl_lora_config,
    one_step=sdxl.sdxl_1step_config,
    sd15=sdxl.sd15_config,
    sd15_gan=sdxl.sd15_gan_config,
)
# all terms in each of three iterations
now = dict(batch=2, ttur=1, warmup_fake=0, gan_start=0, lr_warmup=0, dtype='float16')


def went_well(dmd, logs):
    assert (
        len(logs) == 3 == dmd.step and dmd.scaler_fake.is_enabled() and dmd.dtype == torch.float16
    )
    assert all(v.isfinite() for o in logs for k, v in o.items() if not k.startswith('norm_'))
    assert all(p.isfinite().all() for m in (dmd.G, dmd.fake, dmd.ema) for p in m.parameters())
    return logs


@pytest.mark.parametrize('name', EDM)
def test_recipes_of_images(name):
    r = EDM[name]
    args = {k: v for k, v in r.net['args'].items() if k not in ('channel_mult_emb',)} | SMALL[
        r.net['net']
    ]
    torch.manual_seed(0)
    net = build_denoiser(r.net | dict(args=args))
    with torch.no_grad():
        for p in net.parameters(): p.add_(.02*torch.randn_like(p))
    fake = (r.critic or deepcopy)(net).requires_grad_(True)
    labels = torch.eye(args['label_dim'])[[0, 1]]
    dmd = DMD2(
        net, deepcopy(net).requires_grad_(True), fake, replace(r.config, **now), probe=labels[:1]
    )
    went_well(
        dmd,
        list(train(dmd, repeat(labels), 3, repeat((torch.rand(2, *net.shape) * 2 - 1, labels)))),
    )
    assert dmd.g_updates > 0


@pytest.mark.parametrize('name', TEXT)
def test_recipes_of_text_to_image(name):
    torch.manual_seed(0)
    one_text = name.startswith('sd15')
    unet = (TINY_SD15 if one_text else TINY_SDXL) | dict(
        block_out_channels=(16, 32, 32, 32)[
            : len((TINY_SD15 if one_text else TINY_SDXL)['block_out_channels'])
        ],
        layers_per_block=1,
    )
    D = EpsDenoiser(make_unet(unet), shape=(4, 16, 16))
    roles = SharedBase(D, rank=2) if name == 'lora' else FullCopies(D, checkpointing=False)
    wide = D.net.unet.config.cross_attention_dim
    text = torch.randn(2, 5, wide)
    if one_text: cond, extra = text, dict(uncond=torch.zeros(1, 5, wide))
    else: cond, extra = SDXLCond(text, torch.randn(2, pooled(D)), torch.full((2, 6), 128.)), {}
    dmd = sdxl.sdxl_dmd2(roles, replace(TEXT[name], **now), cond, **extra)
    real = repeat((torch.randn(2, 4, 16, 16), cond)) if dmd.cfg.gan else None
    went_well(dmd, list(train(dmd, repeat(cond), 3, real)))


def pooled(D):
    return (
        D.net.unet.config.projection_class_embeddings_input_dim
        - 6 * D.net.unet.config.addition_time_embed_dim
    )


# -- one term at a time --
OFF = dict(w_dm=0., w_fake=0., gan_g=0., gan_d=0., w_reg=0.)
ONE = dict(
    dm=dict(w_dm=1.0),
    fake=dict(w_fake=1.0),
    gan_g=dict(gan_g=0.1),
    gan_d=dict(gan_d=0.1),
    reg=dict(w_reg=1.0),
    none={},
    no_dm=dict(w_fake=1.0, gan_g=0.1, gan_d=0.1),
    no_fake=dict(w_dm=1.0, gan_g=0.1, gan_d=0.1),
    no_dm_later=dict(w_fake=1.0, gan_g=0.1, gan_d=0.1, gan_start=2),
    no_fake_later=dict(w_dm=1.0, gan_g=0.1, gan_d=0.1, gan_start=2),
    gan_later=dict(gan_g=0.1, gan_d=0.1, gan_start=1),
)
x, labels = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def toy(graph=False, scale=None, dtype='float16', own_ema=True, **terms):
    torch.manual_seed(0)
    net = EDMPrecond(ToyNet(width=16, label_dim=3), sigma_data=1.)
    cfg = replace(
        toy_config,
        **dict(
            batch=8,
            ttur=1,
            warmup_fake=0,
            lr_g=1e-3,
            lr_fake=1e-3,
            lr_head=1e-3,
            ema_halflife=3.0,
            dtype=dtype,
        )
        | terms,
    )
    pairs = (
        TeacherPairs(net, torch.tensor([10.0, 1.0]), 16, (2,), torch.arange(16) % 3)
        if cfg.w_reg
        else None
    )
    make = type('AsInGraphs', (DMD2,), dict(capturable=True)) if graph else DMD2
    dmd = make.from_teacher(net, cfg, pairs=pairs)
    # a critic that differs from the teacher, so that matching has something to say
    with torch.no_grad():
        for p in dmd.fake.parameters(): p.add_(.1*torch.randn_like(p))
    if not own_ema: dmd.ema = sdxl.Itself(dmd.G)
    if graph:  # on a CPU AdamW is capturable only when it is fused
        for o in (dmd.opt_g, dmd.opt_fake):
            for g in o.param_groups:
                g.update(fused=True, foreach=False, lr=torch.tensor(float(g['lr'])))
    if scale:
        for s in ('scaler_g', 'scaler_fake'):
            setattr(dmd, s, torch.amp.GradScaler('cpu', init_scale=scale))
    return dmd


def go(dmd, n=3): return list(train(dmd, repeat(labels), n, repeat((x, labels))))


@pytest.mark.parametrize('graph', [False, True])
@pytest.mark.parametrize('name', ONE)
def test_single_terms(name, graph):
    "What has no gradient stays as it is and has a norm of zero; the rest learns"
    c = OFF | ONE[name]
    for dtype in ('float32', 'float16'):
        dmd = toy(graph, dtype=dtype, scale=2.**8 if dtype == 'float16' else None, **c)
        start = {
            n: [p.detach().clone() for p in getattr(dmd, n).parameters()] for n in ('G', 'fake')
        }
        logs = go(dmd)
        assert dmd.step == 3 and dmd.g_updates == 3
        assert all(v.isfinite() for o in logs for v in o.values())
        moved = {
            n: any(not torch.equal(a, b) for a, b in zip(start[n], getattr(dmd, n).parameters()))
            for n in start
        }
        assert moved['G'] == bool(c['w_dm'] or c['gan_g'] or c['w_reg']) and moved['fake'] == bool(
            c['w_fake'] or c['gan_d']
        )
        assert (float(logs[-1]['norm_g']) > 0) == moved['G'] and (
            float(logs[-1]['norm_fake']) > 0
        ) == moved['fake']
        if not moved['G']: assert float(logs[0]['norm_g']) == 0


# -- saved with some flags, loaded with others --
FLAGS = [dict(), dict(graph=True), dict(own_ema=False)]


@pytest.mark.parametrize('name', ['no_dm_later', 'no_fake', 'dm'])
@pytest.mark.parametrize('saved', FLAGS, ids=str)
@pytest.mark.parametrize('loaded', FLAGS, ids=str)
def test_other_flags_after_a_stop(tmp_path, saved, loaded, name):
    "The optimiser of the new run keeps its own flags, and trains on as the unbroken run does"
    c = OFF | ONE[name]
    if not saved.get('own_ema', True): c |= dict(ema_halflife=0.)
    if not loaded.get('own_ema', True): c |= dict(ema_halflife=0.)
    c |= dict(scale=2.**8)
    a, b, whole = toy(**saved, **c), toy(**loaded, **c), toy(**saved, **c)
    go(a)
    save_state(a, tmp_path/'run')
    flags = [
        {k: g[k] for k in ('capturable', 'fused', 'foreach')}
        for o in (b.opt_g, b.opt_fake)
        for g in o.param_groups
    ]
    load_state(b, tmp_path/'run')
    assert flags == [
        {k: g[k] for k in ('capturable', 'fused', 'foreach')}
        for o in (b.opt_g, b.opt_fake)
        for g in o.param_groups
    ]
    assert (b.step, b.g_updates) == (
        3,
        a.g_updates,
    ) and b.scaler_g.get_scale() == a.scaler_g.get_scale()
    logs, want = go(b), go(whole, 6)[3:]
    for o, w in zip(logs, want):
        assert o.keys() == w.keys()
        for k in o: torch.testing.assert_close(o[k], w[k], rtol=2e-2, atol=2e-3)
    for p, q in zip(b.G.parameters(), whole.G.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


# -- steps that are skipped --
@pytest.mark.parametrize('graph', [False, True])
def test_a_skipped_step_is_no_update(graph):
    "A scale that overflows float16: no weight, no average, no count moves, and no turn is shifted"
    c = dict(gan_g=.1, gan_d=.1, ttur=2, gan_start=1)
    dmd = toy(graph, scale=2.**60, **c)
    nets = dict(G=dmd.G, ema=dmd.ema, fake=dmd.fake)
    with torch.no_grad():  # an average that differs from its network would move with any update
        for p in dmd.ema.net.parameters(): p.add_(1.)
    start = {n: [p.detach().clone() for p in m.parameters()] for n, m in nets.items()}
    turns = []
    for _ in range(4):
        turns.append(dmd.generators_turn())
        go(dmd, 1)
    assert turns == [True, False, True, False] and dmd.step == 4
    assert dmd.g_updates == 0 and not dmd.gan_on and dmd.warm_until == 0
    for n, m in nets.items():
        assert all(torch.equal(a, b) for a, b in zip(start[n], m.parameters())), n
    assert dmd.scaler_g.get_scale() == 2.**58
    for s in ('scaler_g', 'scaler_fake'):
        setattr(dmd, s, torch.amp.GradScaler('cpu', init_scale=8.))
    go(dmd, 1)
    assert dmd.g_updates == 1 and dmd.gan_on
    for n, m in nets.items():
        assert any(not torch.equal(a, b) for a, b in zip(start[n], m.parameters())), n


def test_a_skipped_step_of_one_network_alone():
    "The critic's overflow is no concern of the generator's, nor the other way round"
    for own, other in (('scaler_g', 'fake'), ('scaler_fake', 'G')):
        dmd = toy(scale=8.)
        setattr(dmd, own, torch.amp.GradScaler('cpu', init_scale=2.**60))
        start = [p.detach().clone() for p in getattr(dmd, other).parameters()]
        go(dmd, 1)
        assert dmd.g_updates == (own == 'scaler_fake')
        assert any(not torch.equal(a, b) for a, b in zip(start, getattr(dmd, other).parameters()))
