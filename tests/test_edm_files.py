"Opening EDM and DMD2 files: every wrapper gives the same bits, every bad file one clear error, and nothing runs"
import json, os, pickle, struct, warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.gan import GanHead
from dmd2_nb.noise import karras_sigmas
from dmd2_nb.system.safe_pickle import (
    RefusedPickle,
    Thing,
    module_state,
    read_pickle,
    write_edm_pickle,
)
from dmd2_nb.teacher import edm_imagenet64_kwargs, load_dmd2_edm, load_edm, to_safetensors
from dmd2_nb.unet import ADMUNet, SongUNet

base = dict(
    img_resolution=16,
    label_dim=4,
    model_channels=32,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[8],
    dropout=0.0,
)
ncsnpp = dict(
    embedding_type='fourier',
    channel_mult_noise=2,
    encoder_type='residual',
    decoder_type='standard',
    resample_filter=[1, 3, 3, 1],
)
kinds = dict(
    adm=(ADMUNet, base),
    ddpmpp=(SongUNet, base | dict(augment_dim=9)),
    ncsnpp=(SongUNet, base | ncsnpp),
)
published = dict(
    ADMUNet='DhariwalUNet',
    Block='UNetBlock',
    Conv='Conv2d',
    Positional='PositionalEmbedding',
    Fourier='FourierEmbedding',
)


def teacher(kind='adm'):
    cls, args = kinds[kind]
    D = EDMPrecond(cls(**args)).eval()
    for p in D.parameters(): p.data += 0.05*torch.randn_like(p)
    return D, args


def answer(D):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return D(
            9 * torch.randn(2, 3, 16, 16, generator=g),
            torch.tensor([9.0, 0.5]),
            torch.tensor([3, 0]),
        )


def stored_arguments(D, args, **kw):
    "As the preconditioner of a published file keeps them"
    return (
        dict(
            img_channels=3,
            use_fp16=False,
            sigma_min=0,
            sigma_max=float('inf'),
            sigma_data=0.5,
            model_type=published.get(type(D.model).__name__, type(D.model).__name__),
        )
        | args
        | kw
    )


def save_pkl(D, args, path, protocol=4, **kw):
    write_edm_pickle(
        dict(
            ema=D,
            dataset_kwargs=dict(class_name='training.dataset.ImageFolderDataset', max_size=None),
        ),
        path,
        stored_arguments(D, args, **kw),
        published,
        protocol,
    )


@pytest.mark.parametrize('kind,protocol', [('adm', 2), ('adm', 3), ('adm', 5), *((k, 4) for k in kinds)])
def test_pickle(kind, protocol, tmp_path):
    "The layout of the published files, with NumPy numbers among the attributes as DDPM++ has them"
    D, args = teacher(kind)
    for m in D.modules():
        m.skip_scale, m.flag, m.names = (
            np.sqrt(0.5),
            np.bool_(True),
            OrderedDict(a=np.float32(2), b=np.int64(-3), c=torch.Size([2]), d={1}),
        )
    save_pkl(D, args, tmp_path/'t.pkl', protocol)
    E = load_edm(tmp_path/'t.pkl')
    assert torch.equal(answer(E), answer(teacher_again(D)))
    want = type(D.model)(**args).config
    assert (
        E.model.config == want
        and E.sigma_data == 0.5
        and (E.sigma_min, E.sigma_max) == (0.002, 80.0)
    )
    thing = read_pickle(tmp_path/'t.pkl')['ema']
    assert (
        isinstance(thing, Thing)
        and abs(thing.state['skip_scale'] - 0.5**0.5) < 1e-15
        and thing.state['flag'] is True
    )
    assert thing.state['names'] == dict(a=2., b=-3, c=(2,), d={1})
    assert {k: tuple(v.shape) for k, v in module_state(thing).items()} == {
        k: tuple(v.shape) for k, v in D.state_dict().items()
    }


def teacher_again(D):
    "Same weights, attributes as built"
    E = EDMPrecond(type(D.model)(**D.model.config)).eval()
    E.load_state_dict(D.state_dict())
    return E


