"What cached files were made from: one hash for files, tensors and networks, and caches that refuse other inputs"
import hashlib, os
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dmd2_nb.system import plan
from dmd2_nb.system.plan import content_hash, fingerprint, identity


def tree(folder, files):
    for n, b in files.items():
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        (folder/n).write_bytes(b)
    return folder


def test_a_file_has_the_hash_that_sha256sum_prints(tmp_path):
    f = tmp_path/'a.bin'
    f.write_bytes(bytes(range(256))*99)
    assert content_hash(f) == hashlib.sha256(f.read_bytes()).hexdigest()
    (tmp_path/'empty').write_bytes(b'')
    assert content_hash(tmp_path/'empty') == hashlib.sha256(b'').hexdigest()
    with pytest.raises(FileNotFoundError, match='gone is missing'): content_hash(tmp_path/'gone')


@pytest.mark.parametrize(
    'change',
    [{'a/1': b'y'}, {'a/3': b''}, {'b': b''}, {'a/1': b'xb', 'a/2': b''}],
    ids=['bytes', 'one more file', 'emptied', 'moved from one file to the next'],
)
def test_a_folder_is_its_names_and_bytes(tmp_path, change):
    files = {'a/1': b'x', 'a/2': b'b', 'b': b'z'}
    one, two = tree(tmp_path/'one', files), tree(tmp_path/'two', files)
    for f in two.rglob('*'): os.utime(f, (0, 0))
    assert content_hash(one) == content_hash(two), 'time and place are no part of it'
    assert content_hash(tree(two, change)) != content_hash(one)


def test_a_renamed_file_is_another_folder(tmp_path):
    one = tree(tmp_path/'one', {'cat/1.png': b'x'})
    was = content_hash(one)
    (one/'cat').rename(one/'dog')
    assert content_hash(one) != was


def test_what_is_no_data_does_not_count(tmp_path):
    one = tree(tmp_path/'one', {'data.mdb': b'x'})
    was = content_hash(one)
    tree(
        one,
        {'.DS_Store': b'1', '.ipynb_checkpoints/a': b'2', '__MACOSX/._a': b'3', 'lock.mdb': b'4'},
    )
    assert content_hash(one) == was
    assert content_hash(one, ['data.mdb']) == was


def test_linked_folders_are_read_and_circles_end(tmp_path):
    tree(tmp_path/'far', {'1.png': b'x'})
    one = tree(tmp_path/'one', {'0.png': b'y'})
    was = content_hash(one)
    (one/'more').symlink_to(tmp_path/'far', target_is_directory=True)
    more = content_hash(one)
    assert more != was
    (one/'again').symlink_to(one, target_is_directory=True)
    assert content_hash(one) == more


def large(path, size=2**22):
    path.write_bytes(np.random.default_rng(0).integers(0, 256, size, 'uint8').tobytes())
    os.utime(path, ns=(10**9, 10**9))
    return path


def patch(path, at, byte):
    "Another byte, the same time"
    with open(path, 'r+b') as f:
        f.seek(at)
        f.write(byte)
    os.utime(path, ns=(10**9, 10**9))


def test_of_large_files_a_draw_is_read(tmp_path, monkeypatch):
    "It says so; size, time, both ends and long changes anywhere are seen"
    monkeypatch.setattr(plan, 'WHOLE', 2**20)
    monkeypatch.setattr(plan, 'DRAWN', 2**19)
    f = large(tmp_path/'a.bin')
    was = content_hash(f)
    assert was[64:] == ' (sizes, times and 0 MB drawn from 4 MB)' and was == content_hash(f)
    seen = {was}
    for at, byte in ((0, b'#'), (2**22-1, b'#'), (2**21, b'#'*2**19)):
        patch(large(f), at, byte)
        assert content_hash(f) not in seen
        seen.add(content_hash(f))
    os.utime(large(f), ns=(10**9, 10**9+1))
    assert content_hash(f) not in seen
    assert content_hash(large(f, 2**22+1)) not in seen
    assert content_hash(large(f)) == was


def test_large_folders_are_drawn_from_too(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, 'WHOLE', 2**20)
    monkeypatch.setattr(plan, 'DRAWN', 2**19)
    for i in range(8): large(tmp_path/f'{i}.bin', 2**18+i)
    was = content_hash(tmp_path)
    patch(tmp_path/'5.bin', 2**16, b'#'*2**17)
    assert content_hash(tmp_path) != was


