"An LMDB read as data: the same values as from the library that wrote it, and one line for whatever is damaged"
import os, random, struct

import numpy as np
import pytest

from dmd2_nb.images import ImageLMDB, in_memory, open_images
from dmd2_nb.sdxl.data import LMDBLatents
from dmd2_nb.system.lmdb_pages import LMDB

lmdb = pytest.importorskip('lmdb')


def database(path, items, **how):
    env = lmdb.open(str(path), map_size=2**26, **how)
    with env.begin(write=True) as t:
        for k, v in items.items(): t.put(k, v)
    env.close()
    return path


def images(n=40, side=32):
    rng = np.random.RandomState(0)
    out = {b'images_shape': f'{n} 3 {side} {side}'.encode(), b'labels_shape': str(n).encode()}
    for i in range(n):
        out[f'images_{i}_data'.encode()] = rng.bytes(3*side*side)
        out[f'labels_{i}_data'.encode()] = np.int64(i % 3).tobytes()
    return out


@pytest.mark.parametrize('n, sizes', [(0, (1,)), (1, (5,)), (3000, (0, 3, 40)), (300, (0, 1, 900, 2100, 5000, 40_000))])
def test_the_same_values(n, sizes, tmp_path):
    "Trees of one to three levels, short and long values, keys that are not there"
    r = random.Random(n)
    items = {
        f'{r.randrange(10**6)}_{"x" * r.randrange(40)}'.encode(): os.urandom(r.choice(sizes))
        for _ in range(n)
    }
    db = LMDB(database(tmp_path/'x', items))
    for k, v in items.items(): assert db.get(k) == v
    for k in (b'', b'0', b'zzz', b'5', *[k+b'!' for k in list(items)[:20]]):
        assert db.get(k) is None or k in items
    assert LMDB(tmp_path/'x'/'data.mdb').get(b'zzz') is None, 'twice, and by the file'


def test_the_last_change_counts(tmp_path):
    items = {f'k{i:05d}'.encode(): b'old' for i in range(2000)}
    database(tmp_path/'x', items)
    for i in range(3): database(tmp_path/'x', {k: f'new{i}'.encode() for k in list(items)[i::3]})
    env = lmdb.open(str(tmp_path/'x'), map_size=2**26)
    with env.begin(write=True) as t:
        for k in list(items)[::7]: t.delete(k)
    env.close()
    db = LMDB(tmp_path/'x')
    for i, k in enumerate(items): assert db.get(k) == (None if i % 7 == 0 else f'new{i%3}'.encode())


@pytest.mark.parametrize('share', [0, 1e-4, 0.03, 0.1, 0.5, 0.9, 0.99])
def test_a_download_that_was_cut_short(share, tmp_path):
    "The library ends the process by a bus error here"
    file = database(tmp_path/'x', images())/'data.mdb'
    raw = file.read_bytes()
    file.write_bytes(raw[:int(share*len(raw))])
    with pytest.raises(ValueError, match=r'not a readable LMDB \(.*') as e:
        in_memory(ImageLMDB(tmp_path/'x'))
    assert (
        str(tmp_path / 'x') in str(e.value) and len(str(e.value)) < 600 and '\n' not in str(e.value)
    )


def test_damage_is_one_line(tmp_path):
    "400 files with wrong bytes, most of them in the numbers that lead from page to page: the pictures, or one line"
    file = database(tmp_path/'x', images(30, 24))/'data.mdb'
    raw, r, ends = file.read_bytes(), random.Random(1), dict(read=0, refused=0)
    for k in range(400):
        b = bytearray(raw)
        for _ in range(1+k % 5):
            page = r.randrange(len(raw)//4096)*4096
            b[page+(r.randrange(4096) if k % 4 == 0 else r.randrange(120))] = r.randrange(256)
        file.unlink()
        file.write_bytes(b)
        try:
            in_memory(ImageLMDB(tmp_path/'x'))
            ends['read'] += 1
        except ValueError as e:
            assert str(tmp_path/'x') in str(e) and len(str(e)) < 600
            ends['refused'] += 1
    assert min(ends.values()) > 20, ends


def test_a_circle_of_pages(tmp_path):
    file = database(tmp_path/'x', {f'k{i:05d}'.encode(): b'x'*50 for i in range(3000)})/'data.mdb'
    b = bytearray(file.read_bytes())
    db = LMDB(file)
    at = db.root*4096
    for node in db.nodes(at): struct.pack_into('<I', b, node, db.root)
    del db
    file.unlink()
    file.write_bytes(b)
    with pytest.raises(ValueError, match='its tree has no end'): LMDB(file).get(b'k00001')


def test_no_database(tmp_path):
    for name, data, why in (
        ('empty', b'', 'it is empty'),
        ('text', b'a cat\n' * 2000, 'does not begin as one'),
        ('short', b'\0' * 30, 'cut short'),
        ('zeros', bytes(9000), 'does not begin as one'),
    ):
        (tmp_path/f'{name}.mdb').write_bytes(data)
        with pytest.raises(ValueError, match=f'{name}.mdb: not a readable LMDB .*{why}'):
            open_images(tmp_path/f'{name}.mdb')
    for o in (ImageLMDB, LMDBLatents):
        with pytest.raises(FileNotFoundError, match='gone: no such file'): o(tmp_path/'gone')
        with pytest.raises(ValueError, match='no data.mdb in it'): o(tmp_path)


def test_tables_within_tables(tmp_path):
    env = lmdb.open(str(tmp_path/'x'), map_size=2**24, max_dbs=2)
    sub = env.open_db(b'images_shape')
    with env.begin(write=True) as t: t.put(b'a', b'b', db=sub)
    env.close()
    with pytest.raises(ValueError, match='tables within tables'): ImageLMDB(tmp_path/'x')
