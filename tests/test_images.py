"What a reader need not see of `images` and `image_files`: broken, hostile and odd files"
import io, json, os, random, zipfile
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2_nb.assets import data_path
from dmd2_nb.image_files import ImageLMDB, ImageZip, center_crop, folder_images, open_image, prepare
from dmd2_nb.images import (
    ImageData,
    emoji32,
    fashion16,
    image_batches,
    in_memory,
    load_arrays,
    npz_images,
    open_images,
)

DEMO = data_path('imagenet64_layout_demo.zip')


def png(size=8, mode='RGB', value=120):
    f = io.BytesIO()
    Image.new(
        mode,
        (size, size) if isinstance(size, int) else size,
        value if mode in ('L', 'I;16') else (value,) * len(mode),
    ).save(f, 'png')
    return f.getvalue()


def make_zip(path, entries, labels='auto', kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', kind) as z:
        for k, v in entries.items(): z.writestr(k, v)
        if labels == 'auto':
            labels = json.dumps(dict(labels=[[k, i] for i, k in enumerate(entries)]))
        if labels is not None: z.writestr('dataset.json', labels)
    return path


def test_truncated_zip(tmp_path):
    whole = DEMO.read_bytes()
    for cut in (len(whole)//2, len(whole)-1000, 10, 0):
        p = tmp_path/'cut.zip'
        p.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='cut.zip: not a readable zip'): ImageZip(p)


def test_flipped_bytes_never_pass_unnoticed(tmp_path):
    "A zip entry carries a checksum: whichever byte of an entry's data changes, its name is in the error"
    whole = bytearray(DEMO.read_bytes())
    with zipfile.ZipFile(DEMO) as z: info = z.getinfo('00000/img00000007.png')
    whole[info.header_offset + 200] ^= 0xff
    p = tmp_path/'flipped.zip'
    p.write_bytes(whole)
    with pytest.raises(ValueError, match='img00000007.png'): ImageZip(p).pixels(range(12))


@pytest.mark.parametrize('labels,message', [
    (None, 'has no dataset.json'),
    ('{', 'dataset.json is not'),
    ('[]', 'dataset.json is not'),
    ('{"labels": {"a.png": 1}}', 'must be a list of'),
    ('{"labels": [["a.png", 0]]}', '1 images without a label in dataset.json: b.png'),
    ('{"labels": [["a.png", 0], ["b.png", 1], ["c.png", 2]]}', '1 labels without an image in dataset.json: c.png'),
    ('{"labels": [["a.png", 0], ["b.png", "cat"]]}', 'all integers'),
    ('{"labels": [["a.png", 0], ["b.png", true]]}', 'all integers'),
    ('{"labels": [["a.png", [0, 1]], ["b.png", [1]]]}', 'vectors of one length'),
    ('{"labels": [["a.png", 0], ["b.png", -1]]}', 'label -1 is outside'),
    ('{"labels": [["a.png", 0], ["b.png", 5]]}', 'label 5 is outside the 5 classes'),
])
def test_labels(tmp_path, labels, message):
    p = make_zip(tmp_path/'x.zip', {'a.png': png(), 'b.png': png()}, labels)
    with pytest.raises(ValueError, match=message): ImageZip(p, classes=5)


def test_label_forms(tmp_path):
    two = {'a.png': png(), 'b.png': png()}
    assert ImageZip(make_zip(tmp_path/'n.zip', two, '{"labels": null}')).conds([0, 1]) is None
    z = ImageZip(
        make_zip(tmp_path / 'v.zip', two, '{"labels": [["b.png", [0, 1]], ["a.png", [1, 0]]]}')
    )
    assert z.conds([0, 1]).tolist() == [[1., 0.], [0., 1.]] and z.label_dim == 2
    d = in_memory(z)
    assert d.cond.shape == (2, 2) and d.labels is None


@pytest.mark.parametrize('name', ['../a.png', '/etc/a.png', 'x/../../a.png', 'C:/a.png', 'x\\..\\a.png'])
def test_traversal(tmp_path, name):
    with pytest.raises(ValueError, match='unsafe entry name'):
        ImageZip(make_zip(tmp_path/'x.zip', {name: png()}))


def test_entry_bomb(tmp_path):
    "300 MB of zeros in 300 kB: refused by its claimed size"
    p = make_zip(tmp_path/'bomb.zip', {'a.png': bytes(300*2**20)})
    assert p.stat().st_size < 2**20
    with pytest.raises(ValueError, match='claims 314,572,800 bytes'): ImageZip(p)


def test_pixel_bomb(tmp_path):
    for side, message in ((12000, '12000x12000 is over the limit'), (16000, 'bomb')):
        f = io.BytesIO()
        Image.new('1', (side, side)).save(f, 'png')
        assert len(f.getvalue()) < 2**20
        with pytest.raises(ValueError, match=f'big.png: .*{message}'):
            open_image(f.getvalue(), 'big.png')


def test_npz_bomb(tmp_path):
    p = tmp_path/'bomb.npz'
    with zipfile.ZipFile(p, 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('images.npy', 'w', force_zip64=True) as f:
            for _ in range(1100): f.write(bytes(2**20))
    with pytest.raises(ValueError, match='decompression bomb'): load_arrays(p)


def test_npz_huge_header(tmp_path):
    "A header that promises more than follows"
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False, shape=(10**15,)))
    p = tmp_path/'header.npz'
    with zipfile.ZipFile(p, 'w') as z: z.writestr('images.npy', f.getvalue())
    with pytest.raises(ValueError, match='header.npz: not a readable npz'): load_arrays(p)