def test_how_much_is_read(tmp_path, monkeypatch):
    "Of a sparse file of 300 MB, 64 MB in pieces and no more"
    f, read = tmp_path/'sparse', []
    with open(f, 'wb') as o: o.truncate(300*2**20)
    inner = plan._read
    monkeypatch.setattr(
        plan, '_read', lambda path, at, n: read.append((at, n)) or inner(path, at, n)
    )
    assert content_hash(f).endswith('(sizes, times and 64 MB drawn from 300 MB)')
    assert 63*2**20 < sum(n for _, n in read) <= 64*2**20
    gaps = [b-a for (a, _), (b, _) in zip(read, read[1:])]
    assert max(gaps) < 2**18 and read[0][0] == 0 and sum(read[-1]) == 300*2**20


@pytest.mark.parametrize(
    'a, b',
    [
        (['ab', 'c'], ['a', 'bc']),
        ([1, [2]], [[1], 2]),
        ([[], []], [[[]]]),
        ({'a': 1}, ['a', 1]),
        ([1], ['1']),
        ([1], [1.0]),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2).half()),
        (torch.zeros(1), -torch.zeros(1)),
        (np.zeros(2000), np.ones(2000)),
    ],
    ids=lambda o: '',
)
def test_other_trees_have_other_fingerprints(a, b):
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)
    assert fingerprint(a, b) != fingerprint(b, a)


def test_a_long_array_counts_to_its_end():
    a = np.zeros(5000)
    b = a.copy()
    b[2500] = 1  # numpy prints neither
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(np.array(['a', 'b'])) != fingerprint(np.array(['a', 'c']))


class Guide(nn.Module):
    def __init__(self, scale, uncond=None):
        super().__init__()
        self.net, self.scale, self.uncond, self._tables = nn.Linear(2, 2), scale, uncond, {}


def zeros(c): return c
def ones(c): return c


def guide(*args, seed=0):
    torch.manual_seed(seed)
    return Guide(*args)


@pytest.mark.parametrize(
    'other',
    [
        lambda: guide(8.0),
        lambda: guide(1.0, zeros),
        lambda: guide(1.0, torch.zeros(1)),
        lambda: guide(1.0, seed=1),
        lambda: guide(1.0).half(),
        lambda: partial(guide(1.0), 1),
    ],
    ids=['number', 'function', 'tensor', 'weights', 'dtype', 'an argument'],
)
def test_settings_belong_to_a_networks_identity(other):
    a, b = guide(1.), guide(1.)
    b._tables['cpu'] = 3
    b.eval()
    assert identity(a) == identity(b) != identity(other())
    assert identity(guide(1., zeros)) != identity(guide(1., ones))


def test_buffers_without_state_count():
    a, b = nn.Module(), nn.Module()
    a.register_buffer('t', torch.zeros(2), persistent=False)
    b.register_buffer('t', torch.ones(2), persistent=False)
    assert identity(a) != identity(b)


def test_identity_of_text_encoders_and_autoencoders():
    from dmd2_nb.sdxl.adapter import EpsDenoiser, VDenoiser, make_unet, make_vae
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    enc = lambda **k: identity(tiny_text_encoders(**k))
    assert enc() == enc() != enc(seed=1) and enc() != enc(two=False)
    other = tiny_text_encoders()
    other.tokenizers[0].add_tokens(['cat'])
    assert identity(other) != enc()
    a, b = make_vae(), make_vae()
    b.register_to_config(scaling_factor=2*a.config.scaling_factor)
    assert identity(a) != identity(b), 'the scaling factor is a setting'
    assert (
        identity(EpsDenoiser(make_unet()))
        == identity(EpsDenoiser(make_unet()))
        != identity(VDenoiser(make_unet()))
    )
    used = EpsDenoiser(make_unet())
    was = identity(used)
    used.timestep(used.levels[-1:])
    assert identity(used) == was, 'tables that were filled on the way are no setting'