def test_pickle_arguments_by_position(tmp_path):
    "Arguments that were given by position, and a finite range of levels"
    D, args = teacher()
    write_edm_pickle(
        dict(ema=D),
        tmp_path / 'p.pkl',
        {
            k: v
            for k, v in stored_arguments(D, args).items()
            if k not in ('img_resolution', 'img_channels', 'label_dim')
        },
        published,
        args=(16, 3, 4),
    )
    assert load_edm(tmp_path/'p.pkl').model.config == D.model.config
    save_pkl(D, args, tmp_path/'u.pkl', sigma_min=0.01, sigma_max=50., sigma_data=0.6)
    E = load_edm(tmp_path/'u.pkl')
    assert (E.sigma_min, E.sigma_max, E.sigma_data) == (0.01, 50., 0.6)


@pytest.mark.parametrize('kind', kinds)
def test_wrappers(kind, tmp_path):
    "State dicts old and new, safetensors with and without arguments, half precision, conversion"
    D, args = teacher(kind)
    want, sd = answer(D), D.state_dict()
    torch.save(sd, tmp_path/'new.pt')
    torch.save(sd, tmp_path/'old.bin', _use_new_zipfile_serialization=False)
    torch.save(OrderedDict(sd), tmp_path/'no_suffix')
    save_file({k: v.contiguous() for k, v in sd.items()}, tmp_path/'bare.safetensors')
    for n in ('new.pt', 'old.bin', 'no_suffix', 'bare.safetensors'):
        before = torch.get_rng_state()
        assert torch.equal(answer(load_edm(tmp_path/n, **args)), want), n
        assert torch.equal(torch.get_rng_state(), before), 'loading draws random numbers'
    to_safetensors(tmp_path/'new.pt', tmp_path/'out.safetensors', **args)
    E = load_edm(tmp_path/'out.safetensors')
    assert torch.equal(answer(E), want) and not E.training and E.model.config == D.model.config
    torch.save({k: v.half() for k, v in sd.items()}, tmp_path/'half.pt')
    H = load_edm(tmp_path/'half.pt', **args)
    assert (
        all(p.dtype == torch.float32 for p in H.parameters())
        and (answer(H) - want).norm() / want.norm() < 0.01
    )


def dmd2_folder(folder, D, gan=True, **extra):
    folder.mkdir()
    torch.save(D.state_dict(), folder/'pytorch_model.bin')
    real = {k: 2*v for k, v in D.state_dict().items()}
    for k in real:
        if k.endswith('resample_filter'): real[k] = D.state_dict()[k]
    state = {f'real_unet.{k}': v for k, v in real.items()} | {
        f'fake_unet.{k}': v for k, v in D.state_dict().items()
    }
    head = GanHead(D.model.bottleneck)
    if gan: state |= {f'cls_pred_branch.{k}': v for k, v in head.state_dict().items()}
    torch.save(
        state | dict(karras_sigmas=karras_sigmas(1000)) | extra, folder / 'pytorch_model_1.bin'
    )
    return head


@pytest.mark.parametrize('gan', [True, False])
def test_dmd2_folder(gan, tmp_path):
    D, args = teacher()
    head = dmd2_folder(tmp_path/'run', D, gan)
    nets = load_dmd2_edm(tmp_path/'run', **args)
    assert torch.equal(answer(nets['generator']), answer(D)) and torch.equal(
        answer(nets['fake_score']), answer(D)
    )
    assert torch.equal(nets['teacher'].model.out_conv.weight, 2*D.model.out_conv.weight)
    if gan:
        assert all(torch.equal(a, b) for a, b in zip(nets['head'].parameters(), head.parameters()))
    else: assert nets['head'] is None
    for part in ('generator', 'teacher', 'fake_score'):
        assert torch.equal(answer(load_edm(tmp_path/'run', part, **args)), answer(nets[part]))
    assert torch.equal(
        answer(load_edm(tmp_path / 'run/pytorch_model_1.bin', 'fake_score', **args)), answer(D)
    )
    assert list(load_dmd2_edm(tmp_path / 'run/pytorch_model_1.bin', **args)) == [
        'teacher',
        'fake_score',
        'head',
    ]
    to_safetensors(tmp_path/'run', tmp_path/'t.safetensors', 'teacher', **args)
    assert torch.equal(answer(load_edm(tmp_path/'t.safetensors')), answer(nets['teacher']))


def test_published_head():
    "The head of the ImageNet-64 run: names, shapes, 18.88 M parameters"
    with torch.device('meta'): head = GanHead((768, 8, 8))
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items() if k.endswith('weight')}
    assert shapes == {
        '0.weight': (768, 768, 4, 4),
        '1.weight': (768,),
        '3.weight': (768, 768, 4, 4),
        '4.weight': (768,),
        '6.weight': (1, 768, 1, 1),
    }
    assert round(sum(p.numel() for p in head.parameters())/1e6, 2) == 18.88


