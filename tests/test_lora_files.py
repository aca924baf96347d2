"""LoRA files: every tensor is used or named, every source of alpha is asked, exports are equally
strong wherever they are opened"""
import json, warnings
from copy import deepcopy

import pytest, torch
from safetensors.torch import load_file, save_file

from dmd2_nb.core import rng
from dmd2_nb.layers.lora import content_mark, open_lora
from dmd2_nb.layers.lora_names import ldm_names, lora_part
from dmd2_nb.layers.lora_strength import pattern_value
from dmd2_nb.sdxl.adapt import check_start
from dmd2_nb.sdxl.adapter import CondUNet, EpsDenoiser, TINY_SD15, make_unet
from dmd2_nb.sdxl.checkpoints import (
    export_lora,
    fuse_lora,
    load_dmd2_lora,
    read_lora,
    tiny_pipeline,
)
from dmd2_nb.sdxl.conditioning import TextEncoders, encode_prompts
from dmd2_nb.sdxl.lora import AdapterBase, AdapterNet
from dmd2_nb.sdxl.roles import SharedBase

unet = make_unet()
PROJ, CONV, OUT = (
    'mid_block.attentions.0.proj_in',
    'mid_block.resnets.0.conv1',
    'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0',
)
KOHYA = 'lora_unet_'+PROJ.replace('.', '_')


def one_line(e):
    text = str(e.value)
    return '\n' not in text and len(text) <= 600


def pair(stem=f'base_model.model.{PROJ}', down='lora_A', up='lora_B', r=4, n=64):
    "A and B of ones: at alpha = rank each weight moves by the rank"
    return {f'{stem}.{down}.weight': torch.ones(r, n), f'{stem}.{up}.weight': torch.ones(64, r)}


def kohya(stem=KOHYA, **k): return pair(stem, 'lora_down', 'lora_up', **k)


def write(folder, tensors, name='l.safetensors', config=None, **metadata):
    "A file, its metadata, and peft's settings beside it"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder/name, metadata=dict(format='pt') | metadata)
    if config is not None: (folder/'adapter_config.json').write_text(json.dumps(config))
    return folder/name


def scale(file, layer=PROJ, **k):
    "How much B times A counts"
    fused = fuse_lora(deepcopy(unet), file, **k)
    return ((fused.get_submodule(layer).weight-unet.get_submodule(layer).weight).mean()/4).item()


def adapter_metadata(prefix='unet.', **c):
    return dict(lora_adapter_metadata=json.dumps({prefix+k: v for k, v in c.items()}))


# names

stems = [
    PROJ,
    f'unet.{PROJ}',
    f'base_model.model.{PROJ}',
    f'module.{PROJ}',
    f'_orig_mod.{PROJ}',
    f'unet._orig_mod.{PROJ}',
    f'module._orig_mod.base_model.model.{PROJ}',
    f'diffusion_model.{PROJ}',
    'diffusion_model.middle_block.1.proj_in',
    'model.diffusion_model.middle_block.1.proj_in',
    f'transformer.{PROJ}',
    KOHYA,
    'lora_unet_middle_block_1_proj_in',
    KOHYA.replace('lora_unet_', 'lycoris_'),
    KOHYA.replace('lora_unet_', 'lora_unet__orig_mod_'),
]


@pytest.mark.parametrize('stem', stems)
@pytest.mark.parametrize(
    'down, up',
    [
        ('lora_A', 'lora_B'),
        ('lora_A.default', 'lora_B.default'),
        ('lora_A.default_0', 'lora_B.default_0'),
        ('lora_down', 'lora_up'),
        ('lora.down', 'lora.up'),
    ],
)
def test_spellings(tmp_path, stem, down, up):
    tensors, rank, alpha = read_lora(write(tmp_path, pair(stem, down, up)), unet, alpha=2)
    assert list(tensors) == [PROJ] and (rank, alpha) == (4, 2.)


@pytest.mark.parametrize(
    'stem',
    [
        'unet.{}.processor.to_out_lora',
        '{}.processor.to_out_lora',
        'unet.{}.to_out.0.lora',
        'unet.{}.to_out.0.lora_linear_layer',
    ],
)
def test_old_names_of_diffusers(tmp_path, stem):
    with pytest.warns(UserWarning, match='alpha = rank'):
        file = write(
            tmp_path,
            {
                f'{stem.format(OUT.removesuffix(".to_out.0"))}.{p}.weight': v
                for p, v in zip(('down', 'up'), (torch.ones(4, 64), torch.ones(64, 4)))
            },
        )
        assert scale(file, OUT) == pytest.approx(1)