def test_differences_are_named_and_short():
    was, now = dict(a='0'*64, b=dict(c=1, d=2), e=3), dict(a='1'*64, b=dict(c=1, d=3), f=[1, 2])
    assert plan.differences(was, now) == [
        'a was 000000000000... and is 111111111111...',
        'b.d was 2 and is 3',
        'f was not recorded and is [1, 2]',
        'e was 3 and is not given',
    ]
    assert plan.differences(was, now, only=['b']) == [
        'b.d was 2 and is 3'
    ] and not plan.differences(was, dict(was))
    assert not plan.differences(dict(a=(1, 2)), dict(a=[1, 2])), 'as JSON knows them'


def test_a_plan_guards_its_folder(tmp_path):
    plan.keep_plan(tmp_path/'a', dict(x=1))
    plan.keep_plan(tmp_path/'a', dict(x=1))
    with pytest.raises(ValueError, match=r'a was begun with other settings \(x was 1 and is 2\)'):
        plan.keep_plan(tmp_path/'a', dict(x=2))
    with pytest.raises(ValueError) as e:
        plan.keep_plan(tmp_path/'a', {f'{i}'*50: 'y'*500 for i in range(50)})
    assert len(str(e.value)) < 600+len(str(tmp_path)) and 'and 47 more' in str(e.value)
    for broken in ('', '{"x": ', '[1]', 'null', '3'):
        (tmp_path/'a'/'plan.json').write_text(broken)
        with pytest.raises(ValueError, match='plan.json is damaged'):
            plan.keep_plan(tmp_path/'a', dict(x=1))
    tree(tmp_path/'b', {'shard_1': b''})
    with pytest.raises(ValueError, match='holds shard_1 and no plan.json'):
        plan.keep_plan(tmp_path/'b', dict(x=1), made='shard_*')
    assert not (tmp_path/'b'/'plan.json').exists()


# What is encoded once

def one_line(e): return '\n' not in str(e.value) and len(str(e.value)) < 600


@pytest.fixture(scope='module')
def enc():
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    return tiny_text_encoders()


@pytest.fixture(scope='module')
def vae():
    from dmd2_nb.sdxl.adapter import make_vae
    return make_vae()


@pytest.fixture
def encode(tmp_path, enc):
    from dmd2_nb.sdxl.data import encode_conditions
    def f(prompts=('a cat', 'a dog', 'a cow'), enc=enc, **k):
        return encode_conditions(tmp_path/'p', list(prompts), enc, **dict(size=64, shard=2) | k)
    return f


changes = {
    'prompts': dict(prompts=['a cat', 'a dog', 'an owl']),
    'order': dict(prompts=['a dog', 'a cat', 'a cow']),
    'size': dict(size=128),
    'dtype': dict(dtype=torch.float32),
    'fewer': dict(prompts=['a cat', 'a dog']),
}


@pytest.mark.parametrize('change', changes.values(), ids=changes)
def test_other_conditions_are_refused(encode, change):
    assert encode().items([2])[2] == ['a cow']
    before = encode().items(range(3))[1]
    with pytest.raises(ValueError, match='begun with other settings') as e: encode(**change)
    assert one_line(e) and ('prompts' if 'prompts' in change else next(iter(change))) in str(
        e.value
    )
    assert torch.equal(encode().items(range(3))[1].text, before.text)


def test_another_text_encoder_is_refused(encode):
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    encode()
    with pytest.raises(ValueError, match=r'other settings \(encoder was'):
        encode(enc=tiny_text_encoders(seed=1))


def test_an_interrupted_encoding_goes_on_with_its_own_prompts_only(encode):
    def stop(todo):
        yield todo[0]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): encode(progress=stop)
    for edited in (['a cat', 'a dog', 'an owl'], ['an ant', 'a dog', 'a cow']):
        with pytest.raises(ValueError, match='other settings .*prompts was'): encode(edited)
    assert encode().items(range(3))[2] == ['a cat', 'a dog', 'a cow']


def test_one_text_is_no_list(enc, tmp_path):
    from dmd2_nb.sdxl.data import encode_conditions
    with pytest.raises(ValueError, match="a list of texts .* 'a cat'"):
        encode_conditions(tmp_path/'p', 'a cat', enc)
    assert not (tmp_path/'p').exists()


