"Files of another model, broken files, a card too small, a missing package: one clear line each, and nothing lost"
import json, resource, sys, types, warnings

import pytest
import torch

diffusers = pytest.importorskip('diffusers')
from safetensors.torch import load_file, save_file

from dmd2_nb.sdxl.adapter import SDXL_UNET, TINY_SD15, TINY_SDXL, EpsDenoiser, make_unet, make_vae
from dmd2_nb.sdxl.checkpoints import (
    export_lora,
    export_unet,
    fuse_lora,
    load_dmd2_lora,
    load_dmd2_unet,
)
from dmd2_nb.sdxl.conditioning import tiny_text_encoders
from dmd2_nb.sdxl.data import LatentShards, PromptFile, encode_conditions, encode_latents
from dmd2_nb.sdxl.lora import AdapterBase, AdapterNet
from dmd2_nb.sdxl.recipe import distill_sdxl, eight_bit, sdxl_dmd2, sdxl_lora_config
from dmd2_nb.sdxl.roles import Setup, SharedBase, memory_plan
from dataclasses import replace

SMALL = TINY_SDXL | dict(
    block_out_channels=(16, 16, 32),
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(2, 2, 2),
)
cfg = replace(
    sdxl_lora_config, batch=1, gan_g=0.0, gan_d=0.0, guidance=1.0, ema_halflife=0.0, dtype='float32'
)


def one_line(e): return len(str(e.value).splitlines()) == 1
def weights(m): return [p.detach().clone() for p in m.parameters()]
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope='module')
def conds(tmp_path_factory):
    return encode_conditions(
        tmp_path_factory.mktemp('conds'), ['a cat', 'a dog'], tiny_text_encoders(), size=128
    )


def run(conds):
    return sdxl_dmd2(
        SharedBase(EpsDenoiser(make_unet(SMALL), shape=(4, 16, 16)), rank=2),
        cfg,
        conds.items([0])[1],
    )


@pytest.mark.parametrize('layout', ['diffusers', 'kohya'])
def test_lora_of_another_model(tmp_path, layout):
    file = export_lora(
        AdapterNet(AdapterBase(make_unet(TINY_SD15)), 2), tmp_path / 'sd15', (999,), layout
    )
    unet = make_unet(SMALL)
    was = weights(unet)
    with pytest.raises(
        ValueError, match='sd15.*belongs to another model: .* no layer of this U-Net'
    ) as e:
        fuse_lora(unet, file)
    assert one_line(e) and same(weights(unet), was)
    G = SharedBase(EpsDenoiser(make_unet(SMALL)), rank=2).generator.net
    was = weights(G)
    with pytest.raises(ValueError, match='belongs to another model'): load_dmd2_lora(file, G)
    assert same(weights(G), was)


def test_lora_of_another_width(tmp_path):
    "Same names, other shapes: found before the first weight is changed"
    file = export_lora(
        AdapterNet(AdapterBase(make_unet(SMALL, block_out_channels=(32, 32, 64))), 2),
        tmp_path / 'wide',
        (999,),
    )
    unet = make_unet(SMALL)
    was = weights(unet)
    with pytest.raises(ValueError, match='does not fit this U-Net') as e: fuse_lora(unet, file)
    assert one_line(e) and same(weights(unet), was)
    G = SharedBase(EpsDenoiser(make_unet(SMALL)), rank=2).generator.net
    was = weights(G)
    with pytest.raises(ValueError, match='does not fit this U-Net: .*misshapen'):
        load_dmd2_lora(file, G)
    assert same(weights(G), was)


@pytest.mark.parametrize(
    'change',
    [dict(in_channels=9), dict(block_out_channels=(16, 32, 32)), dict(cross_attention_dim=32)],
    ids=['inputs', 'widths', 'text'],
)
def test_unet_with_wrong_channels(tmp_path, change):
    file = (
        export_unet(make_unet(SMALL, **change), tmp_path / 'other', (999,))
        / 'diffusion_pytorch_model.safetensors'
    )
    with pytest.raises(
        ValueError, match=r'does not fit this U-Net: .*misshapen: .* instead of '
    ) as e:
        load_dmd2_unet(file, SMALL)
    assert one_line(e)


@pytest.mark.parametrize(
    'raw, says',
    [
        (b'a cat\n\na dog\n', 'line 2: empty prompt'),
        (b'a cat\n   \n', 'line 2: empty prompt'),
        (b'a cat\ncaf\xe9\n', 'line 2: not UTF-8 .byte 0xe9'),
        (b'\xff\xfea\0', 'line 1: not UTF-8'),
        (b'a\0b\n', 'line 1: not text'),
        (b'', 'has no prompts'),
    ],
    ids=['empty line', 'blank line', 'latin-1', 'utf-16', 'zero byte', 'empty file'],
)
def test_prompt_files(tmp_path, raw, says):
    (tmp_path/'p.txt').write_bytes(raw)
    with pytest.raises(ValueError, match=f'p.txt.* {says}') as e: PromptFile(tmp_path/'p.txt')
    assert one_line(e)


