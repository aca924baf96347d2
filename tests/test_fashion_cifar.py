"Whole sets that torchvision fetches: small files of their layouts, odd ones and hostile ones"
import gzip, os, pickle, struct

import numpy as np
import pytest
import torch

from dmd2_nb.cifar import cifar10
from dmd2_nb.images import FASHION_SHA256, fashion32, to_float

draw = np.random.RandomState(0)
GARMENTS = draw.randint(0, 256, (5, 28, 28)).astype('uint8')
PICTURES = draw.randint(0, 256, (4, 3, 32, 32)).astype('uint8')
IMAGES, LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'


def idx(x): return struct.pack(f'>{1+x.ndim}i', 0x800+x.ndim, *x.shape)+x.tobytes()


def fashion_folder(path, *, images=None, labels=None, packed=False):
    path.mkdir(parents=True, exist_ok=True)
    files = {
        IMAGES: idx(GARMENTS) if images is None else images,
        LABELS: idx(np.array([9, 0, 3, 3, 1], 'uint8')) if labels is None else labels,
    }
    for k, v in files.items():
        (path/(k+'.gz'*packed)).write_bytes(gzip.compress(v) if packed else v)
    return path


@pytest.mark.parametrize('below, packed', [('', False), ('', True), ('FashionMNIST/raw', False)])
def test_fashion_reads(tmp_path, below, packed):
    "Plain, packed, or as torchvision leaves them: the same images within a black border"
    fashion_folder(tmp_path/below, packed=packed)
    d = fashion32(tmp_path, check=False)
    assert d.shape == (1, 32, 32) and d.labels.tolist() == [9, 0, 3, 3, 1] and d.label_dim == 10
    assert (d.images[:, 0, 2:-2, 2:-2].numpy() == GARMENTS).all()
    assert d.images.long().sum() == GARMENTS.astype(int).sum(), 'the border is black'
    assert to_float(d.images).min() == -1 and d.caption(0) == 'ankle boot'


