"The EDM networks: published names and shapes, and the same function written a second time"
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.unet import ADMUNet, SongUNet

here = Path(__file__).parent
ncsnpp = dict(
    embedding_type='fourier',
    channel_mult_noise=2,
    encoder_type='residual',
    resample_filter=(1, 3, 3, 1),
)


def shaken(net):
    "No weight left at its neutral start"
    for p in net.parameters(): p.data += 0.1*torch.randn_like(p)
    return net.eval()


def test_imagenet64_keys():
    "553 tensors of the published names and shapes, 295,899,267 parameters"
    want = dict(
        line.split('\t') for line in (here / 'edm_imagenet64_keys.tsv').read_text().splitlines()
    )
    with torch.device('meta'): D = EDMPrecond(ADMUNet(64, label_dim=1000))
    assert len(want) == 553 and {k: str(tuple(v.shape)) for k, v in D.state_dict().items()} == want
    assert sum(p.numel() for p in D.parameters()) == 295_899_267


def test_song_keys():
    "Where the three kinds of SongUNet differ in their names"
    args = dict(
        img_resolution=32,
        label_dim=10,
        augment_dim=9,
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_blocks=2,
    )
    with torch.device('meta'):
        keys = {
            k: {n: tuple(v.shape) for n, v in SongUNet(**args, **kw).state_dict().items()}
            for k, kw in dict(
                ddpmpp={}, ncsnpp=ncsnpp, skip=dict(encoder_type='skip', decoder_type='skip')
            ).items()
        }
    ddpm = keys['ddpmpp']
    assert (
        ddpm['map_label.weight'] == (32, 10)
        and ddpm['map_label.bias'] == (32,)
        and ddpm['map_augment.weight'] == (32, 9)
        and 'map_augment.bias' not in ddpm
    )
    assert ddpm['enc.16x16_down.skip.weight'] == (32, 32, 1, 1) and ddpm[
        'enc.16x16_down.skip.resample_filter'
    ] == (1, 1, 2, 2)
    assert (
        ddpm['enc.32x32_block0.affine.weight'] == (32, 128)
        and ddpm['dec.32x32_aux_conv.weight'] == (3, 32, 3, 3)
        and 'dec.16x16_aux_norm.weight' not in ddpm
    )
    assert [n for n in ddpm if n.endswith('qkv.weight')] == [
        f'{n}.qkv.weight'
        for n in ('enc.16x16_block0', 'enc.16x16_block1', 'dec.8x8_in0', 'dec.16x16_block2')
    ]
    ncsn = keys['ncsnpp']
    assert (
        ncsn['map_noise.freqs'] == (32,)
        and ncsn['enc.16x16_aux_residual.weight'] == (32, 3, 3, 3)
        and ncsn['enc.8x8_aux_residual.weight'] == (64, 32, 3, 3)
    )
    assert ncsn['enc.8x8_aux_residual.resample_filter'] == (1, 1, 4, 4) and ncsn[
        'map_layer0.weight'
    ] == (128, 64)
    skip = keys['skip']
    assert (
        'enc.16x16_aux_down.weight' not in skip
        and skip['enc.16x16_aux_skip.weight'] == (32, 3, 1, 1)
        and skip['dec.16x16_aux_up.resample_filter'] == (1, 1, 2, 2)
    )


# -- a second way of writing the networks: one function over a state dict, with its own arithmetic
# --