def pictures(n=5, seed=0):
    return [
        (
            torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(100 * seed + i)) * 2 - 1,
            f'picture {i}',
        )
        for i in range(n)
    ]


@pytest.fixture
def latents(tmp_path, enc, vae):
    from dmd2_nb.sdxl.data import encode_latents
    def f(images=None, vae=vae, **k):
        return encode_latents(
            tmp_path / 'i', images or pictures(), vae, enc, **dict(size=32, shard=2) | k
        )
    return f


def test_other_pictures_are_refused_by_number(latents):
    x = latents().items(range(5))[0]
    assert torch.equal(latents().items(range(5))[0], x)
    for i in (0, 4):
        changed = pictures()
        changed[i] = (-changed[i][0], changed[i][1])
        with pytest.raises(
            ValueError, match=f'made from other pictures or prompts: item {i} differs'
        ) as e:
            latents(changed)
        assert one_line(e)
    changed = pictures()
    changed[3] = (changed[3][0], 'another text')
    with pytest.raises(ValueError, match='item 3 differs'): latents(changed)
    with pytest.raises(ValueError, match='item 0 differs'): latents(pictures(seed=1))


def test_another_autoencoder_is_refused(latents):
    from dmd2_nb.sdxl.adapter import make_vae
    latents()
    other = make_vae()
    other.register_to_config(scaling_factor=1.)
    for v in (make_vae(seed=1), other):
        with pytest.raises(ValueError, match=r'other settings \(vae was'): latents(vae=v)
    with pytest.raises(ValueError, match=r'other settings \(seed was 0 and is 1'): latents(seed=1)


def test_an_interrupted_encoding_of_pictures_never_mixes(latents):
    class Stops(list):
        def __getitem__(self, i):
            if i >= 3: raise KeyboardInterrupt
            return super().__getitem__(i)
    with pytest.raises(KeyboardInterrupt): latents(Stops(pictures()))
    with pytest.raises(ValueError, match='item 0 differs'): latents(pictures(seed=1))
    whole = latents()
    assert whole.items(range(5))[2] == [p for _, p in pictures()]
    assert whole.index['made']


def test_pictures_of_a_folder_count_by_their_files(tmp_path, enc, vae):
    from PIL import Image
    from dmd2_nb.sdxl.adapt import FolderPictures
    from dmd2_nb.sdxl.data import encode_latents
    (tmp_path/'f').mkdir()
    for i in range(3): Image.new('RGB', (32, 32), (80*i,)*3).save(tmp_path/'f'/f'{i}.png')
    make = lambda size=32, prompt='a': encode_latents(
        tmp_path / 'i', FolderPictures(tmp_path / 'f', size, prompt), vae, enc, size=32
    )
    make()
    make()
    with pytest.raises(ValueError, match=r'other settings \(prompts was'): make(prompt='b')
    with pytest.raises(ValueError, match=r'other settings \(.*pictures was'): make(size=64)
    Image.new('RGB', (32, 32), (81,)*3).save(tmp_path/'f'/'1.png')
    with pytest.raises(ValueError, match=r'other settings \(pictures was'): make()


@pytest.mark.parametrize(
    'picture, says',
    [
        (torch.zeros(3, 32, 32, dtype=torch.uint8), 'float tensor .* got torch.uint8'),
        (torch.full((3, 32, 32), 200.0), 'values lie in 200 .. 200'),
        (torch.full((3, 32, 32), float('nan')), 'NaN of 3,072'),
        (torch.zeros(32, 32), r'got torch.float32 \(32, 32\)'),
    ],
    ids=['bytes', 'range', 'NaN', 'shape'],
)
def test_what_is_no_picture_is_named(latents, picture, says):
    with pytest.raises(ValueError, match=rf"item 1 \('a cat'\).*{says}") as e:
        latents([pictures()[0], (picture, 'a cat')])
    assert one_line(e)


def test_pictures_between_0_and_1_get_a_word(latents):
    with pytest.warns(UserWarning, match='no picture has a value below 0'):
        latents([((im+1)/2, p) for im, p in pictures()])


