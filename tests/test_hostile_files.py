"""Files that can't harm: pickles by the thousand, archives that unpack to absurd sizes or climb
out, headers and configs that lie"""
import io, json, os, re, resource, struct, subprocess, sys, time, tracemalloc, zipfile, zlib
from dataclasses import asdict
from pathlib import Path
from pickle import dumps

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dmd2_nb.system.tensors import MAX_HEADER, read_state_dict, read_tensors, shard_index
from dmd2_nb.system.zips import checked_zip, read_npz
from dmd2_nb.core import checked
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2Config, toy_config
from dmd2_nb.features import small_classifier
from dmd2_nb.generator import load_generator
from dmd2_nb.guards import Limits
from dmd2_nb.image_files import ImageZip
from dmd2_nb.images import in_memory
from dmd2_nb.nets import ToyNet
from dmd2_nb.runs import claim_run
from dmd2_nb.system.safe_pickle import MAX_OPS, RefusedPickle, read_pickle
from dmd2_nb.train import load_state, save_state
from dmd2_nb.weights import load_denoiser

N = 3000


def one_line(match, f, *args, kind=ValueError, **kw):
    with pytest.raises(kind, match=match) as e: f(*args, **kw)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 1000
    return str(e.value)


# -- pickles --

def test_fuzz(tmp_path):
    """Thousands of mutated pickles: nothing executed, imported or written, one clear error each,
    and the memory stays small"""
    r = subprocess.run(
        [sys.executable, str(Path(__file__).parent / '_fuzz_work.py'), str(tmp_path), str(N)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    assert not r.returncode, r.stderr[-2000:]  # a crash would show here
    out = json.loads(r.stdout)
    assert out['n'] == N >= 2000 and out['control'] >= 4
    assert (
        out['harm'] == {}
        and out['new_modules'] == []
        and out['files'] == ['broken.pkl', 'seed.pkl']
    )
    assert out['n_wrong'] == 0, out['wrong']
    assert min(out['ends'].get(k, 0) for k in ('read', 'refused', 'damaged')) > N/50
    assert out['peak_mib'] < 1024 and out['growth_mib'] < 100 and out['slowest'] < 10


def test_no_module_executes_pickles(root):
    "Nowhere in the package or the data scripts"
    for p in [*(root/'dmd2_nb').rglob('*.py'), *(root/'data').glob('*.py')]:
        text = p.read_text(encoding='utf-8')
        assert not re.search(
            r'pickle\.loads?\(|weights_only *= *False|allow_pickle *= *True|Unpickler', text
        ), p.name


def grow(item, times):
    return (
        b'(c_codecs\nencode\nq\x00X'
        + struct.pack('<I', len(item))
        + item
        + b'X\x06\x00\x00\x00latin1\x86q\x01'
        + b'h\x00h\x01R' * times
        + b'l.'
    )


bombs = {
    'a megabyte copied a thousand times': lambda: grow(b'a' * 2**20, 1000),
    'a list made a set again and again': lambda: (
        b'(c__builtin__\nset\nq\x00'
        + b']q\x01('
        + b'K\x01' * 200_000
        + b'e\x85q\x02'
        + b'h\x00h\x02R' * 1000
        + b'l.'
    ),
    'too many instructions': lambda: b'(' + b'\x8f' * (MAX_OPS + 5) + b'l.',
    'a tensor turned and copied': lambda: turned(2000),
}


def turned(times):
    "A pickle that asks for the transpose of one tensor again and again"
    import io
    t = torch.zeros(512, 512)
    b = io.BytesIO()
    torch.save(
        t.untyped_storage() if False else torch.zeros(512 * 512)._typed_storage(),
        b,
        _use_new_zipfile_serialization=False,
    )
    raw = b.getvalue()
    storage = b'ctorch.storage\n_load_from_bytes\nB' + struct.pack('<I', len(raw)) + raw + b'\x85R'
    args = b'(' + storage + b'K\x00(M\x00\x02M\x00\x02t(K\x01M\x00\x02t\x89}tq\x01'
    return (
        b'ctorch._utils\n_rebuild_tensor_v2\nq\x000' + args + b'0(' + b'h\x00h\x01R' * times + b'l.'
    )


@pytest.mark.parametrize('name', bombs)
def test_pickle_bombs(name):
    "Refused before they take what they ask for"
    data = bombs[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RefusedPickle, match='bomb|instructions'): read_pickle(data)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024 < 1024


# -- safetensors --

def test_headers(tmp_path):
    """A header of absurd length, a length beyond the file, tensors beyond it, shapes that overflow:
    refused, nothing allocated"""
    f = tmp_path/'a.safetensors'
    def header(d, n=None):
        b = json.dumps(d).encode()
        f.write_bytes(struct.pack('<Q', len(b) if n is None else n)+b+b'\0'*16)
    good = dict(w=dict(dtype='F32', shape=[4], data_offsets=[0, 16]))
    header(good)
    assert read_tensors(f)[0]['w'].shape == (4,)
    for n in (2**63-1, 2**40, MAX_HEADER+1):
        header(good, n)
        one_line(f'a.safetensors is damaged.*{n:,} bytes', read_tensors, f)
        one_line('a.safetensors is damaged', shard_index, [f])
    for n in (0, 1, 7, len(json.dumps(good))+99):
        header(good, n)
        one_line('a.safetensors is damaged', read_tensors, f)
    for w in (
        dict(dtype='F32', shape=[2**40], data_offsets=[0, 2**42]),
        dict(dtype='F32', shape=[4], data_offsets=[0, 2**62]),
        dict(dtype='F32', shape=[2**33, 2**33], data_offsets=[0, 16]),
        dict(dtype='F32', shape=[-4], data_offsets=[0, 16]),
        dict(dtype='OBJECT', shape=[4], data_offsets=[0, 16]),
    ):
        header(dict(w=w))
        one_line('a.safetensors is damaged', read_tensors, f)


D = EDMPrecond(ToyNet(width=8))
greedy = {
    'a network as large as a disk': dict(net='ToyNet', args=dict(width=60_000, depth=2)),
    'more blocks than tensors': dict(net='ToyNet', args=dict(width=8, depth=5000)),
    'a number beyond all': dict(net='ToyNet', args=dict(width=2**40)),
    'not a number': dict(net='ToyNet', args=dict(width=float('nan'))),
    'a deep list': dict(net='UNet', args=dict(img_resolution=8, channels=[4] * 1000)),
    'an object': dict(net='ToyNet', args=dict(width=dict(a=1))),
    'arguments of none': dict(net='ToyNet', args=dict(widht=8)),
    'no arguments': dict(net='ToyNet'),
    'a module': dict(net='os.system', args={}),
    'a list for a name': dict(net=['ToyNet'], args={}),
    'a text for a level': dict(net='ToyNet', args=dict(width=8), sigma_data='0.5'),
    'a list': [1, 2],
    'a number': 7,
}


@pytest.mark.parametrize('name', greedy)
def test_denoiser_config(name, tmp_path):
    "The config inside a weights file: nothing is built that the file's tensors don't fill"
    save_file(
        {k: v.contiguous() for k, v in D.state_dict().items()},
        tmp_path / 'a.safetensors',
        metadata=dict(denoiser=json.dumps(greedy[name])),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = one_line('a.safetensors', load_denoiser, tmp_path/'a.safetensors')
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024 < 300, text


def test_classifier_config(tmp_path):
    for config in (dict(channels=10**6), dict(size=3), [1], dict(channels='many')):
        save_file(
            dict(w=torch.zeros(1)),
            tmp_path / 'c.safetensors',
            metadata=dict(classifier=json.dumps(config)),
        )
        one_line('c.safetensors', small_classifier, tmp_path/'c.safetensors')


def test_metadata_that_would_be_arguments(tmp_path):
    "Names in a file's metadata become no arguments of ours"
    for meta in (
        dict(levels=[1.0, 2.0]),
        dict(levels='80'),
        dict(levels=[80.0], G='x'),
        dict(levels=[80.0], self=1),
        dict(levels=[float('nan')]),
        dict(levels=[]),
    ):
        save_file(
            {k: v.contiguous() for k, v in D.state_dict().items()},
            tmp_path / 'g.safetensors',
            metadata=dict(
                denoiser=json.dumps(dict(net='ToyNet', args=D.model.config)), meta=json.dumps(meta)
            ),
        )
        with pytest.raises(ValueError) as e: load_generator(tmp_path/'g.safetensors')
        assert len(str(e.value).splitlines()) == 1


# -- configs --

def test_config_json():
    "Every field of the dataclass, of its own kind; unknown names are named"
    good = json.loads(json.dumps(asdict(toy_config)))
    assert DMD2Config.from_dict(good) == toy_config
    for k, v in good.items():
        for bad in ({}, None, 'much', [[1]], True) if not isinstance(v, str) else (3, None, ['a']):
            one_line(f'config field {k} must be', DMD2Config.from_dict, good | {k: bad})
    assert 'lr_generator, ttru' in one_line(
        'unknown config fields', DMD2Config.from_dict, good | dict(ttru=5, lr_generator=1.0)
    )
    for bad in ([], 'config', 3, None): one_line('a config is a dict', DMD2Config.from_dict, bad)
    one_line('ttur must be a whole number, got 2.5', DMD2Config.from_dict, good | dict(ttur=2.5))
    one_line('unknown config field', checked, Limits, {'x'*10_000: 1})
    assert Limits(**checked(Limits, dict(lag=2))).lag == 2


def test_checkpoint_config(tmp_path):
    "A checkpoint whose state.json was edited"
    from dmd2_nb.lab.health_runs import toy_run
    dmd, _, _ = toy_run(0)
    save_state(dmd, tmp_path/'s')
    state = json.loads((tmp_path/'s'/'state.json').read_text())
    state.pop('sha256')
    for change, word in (
        (dict(config=state['config'] | dict(trur=3)), 'unknown config field: trur'),
        (dict(config=state['config'] | dict(ttur='5')), 'ttur must be a whole number'),
        (dict(config=7), 'a config is a dict'),
    ):
        (tmp_path/'s'/'state.json').write_text(json.dumps(state | change))
        one_line(word, load_state, dmd, tmp_path/'s')


# -- archives and names --

def png(w, h):
    "A grey picture of one colour: a few bytes for any size"
    def chunk(kind, data):
        return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    row = zlib.compressobj(9)
    data = row.compress(b'\0'*(w+1)*h)+row.flush()
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, 0))
        + chunk(b'IDAT', data)
        + chunk(b'IEND', b'')
    )