def test_names_of_sd_scripts_are_those_of_diffusers_own_table():
    "The numbered names of every layer of the real SDXL, against what diffusers makes of them"
    from types import SimpleNamespace
    from diffusers.loaders.lora_conversion_utils import (
        _convert_unet_lora_key,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from dmd2_nb.sdxl.adapter import SDXL_UNET
    sdxl = make_unet(SDXL_UNET, device='meta')
    layers = [
        n for n, m in sdxl.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    ours = ldm_names(layers)
    assert sorted(ours.values()) == sorted(layers)
    for alias, name in ours.items():
        key = f'lora_unet_{alias.replace(".", "_")}.lora_down.weight'
        theirs = _convert_unet_lora_key(
            next(
                iter(
                    _maybe_map_sgm_blocks_to_diffusers(
                        {key: 0}, SimpleNamespace(layers_per_block=2)
                    )
                )
            )
        )
        theirs = (
            theirs.replace('.processor', '')
            .replace('_lora.down.weight', '')
            .replace('.lora.down.weight', '')
            .replace('to_out', 'to_out.0')
        )
        assert theirs == name or 'to_out' in name and theirs.replace('.0.0', '.0') == name, (
            alias,
            name,
            theirs,
        )


def test_text_encoders_are_left_out_with_a_word(tmp_path):
    for i, (stem, _k) in enumerate(
        {
            'text_encoder.text_model.encoder.layers.0.self_attn.q_proj': {},
            'text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj': {},
            'lora_te1_text_model_x': {},
            'lora_te2_text_model_x': {},
            'lora_te_text_model_x': {},
            'te1.text_model.x': {},
        }.items()
    ):
        text = pair(stem, 'lora_down', 'lora_up')
        with pytest.warns(UserWarning, match='text encoders .2 tensors'):
            assert scale(write(tmp_path/str(i), kohya() | text), alpha=4) == pytest.approx(1)
        with pytest.raises(ValueError, match='only a LoRA of text encoders') as e:
            fuse_lora(deepcopy(unet), write(tmp_path/f'only{i}', text))
        assert one_line(e)


def test_a_training_checkpoint_holds_the_base_too(tmp_path):
    base = {
        k.replace(f'{PROJ}.', f'{PROJ}.base_layer.'): v.clone()
        for k, v in unet.state_dict().items()
    }
    torch.save(
        {
            f'module.{k}': v
            for k, v in (base | pair(PROJ, 'lora_A.default', 'lora_B.default')).items()
        },
        tmp_path / 'pytorch_model.bin',
    )
    with pytest.warns(UserWarning, match='weights of the U-Net itself .* left out'):
        assert scale(tmp_path/'pytorch_model.bin', alpha=1) == pytest.approx(0.25)


lora_down = f'{KOHYA}.lora_down.weight'
strange = {
    'dora': ({f'{KOHYA}.dora_scale': torch.ones(64, 1)}, 'dora_scale .DoRA'),
    'dora of peft': (
        {f'unet.{PROJ}.lora_magnitude_vector.default.weight': torch.ones(64)},
        'magnitude_vector.* .DoRA',
    ),
    'diff': (
        {'lora_unet_conv_in.diff': torch.ones(32, 4, 3, 3)},
        'conv_in.diff .a whole difference',
    ),
    'diff_b': ({f'{KOHYA}.diff_b': torch.ones(64)}, 'diff_b'),
    'loha': ({'lora_unet_conv_in.hada_w1_a': torch.ones(4, 4)}, 'hada_w1_a .LoHa'),
    'lokr': ({'lora_unet_conv_in.lokr_w1': torch.ones(4, 4)}, 'lokr_w1 .LoKr'),
    'bias': ({f'unet.{PROJ}.lora_B.bias': torch.ones(64)}, 'lora_B.bias .a trained bias'),
    'up alone': ({'lora_unet_conv_in.lora_up.weight': torch.ones(32, 4)}, 'conv_in has up alone'),
    'down alone': (
        {'lora_unet_conv_in.lora_down.weight': torch.ones(4, 4, 3, 3)},
        'conv_in has down alone',
    ),
    'alpha alone': ({'lora_unet_conv_in.alpha': torch.tensor(1.0)}, 'conv_in has alpha alone'),
    'unknown': ({'something': torch.ones(1)}, 'no part of a LoRA: something'),
    'whole layer': ({'unet.conv_in.modules_to_save.weight': torch.ones(1)}, 'modules_to_save'),
    'twice': (pair(f'unet.{PROJ}'), 'same matrix twice'),
    'another layer': (
        kohya('lora_unet_up_blocks_9_x'),
        'belongs to another model: lora_unet_up_blocks_9_x is no layer',
    ),
    'odd name': (kohya('lora_unet_whatever'), 'not known here .lora_unet_whatever'),
    'nan': ({f'{KOHYA}.alpha': torch.tensor(float('nan'))}, 'alpha has 1 NaN'),
    'zero': ({f'{KOHYA}.alpha': torch.tensor(0.0)}, 'alpha must be a number above 0'),
    'inf': ({lora_down: torch.full((4, 64), float('inf'))}, 'lora_down.weight has 256 infinite'),
    'integers': ({lora_down: torch.ones(4, 64, dtype=torch.int8)}, 'not floating point'),
    'rank': ({lora_down: torch.ones(5, 64)}, 'does not fit this U-Net: 1 misshapen'),
    'width': ({lora_down: torch.ones(4, 63)}, 'does not fit'),
    'conv': ({lora_down: torch.ones(4, 64, 3, 3)}, 'does not fit'),
    'flat': ({lora_down: torch.ones(64)}, 'does not fit'),
    'empty': ({lora_down: torch.ones(0, 64)}, 'does not fit'),
}


@pytest.mark.parametrize('what', strange)
def test_every_tensor_is_used_or_named(tmp_path, what):
    more, says = strange[what]
    file, was = write(tmp_path, kohya() | more), content_mark(unet)
    with pytest.raises(ValueError, match=says) as e: fuse_lora(unet, file)
    assert one_line(e) and 'l.safetensors' in str(e.value) and content_mark(unet) == was
    if what not in ('nan', 'zero', 'inf', 'integers'):  # these are in the numbers, not in the names
        with pytest.raises(ValueError, match=says.replace('this U-Net', 'this teacher')):
            check_start(unet, file)


def test_several_adapters(tmp_path):
    file = write(tmp_path, pair(PROJ, 'lora_A.a', 'lora_B.a') | pair(OUT, 'lora_A.b', 'lora_B.b'))
    with pytest.raises(ValueError, match=r'several adapters \(a, b\)'):
        fuse_lora(deepcopy(unet), file, alpha=1)


def test_convolutions(tmp_path):
    "k x k down and a point up; 1 x 1, k x k in the middle and a point (LyCORIS)"
    g = rng(1)
    a, mid, b = (
        torch.randn(4, 64, 1, 1, generator=g),
        torch.randn(4, 4, 3, 3, generator=g),
        torch.randn(64, 4, 1, 1, generator=g),
    )
    stem, w = 'lora_unet_'+CONV.replace('.', '_'), unet.get_submodule(CONV).weight
    file = write(
        tmp_path / 'mid',
        {
            f'{stem}.lora_down.weight': a,
            f'{stem}.lora_mid.weight': mid,
            f'{stem}.lora_up.weight': b,
            f'{stem}.alpha': torch.tensor(2.0),
        },
    )
    x, conv = torch.randn(1, 64, 5, 5, generator=g), torch.nn.functional.conv2d
    moved = fuse_lora(deepcopy(unet), file).get_submodule(CONV).weight-w
    assert torch.allclose(conv(x, moved), conv(conv(conv(x, a), mid), b)/2, atol=1e-4)
    a = torch.randn(4, 64, 3, 3, generator=g)
    file = write(
        tmp_path / 'plain',
        {
            f'{stem}.lora_down.weight': a,
            f'{stem}.lora_up.weight': b,
            f'{stem}.alpha': torch.tensor(2.0),
        },
    )
    moved = fuse_lora(deepcopy(unet), file).get_submodule(CONV).weight-w
    assert torch.allclose(conv(x, moved), conv(conv(x, a), b)/2, atol=1e-4)


def test_a_linear_layer_stored_as_a_convolution(tmp_path):
    "1 x 1 convolution and linear layer are the same matrix"
    file = write(tmp_path, {k: v[..., None, None] for k, v in kohya().items()})
    assert scale(file, alpha=1) == pytest.approx(0.25)


# strength

@pytest.mark.parametrize(
    'config, right',
    [
        (dict(r=4, lora_alpha=1), 0.25),
        (dict(r=4, lora_alpha=4), 1),
        (dict(r=4, lora_alpha=4, use_rslora=True), 2),
        (dict(r=8, lora_alpha=1, rank_pattern={'proj_in': 4}), 0.25),
        (dict(r=4, lora_alpha=4, alpha_pattern={'proj_in': 1}), 0.25),
        (dict(r=4, lora_alpha=4, alpha_pattern={'mid_block.*': 2}), 0.5),
        (dict(r=4, lora_alpha=4, alpha_pattern={'j_in': 1}), 1),
        (dict(r=4, lora_alpha=4, use_rslora=True, alpha_pattern={PROJ: 1}), 0.5),
        (
            dict(
                peft_type='LORA',
                r=4,
                lora_alpha=2,
                bias='none',
                use_dora=False,
                init_lora_weights='gaussian',
            ),
            0.5,
        ),
    ],
)
def test_alpha_of_peft(tmp_path, config, right):
    "Beside the file, and in its metadata as diffusers writes them: with and without the name of the part"
    file = write(tmp_path/'a', pair(), 'adapter_model.safetensors', config)
    assert scale(file) == scale(file.parent) == pytest.approx(right)
    assert scale(
        write(tmp_path / 'b', pair(f'unet.{PROJ}'), **adapter_metadata(**config))
    ) == pytest.approx(right)
    assert scale(
        write(tmp_path / 'c', pair(PROJ), **adapter_metadata('', **config))
    ) == pytest.approx(right)
    text = json.loads(adapter_metadata(**config)['lora_adapter_metadata']) | {
        'text_encoder.lora_alpha': 77,
        'text_encoder.r': 5,
    }
    assert scale(
        write(tmp_path / 'd', pair(f'unet.{PROJ}'), lora_adapter_metadata=json.dumps(text))
    ) == pytest.approx(right)


def test_patterns_are_pefts(tmp_path):
    from peft.utils.other import get_pattern_key
    keys = [
        {'to_q': 1, 'attn1.to_k': 2},
        {r'down_blocks\.\d\..*': 3},
        {'^mid.*': 4},
        {'to': 5, '.*to_q': 6},
        {'to_q|to_v': 7},
    ]
    for pattern in keys:
        for layer in (
            'to_q',
            'a.to_q',
            'a.xto_q',
            'a.attn1.to_k',
            'down_blocks.1.x',
            'mid_block.to_v',
            'x.mid_block',
        ):
            assert pattern_value(pattern, layer, 0) == pattern.get(
                get_pattern_key(pattern, layer), 0
            ), (pattern, layer)


@pytest.mark.parametrize(
    'config, says',
    [
        (dict(r=4, lora_alpha=4, use_dora=True), 'use_dora'),
        (dict(r=4, lora_alpha=4, bias='all'), "bias='all'"),
        (dict(r=4, lora_alpha=4, bias='lora_only'), 'bias='),
        (dict(r=4, lora_alpha=4, lora_bias=True), 'lora_bias'),
        (dict(r=4, lora_alpha=4, init_lora_weights='pissa_niter_4'), 'pissa_niter_4'),
        (dict(r=4, lora_alpha=4, modules_to_save=['conv_in']), 'modules_to_save'),
        (dict(peft_type='LOHA', r=4), 'no LoRA but LOHA'),
        (dict(r=8, lora_alpha=4), 'has rank 4, but .* says 8'),
        (dict(r=4, lora_alpha=4, rank_pattern={'proj_in': 2}), 'has rank 4, but .* says 2'),
        (dict(r=4, lora_alpha=0), 'lora_alpha must be a number above 0'),
        (dict(r=4, lora_alpha='many'), 'lora_alpha must be'),
        (dict(r=4, lora_alpha=True), 'lora_alpha must be'),
        (dict(r=4, lora_alpha=4, alpha_pattern={'(': 1}), 'is no pattern'),
        (dict(r=4, lora_alpha=4, alpha_pattern=[1]), 'must be a table'),
        ([4], 'must be a table'),
    ],
)
def test_settings_that_mean_more(tmp_path, config, says):
    file = write(tmp_path, pair(), 'adapter_model.safetensors', config)
    with pytest.raises(ValueError, match=says) as e: fuse_lora(deepcopy(unet), file)
    assert one_line(e) and 'adapter_config.json' in str(e.value)


@pytest.mark.parametrize('text', ['', '{"r": 4', '\x00', '\udcff'])
def test_settings_that_are_damaged(tmp_path, text):
    file = write(tmp_path, pair())
    (tmp_path/'adapter_config.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match='adapter_config.json is no') as e:
        fuse_lora(deepcopy(unet), file)
    assert one_line(e)


@pytest.mark.parametrize(
    'metadata, right',
    [
        (dict(ss_network_alpha='1'), 0.25),
        (dict(ss_network_alpha='2.0', ss_network_args='{"conv_alpha": "9"}'), 0.5),
        (dict(lora_alpha='1'), 0.25),
        (dict(ss_network_alpha='2', ss_network_args='{"rs_lora": "True"}'), 1.0),
        (dict(ss_network_alpha='2', ss_network_args='broken'), 0.5),
    ],
)
def test_alpha_of_sd_scripts(tmp_path, metadata, right):
    "In the metadata alone, and with a tensor that says the same, in half precision too"
    assert scale(write(tmp_path/'a', kohya(), **metadata)) == pytest.approx(right)
    for dtype in (torch.float32, torch.bfloat16):
        assert scale(
            write(
                tmp_path / 'b',
                kohya() | {f'{KOHYA}.alpha': torch.tensor(4 * right).to(dtype)},
                **metadata,
            )
        ) == pytest.approx(right)


@pytest.mark.parametrize('name', ['adapter_config', 'lora_config', 'peft_config'])
def test_alpha_in_metadata_of_other_programs(tmp_path, name):
    "The settings of peft as a text, whatever the program has called it"
    told = {name: json.dumps(dict(r=4, lora_alpha=2))}
    assert scale(write(tmp_path/'a', kohya(), **told)) == pytest.approx(0.5)
    assert scale(write(tmp_path/'b', pair(PROJ), **told)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=f'{name} in .* is not JSON') as e:
        scale(write(tmp_path/'c', kohya(), **{name: '{"r": 4'}))
    assert one_line(e)


def test_alpha_as_a_whole_number(tmp_path):
    assert scale(write(tmp_path, kohya() | {f'{KOHYA}.alpha': torch.tensor(2)})) == pytest.approx(0.5)


def test_alpha_tensors(tmp_path):
    assert scale(write(tmp_path, kohya() | {f'{KOHYA}.alpha': torch.tensor(1.0)})) == pytest.approx(
        0.25
    )
    assert scale(
        write(tmp_path, pair(f'unet.{PROJ}') | {f'unet.{PROJ}.alpha': torch.tensor([1.0])})
    ) == pytest.approx(0.25)


@pytest.mark.parametrize(
    'metadata, config, tensor, both',
    [
        (dict(ss_network_alpha='2'), None, 1.0, ('ss_network_alpha', 'alpha tensors')),
        ({}, dict(r=4, lora_alpha=2), 1.0, ('adapter_config.json', 'alpha tensors')),
        (
            dict(ss_network_alpha='2'),
            dict(r=4, lora_alpha=1),
            None,
            ('adapter_config.json', 'ss_network_alpha'),
        ),
        (
            adapter_metadata(r=4, lora_alpha=2),
            dict(r=4, lora_alpha=1),
            None,
            ('adapter_config.json', 'lora_adapter_metadata'),
        ),
    ],
)
def test_two_sources_that_differ(tmp_path, metadata, config, tensor, both):
    alpha = {} if tensor is None else {f'{KOHYA}.alpha': torch.tensor(tensor)}
    file = write(tmp_path, kohya() | alpha, config=config, **metadata)
    with pytest.raises(ValueError, match='two things are said') as e:
        fuse_lora(deepcopy(unet), file)
    assert one_line(e) and all(b in str(e.value) for b in both)
    assert scale(file, alpha=1) == pytest.approx(.25) and scale(file, alpha=2) == pytest.approx(.5)
    with pytest.raises(ValueError, match='argument'): fuse_lora(deepcopy(unet), file, alpha=3)


@pytest.mark.parametrize(
    'names',
    [
        ('', 'lora_A.default', 'lora_B.default'),
        ('', 'lora_A', 'lora_B'),
        ('base_model.model.', 'lora_A', 'lora_B'),
        ('module.', 'lora_A.default', 'lora_B.default'),
    ],
)
@pytest.mark.parametrize('ending', ['bin', 'safetensors'])
def test_nothing_tells_alpha(tmp_path, names, ending):
    "As in DMD2's training checkpoints: asked for, or the adapter's own is kept"
    pre, down, up = names
    tensors = pair(pre+PROJ, down, up)
    file = tmp_path/f'pytorch_model.{ending}'
    if ending == 'bin': torch.save(tensors, file)
    else: save_file(tensors, file)
    for f in (fuse_lora, lambda u, p: read_lora(p, u)):
        with pytest.raises(ValueError, match='pytorch_model.* tells its alpha: pass alpha=') as e:
            f(deepcopy(unet), file)
        assert one_line(e)
    assert scale(file, alpha=1) == pytest.approx(.25) and read_lora(file, unet, alpha=8)[2] == 8
    net = AdapterNet(AdapterBase(make_unet(), ('mid_block.attentions.0.proj_in',)), 4, alpha=2.)
    with pytest.warns(UserWarning, match='own .2. is kept'): load_dmd2_lora(file, net)
    assert net.alpha == 2 and all(
        torch.equal(m, torch.ones_like(m)) for ab in net.tensors().values() for m in ab
    )
    load_dmd2_lora(file, net, alpha=1)
    assert net.alpha == 2 and (
        net.merged()[f'{PROJ}.weight'] - unet.state_dict()[f'{PROJ}.weight']
    ).mean().item() == pytest.approx(1)
    with pytest.raises(ValueError, match='alpha must be a number above 0'):
        read_lora(file, unet, alpha=0)


def test_names_that_say_what_no_alpha_means(tmp_path):
    "kohya and diffusers read no alpha as alpha = rank; so do we, with a word"
    for i, t in enumerate(
        (
            kohya(),
            pair(f'unet.{PROJ}'),
            pair(f'diffusion_model.{PROJ}'),
            kohya('lora_unet_middle_block_1_proj_in'),
        )
    ):
        with pytest.warns(UserWarning, match='alpha = rank'):
            assert scale(write(tmp_path/str(i), t)) == pytest.approx(1)


def test_ranks_and_alphas_of_each_layer(tmp_path):
    "One rank and one alpha for all come out; every product is what it was"
    to_q = OUT.replace('to_out.0', 'to_q')
    tensors = (
        pair(r=4)
        | pair(f'base_model.model.{to_q}', r=2)
        | {
            f'base_model.model.{CONV}.lora_A.weight': torch.ones(4, 64, 3, 3),
            f'base_model.model.{CONV}.lora_B.weight': torch.ones(64, 4, 1, 1),
        }
    )
    file = write(
        tmp_path,
        tensors,
        config=dict(
            r=4, lora_alpha=4, rank_pattern={'to_q': 2}, alpha_pattern={'to_q': 1, 'conv1': 1}
        ),
    )
    lora, rank, alpha = read_lora(file, unet)
    assert {n: tuple(a.shape) for n, (a, _) in lora.items()} == {
        PROJ: (4, 64),
        to_q: (4, 64),
        CONV: (4, 64, 3, 3),
    }
    for n, moved in {PROJ: 4*1., to_q: 2*.5, CONV: 4*.25}.items():
        a, b = lora[n]
        assert torch.allclose(alpha/rank*(b.flatten(1)@a.flatten(1)), torch.tensor(moved)), n
    net = AdapterNet(AdapterBase(make_unet(), (PROJ, to_q, CONV)), 4, alpha=3.)
    fused = fuse_lora(deepcopy(unet), file).state_dict()
    for k, v in load_dmd2_lora(file, net).merged().items():
        assert torch.allclose(v, fused[k], atol=1e-5), k


# twice, folders, exports

def test_fusing_twice(tmp_path):
    file, other = (
        write(tmp_path / 'a', kohya() | {f'{KOHYA}.alpha': torch.tensor(1.0)}),
        write(
            tmp_path / 'b',
            {k: 2 * v for k, v in kohya().items()} | {f'{KOHYA}.alpha': torch.tensor(1.0)},
        ),
    )
    net = deepcopy(unet)
    fuse_lora(net, file)
    fuse_lora(net, other)
    was = content_mark(net)
    for n in (net, deepcopy(net)):
        with pytest.raises(ValueError, match='is in these weights already') as e:
            fuse_lora(n, file, 0.5)
        assert one_line(e) and content_mark(n) == was
    with pytest.raises(ValueError, match='already'): fuse_lora(deepcopy(net).half(), other)
    net.load_state_dict(unet.state_dict())  # the base again
    fuse_lora(net, file)
    with pytest.raises(ValueError, match='scale must be'): fuse_lora(net, other, float('nan'))


def test_folder_of_several_files(tmp_path):
    for i, name in enumerate(
        ('a.safetensors', 'pytorch_lora_weights.safetensors', 'adapter_model.safetensors')
    ):
        write(
            tmp_path,
            {k: (i + 1) * v for k, v in kohya().items()} | {f'{KOHYA}.alpha': torch.tensor(4.0)},
            name,
        )
        if not i: assert scale(tmp_path) == pytest.approx(1)
        else:
            with pytest.warns(UserWarning, match=f'reading {name}; also there: '):
                assert scale(tmp_path) == pytest.approx((i+1)**2)
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no file of weights'): scale(tmp_path/'empty')
    with pytest.raises(FileNotFoundError, match='none.safetensors is missing'):
        scale(tmp_path/'none.safetensors')


@pytest.fixture(scope='module')
def pipe(): return tiny_pipeline()


@pytest.fixture(scope='module')
def role(pipe):
    G = AdapterNet(AdapterBase(deepcopy(pipe.unet)), 8, alpha=3.)
    for i, (_a, b) in enumerate(G.tensors().values()):
        b.copy_(0.2*torch.randn(b.shape, generator=rng(0, i)))
    return G


@pytest.mark.parametrize('layout', ['diffusers', 'kohya'])
@pytest.mark.parametrize('stripped', [False, True], ids=['with metadata', 'without'])
def test_exports_are_as_strong_everywhere(tmp_path, pipe, role, layout, stripped):
    "Opened by diffusers' pipeline, by its U-Net alone, by our reader, with and without the metadata"
    file = export_lora(role, tmp_path/layout, (999,), layout, torch.float32)
    if stripped: save_file(load_file(file), file)
    cond = encode_prompts(TextEncoders.from_pipe(pipe), ['a cat', 'a dog'], size=128)
    x, t = torch.randn(2, 4, 16, 16, generator=rng(1)), torch.tensor([999, 249])
    with torch.no_grad():
        ours, plain = role(x, t, cond), CondUNet(pipe.unet)(x, t, cond)
        same = lambda y: (y-ours).abs().max()/ours.abs().max() < 1e-5
        assert not same(plain)
        pipe.load_lora_weights(tmp_path/layout)
        out = CondUNet(pipe.unet)(x, t, cond)
        pipe.unload_lora_weights()
        assert same(out)
        if layout == 'diffusers':
            alone = deepcopy(pipe.unet)
            alone.load_lora_adapter(str(file.parent), weight_name=file.name, prefix='unet')
            assert same(CondUNet(alone)(x, t, cond))
        with warnings.catch_warnings():
            # without the metadata it is said that alpha = rank is taken
            warnings.simplefilter('ignore' if stripped else 'error')
            assert same(CondUNet(fuse_lora(deepcopy(pipe.unet), file))(x, t, cond))
            other = AdapterNet(role.base, 8, alpha=1.)
            assert same(load_dmd2_lora(file, other)(x, t, cond)) and other.alpha == 1


def test_half_precision_loses_little(tmp_path):
    "Small matrices do not fall below what float16 can hold, whatever alpha is"
    net = AdapterNet(AdapterBase(make_unet()), 8, alpha=0.01)
    for i, (a, b) in enumerate(net.tensors().values()):
        b.copy_(1e-3*torch.randn(b.shape, generator=rng(0, i)))
    for layout in ('diffusers', 'kohya'):
        tensors, rank, alpha = read_lora(export_lora(net, tmp_path/layout, (999,), layout), unet)
        for n, (a, b) in net.tensors().items():
            want, got = (
                net.scale * (b.flatten(1) @ a.flatten(1)),
                alpha
                / rank
                * (tensors[n][1].float().flatten(1) @ tensors[n][0].float().flatten(1)),
            )
            assert (got-want).norm() < 2e-2*want.norm()


@pytest.mark.parametrize('value', [float('nan'), 1e6])
def test_nothing_is_exported_that_is_not_finite(tmp_path, value):
    "Also what only half precision cannot hold"
    net = AdapterNet(AdapterBase(make_unet()), 2)
    next(iter(net.tensors().values()))[1].fill_(value)
    for layout in ('diffusers', 'kohya'):
        with pytest.raises(ValueError, match='not finite as torch.float16') as e:
            export_lora(net, tmp_path/'x', (999,), layout)
        assert one_line(e) and not (tmp_path/'x').exists()


def test_transformers_names(tmp_path):
    "Nothing in the reader knows U-Nets"
    net = torch.nn.ModuleDict(
        dict(
            transformer_blocks=torch.nn.ModuleList(
                [torch.nn.ModuleDict(dict(to_q=torch.nn.Linear(64, 64)))]
            )
        )
    )
    for stem in (
        'transformer.transformer_blocks.0.to_q',
        'lora_transformer_transformer_blocks_0_to_q',
        'transformer_blocks.0.to_q',
    ):
        assert list(open_lora(write(tmp_path, pair(stem)), net, alpha=1).tensors) == [
            'transformer_blocks.0.to_q'
        ]
    with pytest.raises(ValueError, match='belongs to another model'):
        open_lora(write(tmp_path, kohya()), net)


# starts and runs

@pytest.mark.parametrize('where', ['p', 'p/unet', 'p/unet/diffusion_pytorch_model.safetensors', 'module'])
@pytest.mark.parametrize(
    'prediction, class_',
    [('v_prediction', 'Euler'), ('flow_prediction', 'Euler'), (None, 'FlowMatch')],
)
def test_start_of_another_prediction(tmp_path, pipe, where, prediction, class_):
    "The folder of a pipeline and that of its U-Net say the same"
    other = make_unet()
    other.save_pretrained(tmp_path/'p'/'unet')
    (tmp_path/'p'/'scheduler').mkdir()
    config = dict(_class_name=f'{class_}EulerDiscreteScheduler') | (
        dict(prediction_type=prediction) if prediction else {}
    )
    (tmp_path/'p'/'scheduler'/'scheduler_config.json').write_text(json.dumps(config))
    init = (
        type(other).from_pretrained(tmp_path / 'p', subfolder='unet')
        if where == 'module'
        else tmp_path / where
    )
    with pytest.raises(
        ValueError, match='teacher predicts epsilon, the start (v_prediction|flow)'
    ) as e:
        check_start(EpsDenoiser(make_unet()), init)
    assert one_line(e)
    (tmp_path / 'p' / 'scheduler' / 'scheduler_config.json').write_text(
        json.dumps(dict(prediction_type='epsilon'))
    )
    check_start(EpsDenoiser(make_unet()), tmp_path/'p'/'unet')


def test_start_in_shards(tmp_path):
    make_unet().save_pretrained(tmp_path/'u', max_shard_size='1MB')
    check_start(unet, tmp_path/'u')
    make_unet(cross_attention_dim=32).save_pretrained(tmp_path/'o', max_shard_size='1MB')
    with pytest.raises(ValueError, match="not of the teacher's architecture"):
        check_start(unet, tmp_path/'o')


@pytest.mark.parametrize(
    'change, says',
    [
        ('alpha', 'alpha 8.0 instead of 3.0'),
        ('base', r'base \w{16}... instead of'),
        ('targets', 'targets'),
        ('dtype', 'dtype float32 instead of float64'),
    ],
)
def test_a_run_knows_its_adapter(tmp_path, change, says):
    "Same shapes, other strength or other base: refused with what differs"
    from dataclasses import replace
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    from dmd2_nb.sdxl.data import encode_conditions
    from dmd2_nb.sdxl.recipe import sdxl_dmd2, sdxl_lora_config
    from dmd2_nb.train import load_state, save_state
    cond = encode_conditions(tmp_path/'c', ['a cat'], tiny_text_encoders(), size=128).items([0])[1]
    cfg = replace(sdxl_lora_config, batch=1, gan_g=0., gan_d=0., dtype='float32')
    def run(seed=0, dtype=None, **k):
        return sdxl_dmd2(
            SharedBase(
                EpsDenoiser(make_unet(seed=seed, dtype=dtype), shape=(4, 16, 16)), rank=2, **k
            ),
            cfg,
            cond,
        )
    save_state(run(), tmp_path/'state')
    load_state(run(), tmp_path/'state')
    other = dict(
        alpha=lambda: run(alpha=3.0),
        base=lambda: run(seed=1),
        targets=lambda: run(targets=('to_q',)),
        dtype=lambda: run(dtype=torch.float64),
    )[change]()
    with pytest.raises(
        ValueError, match=f'state was saved with another adapter or base: .*{says}'
    ) as e:
        load_state(other, tmp_path/'state')
    assert one_line(e)


def test_content_mark():
    "All bytes of what is small; of much, a part that is drawn from every tensor"
    import dmd2_nb.layers.lora as module
    t = {k: v.clone() for k, v in unet.state_dict().items()}
    was = content_mark(t)
    t['conv_in.weight'].flatten()[7] += 1e-3
    assert content_mark(t) != was and 'drawn' not in was and len(was) == 64
    big = {'a': torch.zeros(5000), 'b': torch.zeros(3)}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'WHOLE', 2**12)
        m.setattr(module, 'DRAWN', 2**11)
        was = content_mark(big)
        big['b'][0] = 1
        assert 'drawn' in was and content_mark(big) != was
        assert content_mark({'a': torch.zeros(5001), 'b': torch.zeros(3)}) != was


def test_parts():
    assert (
        lora_part('x.lora_A.weight') == ('x', 'down', None)
        and lora_part('x.lora_up.weight')[1] == 'up'
        and lora_part('x.weight')[1] is None
    )
    with pytest.raises(ValueError, match='belongs to another model'): read_lora_of_sd15()


def read_lora_of_sd15():
    "The first model's blocks are numbered otherwise: not by chance the same layer"
    from dmd2_nb.layers.lora_names import sort_lora
    return sort_lora(
        [f'lora_unet_input_blocks_10_1_proj_in.lora_{p}.weight' for p in ('down', 'up')],
        {k: tuple(v.shape) for k, v in make_unet(TINY_SD15, device='meta').state_dict().items()},
        'x',
    )
