"""Files made to cost memory or time, in a process that measures itself: python tests/_bombs_work.py FOLDER N [SEED]

Pickles out of the reader's own instructions, keys that collide, archives whose entries lie, and
damaged LMDB pages. Each input ends in a value or in one line. Prints one line of JSON."""
import io, json, os, random, struct, sys, time, zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dmd2_nb.image_files import ImageLMDB, ImageZip
from dmd2_nb.images import in_memory, npz_images
from dmd2_nb.system.safe_pickle import ACTIONS, CALLS, OPCODES, read_pickle
from dmd2_nb.system.tensors import read_state_dict
from _fuzz_work import most

CODES = {name: code for code, (name, _, _) in OPCODES.items()}
PRIME = sys.hash_info.modulus  # whole numbers that differ by it have one hash


def text(dice):
    "A short text, as a pickle holds it"
    b = dice.choice(('x', 'latin1', 'ü' * 9, '_tensor_type', 'f4', '')).encode()
    return CODES['BINUNICODE'] + struct.pack('<I', len(b)) + b


def name(dice):
    "A name that the reader knows, as two lines"
    module, _, short = dice.choice(sorted(CALLS)).rpartition('.')
    return CODES['GLOBAL'] + f'{module}\n{short}\n'.encode()


def leaf(dice):
    "One value without parts"
    return dice.choice(
        [
            lambda: CODES['NONE'],
            lambda: CODES['NEWTRUE'],
            lambda: CODES['BININT'] + struct.pack('<i', dice.choice((0, 1, -1, 2**31-1, 7))),
            lambda: CODES['LONG1'] + b'\x09' + (2 ** dice.randrange(60, 71)).to_bytes(9, 'little'),
            lambda: CODES['BINFLOAT'] + struct.pack('>d', dice.choice((0., 1e300, float('nan')))),
            lambda: text(dice),
            lambda: CODES['SHORT_BINBYTES'] + b'\x08' + dice.randbytes(8),
            lambda: CODES['BINGET'] + bytes([dice.randrange(3)]),
        ]
    )()


def value(dice, depth):
    "One value, of parts that are values: containers, calls of known names, states, doubled items"
    if depth == 0 or dice.random() < 0.3: return leaf(dice)
    parts = [value(dice, depth-1) for _ in range(dice.randint(0, 4))]
    inside = CODES['MARK'] + b''.join(parts)
    even = CODES['MARK'] + b''.join(leaf(dice)+v for v in parts)
    return dice.choice(
        [
            lambda: inside + CODES['TUPLE'],
            lambda: inside + CODES['LIST'],
            lambda: even + CODES['DICT'],
            lambda: CODES['EMPTY_DICT'] + even + CODES['SETITEMS'],
            lambda: CODES['EMPTY_SET'] + inside + CODES['ADDITEMS'],
            lambda: inside + CODES['FROZENSET'],
            lambda: name(dice) + inside + CODES['TUPLE'] + CODES['REDUCE'],
            lambda: value(dice, depth-1) + value(dice, depth-1) + CODES['BUILD'],
            lambda: value(dice, depth-1) + CODES['BINPUT'] + bytes([dice.randrange(3)]),
            lambda: leaf(dice) + (CODES['DUP'] + CODES['TUPLE2'])*dice.choice((2, 20, 200)),
            lambda: name(dice)+value(dice, depth-1)+(CODES['TUPLE1']+CODES['REDUCE'])*dice.randint(1, 9),
        ]
    )()


PLAIN = [CODES[n] for c, (n, reader, act) in OPCODES.items() if act and not reader]


def grammar(dice):
    "A pickle of the reader's own instructions; in one of three there is one too many"
    out = bytearray(b'\x80\x04')
    for i in range(3): out += leaf(dice).replace(CODES['BINGET'], CODES['BININT1']) + CODES['BINPUT'] + bytes([i])
    out += value(dice, dice.randint(1, 6))
    if dice.random() < 0.33:
        i = dice.randrange(2, len(out)+1)
        out[i:i] = dice.choice(PLAIN)*dice.choice((1, 1, 300))
    return bytes(out) + b'.'


def whole(k):
    "A whole number of any size"
    b = k.to_bytes(k.bit_length()//8+1, 'little', signed=True)
    return CODES['LONG1'] + bytes([len(b)]) + b


def colliding(dice):
    "A set, a dict or a frozenset of many keys with one hash"
    n = dice.choice((1000, 20_000, 60_000))
    keys = [whole(PRIME*k+5) for k in range(1, n+1)]
    if dice.random() < 0.3:
        keys = [k+CODES['TUPLE1'] for k in keys]
    kind = dice.randrange(3)
    if kind == 0:
        return b'\x80\x04}(' + b''.join(k+CODES['NONE'] for k in keys) + b'u.'
    if kind == 1: return b'\x80\x04\x8f(' + b''.join(keys) + b'\x90.'
    return b'\x80\x04(' + b''.join(keys) + b'\x91.'


def npy(shape, dtype='|u1', data=b''):
    "An array's file, with a first line that may lie"
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        f, dict(descr=dtype, fortran_order=False, shape=tuple(shape))
    )
    return f.getvalue() + data


ZEROS = bytes(2**20)


def large(z, entry, mib, head=b''):
    "An entry of so many MiB, nearly nothing when packed"
    with z.open(entry, 'w', force_zip64=True) as f:
        f.write(head)
        for _ in range(mib): f.write(ZEROS)


def lie(raw, dice):
    "Other sizes in the table at the end, or in the heads of the entries"
    b = bytearray(raw)
    for mark, at in ((b'PK\1\2', 20), (b'PK\3\4', 18)):
        i = b.find(mark)
        while i >= 0 and i+at+8 <= len(b):
            if dice.random() < 0.5:
                k = at + dice.choice((0, 4))
                b[i+k:i+k+4] = struct.pack('<I', dice.choice((0, 1, 2**20, 2**31, 2**32-2)))
            i = b.find(mark, i+4)
    return bytes(b)