def archive(path, entries, labels=None):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, data in entries.items(): z.writestr(n, data)
        z.writestr('dataset.json', json.dumps(dict(labels=labels)))
    return path


@pytest.mark.parametrize(
    'name',
    [
        '../out.png',
        '/etc/out.png',
        'a/../../out.png',
        '..\\out.png',
        'C:out.png',
        'a/b/../../../out.png',
    ],
)
def test_zip_traversal(name, tmp_path):
    one_line(
        'unsafe entry name',
        ImageZip,
        archive(tmp_path / 'a.zip', {'ok.png': png(4, 4), name: png(4, 4)}),
    )
    assert [p.name for p in tmp_path.iterdir()] == ['a.zip']


LAUGHS = b'N' + b'2\x86'*200  # a pair of pairs of pairs ...: 400 bytes, 2**200 parts


@pytest.mark.parametrize('pickle', [
    b'c_codecs\nencode\n(X\1\0\0\0x' + LAUGHS + b'tR.', b'cnumpy\ndtype\n' + LAUGHS + b'\x85R.',
    b'ctorch\nSize\n' + LAUGHS + b'\x85R.', LAUGHS + b'.', b'}X\1\0\0\0a' + LAUGHS + b's.', b']' + LAUGHS + b'a.',
    b'cnumpy\ndtype\nX\2\0\0\0f8\x85R' + LAUGHS + b'b.'])
