"One reader of state dicts: whoever wrote them, however they were wrapped; one way to say what does not fit"
import json, os, zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmd2_nb.system.safe_pickle import RefusedPickle
from dmd2_nb.system.tensors import (
    check_fit,
    load_into,
    misfit,
    one_dtype,
    plain_names,
    read_shapes,
    read_state_dict,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))


own = net().state_dict()
shapes = {k: tuple(v.shape) for k, v in own.items()}


def quiet(source, **kw): return read_state_dict(source, say=None, **kw)


def same(got, want=own):
    assert set(got) == set(want)
    for k, v in want.items():
        assert (
            torch.equal(got[k], v) and got[k].dtype == v.dtype and type(got[k]) is torch.Tensor
        ), k


def old(o, path): torch.save(o, path, _use_new_zipfile_serialization=False)
def new(o, path): torch.save(o, path)
def safe(o, path): save_file({k: v.contiguous() for k, v in o.items()}, path)


@pytest.mark.parametrize(
    'write, name',
    [
        (new, 'a.pt'),
        (old, 'a.pt'),
        (new, 'a.bin'),
        (old, 'pytorch_model.bin'),
        (safe, 'a.safetensors'),
        (safe, 'odd_ending.bin'),
    ],
)
def test_files(write, name, tmp_path):
    write(own, tmp_path/name)
    same(quiet(tmp_path/name))
    assert read_shapes(tmp_path/name) == shapes
    same(quiet(tmp_path))


@pytest.mark.parametrize('write', [new, old])
def test_parameters_views_and_shared_tensors(write, tmp_path):
    w = torch.arange(12.).reshape(3, 4)
    write(
        dict(
            p=nn.Parameter(w),
            t=w.T,
            row=w[1],
            empty=torch.empty(0, 3),
            half=w.bfloat16(),
            flag=torch.tensor(True),
            long=torch.arange(3),
        ),
        tmp_path / 'a.pt',
    )
    same(
        quiet(tmp_path / 'a.pt'),
        dict(
            p=w,
            t=w.T,
            row=w[1],
            empty=torch.empty(0, 3),
            half=w.bfloat16(),
            flag=torch.tensor(True),
            long=torch.arange(3),
        ),
    )


@pytest.mark.parametrize(
    'start',
    [
        'module.',
        '_orig_mod.',
        'module._orig_mod.',
        '_orig_mod.module.',
        'module.module.',
        '_fsdp_wrapped_module.',
        '_orig_mod._orig_mod.',
    ],
)
@pytest.mark.parametrize('write', [new, safe])
def test_prefixes(start, write, tmp_path):
    write(
        {start + k: v for k, v in own.items()},
        tmp_path / ('a.safetensors' if write is safe else 'a.pt'),
    )
    same(quiet(tmp_path))
    assert read_shapes(tmp_path, say=None) == shapes


def test_prefixes_inside_and_names_that_only_look_like_them():
    t = torch.zeros(1)
    assert list(
        plain_names({'down._orig_mod.conv.weight': t, 'up.0._checkpoint_wrapped_module.w': t}, 'x')
    ) == ['down.conv.weight', 'up.0.w']
    assert list(plain_names({'module.a': t, 'head': t}, 'x')) == ['module.a', 'head']
    # torch.optim.swa_utils.AveragedModel
    assert list(plain_names({'n_averaged': t, 'module.a': t}, 'x')) == ['a']
    with pytest.raises(ValueError, match='x holds a twice'):
        plain_names({'_orig_mod.a': t, 'a': t}, 'x')