def archive(path, dice):
    "A zip that wants too much; the kind and who reads it"
    kind = dice.choice(('unused', 'wanted', 'many', 'twice', 'lying', 'shared', 'packed'))
    ends = dice.choice(('.npz', '.zip', '.pt'))
    if kind == 'packed': how = dice.choice((zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
    else: how = zipfile.ZIP_DEFLATED
    path = path.with_suffix(ends)
    with zipfile.ZipFile(path, 'w', how) as z:
        good = npy((4, 8, 8, 3), data=bytes(768))
        if ends == '.npz': z.writestr('images.npy', good)
        if ends == '.pt': z.writestr('archive/data.pkl', b'\x80\x02}q\x00.')
        mib = 150 if kind == 'packed' else dice.choice((300, 600))
        if kind in ('unused', 'packed') and ends == '.npz':
            for i in range(2): large(z, f'extra{i}.npy', mib, npy((mib*2**20,)))
        elif kind in ('wanted', 'unused', 'packed'):
            large(z, {'.zip': 'a.png', '.pt': 'archive/data/0', '.npz': 'labels.npy'}[ends], mib)
        elif kind == 'many':
            for i in range(dice.choice((2000, 30_000))): z.writestr(f'{i}/', b'')
        elif kind == 'twice':
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                for _ in range(dice.choice((2, 3000))): z.writestr('same/', b'')
        else: z.writestr('labels.npy' if ends == '.npz' else 'a.png', npy((4,), '<i8', bytes(32)))
    raw = path.read_bytes()
    if kind == 'lying': path.write_bytes(lie(raw, dice))
    if kind == 'shared':  # the table lists one entry many times over
        i = raw.find(b'PK\1\2')
        j = raw.find(b'PK\5\6')
        n = dice.choice((150, 20_000))
        table = raw[i:j]*n
        end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, n % 65536, n % 65536, len(table), i, 0)
        path.write_bytes(raw[:i]+table+end)
    return path, f'{kind} {ends}'


def read_archive(path):
    "As the one who would open a file of this name"
    if path.suffix == '.npz': return npz_images(path)
    if path.suffix == '.pt': return read_state_dict(path)
    return in_memory(ImageZip(path))


def database(folder):
    "A whole LMDB of 30 pictures, as bytes"
    import lmdb

    env = lmdb.open(str(folder), map_size=2**24)
    with env.begin(write=True) as t:
        t.put(b'images_shape', b'30 3 24 24')
        t.put(b'labels_shape', b'30')
        for i in range(30):
            t.put(f'images_{i}_data'.encode(), bytes([i])*3*24*24)
            t.put(f'labels_{i}_data'.encode(), np.int64(i % 3).tobytes())
    env.close()
    return (folder/'data.mdb').read_bytes()


def pages(raw, dice):
    "Wrong numbers in the pages, pages moved, a file cut short"
    b = bytearray(raw)
    for _ in range(dice.randint(1, 6)):
        page = dice.randrange(len(b)//4096)*4096
        kind = dice.randrange(4)
        if kind == 0: b[page+dice.randrange(4096)] = dice.randrange(256)
        elif kind == 1:
            i = page + 2*dice.randrange(60)
            b[i:i+2] = struct.pack('<H', dice.choice((0, 1, 4095, 65535, dice.randrange(65536))))
        elif kind == 2:
            other = dice.randrange(len(b)//4096)*4096
            b[page:page+4096] = b[other:other+4096]
        else: b[page:page+4096] = b[page:page+4096][::-1]
    if dice.random() < 0.2: del b[dice.randrange(len(b)):]
    return bytes(b)


def main(folder, n, seed=0):
    folder, dice = Path(folder), random.Random(seed)
    (folder/'good').mkdir()
    raw = database(folder/'good')
    (folder/'db').mkdir()
    base, out, wrong = most(), {}, []

    def attempt(strategy, what, read, *args):
        begun = time.perf_counter()
        o = out.setdefault(strategy, dict(inputs=0, read=0, refused=0, slowest=0.))
        try:
            read(*args)
            o['read'] += 1
        except ValueError as e:
            o['refused'] += 1
            if '\n' in str(e) or len(str(e)) > 600: wrong.append(f'{what}: {e}'[:300])
        except BaseException as e: wrong.append(f'{what}: {type(e).__name__}: {e}'[:300])
        o['inputs'] += 1
        o['slowest'] = max(o['slowest'], round(time.perf_counter()-begun, 2))
        o['most_mib'] = max(o.get('most_mib', 0), round((most()-base)/1024))

    for i in range(n): attempt('grammar', f'grammar {i}', read_pickle, grammar(dice))
    for i in range(max(6, n//200)): attempt('colliding', f'colliding {i}', read_pickle, colliding(dice))
    for i in range(n//8):
        file = folder/'db'/'data.mdb'
        file.unlink(missing_ok=True)
        file.write_bytes(pages(raw, dice))
        attempt('pages', f'pages {i}', lambda: in_memory(ImageLMDB(folder/'db')))
    for i in range(max(24, n//80)):
        path, kind = archive(folder/f'bomb{i}', dice)
        attempt('archives', f'archive {i} ({kind})', read_archive, path)
        path.unlink()
    return dict(strategies=out, n=sum(o['inputs'] for o in out.values()), wrong=wrong[:8], n_wrong=len(wrong),
                slowest=max(o['slowest'] for o in out.values()), most_mib=round((most()-base)/1024))


if __name__ == '__main__': print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