def test_npz_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'ran'),))
    a = np.empty(1, dtype=object)
    a[0] = Bomb()
    np.savez(tmp_path/'x.npz', images=a)
    with pytest.raises(ValueError, match='not a readable npz'): npz_images(tmp_path/'x.npz')
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize(
    'arrays,error,message',
    [
        (dict(images=np.zeros((2, 4, 4), 'float32')), TypeError, 'must be uint8'),
        (dict(images=np.zeros((2, 4, 4, 7), 'uint8')), ValueError, 'must be'),
        (
            dict(images=np.zeros((2, 4, 4), 'uint8'), labels=np.zeros(3, 'int64')),
            ValueError,
            '3 labels for 2 images',
        ),
        (
            dict(images=np.zeros((2, 4, 4), 'uint8'), labels=np.full(2, 0.5)),
            ValueError,
            'must be integers',
        ),
        (
            dict(
                images=np.zeros((2, 4, 4), 'uint8'),
                labels=np.array([0, 2]),
                class_names=np.array(['a', 'b']),
            ),
            ValueError,
            'label 2 is outside the 2',
        ),
    ],
)
def test_npz_arrays(tmp_path, arrays, error, message):
    np.savez(tmp_path/'x.npz', **arrays)
    with pytest.raises(error, match=message): npz_images(tmp_path/'x.npz')


def test_npz_adm_layout(tmp_path):
    x = np.random.RandomState(0).randint(0, 256, (5, 4, 6, 3)).astype('uint8')
    np.savez(tmp_path/'x.npz', arr_0=x, arr_1=np.arange(5))
    d = open_images(tmp_path/'x.npz')
    assert (
        d.shape == (3, 4, 6)
        and (d.images.numpy() == x.transpose(0, 3, 1, 2)).all()
        and d.label_dim == 5
    )
    (tmp_path/'cut.npz').write_bytes((tmp_path/'x.npz').read_bytes()[:-40])
    with pytest.raises(ValueError, match='cut.npz: not a readable npz'):
        open_images(tmp_path/'cut.npz')
    with pytest.raises(FileNotFoundError, match='none.npz'): npz_images(tmp_path/'none.npz')


