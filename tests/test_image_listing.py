"Which images there are, in which order, of which class, and what was left out: one list for folders, zips and npz"
import io, json, os, zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2_nb import measure as M
from dmd2_nb.assets import data_path
from dmd2_nb.features import check_images
from dmd2_nb.fid import clip_score
from dmd2_nb.image_files import ImageLMDB, ImageZip, folder_images, open_image, prepare
from dmd2_nb.images import (
    CLASS_NAMES,
    Drawn,
    drawn_rows,
    fashion16,
    in_memory,
    npz_images,
    open_images,
    to_uint8,
)
from dmd2_nb.jobs import open_data, open_teacher
from dmd2_nb.recipes import recipe
from dmd2_nb.system.image_names import list_images, natural


def picture(path, value=0, size=8, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (size, size), (value,)*3).save(path, **how)
    return path


def classes(folder, names, **kw):
    for i, n in enumerate(names): picture(folder/n/'x.png', i, **kw)
    return folder


def zipped(folder, path, labels):
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(folder.rglob('*')):
            if p.is_file(): z.write(p, p.relative_to(folder).as_posix())
        z.writestr('dataset.json', labels if isinstance(labels, str) else json.dumps(labels))
    return path


def by_folder(files): return {n.split('/')[0]: int(l) for n, l in zip(files.names, files.labels)}


# -- order --

@pytest.mark.parametrize('names', [
    [str(i) for i in range(120)], [f'class{i}' for i in (1, 2, 9, 10, 11, 100)], ['007', '8', '0009', '10'],
    ['a', 'a1', 'a2b1', 'a2b10', 'a10', 'b'], ['n01440764', 'n01443537', 'n15075141'], ['1'*300, '2'*300, '1'*5000]])
def test_natural_order(names):
    assert sorted(reversed(names), key=natural) == names
    assert sorted([f'{n}/x.png' for n in reversed(names)], key=natural) == [
        f'{n}/x.png' for n in names
    ]


def test_folders_by_number(tmp_path):
    files = folder_images(classes(tmp_path, [str(i) for i in range(12)]), say=None)
    assert by_folder(files) == {str(i): i for i in range(12)} and files.class_names == tuple(
        map(str, range(12))
    )
    assert files.pixels(range(12))[:, 0, 0, 0].tolist() == list(range(12))


def test_a_zip_has_the_same_order(tmp_path):
    for i in range(12): picture(tmp_path/'s'/f'img{i}.png', i)
    p = zipped(tmp_path/'s', tmp_path/'a.zip', dict(labels=[[f'img{i}.png', i] for i in range(12)]))
    assert (
        ImageZip(p).labels.tolist()
        == list(range(12))
        == folder_images(tmp_path / 's').pixels(range(12))[:, 0, 0, 0].tolist()
    )


def test_pictures_go_with_their_prompts(tmp_path):
    "Picture 10 is the eleventh, not the third"
    for i in range(12): picture(tmp_path/f'{i}.png', 20*i)
    class See:
        batch, name = 4, 'mean'
        def __call__(self, x):
            return torch.cat([x.float().mean((2, 3))[:, :1], torch.ones(len(x), 1)], 1)
        def text(self, prompts):
            return torch.tensor([[20.*int(p.split()[-1]), 1.] for p in prompts])
    mean, _ = clip_score(tmp_path, [f'number {i}' for i in range(12)], See())
    assert mean == pytest.approx(1.)


def test_prepare_keeps_numbers_and_names(tmp_path):
    z = ImageZip(prepare(classes(tmp_path/'s', [str(i) for i in range(12)]), tmp_path/'a.zip', 8))
    assert z.labels.tolist() == list(range(12)) and z.class_names == tuple(map(str, range(12)))
    assert in_memory(z).class_names == z.class_names and z.pixels([10])[0, 0, 0, 0] == 10


