"The start of the one-step generator: the teacher's pairs, and the regression on them"
import pytest
import torch

diffusers = pytest.importorskip('diffusers')

from dmd2_nb.denoiser import Guided
from dmd2_nb.sdxl.adapter import TINY_SDXL, EpsDenoiser, make_unet, make_vae, sdxl_sigmas
from dmd2_nb.sdxl.conditioning import tiny_text_encoders, zero_uncond
from dmd2_nb.sdxl.data import encode_conditions
from dmd2_nb.sdxl.pretrain import (
    decoder,
    euler_sample,
    pair_noise,
    regression_pretrain,
    teacher_pairs,
    trailing_timesteps,
)
from dmd2_nb.sdxl.roles import SharedBase

SMALL = TINY_SDXL | dict(
    block_out_channels=(16, 16, 32),
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(2, 2, 2),
)


def denoiser(): return EpsDenoiser(make_unet(SMALL), shape=(4, 16, 16))
def role(): return SharedBase(denoiser(), rank=4).generator


@pytest.fixture(scope='module')
def conds(tmp_path_factory):
    return encode_conditions(
        tmp_path_factory.mktemp('conds'),
        ['a cat', 'a dog', 'a fox'],
        tiny_text_encoders(),
        size=128,
    )


@pytest.fixture(scope='module')
def pairs(conds, tmp_path_factory):
    return teacher_pairs(
        tmp_path_factory.mktemp('pairs'),
        Guided(denoiser(), 8.0, zero_uncond),
        conds,
        n=6,
        steps=4,
        batch=2,
        shard=2,
    )


def test_sampler_is_diffusers_euler(conds):
    "The paper's pairs: EulerDiscrete, trailing, guidance 8, zeros as empty text"
    D, (_, c, _) = denoiser(), conds.items([0, 1])
    c = c._replace(text=c.text.float(), pooled=c.pooled.float())
    s = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        timestep_spacing='trailing',
    )
    s.set_timesteps(9)
    z = torch.cat([pair_noise((4, 16, 16), i) for i in range(2)])
    # pure noise; diffusers itself begins at sigma*z, 0.2 % less
    x = D.prior(z, sdxl_sigmas([999]).expand(2))
    assert (x/z).mean()/s.init_noise_sigma == pytest.approx(1.0023, abs=1e-3)
    with torch.no_grad():
        for t in s.timesteps:
            inp, tt = s.scale_model_input(x, t), t.expand(2).long()
            e, u = D.net(inp, tt, c), D.net(inp, tt, zero_uncond(c))
            x = s.step(u+8*(e-u), t, x, return_dict=False)[0]
    ours = euler_sample(Guided(D, 8., zero_uncond), z, sdxl_sigmas(trailing_timesteps(9)), c)
    assert (ours-x).norm() < 1e-4*x.norm()


def test_pairs_stop_and_go_on(conds, pairs, tmp_path):
    "Broken off after a shard: the rest is made, nothing twice, and all of it is what an unbroken run makes"
    teacher, made = Guided(denoiser(), 8., zero_uncond), []
    def stop(todo):
        for k in todo:
            if made: raise KeyboardInterrupt
            made.append(k)
            yield k
    args = dict(n=6, steps=4, batch=1, shard=2)
    with pytest.raises(KeyboardInterrupt):
        teacher_pairs(tmp_path/'p', teacher, conds, **args, progress=stop)
    first = (tmp_path/'p'/'shard_00000.safetensors').stat().st_mtime_ns
    again = teacher_pairs(tmp_path/'p', teacher, conds, **args)
    assert (tmp_path/'p'/'shard_00000.safetensors').stat().st_mtime_ns == first
    (a, ca, na), (b, cb, nb) = again.items(range(6)), pairs.items(range(6))
    # batches of one or two differ by rounding
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
    assert na == nb == ['a cat', 'a dog', 'a fox']*2 and torch.equal(ca.text, cb.text)
    with pytest.raises(ValueError, match='other settings .*steps'):
        teacher_pairs(tmp_path/'p', teacher, conds, **args | dict(steps=5))