def test_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): folder_images(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='no images'): folder_images(tmp_path)
    (tmp_path/'a.png').write_bytes(png(8))
    (tmp_path/'b.png').write_bytes(png(8, 'L'))
    with pytest.raises(ValueError, match=r'b.png is \(1, 8, 8\)'):
        folder_images(tmp_path).pixels([0, 1])
    assert folder_images(tmp_path, size=4).pixels([0, 1]).shape == (2, 3, 4, 4)
    (tmp_path/'b.png').write_text('not an image')
    with pytest.raises(ValueError, match='b.png: not a usable image'):
        folder_images(tmp_path).pixels([1])


def test_image_modes():
    assert open_image(png(8, 'L'), 'x').mode == 'L'
    clear = np.array(open_image(png(8, 'RGBA', 0), 'x'))
    assert (clear == 255).all(), 'transparent pixels are white'
    with pytest.raises(ValueError, match='only 8 bits'): open_image(png(8, 'I;16'), 'x')


def test_folder_layout_equals_zip(tmp_path):
    with zipfile.ZipFile(DEMO) as z: z.extractall(tmp_path)
    a, b = open_images(tmp_path), open_images(DEMO, classes=1000, workers=2)
    assert a.names == b.names and (a.labels == b.labels).all()
    assert torch.equal(a.pixels(range(0, 166, 15)), b.pixels(range(0, 166, 15)))


def write_lmdb(path, x, y, **change):
    lmdb = pytest.importorskip('lmdb')
    env = lmdb.open(str(path), map_size=2**24)
    items = dict(
        images_shape=' '.join(map(str, x.shape)).encode(),
        labels_shape=' '.join(map(str, y.shape)).encode(),
    )
    for i in range(len(x)):
        items |= {f'images_{i}_data': x[i].tobytes(), f'labels_{i}_data': y[i].tobytes()}
    with env.begin(write=True) as t:
        for k, v in (items | change).items():
            if v is not None: t.put(k.encode(), v)
    env.close()
    return path


def test_lmdb(tmp_path):
    x, y = np.random.RandomState(0).randint(0, 256, (6, 3, 4, 4)).astype('uint8'), np.arange(6)
    d = open_images(write_lmdb(tmp_path/'ok', x, y), classes=10)
    assert (
        d.shape == (3, 4, 4)
        and (d.pixels([1, 5]).numpy() == x[[1, 5]]).all()
        and d.conds([1, 5]).tolist() == [1, 5]
    )
    assert torch.equal(in_memory(d).images, torch.from_numpy(x))
    xb, yb = next(image_batches(d, 4, workers=2))
    assert torch.equal(((xb+1)*127.5).round().byte(), torch.from_numpy(x[yb]))
    column = open_images(write_lmdb(tmp_path/'column', x, y[:, None]))
    assert column.conds([3]).tolist() == [3]


@pytest.mark.parametrize('change,message', [
    (dict(images_shape=b'6 3 4'), 'images_shape must be'),
    (dict(images_shape=b'6 3 5 4'), 'images_2_data has 48 bytes, its shape needs 60'),
    (dict(images_shape=None), 'images_shape is None'),
    (dict(images_shape=b'six'), 'not numbers'),
    (dict(labels_shape=b'5'), 'does not go with 6 images'),
    (dict(labels_3_data=None), 'labels_3_data is missing'),
    (dict(labels_3_data=b'1234'), 'labels_3_data has 4 bytes'),
    (dict(labels_3_data=np.array([77]).tobytes()), 'label 77 is outside the 10 classes'),
    (dict(images_2_data=None), 'images_2_data is missing'),
])
def test_lmdb_broken(tmp_path, change, message):
    p = write_lmdb(tmp_path/'x', np.zeros((6, 3, 4, 4), 'uint8'), np.arange(6), **change)
    with pytest.raises(ValueError, match=message): ImageLMDB(p, classes=10).pixels([2])