@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_sharded_folder(ending, tmp_path):
    """As transformers and diffusers write it; each part is named when it is missing, and the index
    is believed to the letter"""
    stem = 'diffusion_pytorch_model' if ending == 'safetensors' else 'pytorch_model'
    names = sorted(own)
    parts = {f'{stem}-0000{i+1}-of-00002.{ending}': names[i::2] for i in range(2)}
    for f, ks in parts.items():
        (safe if ending == 'safetensors' else new)({k: own[k] for k in ks}, tmp_path/f)
    index = tmp_path/f'{stem}.{ending}.index.json'
    text = json.dumps(
        dict(metadata=dict(total_size=1), weight_map={k: f for f, ks in parts.items() for k in ks})
    )
    index.write_text(text)
    same(quiet(tmp_path))
    same(quiet(index))
    assert read_shapes(tmp_path) == shapes
    for bad in (
        '{',
        '[]',
        '{"weight_map": {"a": "../b"}}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
    ):
        index.write_text(bad)
        with pytest.raises(ValueError, match='index.json is damaged'): quiet(tmp_path)
    index.write_text(text.replace(names[0], 'other'))
    with pytest.raises(ValueError, match=f'lacks other|has {names[0]}'): quiet(tmp_path)
    index.write_text(text)
    lost = sorted(parts)[1]
    (tmp_path/lost).unlink()
    with pytest.raises(FileNotFoundError, match=f'{lost} is missing'): quiet(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match='holds 1 of 2 parts'): quiet(tmp_path)


def test_diffusers_and_transformers_folders(tmp_path):
    from dmd2_nb.sdxl.adapter import make_unet
    unet = make_unet()
    for k, kw in dict(
        whole={},
        sharded=dict(max_shard_size='300KB'),
        half=dict(variant='fp16'),
        pickled=dict(safe_serialization=False),
    ).items():
        unet.save_pretrained(tmp_path/k, **kw)
        same(quiet(tmp_path/k), unet.state_dict())
    assert len(list((tmp_path/'sharded').glob('*.safetensors'))) > 1


def test_accelerate_folder(tmp_path, capsys):
    "Weights beside the state of optimiser, schedule and random numbers, and a second network"
    safe(own, tmp_path/'model.safetensors')
    safe(net(1).state_dict(), tmp_path/'model_1.safetensors')
    new(dict(state={}, param_groups=[]), tmp_path/'optimizer.bin')
    new(dict(step=1), tmp_path/'scheduler.bin')
    (tmp_path/'random_states_0.pkl').write_bytes(b'\x80\x04N.')
    same(read_state_dict(tmp_path))
    assert (
        'reading model.safetensors; also there: model_1.safetensors\n'
        in (said := capsys.readouterr().out)
        and said.count('\n') == 1
    )
    (tmp_path/'pytorch_model.bin').write_bytes(b'')
    same(quiet(tmp_path))  # safetensors before pickles
    (tmp_path/'pytorch_model_1').mkdir()
    (tmp_path/'pytorch_model_1'/'.metadata').write_bytes(b'x')
    (tmp_path/'pytorch_model_1'/'__0_0.distcp').write_bytes(b'x')
    with pytest.raises(ValueError, match='in pieces.*merge-weights'):
        quiet(tmp_path/'pytorch_model_1')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no file of weights'): quiet(tmp_path/'empty')
    with pytest.raises(FileNotFoundError, match='nothing is missing'): quiet(tmp_path/'nothing')


def test_checkpoints_of_training_programs(tmp_path, capsys):
    opt = torch.optim.Adam(net().parameters())
    extra = dict(optimizer=opt.state_dict(), epoch=3, args=dict(lr=1e-4))
    for name in ('state_dict', 'model', 'ema', 'generator'):
        new({name: own} | extra, tmp_path/'a.pt')
        same(read_state_dict(tmp_path/'a.pt'))
        assert capsys.readouterr().out == f"{tmp_path/'a.pt'}: reading '{name}'\n"
    new(dict(model=own, ema={f'module.{k}': v+1 for k, v in own.items()}) | extra, tmp_path/'a.pt')
    with pytest.raises(ValueError, match='several state dicts: say part= one of model, ema'):
        quiet(tmp_path/'a.pt')
    same(quiet(tmp_path/'a.pt', part='model'))
    same(quiet(tmp_path/'a.pt', part='ema'), {k: v+1 for k, v in own.items()})
    with pytest.raises(ValueError, match="no part 'unet': it holds model, ema"):
        quiet(tmp_path/'a.pt', part='unet')
    new(dict(checkpoint=dict(state_dict=own)), tmp_path/'a.pt')
    same(quiet(tmp_path/'a.pt'))