def test_parts_that_repeat_their_parts(tmp_path, pickle):
    "Small in the file, endless when they are printed, hashed or compared: in a value, in arguments, in a state"
    begun = time.perf_counter()
    one_line('repeats its parts without end', read_pickle, b'\x80\4'+pickle)
    zipped = tmp_path/'a.pt'
    with zipfile.ZipFile(zipped, 'w') as z: z.writestr('a/data.pkl', b'\x80\2'+pickle)
    with pytest.raises(ValueError): read_state_dict(zipped)
    head = [0x1950a86a20f9469cfc6c, 1001, dict(little_endian=True, protocol_version=1001)]
    old = tmp_path/'old.pt'
    old.write_bytes(b''.join(dumps(o, 2) for o in head) + b'\x80\2' + pickle + dumps([], 2))
    with pytest.raises(ValueError): read_state_dict(old)
    assert time.perf_counter()-begun < 30


def test_parts_that_are_shared_are_no_bomb():
    "A tensor, a tuple or a text that is used again and again; a thing that holds itself"
    shared = ('a', 1, (2, 3))
    assert read_pickle(dumps([shared]*1000, 4)) == [shared]*1000
    assert len(read_pickle(dumps({str(i): shared for i in range(20_000)}, 4))) == 20_000


def test_zip_bombs(tmp_path):
    "A small zip of a few thousand large blank pictures is not unpacked; one of a claimed size is not read"
    one = png(4000, 4000)
    z = ImageZip(archive(tmp_path/'many.zip', {f'{i:04d}.png': one for i in range(120)}))
    assert os.path.getsize(tmp_path/'many.zip') < 10**7
    one_line('many.zip unpacks to 1,920,000,000 bytes.*decompression bomb', in_memory, z)
    one_line(
        'not a usable image|over the limit',
        ImageZip,
        archive(tmp_path / 'wide.zip', {'a.png': png(20_000, 20_000)}),
    )
    one_line('over the limit', ImageZip, archive(tmp_path/'fat.zip', {'a.png': b'\0'*(2**28+1)}))