def test_numbers_that_overflow_become_no_shard(tmp_path, enc):
    "An autoencoder in half precision, and numbers that are too large for the precision kept"
    from dmd2_nb.sdxl.adapter import make_vae
    from dmd2_nb.sdxl.data import LatentShards, encode_conditions, encode_latents
    bad = make_vae(dtype=torch.float16)
    with torch.no_grad():
        bad.encoder.conv_in.bias.fill_(6e4)
        bad.encoder.conv_in.weight.mul_(3e4)
    with pytest.raises(
        ValueError, match=r"i, item 0 \('picture 0'\): latents has .*NaN.* of 64 numbers.*float32"
    ) as e:
        encode_latents(tmp_path/'i', pictures(), bad, enc, size=32)
    assert one_line(e) and not list((tmp_path/'i').glob('*shard*'))
    with pytest.raises(FileNotFoundError): LatentShards(tmp_path/'i')
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    loud = tiny_text_encoders()
    with torch.no_grad(): loud.models[1].text_projection.weight.mul_(1e7)
    with pytest.raises(ValueError, match=r"item 0 \('a cat'\): pooled has \d+ infinite"):
        encode_conditions(tmp_path/'p', ['a cat'], loud)
    encode_conditions(tmp_path/'q', ['a cat'], loud, dtype=torch.float32)


# Pairs of a teacher

@pytest.fixture(scope='module')
def teacher():
    from dmd2_nb.denoiser import Guided
    from dmd2_nb.sdxl.adapter import TINY_SDXL, EpsDenoiser, make_unet
    from dmd2_nb.sdxl.conditioning import zero_uncond
    small = TINY_SDXL | dict(
        block_out_channels=(16, 16, 32),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 2, 2),
    )
    def make(seed=0, guidance=8., kind=EpsDenoiser):
        return Guided(kind(make_unet(small, seed=seed), shape=(4, 8, 8)), guidance, zero_uncond)
    return make


@pytest.fixture
def pair_up(tmp_path, teacher, enc):
    from dmd2_nb.sdxl.data import encode_conditions
    from dmd2_nb.sdxl.pretrain import teacher_pairs
    asked = lambda name, prompts: encode_conditions(tmp_path/name, prompts, enc, size=64)
    conds = dict(one=asked('one', ['a cat', 'a dog']), two=asked('two', ['a cat', 'a cow']))
    def f(teacher=teacher(), conds=conds['one'], **k):
        return teacher_pairs(tmp_path/'pairs', teacher, conds, **dict(n=2, steps=2) | k)
    f.conds = conds
    return f


def test_pairs_of_another_teacher_are_refused(pair_up, teacher):
    from dmd2_nb.sdxl.adapter import VDenoiser
    first = pair_up().items([0, 1])[0]
    assert torch.equal(pair_up(teacher()).items([0, 1])[0], first), 'the same teacher opened again'
    others = {
        'teacher': (
            teacher(seed=1),
            teacher(guidance=7.5),
            teacher(kind=VDenoiser),
            teacher().half(),
        ),
        'conditions': (),
    }
    for t in others['teacher']:
        with pytest.raises(ValueError, match=r'other settings \(teacher was') as e: pair_up(t)
        assert one_line(e)
    with pytest.raises(ValueError, match=r'other settings \(conditions was'):
        pair_up(conds=pair_up.conds['two'])
    with pytest.raises(ValueError, match=r'other settings \(shape was'): pair_up(shape=(4, 16, 16))
    with pytest.raises(ValueError, match=r'other settings \(seed was 0 and is 1'): pair_up(seed=1)


def test_a_teacher_that_draws_no_numbers_makes_no_pairs(pair_up, teacher):
    t = teacher()
    with torch.no_grad(): t.D.net.unet.conv_out.bias.fill_(float('nan'))
    with pytest.raises(ValueError, match=r"item 0 \('a cat'\): latents has 256 NaN"): pair_up(t)


def test_only_pairs_teach_by_regression(pair_up, latents, encode, teacher):
    "Real pictures have no known noise: a generator would learn to draw them from any"
    from dmd2_nb.sdxl.pretrain import regression_pretrain
    from dmd2_nb.sdxl.roles import SharedBase
    role = lambda: SharedBase(teacher().D, rank=2).generator
    next(regression_pretrain(role(), pair_up(), batch=2))
    for wrong, kind in ((latents(), 'real pictures'), (encode(), 'texts alone')):
        with pytest.raises(
            ValueError, match=f"holds {kind} .* needed are a teacher's samples"
        ) as e:
            next(regression_pretrain(role(), wrong, batch=2))
        assert one_line(e)