@pytest.mark.parametrize(
    'what',
    [
        [1, 2],
        'text',
        torch.zeros(3),
        dict(a=torch.zeros(2), epoch=3),
        {1: torch.zeros(2)},
        {},
        dict(state={0: dict(exp_avg=torch.zeros(2))}, param_groups=[]),
    ],
)
@pytest.mark.parametrize('write', [new, old])
def test_no_state_dict(what, write, tmp_path):
    write(what, tmp_path/'a.pt')
    with pytest.raises(ValueError, match='a.pt: not a state dict|asks for') as e:
        quiet(tmp_path/'a.pt')
    assert len(str(e.value)) < 600


@pytest.mark.parametrize('write', [new, old])
def test_nothing_is_executed(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class Calls:
        def __reduce__(self): return os.mkdir, ('owned',)
    write(dict(own, x=Calls()), tmp_path/'a.pt')
    with pytest.raises(RefusedPickle, match="asks for 'posix.mkdir'|asks for 'nt.mkdir'"):
        quiet(tmp_path/'a.pt')
    assert not (tmp_path/'owned').exists()
    write(net(), tmp_path/'a.pt')
    with pytest.raises(ValueError, match="torch.nn.modules|its source code"): quiet(tmp_path/'a.pt')
    torch.jit.save(torch.jit.script(net()), tmp_path/'script.pt')
    with pytest.raises(ValueError, match='TorchScript'): quiet(tmp_path/'script.pt')


@pytest.mark.parametrize('write', [new, old, safe])
def test_cut_and_flipped(write, tmp_path):
    p = tmp_path/('a.safetensors' if write is safe else 'a.pt')
    write(own, p)
    data = p.read_bytes()
    for n in (0, 1, 100, len(data)//2, len(data)-1):
        p.write_bytes(data[:n])
        with pytest.raises(ValueError, match='damaged') as e: quiet(p)
        assert str(p) in str(e.value) and len(str(e.value)) < 600 and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'head, word',
    [
        (b'GGUF\3\0\0\0', 'GGUF'),
        (b'<!DOCTYPE html>', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        (b'\x93NUMPY', 'NumPy'),
        (b'{"a": 1}', 'JSON'),
    ],
)
def test_other_files(head, word, tmp_path):
    (tmp_path/'model.bin').write_bytes(head+b'\0'*100)
    with pytest.raises(ValueError, match=word): quiet(tmp_path)
    with zipfile.ZipFile(tmp_path/'model.bin', 'w') as z: z.writestr('a.txt', 'x')
    with pytest.raises(ValueError, match='not one of torch.save'): quiet(tmp_path)


# -- numbers --

@pytest.mark.parametrize('kind', [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize('write', [new, old, safe])
def test_fp8_is_widened_exactly(kind, write, tmp_path):
    p = tmp_path/('a.safetensors' if write is safe else 'a.pt')
    every = torch.arange(256, dtype=torch.uint8).view(kind)
    every = every[every.float().isfinite()]
    write(dict(w=every, b=torch.zeros(3)), p)
    got = quiet(p)
    assert (
        got['w'].dtype == torch.bfloat16
        and torch.equal(got['w'].float(), every.float())
        and got['b'].dtype == torch.float32
    )


def test_fp8_scales(tmp_path):
    w = torch.randn(4, 3)
    def file(**more):
        safe(
            {'a.weight': w.to(torch.float8_e4m3fn), 'a.bias': w[0]}
            | {k.replace('__', '.'): v for k, v in more.items()},
            tmp_path / 'a.safetensors',
        )
        return quiet(tmp_path)
    eight = w.to(torch.float8_e4m3fn).float()
    got = file(
        a__scale_weight=torch.tensor([0.5]),
        a__scale_input=torch.tensor(3.0),
        scaled_fp8=torch.zeros(2).to(torch.float8_e4m3fn),
    )
    assert set(got) == {'a.weight', 'a.bias'} and torch.equal(got['a.weight'], eight*0.5)
    rows = torch.tensor([1., 2., 3., 4.])
    assert torch.equal(file(a__weight_scale=rows)['a.weight'], eight*rows[:, None])
    with pytest.raises(ValueError, match='no scale for a.weight'):
        file(a__scale_weight=torch.ones(2, 2))
    with pytest.raises(ValueError, match='quantised.*a.weight.absmax'):
        file(a__weight__absmax=torch.ones(2))


def test_one_dtype():
    got = one_dtype(
        dict(a=torch.zeros(2, dtype=torch.bfloat16), b=torch.zeros(2), n=torch.arange(2))
    )
    assert [v.dtype for v in got.values()] == [torch.float32, torch.float32, torch.int64]
    assert one_dtype(got, torch.float16)['b'].dtype == torch.float16


def test_tensors_of_several_processes(tmp_path):
    "FSDP2's tensors: whole ones are read, pieces are named"
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        mesh = init_device_mesh('cpu', (1,))
        w = torch.arange(6.).reshape(2, 3)
        for write in (new, old):
            write(
                dict(
                    a=distribute_tensor(w, mesh, [Shard(0)]),
                    b=distribute_tensor(w, mesh, [Replicate()]),
                ),
                tmp_path / 'a.pt',
            )
            same(quiet(tmp_path/'a.pt'), dict(a=w, b=w))
        from torch.distributed.tensor import DTensor
        torch.save(
            dict(
                a=DTensor.from_local(
                    w, mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1)
                )
            ),
            tmp_path / 'p.pt',
        )
    finally: dist.destroy_process_group()
    with pytest.raises(ValueError, match=r'pieces of tensors.*a: \(2, 3\) of \(4, 3\)'):
        quiet(tmp_path/'p.pt')


# -- what does not fit --

def change(**k): return own | k


@pytest.mark.parametrize(
    'given, cause',
    [
        ({f'unet.{k}': v for k, v in own.items()}, "its names begin with 'unet.'"),
        (
            {f'model.diffusion.{k}': v for k, v in own.items()},
            "its names begin with 'model.diffusion.'",
        ),
        (
            change(**{'0.weight': torch.zeros(6, 9, 3, 3)}),
            'takes 9 input channels where 4 are wanted: it looks like an inpainting U-Net',
        ),
        (change(**{'0.weight': torch.zeros(6, 5, 3, 3)}), 'takes 5 input channels'),
        ({'mid.attn.to_q.lora_A.weight': torch.zeros(4, 6)}, 'it is a LoRA'),
        ({'lora_unet_mid.lora_down.weight': torch.zeros(4, 6)}, 'it is a LoRA'),
        ({'text_model.encoder.layers.0.mlp.fc1.weight': torch.zeros(4, 6)}, 'it is a text encoder'),
        ({'decoder.mid_block.resnets.0.conv1.weight': torch.zeros(4, 6)}, 'VAE'),
        ({'model.diffusion_model.input_blocks.0.0.weight': torch.zeros(4, 6)}, 'original names'),
        (
            {k: v for k, v in own.items() if k != '2.weight'},
            f'it has {len(own) - 1} of {len(own)} tensors',
        ),
        ({'x': torch.zeros(2)}, 'another kind of network'),
        (
            {k: torch.zeros([2 * n for n in v.shape]) for k, v in own.items()},
            'another width: 2 times as wide',
        ),
        (change(extra=torch.zeros(3)), 'unexpected: extra'),
    ],
)
def test_likely_cause(given, cause):
    text = misfit(own, given)
    assert cause in text and len(text) <= 480
    # shapes are enough
    assert text == misfit(shapes, {k: tuple(v.shape) for k, v in given.items()})
    with pytest.raises(ValueError, match='a.pt does not fit this network: ') as e:
        check_fit(own, given, 'a.pt', ' this network')
    assert len(str(e.value)) <= 600


def test_transposed_and_lacking_prefix():
    mine = nn.Linear(3, 5).state_dict()
    assert 'transposed' in misfit(mine, dict(weight=(3, 5), bias=(5,)))
    assert "lack 'net.'" in misfit({f'net.{k}': v for k, v in own.items()}, own)
    assert misfit(own, own) == '' and load_into(net(1), own, 'x') is not None


def test_long_names_stay_short():
    given = {f'{"a"*400}.{i}': torch.zeros(1) for i in range(1000)}
    assert len(misfit(own, given)) <= 480