def test_imagenet_is_prepared_as_edm_does(tmp_path):
    "Folders named by wnid: names in the order of text, pixels as they are stored; others as a viewer shows them"
    exif = Image.Exif()
    exif[0x0112] = 3
    half = np.zeros((8, 8, 3), 'uint8')
    half[:4] = 255
    made = {}
    for kind in (('n01440764', 'n03000684'), ('fish', 'saw')):
        for k in kind:
            (tmp_path/kind[0]/k).mkdir(parents=True)
            for i in (2, 10):
                Image.fromarray(half).save(tmp_path/kind[0]/k/f'{k}_{i}.png', exif=exif)
            picture(tmp_path/kind[0]/k/f'{k}_1.png', 40+10*kind.index(k))
        z = ImageZip(prepare(tmp_path/kind[0], tmp_path/f'{kind[0]}.zip', 8))
        made[kind[0]] = z.pixels(range(6))[:, 0, 0, 0].tolist()
        assert z.class_names == kind and z.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert made == dict(n01440764=[40, 255, 255, 50, 255, 255], fish=[40, 0, 0, 50, 0, 0])
    picture(tmp_path/'n01440764'/'n01440764'/'n01440764_02.png', 90)
    assert (
        ImageZip(prepare(tmp_path / 'n01440764', tmp_path / 'b.zip', 8)).pixels([0])[0, 0, 0, 0]
        == 90
    ), 'order of text'


# -- what counts, and what is said --

@pytest.mark.parametrize(
    'name',
    [
        '.ipynb_checkpoints/x-checkpoint.png',
        '.git/x.png',
        '__MACOSX/cat/._x.png',
        '.DS_Store',
        'Thumbs.db',
        'cat/._x.png',
        'dog/.hidden.png',
        'desktop.ini',
        '@eaDir/x.png',
        '$RECYCLE.BIN/x.png',
    ],
)
def test_rubbish(name, tmp_path, capsys):
    classes(tmp_path/'s', ['cat', 'dog'])
    p = tmp_path/'s'/name
    picture(p) if name.endswith('.png') else p.write_bytes(b'x')
    files = folder_images(tmp_path/'s')
    assert by_folder(files) == dict(cat=0, dog=1) and len(files) == 2
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 's'}: 2 images of 2 classes (cat: 1, dog: 1); left out: 1 hidden\n"
    )
    z = ImageZip(
        zipped(
            tmp_path / 's', tmp_path / 'a.zip', dict(labels=[['cat/x.png', 0], ['dog/x.png', 1]])
        )
    )
    assert z.names == files.names and 'left out: 1 hidden' in capsys.readouterr().out


def test_what_was_left_out_is_counted(tmp_path, capsys):
    picture(tmp_path/'a.png')
    for n in ('b.heic', 'c.HEIC', 'd.avif', 'LICENSE', 'notes.txt', 'a.txt', 'a.json'):
        (tmp_path/n).write_bytes(b'x')
    assert folder_images(tmp_path).names == ['a.png']
    assert (
        capsys.readouterr().out
        == f'{tmp_path}: left out: 2 .heic, 1 .avif, 1 .txt, 1 without an ending\n'
    ), 'captions are none'
    (tmp_path/'a.png').unlink()
    with pytest.raises(ValueError, match=r'no images .*found; left out: 2 \.heic, 2 \.txt'):
        folder_images(tmp_path)
    open_images('fashion16')
    assert not capsys.readouterr().out


def test_one_process_of_many_says_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    folder_images(classes(tmp_path, ['cat', 'dog']))
    assert not capsys.readouterr().out


@pytest.mark.parametrize('ending', ['png', 'jpg', 'jpeg', 'jfif', 'webp', 'bmp', 'gif', 'tif', 'TIFF', 'PNG'])
def test_every_ending_is_read(ending, tmp_path):
    f = picture(tmp_path/'x.png', 200)
    how = dict(jfif='jpeg', tif='tiff').get(ending.lower())
    Image.open(f).save(tmp_path/f'y.{ending}', **(dict(format=how) if how else {}))
    f.unlink()
    assert (folder_images(tmp_path, 8).one(0).int()-200).abs().max() <= 2