def understated(path, how, name, size=2**26, says=5):
    "A zip with one entry of zeros whose table and head claim that it has a few bytes"
    with zipfile.ZipFile(path, 'w', how) as z: z.writestr(name, bytes(size))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack('<I', size), struct.pack('<I', says)))
    return path


@pytest.mark.parametrize('how', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize('name, read', [
    ('a.png', lambda p: checked_zip(p).read('a.png')), ('labels.npy', lambda p: read_npz(p, ['labels'])),
    ('a.png', ImageZip), ('x/data.pkl', read_state_dict)], ids=['zip', 'npz', 'images', 'torch'])
def test_entries_that_hold_more_than_they_claim(tmp_path, how, name, read):
    "64 MB behind a claim of 5 bytes: no more than that is unpacked"
    path = understated(tmp_path/'a.zip', how, name)
    tracemalloc.start()
    try:
        one_line('Bad CRC-32|dataset.json|not a readable npz|not the magic|Bad magic|damaged', read, path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally: tracemalloc.stop()


@pytest.mark.parametrize('keep', [2**32-1, 2**28+1])
def test_lzma_that_wants_memory(tmp_path, keep):
    "An entry says how much of the past must be kept to unpack it; what is usual is read"
    path = tmp_path/'a.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_LZMA) as z: z.writestr('note', b'hello'*99)
    assert checked_zip(path).read('note') == b'hello'*99
    raw = bytearray(path.read_bytes())
    begin = raw.index(b'note')+len('note')
    assert raw[begin+2:begin+4] == b'\5\0'
    for good in (2**12, 2**26):  # the usual ones
        raw[begin+5:begin+9] = struct.pack('<I', good)
        path.write_bytes(raw)
        assert checked_zip(path).read('note') == b'hello'*99
    raw[begin+5:begin+9] = struct.pack('<I', keep)
    path.write_bytes(raw)
    one_line(f"'note' wants {keep:,} bytes to unpack with", lambda: checked_zip(path).read('note'))
    raw[begin+2:begin+9] = b'\5\0'+b'\xff'*5
    path.write_bytes(raw)
    one_line('does not begin as LZMA', lambda: checked_zip(path).read('note'))


@pytest.mark.parametrize('how', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_arrays_are_read_whole(tmp_path, how):
    "Larger than the pieces that are unpacked at a time, and noise; one wrong bit is noticed"
    a = np.random.RandomState(0).randint(0, 256, (3, 200, 211), 'uint8')
    f = io.BytesIO()
    np.save(f, a)
    path = tmp_path/'a.npz'
    with zipfile.ZipFile(path, 'w', how) as z:
        z.writestr('a.npy', f.getvalue())
        z.writestr('empty.npy', b'')
    assert np.array_equal(read_npz(path, ['a'])['a'], a)
    assert checked_zip(path).read('empty.npy') == b''
    raw = bytearray(path.read_bytes())
    raw[len(raw)//2] ^= 16
    path.write_bytes(raw)
    one_line('a.npz: not a readable npz file', read_npz, path, ['a'])


def test_labels_name_no_files(tmp_path):
    "Names in dataset.json are looked up among the images, never opened"
    (tmp_path/'secret.png').write_bytes(png(4, 4))
    (tmp_path/'set').mkdir()
    (tmp_path/'set'/'a.png').write_bytes(png(4, 4))
    for name in ('../secret.png', str(tmp_path/'secret.png')):
        (tmp_path / 'set' / 'dataset.json').write_text(
            json.dumps(dict(labels=[['a.png', 0], [name, 1]]))
        )
        one_line('labels without an image', ImageZip, tmp_path/'set')


@pytest.mark.parametrize('name', ['../out', '/out', 'a/b', '..', '.', ''])
def test_run_names(name, tmp_path):
    one_line('is not a name for a folder', claim_run, tmp_path/'runs', dict(a=1), name=name)
    assert not (tmp_path/'out').exists() and not (tmp_path/'runs').exists()