def test_a_regression_goes_on_with_its_own_pairs(pair_up, teacher, tmp_path):
    from dmd2_nb.sdxl.pretrain import regression_pretrain, teacher_pairs
    from dmd2_nb.sdxl.roles import SharedBase
    role = lambda: SharedBase(teacher().D, rank=2).generator
    list(regression_pretrain(role(), pair_up(), 1, batch=2, folder=tmp_path/'run'))
    others = teacher_pairs(tmp_path/'others', teacher(seed=1), pair_up.conds['one'], n=2, steps=2)
    with pytest.raises(ValueError, match='holds another run: made '):
        next(regression_pretrain(role(), others, 3, batch=2, folder=tmp_path/'run'))
    with pytest.raises(ValueError, match='update 3: .*NaN.* not saved'):
        list(
            regression_pretrain(
                role(),
                pair_up(),
                3,
                distance=lambda a, b: (a - b) * float('nan'),
                batch=2,
                folder=tmp_path / 'run',
            )
        )


def test_shards_that_say_nothing_count_by_their_bytes(tmp_path, encode):
    from dmd2_nb.sdxl.data import LatentShards, write_shards
    make = lambda v: write_shards(
        tmp_path / f'{v}', 2, lambda r: (dict(text=torch.full((2, 1, 1), v)), ['a', 'b'])
    )
    assert make(1.).content_hash() == make(1.).content_hash() != make(2.).content_hash()
    (tmp_path/'1.0'/'index.json').write_text('{"sizes": "x"}')
    with pytest.raises(ValueError, match='index.json is damaged'): LatentShards(tmp_path/'1.0')


def test_an_lmdb_is_known_by_its_bytes(tmp_path, enc):
    lmdb = pytest.importorskip('lmdb')
    from dmd2_nb.sdxl.data import LMDBLatents
    def write(v):
        env = lmdb.open(str(tmp_path/'db'), map_size=2**24)
        with env.begin(write=True) as t:
            t.put(b'latents_shape', b'2 4 4 4')
            for i in range(2):
                t.put(f'latents_{i}_data'.encode(), np.full((4, 4, 4), v, 'float16').tobytes())
                t.put(f'prompts_{i}_data'.encode(), b'a cat')
        env.close()
    write(1.)
    for _ in range(2): LMDBLatents(tmp_path/'db').to_shards(tmp_path/'s', enc, size=64)
    write(2.)
    with pytest.raises(ValueError, match=r'other settings \(lmdb was'):
        LMDBLatents(tmp_path/'db').to_shards(tmp_path/'s', enc, size=64)
    write(float('inf'))
    with pytest.raises(ValueError, match=r"item 0 \('a cat'\): latents has 64 infinite"):
        LMDBLatents(tmp_path/'db').to_shards(tmp_path/'t', enc, size=64)


# Numbers that become files

def toy(dtype=None, scale=1., value=None):
    from dmd2_nb.denoiser import EDMPrecond
    from dmd2_nb.nets import ToyNet
    torch.manual_seed(0)
    D = EDMPrecond(ToyNet())
    with torch.no_grad():
        w = list(D.parameters())[-1]
        if value is not None: w.view(-1)[0] = value
    return D


@pytest.mark.parametrize(
    'value, dtype, says',
    [
        (float('nan'), None, '1 NaN'),
        (float('inf'), torch.float16, '1 infinite'),
        (1e6, torch.float16, '1 infinite .* too large for torch.float16'),
    ],
)
def test_a_generator_that_is_not_finite_is_not_written(tmp_path, value, dtype, says):
    from dmd2_nb.weights import load_denoiser, save_denoiser
    save_denoiser(toy(), tmp_path/'g.safetensors', dtype)
    before = (tmp_path/'g.safetensors').read_bytes()
    with pytest.raises(ValueError, match=f'g.safetensors: .* has {says}') as e:
        save_denoiser(toy(value=value), tmp_path/'g.safetensors', dtype)
    assert (
        one_line(e)
        and (tmp_path / 'g.safetensors').read_bytes() == before
        and len(list(tmp_path.iterdir())) == 1
    )
    if value == 1e6: load_denoiser(save_denoiser(toy(value=value), tmp_path/'g.safetensors'))