def conv(s, k, x, up=False, down=False, conv_first=False):
    w, b, f = s.get(f'{k}.weight'), s.get(f'{k}.bias'), s.get(f'{k}.resample_filter')
    n = 0 if f is None else f.shape[-1]

    def blur(x, pad):
        if up:  # insert zeros, then correlate with 4f
            z = x.new_zeros(*x.shape[:2], 2*x.shape[2]-1, 2*x.shape[3]-1)
            z[..., ::2, ::2] = x
            x, f_ = F.pad(z, [n-1-pad]*4), 4*f.flip(-1, -2)
        else: x, f_ = F.pad(x, [pad]*4), f
        p = F.unfold(x.flatten(0, 1)[:, None], n, stride=1 if up else 2)  # (b c, n n, places)
        side = int(sqrt(p.shape[-1]))
        return (f_.flatten() @ p).reshape(*x.shape[:2], side, side)
    pad = 0 if w is None else w.shape[-1]//2
    if conv_first: return blur(F.conv2d(F.pad(x, [pad+(n-1)//2]*4), w, b), 0)
    if up or down: x = blur(x, (n-1)//2)
    return x if w is None else F.conv2d(F.pad(x, [pad]*4), w, b)


def norm(s, k, x, eps):
    b, c = x.shape[:2]
    y = x.reshape(b, min(32, c//4), -1)
    y = (
        (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + eps).sqrt()
    ).reshape(x.shape)
    return y*s[f'{k}.weight'][:, None, None]+s[f'{k}.bias'][:, None, None]


def swish(x): return x*torch.sigmoid(x)
def lin(s, k, x): return x@s[f'{k}.weight'].T+s.get(f'{k}.bias', 0)


def block(s, k, x, e, adm):
    eps, scale_ = (1e-5, 1) if adm else (1e-6, sqrt(.5))
    rs = dict(up='_up' in k, down='_down' in k)
    h = conv(s, f'{k}.conv0', swish(norm(s, f'{k}.norm0', x, eps)), **rs)
    p = lin(s, f'{k}.affine', e)[:, :, None, None]
    if adm: h = norm(s, f'{k}.norm1', h, eps)*(1+p[:, :h.shape[1]])+p[:, h.shape[1]:]
    else: h = norm(s, f'{k}.norm1', h+p, eps)
    h = conv(s, f'{k}.conv1', swish(h))
    x = (conv(s, f'{k}.skip', x, **rs)+h)*scale_
    if f'{k}.qkv.weight' not in s: return x
    b, c, hh, w = x.shape
    heads = c//64 if adm else 1
    y = conv(s, f'{k}.qkv', norm(s, f'{k}.norm2', x, eps)).reshape(b, heads, c//heads, 3, -1)
    att = torch.einsum('bhdi,bhdj->bhij', y[:, :, :, 0], y[:, :, :, 1])/sqrt(c//heads)
    o = torch.einsum('bhij,bhdj->bhdi', att.softmax(-1), y[:, :, :, 2]).reshape(x.shape)
    return (x+conv(s, f'{k}.proj', o))*scale_


def embed(s, net, v, y):
    adm = isinstance(net, ADMUNet)
    if 'map_noise.freqs' in s: a = 2*torch.pi*v[:, None]*s['map_noise.freqs']
    else:
        n = s['map_layer0.weight'].shape[1]//2
        a = v[:, None]*10000.**(-torch.arange(n)/(n if adm else n-1))
    e = torch.cat((a.cos(), a.sin()) if adm else (a.sin(), a.cos()), 1)
    rows = torch.eye(net.label_dim)[y] if net.label_dim else None
    if rows is not None and not adm: e = e+lin(s, 'map_label', rows*sqrt(net.label_dim))
    e = lin(s, 'map_layer1', swish(lin(s, 'map_layer0', e)))
    if rows is not None and adm: e = e+lin(s, 'map_label', rows)
    return swish(e)


def reference(net, x, v, y):
    s, adm = net.state_dict(), isinstance(net, ADMUNet)
    names = list(dict.fromkeys('.'.join(k.split('.')[:2]) for k in s if k[:4] in ('enc.', 'dec.')))
    e, skips, side = embed(s, net, v, y), [], x
    for k in [n for n in names if n.startswith('enc')]:
        if k.endswith('aux_down'): side = conv(s, k, side, down=True)
        elif k.endswith('aux_skip'): skips[-1] = x = x+conv(s, k, side)
        elif k.endswith('aux_residual'):
            skips[-1] = x = side = (x+conv(s, k, side, conv_first=True))/sqrt(2)
        else:
            x = conv(s, k, x) if k.endswith('_conv') else block(s, k, x, e, adm)
            skips.append(x)
    mid, out = x, None
    for k in [n for n in names if n.startswith('dec')]:
        if k.endswith('aux_up'): out = conv(s, k, out, up=True)
        elif k.endswith('aux_norm'): t = swish(norm(s, k, x, 1e-6))
        elif k.endswith('aux_conv'): out = conv(s, k, t)+(0 if out is None else out)
        else:
            if '_block' in k: x = torch.cat((x, skips.pop()), 1)
            x = block(s, k, x, e, adm)
    if adm: out = conv(s, 'out_conv', swish(norm(s, 'out_norm', x, 1e-5)))
    return out, mid


base = dict(img_resolution=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
cases = dict(
    adm=(ADMUNet, dict(model_channels=64, label_dim=5)),
    adm_deep=(
        ADMUNet,
        dict(
            model_channels=32,
            label_dim=3,
            channel_mult=(1, 2, 3, 4),
            num_blocks=2,
            attn_resolutions=(8, 4, 2),
        ),
    ),
    adm_uncond=(ADMUNet, dict(model_channels=96, channel_mult=(2, 1))),
    ddpmpp=(SongUNet, dict(model_channels=32, label_dim=5)),
    ddpmpp_deep=(SongUNet, dict(model_channels=16, channel_mult=(2, 2, 3), num_blocks=3)),
    ncsnpp=(SongUNet, dict(model_channels=32, label_dim=5, **ncsnpp)),
    ncsnpp_deep=(
        SongUNet,
        dict(model_channels=16, channel_mult=(1, 2, 2, 2), num_blocks=2, **ncsnpp),
    ),
    skip=(
        SongUNet,
        dict(
            model_channels=32,
            encoder_type='skip',
            decoder_type='skip',
            resample_filter=(1, 3, 3, 1),
        ),
    ),
)


@pytest.mark.parametrize('case', cases)
def test_second_way(case):
    "Forward and bottleneck against the second way, in float32 (the bar of parity is 1e-4)"
    kind, kw = cases[case]
    net = shaken(kind(**base | kw))
    x, v, y = torch.randn(3, 3, 16, 16), torch.tensor([-1.5, -.3, 1.1]), torch.tensor([0, 2, 1])
    with torch.no_grad():
        out, mid = net(x, v, y if net.label_dim else None, features=True)
        want, want_mid = reference(net, x, v, y)
        enc = net.encode(x, v, y if net.label_dim else None)
    for a, b in ((out, want), (mid, want_mid), (enc, mid)): assert (a-b).norm()/b.norm() < 1e-5


@pytest.mark.parametrize('case', ['adm', 'ddpmpp', 'ncsnpp'])
def test_second_way_float64(case):
    "The same in float64, so that rounding hides nothing"
    kind, kw = cases[case]
    torch.set_default_dtype(torch.float64)
    try:
        net = shaken(kind(**base | kw))
        for b in net.buffers(): b.data = b.data.double()
        x, v, y = torch.randn(2, 3, 16, 16), torch.tensor([-1., 1.]), torch.tensor([0, 2])
        with torch.no_grad(): a, b = net(x, v, y), reference(net, x, v, y)[0]
        assert a.dtype == torch.float64 and (a-b).norm()/b.norm() < 1e-12
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('case', ['adm', 'ncsnpp'])
def test_layouts_and_gradients(case):
    "channels_last gives the same, and every parameter that takes part gets a gradient"
    kind, kw = cases[case]
    net = shaken(kind(**base | kw, augment_dim=9))
    x, v, y, a = (
        torch.randn(2, 3, 16, 16),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([0, 2]),
        torch.randn(2, 9),
    )
    out = net(x, v, y, augment=a)
    out.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert (net(x, v, y)-out).abs().max() > 1e-4
    last = net.to(memory_format=torch.channels_last)(
        x.to(memory_format=torch.channels_last), v, y, augment=a
    )
    assert (last-out).norm()/out.norm() < 1e-5


def test_dropout_and_label_dropout():
    "Both act in training only, and label dropout by the row"
    net = shaken(ADMUNet(**base, model_channels=32, label_dim=4, dropout=0., label_dropout=.5))
    x, v, y = torch.randn(1, 3, 16, 16).repeat(64, 1, 1, 1), torch.zeros(64), torch.ones(64).long()
    with torch.no_grad():
        with_, without = net(x[:1], v[:1], y[:1]), net(x[:1], v[:1])
        net.train()
        out = net(x, v, y)
        near = [min((o-w).abs().max() for w in (with_[0], without[0])) < 1e-4 for o in out]
        kept = sum(((o-with_[0]).abs().max() < 1e-4).item() for o in out)
        assert all(near) and 15 < kept < 49
        net = shaken(ADMUNet(**base, model_channels=32, dropout=.5))
        assert torch.equal(net(x[:1], v[:1]), net(x[:1], v[:1]))
        net.train()
        assert not torch.equal(net(x[:1], v[:1]), net(x[:1], v[:1]))