def test_empty_classes_keep_their_number(tmp_path, capsys):
    classes(tmp_path, ['0', '2', '3'])
    (tmp_path/'1').mkdir()
    (tmp_path/'4').mkdir()
    (tmp_path/'4'/'x.heic').write_bytes(b'x')
    (tmp_path/'annotations').mkdir()
    (tmp_path/'annotations'/'x.xml').write_text('x')
    files = folder_images(tmp_path)
    assert by_folder(files) == {'0': 0, '2': 2, '3': 3} and files.label_dim == 5
    said = capsys.readouterr().out
    assert (
        '3 images of 5 classes' in said
        and 'no image in 1, 4;' in said
        and '1 .heic, 1 .xml' in said
    )


@pytest.mark.parametrize(
    'names,words',
    [
        (
            ['cat/x.png', 'dog/x.png', 'cover.png'],
            r'no classes, because 1 images lie beside the folders \(cover.png\)',
        ),
        (['train/cat/x.png', 'val/cat/x.png'], 'no classes, because train, val are parts of a set'),
        (
            ['train/cat/x.png', 'train/dog/x.png'],
            'no classes, because all images are in train: name that folder to take its 2 folders',
        ),
    ],
)
def test_why_there_are_no_classes(names, words, tmp_path, capsys):
    import re
    for n in names: picture(tmp_path/n)
    assert folder_images(tmp_path).labels is None and re.search(words, capsys.readouterr().out)


def test_links(tmp_path, capsys):
    "Followed, to files and to folders, one folder under two names too; a circle ends"
    real = classes(tmp_path/'real', ['a', 'b'])
    s = tmp_path/'s'
    s.mkdir()
    (s/'cat').symlink_to(real/'a')
    (s/'kitten').symlink_to(real/'a')
    (s/'dog').mkdir()
    (s/'dog'/'x.png').symlink_to(real/'b'/'x.png')
    (s/'dog'/'up').symlink_to(s)
    (s/'dog'/'self').symlink_to('self')
    (s/'gone.png').symlink_to(tmp_path/'nowhere.png')
    files = folder_images(s)
    assert files.names == ['cat/x.png', 'dog/x.png', 'kitten/x.png'] and files.pixels(range(3))[
        :, 0, 0, 0
    ].tolist() == [0, 1, 0]
    assert (
        'left out: 2 broken link, 1 link to a folder that is listed already'
        in capsys.readouterr().out
    )
    assert len(in_memory(files)) == 3


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_no_image(tmp_path):
    picture(tmp_path/'a.png')
    os.mkfifo(tmp_path/'b.png')
    assert list_images(tmp_path).names == ['a.png']


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    real = os.scandir
    def scandir(p):
        if str(p).endswith('dog'): raise PermissionError(13, 'Permission denied', str(p))
        return real(p)
    classes(tmp_path, ['cat', 'dog'])
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(OSError, match=r'dog: this folder cannot be read \(Permission denied\)'):
        folder_images(tmp_path)


# -- one picture --

@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp', 'tiff'])
def test_orientation(kind, turn):
    "The eight ways that a camera is held, as PIL's own viewer shows them"
    from PIL import ImageOps
    im, exif, f = Image.new('L', (16, 8)).convert('RGB'), Image.Exif(), io.BytesIO()
    im.paste((255, 255, 255), (0, 0, 8, 4))
    exif[0x0112] = turn
    im.save(f, kind, exif=exif)
    with Image.open(io.BytesIO(f.getvalue())) as raw:
        want = np.array(ImageOps.exif_transpose(raw).convert('RGB')).astype(int)
    got = np.array(open_image(f.getvalue(), 'x')).astype(int)
    assert (
        got.shape == want.shape
        and np.abs(got - want).max() < 3
        and (turn < 5) == (got.shape == (8, 16, 3))
    )