def test_features_and_statistics_are_finite(tmp_path):
    from dmd2_nb.features import Features, extract
    from dmd2_nb.fid import Stats
    class Eye(nn.Module):
        def forward(self, x): return x.flatten(1).float()/x.flatten(1).float().sum(1, keepdim=True)
    x = torch.randint(1, 256, (8, 1, 2, 2), dtype=torch.uint8)
    x[5] = 0  # 0/0
    see = Features(Eye(), 'eye', 1)
    with pytest.raises(
        ValueError, match=r'eye features .*4 NaN of 32 numbers, the first at \(5, 0\)'
    ):
        extract(x, see)
    with pytest.raises(ValueError, match='statistics of 8 images: mean has 4 NaN'): Stats.of(x, see)
    with pytest.raises(ValueError, match='s.npz: sigma has'):
        Stats('eye', 8, torch.zeros(2), torch.full((2, 2), float('inf'))).save(tmp_path/'s.npz')
    assert not list(tmp_path.iterdir())
    Stats.of(x[:5], see).save(tmp_path/'s.npz')


@pytest.mark.parametrize(
    'tensor, says',
    [
        (
            torch.tensor([[1.0, float('inf')]]).to(torch.float8_e5m2),
            '1 infinite of 2 numbers, the first at (0, 1)',
        ),
        (torch.tensor(float('nan')), '1 NaN of 1 numbers'),
        (
            torch.tensor([1.0, -float('inf'), float('nan')]).bfloat16(),
            '1 NaN and 1 infinite of 3 numbers, the first at (1,)',
        ),
    ],
)
def test_what_is_not_finite_is_counted_and_placed(tensor, says):
    from dmd2_nb.system.tensors import check_finite
    with pytest.raises(ValueError) as e:
        check_finite(dict(a=torch.ones(2), w=tensor), 'file', 'mend it')
    assert f'file: w has {says}' in str(e.value) and str(e.value).endswith(': mend it')
    good = dict(a=torch.ones(2), b=torch.arange(3), c=torch.zeros(0), d='text')
    assert check_finite(good, 'file') is good


def test_pictures_that_are_none_are_not_written(tmp_path):
    from dmd2_nb.coco_eval import generate
    ask = lambda draw: generate(draw, ['a cat', 'a dog'], tmp_path/'o')
    with pytest.raises(ValueError, match=r"picture 1 \('a dog'\): has 12 NaN"):
        ask(lambda p, s: torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), float('nan'))]))
    with pytest.raises(ValueError, match='draw must give bytes'):
        ask(lambda p, s: torch.zeros(2, 3, 2, 2))
    with pytest.raises(ValueError, match='draw gave 1 pictures for 2 prompts'):
        ask(lambda p, s: torch.zeros(1, 3, 2, 2).byte())
    assert not list((tmp_path/'o').glob('*.png'))


def test_pictures_of_another_network_under_the_same_name(tmp_path):
    from dmd2_nb.coco_eval import generate
    def artist(seed):
        torch.manual_seed(seed)
        net = nn.Linear(1, 12)
        return lambda prompts, seeds: (
            (net(torch.ones(len(prompts), 1)).detach().abs() * 100).byte().view(-1, 3, 2, 2)
        )
    generate(artist(0), ['a cat'], tmp_path/'o', model='mine')
    generate(artist(0), ['a cat'], tmp_path/'o', model='mine')
    with pytest.raises(ValueError, match='made with another networks'):
        generate(artist(1), ['a cat'], tmp_path/'o', model='mine')
    with pytest.raises(ValueError, match='made with another networks'):
        generate(
            partial(lambda net, p, s: None, nn.Linear(1, 1)),
            ['a cat'],
            tmp_path / 'o',
            model='mine',
        )
    with pytest.raises(ValueError, match='made with another prompts'):
        generate(artist(0), ['a dog'], tmp_path/'o', model='mine')
    with pytest.raises(ValueError, match='a list of texts'):
        generate(artist(0), 'a cat', tmp_path/'o')
    (tmp_path/'o'/'run.json').write_text('{"seed"')
    with pytest.raises(ValueError, match='run.json is damaged'):
        generate(artist(0), ['a cat'], tmp_path/'o', model='mine')