def test_a_shard_cut_short(tmp_path):
    "The others stay as they are; without the broken file the encoding goes on and makes the same one again"
    args = dict(
        images=[
            (
                torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1,
                f'picture {i}',
            )
            for i in range(4)
        ],
        vae=make_vae(),
        enc=tiny_text_encoders(),
        shard=2,
        size=32,
    )
    encode_latents(tmp_path/'s', **args)
    bad, good = tmp_path/'s'/'shard_00001.safetensors', tmp_path/'s'/'shard_00000.safetensors'
    whole, stamp = bad.read_bytes(), good.stat().st_mtime_ns
    for size in (len(whole)-100, 40, 0):
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='shard_00001.safetensors is damaged') as e:
            LatentShards(tmp_path/'s').items([3])
        assert one_line(e)
    assert LatentShards(tmp_path/'s').items([1])[2] == ['picture 1']
    bad.unlink()
    encode_latents(tmp_path/'s', **args)
    assert bad.read_bytes() == whole and good.stat().st_mtime_ns == stamp


def test_a_shard_with_rows_missing(tmp_path):
    encode_conditions(tmp_path/'s', ['a', 'b', 'c'], tiny_text_encoders(), shard=3, size=128)
    f = tmp_path/'s'/'shard_00000.safetensors'
    save_file(
        {k: v[:2].contiguous() for k, v in load_file(f).items()},
        f,
        metadata=dict(prompts=json.dumps(['a', 'b', 'c'])),
    )
    with pytest.raises(ValueError, match=r'is damaged: it holds \[2, 3\] items'):
        LatentShards(tmp_path/'s').items([0])


def test_card_too_small():
    "Full-size SDXL on a card of 8 GiB: refused without its 5 GB of weights, and told what would fit"
    was = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError,
        match=r'needs about 1\d\.\d GiB and the card has 8.0 GiB. It would fit with .*rank=',
    ) as e:
        memory_plan(Setup()).check(8*2**30)
    assert one_line(e) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-was < 1_000_000  # KiB
    assert sum(p.numel() for p in make_unet(SDXL_UNET, device='meta').parameters()) > 2.5e9


def fake_bnb(**kw):
    class AdamW8bit(torch.optim.AdamW): pass
    return types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=AdamW8bit, **kw))


@pytest.mark.parametrize(
    'module, says',
    [(None, 'bitsandbytes'), (fake_bnb(), 'it needs a GPU')],
    ids=['absent', 'no GPU'],
)
def test_no_8_bit_optimiser(conds, monkeypatch, module, says):
    "Said once; the run is what it would have been without asking"
    monkeypatch.setitem(sys.modules, 'bitsandbytes', module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        asked = sdxl_dmd2(
            SharedBase(EpsDenoiser(make_unet(SMALL), shape=(4, 16, 16)), rank=2),
            cfg,
            conds.items([0])[1],
            optim='adamw8bit',
        )
    said = [str(w.message) for w in seen if '8-bit' in str(w.message)]
    assert (
        len(said) == 1 and says in said[0] and 'stay in float32' in said[0] and '\n' not in said[0]
    )
    plain = run(conds)
    assert type(asked.opt_g) is type(asked.opt_fake) is torch.optim.AdamW
    for dmd in (asked, plain):
        for _ in distill_sdxl(dmd, conds, 2): pass
    assert same(weights(asked.G), weights(plain.G)) and same(
        weights(asked.fake), weights(plain.fake)
    )


def test_8_bit_optimiser_that_cannot_start(conds, monkeypatch):
    "Installed, and a GPU is there, but its libraries aren't: the optimisers stay whole, none is exchanged alone"
    class Broken:
        made = 0
        def __init__(self, groups):
            Broken.made += 1
            if Broken.made == 2: raise RuntimeError
    monkeypatch.setitem(
        sys.modules,
        'bitsandbytes',
        types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=Broken)),
    )
    dmd = run(conds)
    monkeypatch.setattr(dmd, 'device', torch.device('cuda'))
    with pytest.warns(UserWarning, match='not available .RuntimeError.: averages stay in float32'):
        assert not eight_bit(dmd)
    assert Broken.made == 2 and type(dmd.opt_g) is type(dmd.opt_fake) is torch.optim.AdamW