def test_broken_orientation_is_none():
    f = io.BytesIO()
    Image.new('RGB', (4, 2)).save(f, 'jpeg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff'+b'\x01\x12'*20)
    assert open_image(f.getvalue(), 'x').size == (4, 2)


@pytest.mark.parametrize(
    'mode,value,want',
    [
        ('P', 0, (0, 0, 0)),
        ('1', 1, 255),
        ('L', 7, 7),
        ('LA', (7, 255), (7, 7, 7)),
        ('LA', (7, 0), (255, 255, 255)),
        ('RGBA', (10, 20, 30, 0), (255, 255, 255)),
        ('RGBA', (0, 0, 0, 51), (204, 204, 204)),
        ('CMYK', (0, 0, 0, 255), (0, 0, 0)),
        ('CMYK', (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_modes(mode, value, want):
    f = io.BytesIO()
    Image.new(mode, (4, 4), value).save(f, 'tiff' if mode == 'CMYK' else 'png')
    assert open_image(f.getvalue(), 'x').getpixel((1, 1)) == want


@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_more_than_8_bits_of_grey(mode):
    f = io.BytesIO()
    Image.new(mode, (4, 4)).save(f, 'tiff')
    with pytest.raises(
        ValueError, match='deep.tif: not a usable image .mode .*only 8 bits a channel'
    ):
        open_image(f.getvalue(), 'deep.tif')


def test_transparent_palette_is_white():
    im, f = Image.new('P', (4, 4), 1), io.BytesIO()
    im.putpalette([255, 0, 0, 0, 0, 255])
    im.save(f, 'gif', transparency=1)
    assert open_image(f.getvalue(), 'x').getpixel((0, 0)) == (255, 255, 255)


# -- labels --

def npz(path, **arrays):
    np.savez(path, **(dict(images=np.zeros((3, 8, 8, 3), 'uint8')) | arrays))
    return path


@pytest.mark.parametrize(
    'labels,want',
    [
        (np.array([[3], [1], [2]]), [3, 1, 2]),
        (np.array([[3, 1, 2]]), [3, 1, 2]),
        (np.array([[[3]], [[1]], [[2]]]), [3, 1, 2]),
        (np.array([3.0, 1.0, 2.0]), [3, 1, 2]),
        (np.array([[3.0], [1.0], [2.0]], 'float32'), [3, 1, 2]),
        (np.array([3, 1, 2], 'uint8'), [3, 1, 2]),
        (np.array([3, 1, 2], '>i4'), [3, 1, 2]),
        (np.eye(4)[[3, 1, 2]], [3, 1, 2]),
        (np.eye(4, dtype=bool)[[3, 1, 2]], [3, 1, 2]),
        (np.eye(4, dtype='uint8')[[3, 1, 2]], [3, 1, 2]),
    ],
)
def test_npz_labels(labels, want, tmp_path):
    d = npz_images(npz(tmp_path/'a.npz', labels=labels))
    assert (
        d.labels.tolist() == want
        and d.labels.dtype == torch.int64
        and d.label_dim == 4
        and d.cond is None
    )


def test_one_hot_knows_how_many_classes_there_are(tmp_path):
    d = npz_images(npz(tmp_path/'a.npz', labels=np.eye(10)[[0, 1, 2]]), classes=10)
    assert d.labels.tolist() == [0, 1, 2] and d.label_dim == 10


@pytest.mark.parametrize('rows', [[[1, 1, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0], [0, 0, 1]]])
def test_multi_hot_stays_what_it_is(rows, tmp_path):
    d = open_images(npz(tmp_path/'a.npz', labels=np.array(rows)))
    assert (
        d.labels is None
        and d.conds([0, 1, 2]).tolist() == rows
        and d.cond.dtype == torch.float32
        and d.label_dim == 3
    )


@pytest.mark.parametrize(
    'labels,message',
    [
        (np.array([0, 1, 0.5]), 'a.npz: labels must be integers .*label 2 is 0.5'),
        (np.array([0, np.nan, 1]), 'label 1 is nan'),
        (np.array([0, np.inf, 1]), 'a.npz: label'),
        (np.array([0, -1, 2]), 'a.npz: label -1 of image 1'),
        (np.array([0, 1, 2**63], 'uint64'), 'a.npz: label 9223372036854775808 of image 2'),
        (np.array([0, 1, 2**40]), 'label 1099511627776 of image 2'),
        (np.array(['a', 'b', 'c']), 'labels must be integers'),
        (np.full((3, 3), 0.3), 'a.npz: labels must be integers'),
        (np.array([[1, 2], [0, 1], [1, 0]]), 'labels must be integers'),
        (np.zeros((3, 2, 2)), 'labels must be integers'),
        (np.array([True, False, True]), 'labels must be integers'),
        (np.array([0, 1]), '2 labels for 3 images'),
        (np.array(3), 'labels'),
        (np.zeros((2, 5)), '2 cond for 3 images'),
    ],
)
def test_npz_labels_refused(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        npz_images(npz(tmp_path/'a.npz', labels=labels))
    assert len(str(e.value)) < 600 and '\n' not in str(e.value)


def test_the_number_of_classes_is_checked_everywhere(tmp_path):
    folder = classes(tmp_path/'s', ['cat', 'dog', 'owl'])
    for source in (
        folder,
        npz(
            tmp_path / 'a.npz',
            labels=np.array([0, 1, 2]),
            class_names=np.array(['cat', 'dog', 'owl']),
        ),
        prepare(folder, tmp_path / 'a.zip', 8),
    ):
        assert open_images(source, classes=3).class_names == ('cat', 'dog', 'owl')
        with pytest.raises(ValueError, match=r'has 3 classes \(cat, dog, owl\), not 10'):
            open_images(source, classes=10)
    with pytest.raises(ValueError, match='label 2 is outside the 2 classes'):
        open_images(npz(tmp_path/'b.npz', labels=np.array([0, 1, 2])), classes=2)


def test_images_that_are_none(tmp_path):
    for x, message in (
        (np.array('text'), 'images must be uint8'),
        (np.zeros((3, 8, 8, 3)), 'images must be uint8'),
        (np.zeros(3, 'uint8'), 'images must be'),
        (np.uint8(3), 'images must be'),
    ):
        with pytest.raises(ValueError, match=f'a.npz: {message}'):
            npz_images(npz(tmp_path/'a.npz', images=x))
    with zipfile.ZipFile(tmp_path/'b.npz', 'w') as z: z.writestr('images', b'no array')
    with pytest.raises(ValueError, match="b.npz: has no 'images' or 'arr_0', only nothing"):
        npz_images(tmp_path/'b.npz')


def test_labels_under_another_name_are_not_lost_in_silence(tmp_path, capsys):
    x, y = np.zeros((3, 8, 8, 3), 'uint8'), np.array([1, 2, 0])
    for name in ('label', 'targets', 'y'):
        assert npz_images(npz(tmp_path/'a.npz', images=x, **{name: y})).labels is None
        assert f"a.npz: no 'labels' or 'arr_1'; left out: {name}" in capsys.readouterr().out
    for kw in (dict(images=x), dict(arr_0=x), dict(images=x, labels=y, more=y), dict(arr_0=x, arr_1=y)):
        npz_images(npz(tmp_path/'a.npz', **kw))
        assert not capsys.readouterr().out


def test_arrays_that_nobody_asked_for_are_not_read(tmp_path):
    import tracemalloc
    p = npz(tmp_path/'a.npz', images=np.zeros((8, 8, 8), 'uint8'))
    with zipfile.ZipFile(p, 'a', zipfile.ZIP_DEFLATED) as z:
        for i in range(3): z.writestr(f'unused{i}.npy', bytes(2**26))
    tracemalloc.start()
    try:
        assert len(npz_images(p)) == 8
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally: tracemalloc.stop()


@pytest.mark.parametrize(
    'text,message',
    [
        (
            '[["a.png", 0], ["b.png", 1]]',
            r'dataset.json is not \{"labels": \[\[name, label\], ...\]\}, but has list',
        ),
        ('{"a.png": 0, "b.png": 1}', 'but has a.png, b.png'),
        ('{}', 'but has nothing'),
        ('7', 'but has int'),
        ('{"labels": [["a.png", 0]]}', '1 images without a label in dataset.json: b.png'),
        ('{"labels": [["a.png", 0], ["b.png", 1], ["a.png", 2]]}', 'a.png has two labels, 0 and 2'),
        (
            '{"labels": [["a.png", 0], ["b.png", 1.5]]}',
            'labels must be all integers, b.png has 1.5',
        ),
        (
            '{"labels": [["a.png", 0], ["b.png", NaN]]}',
            'labels must be all integers, b.png has nan',
        ),
        (
            '{"labels": [["a.png", 0], ["b.png", 1e999]]}',
            'labels must be all integers, b.png has inf',
        ),
        (
            '{"labels": [["a.png", 0], ["b.png", 1' + '0' * 30 + ']]}',
            'of b.png is outside 0 ... 1,048,575',
        ),
        (
            '{"labels": [["a.png", [0, 1]], ["b.png", [NaN, 1]]]}',
            'label vectors must hold finite numbers',
        ),
        ('{"labels": [["a.png", []], ["b.png", []]]}', 'label vectors must hold'),
        (
            '{"labels": [["a.png", 0], ["b.png", 1]], "class_names": ["cat"]}',
            'label 1 is outside the 1 classes',
        ),
        (
            '{"labels": [["a.png", 0], ["b.png", 1]], "class_names": ["cat", "cat"]}',
            'class_names must be a list of different texts',
        ),
        (
            '{"labels": [["a.png", 0], ["b.png", 1]], "class_names": "cat"}',
            'class_names must be a list',
        ),
        ('[' * 100_000, 'is not'),
    ],
)
def test_dataset_json(text, message, tmp_path):
    for n in 'ab': picture(tmp_path/'s'/f'{n}.png')
    with pytest.raises(ValueError, match=message) as e:
        ImageZip(zipped(tmp_path/'s', tmp_path/'x.zip', text))
    assert (
        str(tmp_path / 'x.zip') in str(e.value)
        and len(str(e.value)) < 600
        and '\n' not in str(e.value)
    )


def test_dataset_json_forms(tmp_path):
    for n in 'ab': picture(tmp_path/'s'/f'{n}.png')
    for text, names in (
        ('{"labels": [["./b.png", 1.0], [".\\\\a.png", 0]]}', ()),
        (
            '{"labels": [["a.png", 0], ["b.png", 1]], "classes": {"0": "cat", "1": "dog"}}',
            ('cat', 'dog'),
        ),
    ):
        z = ImageZip(zipped(tmp_path/'s', tmp_path/'x.zip', text))
        assert z.labels.tolist() == [0, 1] and z.class_names == names
    (tmp_path/'s'/'dataset.json').write_bytes(b'\xef\xbb\xbf{"labels": null}')
    assert open_images(tmp_path/'s').labels is None


# -- the classes of a recipe --

def test_three_classes_of_imagenet(tmp_path):
    folder = classes(tmp_path/'s', ['n01440764', 'n03000684', 'n03888257'], size=64)
    for source in (folder, prepare(folder, tmp_path/'a.zip', 64)):
        with pytest.raises(
            ValueError, match=r'has 3 classes \(n01440764, n03000684, n03888257\).*1,000'
        ) as e:
            open_data(recipe('imagenet64'), source)
        assert str(source) in str(e.value) and len(str(e.value)) < 600


def test_numbered_classes_of_imagenet(tmp_path):
    folder = classes(tmp_path/'s', ['0', '491', '701'], size=64)
    for source in (folder, prepare(folder, tmp_path/'a.zip', 64)):
        assert open_data(recipe('imagenet64'), source)[0].labels.tolist() == [0, 491, 701]
    assert open_data(
        recipe('imagenet64'), classes(tmp_path / 't', ['000', '010', '0999'], size=64)
    )[0].labels.tolist() == [0, 10, 999]
    with pytest.raises(ValueError, match='has 2 classes'):
        open_data(recipe('imagenet64'), classes(tmp_path/'u', ['0', '1000'], size=64))


def test_garments_by_name(tmp_path):
    "Folders named as the bundled set names its classes get its numbers, though another order is natural"
    names = fashion16().class_names
    assert CLASS_NAMES['fashion16'] == names
    def folders(root, kinds):
        for i, n in enumerate(kinds):
            (root/n).mkdir(parents=True)
            Image.new('L', (16, 16), i).save(root/n/'x.png')
        return root
    garments = [n.replace('/', '_').title() for n in names]
    d, _ = open_data(recipe('fashion16'), folders(tmp_path/'a', garments))
    assert (
        d.labels.tolist() == d.images[:, 0, 0, 0].tolist()
        and sorted(d.labels.tolist()) == list(range(10))
        and d.class_names == names
    )
    assert open_teacher(recipe('fashion16'), d)[0].model.label_dim == 10
    for k, kinds in dict(
        nine=garments[:9], some=[*garments[:9], 'Owl'], two=['Cat', 'Dog']
    ).items():
        if k == 'nine':
            assert open_data(recipe('fashion16'), folders(tmp_path/k, kinds))[0].label_dim == 10
            continue
        with pytest.raises(ValueError, match=f'{k}: has .* classes .*fashion16'):
            open_data(recipe('fashion16'), folders(tmp_path/k, kinds))
    own, _ = open_data(recipe('fashion16'), folders(tmp_path/'own', 'abcdefghij'))
    assert own.class_names == tuple('abcdefghij')
    with pytest.raises(
        ValueError,
        match=r'own: has classes of its own \(a, b, c and 7 more\), fashion16_teacher.safetensors knows',
    ):
        open_teacher(recipe('fashion16'), own)


def test_the_layout_demo_keeps_its_numbers():
    "Labels without names are the network's own numbers"
    data, _ = open_data(recipe('imagenet64'), data_path('imagenet64_layout_demo.zip'))
    with zipfile.ZipFile(data_path('imagenet64_layout_demo.zip')) as z:
        want = json.loads(z.read('dataset.json'))['labels']
    assert data.labels.tolist() == [l for _, l in sorted(want)] and data.label_dim == 1000


# -- which images are used --

def test_a_subset_is_drawn(tmp_path, capsys):
    x = fashion16()
    order = x.labels.argsort(stable=True)
    by_class = x.subset(order)
    assert len(by_class.labels[:500].unique()) == 1
    d = Drawn(by_class, 500)
    assert (
        len(d.conds(range(500)).unique()) == 10
        and len(set(d.rows.tolist())) == 500
        and torch.equal(d.rows, Drawn(by_class, 500).rows)
    )
    assert not torch.equal(d.rows, Drawn(by_class, 500, seed=1).rows) and torch.equal(
        d.pixels([3]), by_class.images[d.rows[3:4]]
    )
    assert d.words('a') == 'a: 500 of 6,000 images, drawn with seed 0' and not Drawn(
        by_class, 9999
    ).words('a')
    assert drawn_rows(5, 9).tolist() == list(range(5)) == drawn_rows(5).tolist()


def test_measure_draws_its_images(tmp_path, capsys):
    "All of the first class come first by name; the distance of a few must be near the distance of all"
    x = fashion16()
    for i in range(0, 6000, 10):
        p = tmp_path/'s'/str(int(x.labels[i]))/f'{i}.png'
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.images[i, 0].numpy()).save(p)
    for source in (tmp_path/'s', prepare_grey(x, tmp_path/'a.npz')):
        row = M.measure([source], 'fashion16', None, n=100, say=print)['rows'][str(source)]
        assert row['n'] == 100 and row['recall'] > 0.5 and row['kid'] < 4*row['kid_se']
        assert f'{source}: 100 of 600 images, drawn with seed 0' in capsys.readouterr().out


def prepare_grey(x, path):
    rows = x.labels[::10].argsort()*10
    np.savez(path, images=x.images[rows, 0].numpy(), labels=x.labels[rows].numpy())
    return path


def test_floats_from_0_to_1_are_noticed():
    "Taken for [-1, 1] they would be washed out pictures"
    x = torch.rand(4, 3, 8, 8)
    with pytest.warns(UserWarning, match='no value is below 0.*2.x - 1'): check_images(x)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_images(2*x-1)
        check_images((255*x).byte())


# -- what is not a number has no colour --

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_no_picture_of_what_is_not_finite(bad, tmp_path):
    x = torch.zeros(5, 3, 4, 4)
    x[3, 1, 2, 2] = bad
    with pytest.raises(
        ValueError,
        match=r'samples: has 1 (NaN|infinite) of 240 numbers, the first at \(3, 1, 2, 2\)',
    ):
        to_uint8(x, 'samples')
    for dtype in (torch.float16, torch.bfloat16): pytest.raises(ValueError, to_uint8, x.to(dtype))
    assert to_uint8(torch.tensor([[[[-9., 1.]]]])).tolist() == [[[[0, 255]]]]


def test_no_drawing_of_what_is_not_finite():
    from dmd2_nb.plot import tile
    x = torch.zeros(3, 1, 4, 4)
    assert tile(x, pad=0)[0, 0].tolist() == [128]*3
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r'images: has 1 NaN .*first at \(1, 0, 0, 0\)'): tile(x)


# -- LMDB --

def test_lmdb_twice(tmp_path):
    lmdb = pytest.importorskip('lmdb')
    env = lmdb.open(str(tmp_path/'x'), map_size=2**20)
    with env.begin(write=True) as t:
        for k, v in {
            'images_shape': b'2 1 2 2',
            'labels_shape': b'2',
            'images_0_data': bytes(4),
            'images_1_data': b'\7' * 4,
            'labels_0_data': np.int64(0).tobytes(),
            'labels_1_data': np.int64(1).tobytes(),
        }.items():
            t.put(k.encode(), v)
    env.close()
    a, b, c = ImageLMDB(tmp_path/'x'), ImageLMDB(tmp_path/'x'), open_images(tmp_path/'x'/'data.mdb')
    del a
    for o in (b, c): assert o.pixels([1]).unique().item() == 7 and o.labels.tolist() == [0, 1]
    assert len(in_memory(b)) == 2
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='empty: not a readable LMDB .no data.mdb'):
        ImageLMDB(tmp_path/'empty')


def test_lmdb_latents_twice(tmp_path):
    lmdb = pytest.importorskip('lmdb')
    from dmd2_nb.sdxl.data import LMDBLatents
    env = lmdb.open(str(tmp_path/'x'), map_size=2**20)
    with env.begin(write=True) as t:
        for k, v in dict(
            latents_shape=b'1 4 2 2', latents_0_data=bytes(32), prompts_0_data=b'a cat'
        ).items():
            t.put(k.encode(), v)
    env.close()
    both = LMDBLatents(tmp_path/'x'), LMDBLatents(str(tmp_path/'x'/'data.mdb'))
    for o in both: assert o[0][1] == 'a cat' and o[0][0].shape == (4, 2, 2)