def test_imagenet64_arguments():
    with torch.device('meta'): net = ADMUNet(**edm_imagenet64_kwargs())
    assert (
        sum(p.numel() for p in net.parameters()) == 295_899_267
        and json.loads(json.dumps(net.config)) == edm_imagenet64_kwargs()
    )


# -- bad input --

def one_error(match, f, *args, kind=ValueError, **kw):
    with pytest.raises(kind, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_keys(tmp_path):
    "Missing, extra, misshapen: all named, at most ten of each kind shown"
    D, args = teacher()
    sd = D.state_dict()
    torch.save({k: v for k, v in sd.items() if k != 'model.out_conv.bias'}, tmp_path/'a.pt')
    one_error('a.pt.*missing: model.out_conv.bias', load_edm, tmp_path/'a.pt', **args)
    torch.save(sd | {'model.new': torch.ones(1)}, tmp_path/'b.pt')
    one_error('b.pt.*unexpected: model.new', load_edm, tmp_path/'b.pt', **args)
    torch.save(sd | {'model.out_conv.bias': torch.ones(4)}, tmp_path/'c.pt')
    one_error(
        r'c.pt.*misshapen: model.out_conv.bias \(4,\) instead of \(3,\)',
        load_edm,
        tmp_path / 'c.pt',
        **args,
    )
    torch.save(sd | {f'extra{i}': torch.ones(1) for i in range(13)}, tmp_path/'d.pt')
    text = one_error('extra9 and 3 more', load_edm, tmp_path/'d.pt', **args)
    assert 'extra10' not in text
    torch.save(
        {k: v for k, v in sd.items() if k != 'model.out_conv.bias'}
        | {'x': sd['model.out_conv.bias'], 'model.out_norm.bias': torch.ones(5)},
        tmp_path / 'e.pt',
    )
    text = one_error('missing: model.out_conv.bias', load_edm, tmp_path/'e.pt', **args)
    assert 'unexpected: x' in text and 'misshapen: model.out_norm.bias' in text
    save_pkl(D, args | dict(channel_mult=[1, 3]), tmp_path/'f.pkl')
    one_error('f.pkl.*instead of', load_edm, tmp_path/'f.pkl')
    dmd2_folder(tmp_path/'run', D, odd=torch.ones(1))
    one_error('unexpected: odd', load_edm, tmp_path/'run', 'teacher', **args)


def test_arguments(tmp_path):
    D, args = teacher()
    torch.save(D.state_dict(), tmp_path/'a.pt')
    one_error('a.pt.*widht', load_edm, tmp_path/'a.pt', **args, widht=3)
    one_error('a.pt.*13 pixels', load_edm, tmp_path/'a.pt', **args | dict(img_resolution=13))
    one_error("part 'student'", load_edm, tmp_path/'a.pt', 'student')
    one_error('has no teacher', load_edm, tmp_path/'a.pt', 'teacher', **args)
    one_error('missing', load_edm, tmp_path/'none.pt', kind=FileNotFoundError)
    one_error('pytorch_model.bin', load_edm, tmp_path, kind=FileNotFoundError)
    save_pkl(D, args, tmp_path/'u.pkl', model_type='UViT')
    one_error("'UViT'", load_edm, tmp_path/'u.pkl')
    save_pkl(D, args, tmp_path/'k.pkl', use_magic=True)
    one_error('k.pkl.*use_magic', load_edm, tmp_path/'k.pkl')
    write_edm_pickle(
        dict(ema=D),
        tmp_path / 'vp.pkl',
        stored_arguments(D, args),
        published | dict(EDMPrecond='VPPrecond'),
    )
    one_error('VPPrecond', load_edm, tmp_path/'vp.pkl')
    (tmp_path/'n.pkl').write_bytes(pickle.dumps(dict(net=1)))
    one_error("n.pkl has no network under 'ema'", load_edm, tmp_path/'n.pkl')


def test_other_filter(tmp_path):
    "A file whose resampling filter is not the one its arguments say"
    D, args = teacher()
    sd = D.state_dict()
    k = next(k for k in sd if k.endswith('resample_filter'))
    torch.save(sd | {k: sd[k]*2}, tmp_path/'a.pt')
    one_error('a.pt.*resample_filter', load_edm, tmp_path/'a.pt', **args)


def test_truncated(tmp_path):
    "Cut anywhere: one error that names the file"
    D, args = teacher()
    save_pkl(D, args, tmp_path/'a.pkl')
    torch.save(D.state_dict(), tmp_path/'a.pt')
    torch.save(D.state_dict(), tmp_path/'old.pt', _use_new_zipfile_serialization=False)
    to_safetensors(tmp_path/'a.pkl', tmp_path/'a.safetensors')
    for n in ('a.pkl', 'a.pt', 'old.pt', 'a.safetensors'):
        data = (tmp_path/n).read_bytes()
        for size in (0, 1, 7, 100, len(data)//3, len(data)-50):
            (tmp_path/f'cut_{n}').write_bytes(data[:size])
            one_error(f'cut_{n}', load_edm, tmp_path/f'cut_{n}', **args)
    (tmp_path/'text.bin').write_text('hello, this is no checkpoint at all')
    one_error('text.bin is neither', load_edm, tmp_path/'text.bin')
    torch.save([1, 2], tmp_path/'list.pt')
    one_error('list.pt: not a state dict, it holds a list', load_edm, tmp_path/'list.pt')
    torch.save(dict(step=3, w=torch.ones(1)), tmp_path/'mixed.pt')
    one_error('mixed.pt.*step', load_edm, tmp_path/'mixed.pt')


class Calls:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


hostile = dict(
    system=(os.system, 'touch owned'),
    mkdir=(os.mkdir, 'owned'),
    eval=(eval, 'open("owned", "w")'),
    getattr=(getattr, os, 'system'),
)


@pytest.mark.parametrize('name', ['system', 'mkdir', 'eval'])
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_hostile(name, protocol, tmp_path, monkeypatch):
    "A call anywhere in the file, also inside a tensor's bytes or beside a whole teacher, is named and not made"
    monkeypatch.chdir(tmp_path)
    D, args = teacher()
    bad = Calls(*hostile[name])
    (tmp_path/'a.pkl').write_bytes(pickle.dumps(dict(ema=bad), protocol))
    one_error(f'a.pkl is refused.*{name}', load_edm, tmp_path/'a.pkl')
    if protocol >= 2:
        write_edm_pickle(
            dict(ema=D, extra=bad),
            tmp_path / 'b.pkl',
            stored_arguments(D, args),
            published,
            protocol,
        )
        one_error(f'b.pkl is refused.*{name}', load_edm, tmp_path/'b.pkl')
    inner = pickle.dumps(bad, 2)
    magic = (
        pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + pickle.dumps(dict(protocol_version=1001, little_endian=True, type_sizes={}), 2)
    )
    for data in (inner, magic+inner):
        (tmp_path / 'c.pkl').write_bytes(
            b'ctorch.storage\n_load_from_bytes\nB' + struct.pack('<I', len(data)) + data + b'\x85R.'
        )
        one_error('c.pkl', load_edm, tmp_path/'c.pkl')
    torch.save(dict(w=bad), tmp_path/'d.pt')
    one_error(f'd.pt is refused.*{name}', load_edm, tmp_path/'d.pt')
    assert not (tmp_path/'owned').exists()


raw = {
    'names an import': (b'cos\nsystem\n.', 'os.system'),
    'stack global': (b'\x80\x04\x8c\x02os\x8c\x06system\x93.', 'os.system'),
    'global with dots': (b'\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.', 'torch.hub.load'),
    'INST': (b'(S"x"\nios\nsystem\n.', 'INST'),
    'OBJ': (b'(ccollections\nOrderedDict\no.', 'OBJ'),
    'EXT': (b'\x80\x02\x82\x07.', 'EXT1'),
    'PERSID': (b'Pfile\n.', 'PERSID'),
    'BINPERSID': (b'Nq\x00Q.', 'BINPERSID'),
    'NEWOBJ_EX': (b'\x80\x04ccollections\nOrderedDict\n)}\x92.', 'NEWOBJ_EX'),
    'attributes of ours': (b'ccollections\nOrderedDict\n}S"x"\nK\x01sb.', 'attributes'),
    'a string is no function': (b'S"collections.OrderedDict"\n)R.', 'calls a str'),
    'a thing is no function': (b'cnumpy\ndtype\n(S"f8"\ntR)R.', 'calls a Thing'),
    'object arrays': (b'cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S"O8"\ntRS"x"\ntR.', 'O8'),
    'other encodings': (b'c_codecs\nencode\n(Vabc\nVrot13\ntR.', 'rot13'),
}


@pytest.mark.parametrize('case', raw)
def test_raw_refusals(case):
    data, name = raw[case]
    with pytest.raises(RefusedPickle, match=name): read_pickle(data)


damaged = {
    'no stop': b'K\x01',
    'empty stack': b'.',
    'no mark': b't.',
    'memo that is not there': b'h\x05.',
    'set item of a list': b']K\x01K\x02s.',
    'append to a number': b'K\x01K\x02a.',
    'odd items': b'}(K\x01u.',
    'unhashable key': b'}]K\x01s.',
    'tuple as key': b'})K\x01s.',
    'wrong arguments': b'c_codecs\nencode\n)R.',
    'opcode': b'\xff.',
    'arguments that are none': b'ccollections\nOrderedDict\nK\x01R.',
    'tensor without storage': b'ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89NtR.',
    'storage of text': b'ctorch.storage\n_load_from_bytes\n(Vabc\ntR.',
    'persistent without state': b'ctorch_utils.persistence\n_reconstruct_persistent_obj\n(}tR.',
}


@pytest.mark.parametrize('case', damaged)
def test_raw_damage(case):
    with pytest.raises(ValueError, match='truncated or damaged'): read_pickle(damaged[case])


def tensor_call(size, stride, offset=0):
    "A pickle that builds a tensor over a storage of four numbers"
    class Asks:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                torch.zeros(4)._typed_storage(),
                offset,
                size,
                stride,
                False,
                {},
            )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pickle.dumps(Asks())


def test_tensor_outside_its_storage():
    assert read_pickle(tensor_call((2, 2), (2, 1))).shape == (2, 2)
    assert read_pickle(tensor_call((0, 9), (9, 1))).shape == (0, 9)
    for size, stride, offset in (
        ((5,), (1,), 0),
        ((2, 2), (2, 1), 1),
        ((2,), (9,), 0),
        ((10**6, 10**6), (0, 0), 0),
        ((-1,), (1,), 0),
        ((2,), (1, 1), 0),
    ):
        with pytest.raises(ValueError, match='truncated or damaged'):
            read_pickle(tensor_call(size, stride, offset))


def test_cycle():
    "A module that contains itself"
    a = Thing('Net', state={})
    a.state['_modules'] = dict(a=a)
    with pytest.raises(ValueError, match='nested too deeply'): module_state(a)
    with pytest.raises(ValueError, match="'a.w' is a str"):
        module_state(
            Thing(
                'Net',
                state=dict(_modules=dict(a=Thing('Net', state=dict(_parameters=dict(w='text'))))),
            )
        )


def test_deep_nesting():
    "A hundred thousand nested tuples do no harm"
    with pytest.raises(ValueError): read_pickle(b'}'+b')'+b'\x85'*100_000+b'K\x01s.')
    assert isinstance(read_pickle(b')'+b'\x85'*100_000+b'.'), tuple)


def test_every_byte_of_a_teacher(tmp_path):
    "Any byte wrong: the file opens (a weight differs), or ends in one ValueError"
    D = EDMPrecond(
        ADMUNet(
            4,
            model_channels=4,
            channel_mult=[1],
            num_blocks=0,
            attn_resolutions=[],
            channel_mult_emb=1,
            label_dim=2,
            dropout=0.0,
        )
    )
    args = D.model.config
    save_pkl(
        D,
        {k: v for k, v in args.items() if k not in ('in_channels', 'out_channels')},
        tmp_path / 't.pkl',
    )
    data, g = (tmp_path/'t.pkl').read_bytes(), torch.Generator().manual_seed(0)
    load_edm(tmp_path/'t.pkl')
    ends = set()
    for i in torch.randint(len(data), (50,), generator=g).tolist():
        broken = bytearray(data)
        broken[i] ^= 1 << int(torch.randint(8, (), generator=g))
        (tmp_path/'b.pkl').write_bytes(broken)
        try:
            load_edm(tmp_path/'b.pkl')
            ends.add('opened')
        except ValueError as e:
            assert 'b.pkl' in str(e)
            ends.add(type(e).__name__)
    assert ends == {'opened', 'ValueError', 'RefusedPickle'}