def test_resumed_equals_unbroken(pairs, tmp_path):
    args = dict(lr=3e-3, batch=2, decode=decoder(make_vae()))
    whole, parts = role(), role()
    losses = list(regression_pretrain(whole, pairs, 5, **args))
    first = list(regression_pretrain(parts, pairs, 2, folder=tmp_path/'run', **args))
    other = role()
    rest = list(regression_pretrain(other, pairs, 5, folder=tmp_path/'run', **args))
    torch.testing.assert_close(torch.stack(first+rest), torch.stack(losses))
    for a, b in zip(whole.parameters(), other.parameters()): torch.testing.assert_close(a, b)
    assert any((p != q).any() for p, q in zip(whole.parameters(), role().parameters()))
    (tmp_path/'steps').mkdir()  # the layout that `save_step` writes goes on as well, and is kept
    list(regression_pretrain(role(), pairs, 2, folder=tmp_path/'steps'/'step-2', **args))
    again = role()
    assert list(regression_pretrain(again, pairs, 5, folder=tmp_path/'steps', **args)) == losses[2:]
    assert sorted(p.name for p in (tmp_path/'steps').iterdir()) == ['step-2', 'step-5']
    with pytest.raises(ValueError, match='another run: timestep 399 instead of 999'):
        next(regression_pretrain(role(), pairs, 9, timestep=999, folder=tmp_path/'run', **args))


def test_it_learns_the_pairs(pairs):
    "On latents: what is left of the error after thirty updates"
    losses = torch.stack(list(regression_pretrain(role(), pairs, 30, lr=1e-2, batch=6)))
    assert losses[-3:].mean() < 0.95*losses[:3].mean()


def test_lpips_on_decoded_pairs(pairs, tmp_path):
    "The paper's distance, with random weights of VGG-16: gradients reach the generator through decoder and classifier"
    torchvision = pytest.importorskip('torchvision')
    pytest.importorskip('torchmetrics')
    from dmd2_nb.fid import lpips
    torch.save(
        {
            k: v
            for k, v in torchvision.models.vgg16().state_dict().items()
            if k.startswith('features')
        },
        tmp_path / 'vgg.pth',
    )
    G = role()
    (loss,) = regression_pretrain(
        G, pairs, 1, lpips(tmp_path / 'vgg.pth'), decoder(make_vae()), batch=2
    )
    assert loss > 0 and loss.ndim == 0
    assert sum(bool(p.grad.abs().sum() > 0) for p in G.parameters()) > len(list(G.parameters()))/2


def test_bad_input(pairs):
    with pytest.raises(ValueError, match='6 pairs are fewer than a batch of 8'):
        next(regression_pretrain(role(), pairs, batch=8))
    with pytest.raises(ValueError, match='no loss scaling'):
        next(regression_pretrain(role(), pairs, dtype='float16'))
    for n in (0, 1001):
        with pytest.raises(ValueError, match='steps must lie in'): trailing_timesteps(n)


def test_checkpoints_by_step(pairs, tmp_path):
    """A folder of step-N is taken up, and goes on as such; another number of updates than is done
    is refused, and changes nothing"""
    args = dict(lr=1e-2, batch=2, save_every=2)
    whole, first, rest = role(), role(), role()
    losses = list(regression_pretrain(whole, pairs, 4, **args))
    list(regression_pretrain(first, pairs, 2, folder=tmp_path/'run'/'step-2', **args))
    again = list(regression_pretrain(rest, pairs, 4, folder=tmp_path/'run', **args))
    assert torch.equal(torch.stack(again), torch.stack(losses[2:])) and all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters())
    )
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['step-2', 'step-4']
    before = [p.clone() for p in first.parameters()]
    with pytest.raises(ValueError, match='step-4 has done 4 iterations, 3 are asked for'):
        next(regression_pretrain(first, pairs, 3, folder=tmp_path/'run', **args))
    assert all(torch.equal(a, b) for a, b in zip(before, first.parameters()))
    assert not list(regression_pretrain(first, pairs, 4, folder=tmp_path/'run', **args))


def test_what_is_no_pair(pairs, conds):
    with pytest.raises(ValueError, match='pairs'): next(regression_pretrain(role(), conds, batch=2))
    for k, v in dict(steps=0, batch=2.5, save_every=0, lr=float('nan'), clip=-1).items():
        with pytest.raises(ValueError, match=k):
            next(regression_pretrain(role(), pairs, **dict(batch=2) | {k: v}))


def test_no_clipping(pairs):
    ends = []
    for clip in (0, 1e9):
        G = role()
        list(regression_pretrain(G, pairs, 2, batch=2, clip=clip, lr=1e-3))
        ends.append([p for p in G.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*ends)) and any(
        not torch.equal(a, b) for a, b in zip(ends[0], role().parameters())
    )