def test_8_bit_optimisers_take_the_same_groups(conds, monkeypatch):
    "With a stand-in for the package and a device that says it is a GPU"
    bnb = fake_bnb()
    monkeypatch.setitem(sys.modules, 'bitsandbytes', bnb)
    dmd = run(conds)
    groups = [
        [(id(p), g['lr'], g['base_lr']) for p in g['params']]
        for o in (dmd.opt_g, dmd.opt_fake)
        for g in o.param_groups
    ]
    monkeypatch.setattr(dmd, 'device', torch.device('cuda'))
    assert eight_bit(dmd)
    monkeypatch.undo()
    assert type(dmd.opt_g) is type(dmd.opt_fake) is bnb.optim.AdamW8bit
    assert groups == [
        [(id(p), g['lr'], g['base_lr']) for p in g['params']]
        for o in (dmd.opt_g, dmd.opt_fake)
        for g in o.param_groups
    ]
    dmd.device = torch.device('cpu')
    was = weights(dmd.G)
    for _ in distill_sdxl(dmd, conds, 1): pass
    assert not same(weights(dmd.G), was)


def test_unknown_optimiser(conds):
    with pytest.raises(ValueError, match="adamw or adamw8bit, got 'lion'"):
        sdxl_dmd2(
            SharedBase(EpsDenoiser(make_unet(SMALL), shape=(4, 16, 16)), rank=2),
            cfg,
            conds.items([0])[1],
            optim='lion',
        )


@pytest.mark.parametrize(
    'what, says',
    [
        ('v', 'predicts epsilon, the start v_prediction'),
        ('other', "not of the teacher's architecture"),
        ('sd15', 'belongs to another model'),
        ('foreign', 'matches no layer of the teacher'),
        ('empty', 'holds no .safetensors'),
        ('missing', 'is missing'),
        ('damaged', 'is damaged'),
    ],
)
def test_adapt_refuses_a_start_before_it_prepares_anything(tmp_path, conds, what, says):
    from dmd2_nb.sdxl.adapt import adapt
    from dmd2_nb.sdxl.adapter import VDenoiser
    for n in ('empty', 'other'): (tmp_path/n).mkdir()
    if what == 'v': init = VDenoiser(make_unet(SMALL))
    elif what == 'sd15':
        init = export_lora(
            AdapterNet(AdapterBase(make_unet(TINY_SD15)), 2), tmp_path / 'sd15', (999,)
        )
    elif what == 'other':
        init = export_unet(make_unet(SMALL, cross_attention_dim=32), tmp_path/'other', (999,))
    elif what == 'foreign':
        init = tmp_path/'f.safetensors'
        save_file(
            {
                'text.proj.lora_A.weight': torch.zeros(2, 8),
                'text.proj.lora_B.weight': torch.zeros(8, 2),
            },
            init,
        )
    elif what == 'damaged':
        init = tmp_path/'d.safetensors'
        init.write_bytes(b'\x08'+bytes(40))
    else: init = tmp_path/(what if what == 'empty' else 'none.safetensors')
    teacher = EpsDenoiser(make_unet(SMALL), shape=(4, 16, 16))
    kinds = [type(m) for m in teacher.modules()]
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e:
        next(adapt(teacher, init, conds, tmp_path/'run'))
    assert (
        one_line(e)
        and not (tmp_path / 'run').exists()
        and kinds == [type(m) for m in teacher.modules()]
    )


def test_an_empty_folder_of_images(tmp_path):
    from dmd2_nb.image_files import folder_images
    with pytest.raises(ValueError, match=str(tmp_path)) as e: folder_images(tmp_path)
    assert one_line(e)


def test_a_run_kept_by_steps(conds, tmp_path):
    "A folder of step-N goes on as one; fewer iterations than are done change nothing"
    from dmd2_nb.system.checkpoint import save_step
    from dmd2_nb.train import save_state
    a, b, whole = run(conds), run(conds), run(conds)
    for _ in distill_sdxl(a, conds, 2): pass
    save_step(tmp_path/'run', 2, lambda p: save_state(a, p))
    for _ in distill_sdxl(b, conds, 4, folder=tmp_path/'run', save_every=1): pass
    for _ in distill_sdxl(whole, conds, 4): pass
    assert same(weights(b.G), weights(whole.G)) and sorted(
        p.name for p in (tmp_path / 'run').iterdir()
    ) == ['step-3', 'step-4']
    before = weights(a.G)
    with pytest.raises(ValueError, match='step-4 has done 4 iterations, 3 are asked for'):
        next(distill_sdxl(a, conds, 3, folder=tmp_path/'run'))
    with pytest.raises(ValueError, match='the run has done 2 iterations, 1 are asked for'):
        next(distill_sdxl(a, conds, 1))
    assert same(weights(a.G), before) and a.step == 2
    assert not list(distill_sdxl(whole, conds, 4))
    for bad in (2.5, -1, True, 'many'):
        with pytest.raises(ValueError, match='steps'): next(distill_sdxl(a, conds, bad))