def test_fashion_sums(tmp_path):
    "A file that is not the published one is named; the held-out images are files of their own"
    p = fashion_folder(tmp_path, packed=True)
    with pytest.raises(ValueError, match=rf'{IMAGES}\.gz: not the published file.*check=False') as e:
        fashion32(p)
    assert '\n' not in str(e.value) and len(str(e.value)) <= 600
    with pytest.raises(FileNotFoundError, match='t10k-images-idx3-ubyte: no such file.*download'):
        fashion32(p, train=False, check=False)
    assert len(set(FASHION_SHA256.values())) == 4 and {len(o) for o in FASHION_SHA256.values()} == {64}


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(images=b''), f'{IMAGES}: no idx file'),
        (dict(images=idx(GARMENTS)[:-1]), f'{IMAGES}: no idx file, or cut short'),
        (dict(images=b'\x89PNG'*400), f'{IMAGES}: no idx file'),
        (dict(images=idx(GARMENTS[:, :14])), f'{IMAGES}: images are bytes, of 28x28'),
        (dict(labels=idx(GARMENTS)), f'{LABELS}: labels are bytes'),
        (dict(labels=idx(np.array([1, 2], 'uint8'))), '2 labels for 5 images'),
        (dict(labels=idx(np.full(5, 10, 'uint8'))), 'label 10 is outside the 10'),
        (dict(images=struct.pack('>4i', 0x803, 2**31-1, 28, 28)), f'{IMAGES}: no idx file'),
    ],
)
def test_fashion_broken(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fashion32(fashion_folder(tmp_path, **change), check=False)


def test_fashion_broken_gzip(tmp_path):
    p = fashion_folder(tmp_path, packed=True)/f'{IMAGES}.gz'
    for raw in (b'no gzip', p.read_bytes()[:-9], p.read_bytes()[:40]+b'x'*9+p.read_bytes()[49:]):
        p.write_bytes(raw)
        with pytest.raises(ValueError, match=r'\.gz: (cannot be unpacked|no idx file)'):
            fashion32(tmp_path, check=False)


def no_network(*args, **kw): raise RuntimeError('Error downloading x:\nTried http://there, got:\nno way')


def test_fetching_fails_in_one_line(tmp_path, monkeypatch):
    from torchvision import datasets
    monkeypatch.setattr(datasets.FashionMNIST, 'download', no_network)
    monkeypatch.setattr(datasets.utils, 'download_and_extract_archive', no_network)
    for read, name in ((fashion32, 'Fashion-MNIST'), (cifar10, 'CIFAR-10')):
        with pytest.raises(OSError, match=f'^{name} cannot be fetched .*folder of a copy$') as e:
            read(tmp_path, download=True)
        assert '\n' not in str(e.value)
    p = fashion_folder(tmp_path/'there')
    assert len(fashion32(p, download=True, check=False)) == 5, 'what is there is not fetched'


def batch(rows, first=0):
    "As Python 2 wrote it: protocol 2, keys of bytes, a row has all reds, greens, blues"
    x = PICTURES[rows].reshape(len(rows), -1)
    labels = [first+i for i in range(len(rows))]
    return {b'data': x, b'labels': labels, b'batch_label': b'a batch', b'filenames': [b'x.png']}


def cifar_folder(path, test=None):
    path.mkdir(parents=True, exist_ok=True)
    files = {f'data_batch_{i}': batch([i % 4]) for i in range(1, 6)}
    files['test_batch'] = batch([2, 0], 3) if test is None else test
    files['batches.meta'] = {b'label_names': [f'kind {i}'.encode() for i in range(10)]}
    for k, v in files.items():
        (path/k).write_bytes(v if isinstance(v, bytes) else pickle.dumps(v, 2))
    return path


def test_cifar_reads(tmp_path):
    "The five batches in their order, the held-out one, names of classes; within the archive's folder, too"
    cifar_folder(tmp_path/'cifar-10-batches-py')
    d, held = (cifar10(tmp_path, train=o, check=False) for o in (True, False))
    assert (d.images.numpy() == PICTURES[[1, 2, 3, 0, 1]]).all() and d.labels.tolist() == [0]*5
    assert (held.images.numpy() == PICTURES[[2, 0]]).all() and held.labels.tolist() == [3, 4]
    assert held.caption(1) == 'kind 4' and d.label_dim == 10
    assert torch.equal(cifar10(tmp_path/'cifar-10-batches-py', check=False).images, d.images)
    with pytest.raises(ValueError, match='data_batch_1: not the published file'): cifar10(tmp_path)


def test_cifar_opcodes_of_python_2(tmp_path):
    "Python 2 wrote text and bytes alike as SHORT_BINSTRING and BINSTRING, arrays with an order of their own"
    def short(b): return b'U'+bytes([len(b)])+b
    def array(x, order):
        shape = b'M'+struct.pack('<H', x.shape[0])+b'M'+struct.pack('<H', x.shape[1])+b'\x86'
        dtype = b'cnumpy\ndtype\n'+short(b'u1')+b'K\x00K\x01\x87R(K\x03'+short(b'|')+b'NNNJ'
        dtype += b'\xff'*4+b'J'+b'\xff'*4+b'K\x00tb'
        raw = x.tobytes(order)
        flag = b'\x88' if order == 'F' else b'\x89'
        return (
            b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + short(b'b')
            + b'\x87R(K\x01' + shape + dtype + flag + b'T' + struct.pack('<i', len(raw)) + raw + b'tb'
        )
    rows = PICTURES[[1, 3]].reshape(2, -1)
    for order in 'CF':
        labels = short(b'labels')+b'](K\x05K\x06e'
        raw = b'\x80\x02}('+short(b'data')+array(rows, order)+labels+b'u.'
        p = cifar_folder(tmp_path/order, raw)
        theirs = pickle.loads(raw, encoding='bytes')  # what is expected; this file is ours
        assert (theirs[b'data'] == rows).all() and theirs[b'labels'] == [5, 6]
        d = cifar10(p, train=False, check=False)
        assert (d.images.numpy() == PICTURES[[1, 3]]).all() and d.labels.tolist() == [5, 6]


class Hostile:
    def __reduce__(self): return os.mkdir, ('ran',)


@pytest.mark.parametrize(
    'test, message',
    [
        ({b'data': Hostile(), b'labels': []}, 'test_batch is refused: .*mkdir'),
        ({b'labels': [1]}, "test_batch .*no 'data', only labels"),
        ([1, 2], "test_batch .*no 'data', only nothing"),
        ({b'data': b'x'*3072, b'labels': [1]}, "test_batch .*'data' is no array"),
        (batch([0, 1]) | {b'labels': [1]}, r"test_batch .*must hold bytes \(1, 3072\)"),
        (batch([0]) | {b'labels': [0.5]}, 'test_batch .*must be integers'),
        (batch([0]) | {b'data': np.zeros((1, 3072), 'float32')}, "test_batch .*must hold bytes"),
        (batch([0]) | {b'data': np.array([None])}, "test_batch .*damaged|test_batch is refused"),
        (batch([0]) | {b'labels': [10]}, 'label 10 is outside the 10 classes'),
        (pickle.dumps(batch([0]), 2)[:-50], 'test_batch is truncated'),
    ],
)
def test_cifar_broken(tmp_path, test, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as e:
        cifar10(cifar_folder(tmp_path/'set', test), train=False, check=False)
    assert not (tmp_path/'ran').exists()
    assert '\n' not in str(e.value) and len(str(e.value)) <= 600


def test_tile_is_their_grid_without_its_frame():
    "The oracle is torchvision's; `tile` needs neither its seconds of import nor its outer frame"
    from torchvision.utils import make_grid
    from dmd2_nb.plot import tile
    x = torch.from_numpy(PICTURES)
    for n, ncols, pad in ((4, 4, 1), (3, 2, 3), (4, 3, 2)):
        theirs = make_grid(x[:n], nrow=ncols, padding=pad, pad_value=255)[:, pad:-pad, pad:-pad]
        assert torch.equal(tile(x[:n], ncols, pad), theirs.permute(1, 2, 0))


def test_crops_are_theirs_but_for_odd_margins():
    "Why `center_crop` stays ours: half a pixel is rounded down, theirs to the even neighbour"
    from PIL import Image
    from torchvision.transforms.v2 import InterpolationMode, functional as V
    from dmd2_nb.system.image_files import center_crop, center_patch
    def equal(width):
        im = Image.fromarray(draw.randint(0, 256, (20, width, 3)).astype('uint8'))
        square = V.resize(V.center_crop(im, [20, 20]), [8, 8], InterpolationMode.LANCZOS)
        patch = V.center_crop(im, [8, 8])
        return [a.tobytes() == b.tobytes() for a, b in (
            (square, center_crop(im, 8)), (patch, center_patch(im, 8))
        )]
    assert equal(30) == equal(44) == equal(25) == [True, True]
    assert equal(27) == equal(31) == [False, False]