# What evaluations use again

def test_a_teachers_samples_for_other_conditions_are_drawn_again(tmp_path):
    from dmd2_nb.evaluate import bundled_samples, eval_conds, load_samples, save_samples
    from dmd2_nb.images import fashion16
    images, conds = torch.arange(4).byte().view(4, 1, 1, 1), torch.tensor([3, 1, 2, 0])
    f = save_samples(tmp_path/'s.npz', images, conds.byte(), seed=0)
    assert torch.equal(load_samples(f, conds[:2], seed=0), images)
    for wrong in (conds.flip(0), conds[1:], torch.eye(4)):
        assert load_samples(f, wrong, seed=0) is None
    assert load_samples(save_samples(tmp_path / 't.npz', images, seed=0), conds, seed=0) is None, (
        'what they were drawn for is not known'
    )
    own = bundled_samples('fashion16')
    assert (
        len(load_samples(own, eval_conds(fashion16(), 300))) == 2000
        and load_samples(own, eval_conds(fashion16(), 300, seed=1)) is None
    )


@pytest.fixture
def measured(tmp_path):
    "`measure` of one set against another, in a file"
    from dmd2_nb.measure import measure
    def write(name, seed):
        g = np.random.default_rng(seed)
        np.savez(tmp_path/name, images=g.integers(0, 256, (24, 8, 8, 1), 'uint8'))
        return str(tmp_path/name)
    def f(seed, **k):
        return measure(
            [write('a.npz', 0)], write('b.npz', seed), tmp_path / 'metrics.json', say=None, **k
        )
    return f


def test_measurements_against_other_bytes_are_not_used_again(measured):
    "The reference keeps its name and its number of images; it is known by its bytes, and by the network that sees"
    assert measured(1) == measured(1)
    assert measured(1)['made'] != measured(2)['made']
    assert measured(1)['settings'] == measured(2)['settings']


# Model cards

@pytest.mark.parametrize(
    'name',
    [
        "bob's model",
        'a: b',
        '"quoted"',
        'two\nlines',
        '# no comment',
        '{a}',
        '[b',
        '- c',
        '@d',
        'back\\slash',
        'tab\there',
        '\x7f\x85\u2028',
        'schön 🦊',
        '%',
        'null',
        '3',
        '---',
        ' spaces ',
        '`' * 3,
        "'",
        '&x *y !z',
    ],
)
def test_a_model_card_is_yaml_and_python_whatever_the_name(name):
    yaml = pytest.importorskip('yaml')
    import ast
    from dmd2_nb.sdxl.checkpoints import model_card
    for kind in ('lora', 'unet'):
        card = model_card((999, 749), kind, base=name, name=name, note='one\n---\ntwo: three')
        head, body = card.split('---\n', 2)[1:]
        assert yaml.safe_load(head)['base_model'] == name
        assert yaml.safe_load(head)['tags'][:3] == ['diffusers', 'text-to-image', 'dmd2']
        fence = '`'*(4 if '```' in name else 3)
        code = body.split(f'{fence}python\n')[1].split(f'\n{fence}\n')[0]
        said = [o.value for o in ast.walk(ast.parse(code)) if isinstance(o, ast.Constant)]
        assert said.count(name) >= 2, 'the base and the name, as Python reads them'
        assert '- note: one --- two: three\n' in body


def test_an_exported_unet_is_finite(tmp_path):
    from dmd2_nb.sdxl.adapter import make_unet
    from dmd2_nb.sdxl.checkpoints import export_unet
    u = make_unet(sample_size=8)
    with torch.no_grad(): u.conv_in.bias[1] = 1e6
    with pytest.raises(
        ValueError, match='conv_in.bias has 1 infinite .*too large for torch.float16'
    ):
        export_unet(u, tmp_path/'u', (999,))
    assert not list(tmp_path.iterdir())
    export_unet(u, tmp_path/'u', (999,), dtype=torch.float32)
    with torch.no_grad(): u.conv_in.bias[1] = float('nan')
    with pytest.raises(ValueError, match='conv_in.bias has 1 NaN'):
        export_unet(u, tmp_path/'u', (999,), dtype=torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['u']