def test_lmdb_not_one(tmp_path):
    pytest.importorskip('lmdb')
    (tmp_path/'data.mdb').write_bytes(b'x'*5000)
    with pytest.raises(ValueError, match='not a readable LMDB'): ImageLMDB(tmp_path)
    with pytest.raises(FileNotFoundError, match='gone'): ImageLMDB(tmp_path/'gone')


def test_prepare(tmp_path):
    r = random.Random(0)
    for k in ('n02', 'n01'):
        (tmp_path/'src'/k).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((r.randint(20, 40), r.randint(20, 40)), 60).save(
                tmp_path / 'src' / k / f'{i}.JPEG', 'jpeg'
            )
    z = ImageZip(prepare(tmp_path/'src', tmp_path/'o'/'x.zip', 16), classes=2)
    assert (
        z.shape == (3, 16, 16)
        and z.labels.tolist() == [0] * 3 + [1] * 3
        and z.names[4] == '00000/img00000004.png'
    )
    (tmp_path/'src'/'n01'/'1.JPEG').write_bytes(b'\xff\xd8broken')
    with pytest.raises(ValueError, match='1.JPEG: not a usable image'):
        prepare(tmp_path/'src', tmp_path/'o'/'y.zip', 16)
    assert sorted(o.name for o in (tmp_path / 'o').iterdir()) == ['x.zip'], (
        'nothing half written stays'
    )
    with pytest.raises(ValueError, match="method 'bilinear'"):
        center_crop(Image.new('RGB', (9, 9)), 4, 'bilinear')


def test_center_crop_keeps_the_centre():
    im = Image.new('RGB', (90, 30))
    im.paste((255, 0, 0), (30, 0, 60, 30))
    for method in ('edm', 'adm'):
        a = np.array(center_crop(im, 10, method))
        assert (a[:, 1:-1] == (255, 0, 0)).all(), method


@pytest.mark.parametrize('batch', [7, 64, 300])
def test_stream_is_a_function_of_position(batch):
    "Whatever the batch size or start, the same images stand at the same positions"
    d = fashion16().subset(torch.arange(250))
    whole = torch.cat([y for _, y in islice(image_batches(d, 100, seed=3), 21)])
    k = 4
    part = next(image_batches(d, batch, seed=3, start=k))[1]
    assert torch.equal(part, whole[k*batch:(k+1)*batch])
    assert whole[:250].bincount().tolist() == d.labels.bincount().tolist()
    other = torch.cat([y for _, y in islice(image_batches(d, 100, seed=4), 3)])
    assert not torch.equal(other, whole[:300])


def test_flip_is_per_image():
    d = fashion16()
    x, y = next(image_batches(d, 512)), next(image_batches(d, 512, flip=True))
    same, mirrored = (x[0] == y[0]).flatten(1).all(1), (x[0].flip(-1) == y[0]).flatten(1).all(1)
    assert (same | mirrored).all() and 0.4 < (~same).float().mean() < 0.6


def test_bad_batches():
    d = fashion16()
    for kw in (dict(batch=0), dict(batch=4, start=-1)):
        with pytest.raises(ValueError): image_batches(d, **kw)


def test_worker_error_arrives(tmp_path):
    (tmp_path/'a.png').write_bytes(png(8))
    (tmp_path/'b.png').write_bytes(png(9))
    with pytest.raises(ValueError, match='b.png'):
        next(image_batches(folder_images(tmp_path), 2, workers=2))


def test_holdout_is_reproducible():
    e = emoji32()
    a, b = e.holdout(0.1, seed=1)[1], e.holdout(0.1, seed=1)[1]
    assert torch.equal(a.concepts, b.concepts) and not torch.equal(
        a.concepts, e.holdout(0.1, seed=2)[1].concepts
    )
    with pytest.raises(ValueError, match='frac'): e.holdout(1.5)


def test_image_data_checks():
    x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for bad in (x[0], torch.zeros(3, 2, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match='images must be'): ImageData(bad)
    with pytest.raises(ValueError, match='2 labels for 3 images'):
        ImageData(x, torch.tensor([0, 1]))
