"""Files made to cost memory or time, in a process that measures itself: python tests/_bombs_work.py FOLDER N [SEED]

Pickles out of the reader's own instructions, keys that collide, archives whose entries lie, and
damaged LMDB pages. Each input ends in a value or in one line. Prints one line of JSON."""
import bz2, io, json, lzma, pickle, random, signal, struct, sys, time, warnings, zipfile, zlib
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from dmd2_nb.image_files import ImageLMDB, ImageZip
from dmd2_nb.images import in_memory, npz_images
from dmd2_nb.system.safe_pickle import CALLS, OPCODES, read_pickle
from dmd2_nb.system.tensors import read_state_dict
from _fuzz_work import most

CODES = {name: code for code, (name, _, _) in OPCODES.items()}
PRIME = sys.hash_info.modulus  # whole numbers that differ by it have one hash


def string(t):
    "A text, as a pickle holds it"
    return CODES['BINUNICODE'] + struct.pack('<I', len(t.encode())) + t.encode()


def text(dice):
    "A short text"
    return string(dice.choice(('x', 'latin1', 'ü' * 9, '_tensor_type', 'f4', '')))


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


MIB = {zipfile.ZIP_DEFLATED: 1000, zipfile.ZIP_BZIP2: 1700, zipfile.ZIP_LZMA: 1700}


@cache
def packed(how):
    "As many MiB of zeros behind the head of an array, nearly nothing by a method of zips"
    if how == zipfile.ZIP_DEFLATED: packer, out = zlib.compressobj(1, zlib.DEFLATED, -15), b''
    elif how == zipfile.ZIP_BZIP2: packer, out = bz2.BZ2Compressor(), b''
    else:
        filters = [dict(id=lzma.FILTER_LZMA1, preset=0)]
        packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
        out = b'\x09\x04\x05\x00' + lzma._encode_filter_properties(filters[0])
    out, zeros = [out, packer.compress(npy((4, 8, 8, 3)))], bytes(2**20)
    out += [packer.compress(zeros) for _ in range(MIB[how])]
    return b''.join(out) + packer.flush()


def claim(raw, how, size):
    "The entries that are large when unpacked say so, or say another size"
    b = bytearray(raw)
    with zipfile.ZipFile(io.BytesIO(raw)) as z: entries, at = z.infolist(), z.start_dir
    for o in entries:
        if o.file_size == len(packed(how)):
            for place, begin in ((8, o.header_offset), (10, at)):
                b[begin+place:begin+place+2] = struct.pack('<H', how)
                b[begin+place+14:begin+place+18] = struct.pack('<I', size)
        at += 46 + len(o.filename.encode()) + len(o.extra) + len(o.comment)
    return bytes(b)


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


LARGE_KINDS = ('unused', 'wanted', 'understated')


@cache
def made(kind, ends, how, n):
    "The bytes of a zip; its large entries are to be given their method and size by `claim`"
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, 'w') as z:
        warnings.simplefilter('ignore')
        if ends == '.pt': z.writestr('archive/data.pkl', storage_pickle(n))
        if ends == '.npz' and kind != 'understated':
            z.writestr('images.npy', npy((4, 8, 8, 3), data=bytes(768)))
        one = {'.zip': 'a.png', '.pt': 'archive/data/0', '.npz': 'labels.npy'}[ends]
        if kind == 'unused' and ends == '.npz':
            for i in range(2): z.writestr(f'extra{i}.npy', packed(how))
        elif kind == 'understated' and ends == '.npz': z.writestr('images.npy', packed(how))
        elif kind in LARGE_KINDS: z.writestr(one, packed(how))
        elif kind == 'many':
            for i in range(n): z.writestr(f'{i}/', b'')
        elif kind == 'twice':
            for _ in range(n): z.writestr('same/', b'')
        else: z.writestr(one, npy((4,), '<i8', bytes(32)), how)
    return out.getvalue()


def storage_pickle(n):
    "What torch.save would write for one tensor of n bytes"
    size = CODES['BININT'] + struct.pack('<i', n)
    storage = string('storage') + b'ctorch\nByteStorage\n' + string('0') + string('cpu') + size
    return (b'\x80\x02}' + string('a') + b'ctorch._utils\n_rebuild_tensor_v2\n((' + storage
            + b'tQK\0' + size + b'\x85K\1\x85\x89ccollections\nOrderedDict\n)RtRs.')


def share(raw, n):
    "The table lists one entry many times over"
    i, j = raw.find(b'PK\1\2'), raw.find(b'PK\5\6')
    table = raw[i:j]*n
    end = struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, n % 65536, n % 65536, len(table), i, 0)
    return raw[:i]+table+end


def remember(raw):
    "Every LZMA entry wants 4 GiB to unpack with"
    b = bytearray(raw)
    i = b.find(b'PK\3\4')
    while i >= 0:
        at = i+30+sum(struct.unpack_from('<HH', b, i+26))+5
        if at+4 <= len(b): b[at:at+4] = b'\xff'*4
        i = b.find(b'PK\3\4', i+4)
    return bytes(b)


KINDS = (*LARGE_KINDS, *LARGE_KINDS, 'many', 'twice', 'lying', 'lying', 'shared', 'dictionary')
METHODS = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def archive(path, dice):
    "A zip that wants too much; the kind and who reads it"
    kind, ends, how = (dice.choice(o) for o in (KINDS, ('.npz', '.zip', '.pt'), METHODS))
    if kind in ('many', 'twice', 'shared'): how = zipfile.ZIP_DEFLATED
    if kind == 'dictionary': how = zipfile.ZIP_LZMA
    size = MIB[how]*2**20 if kind != 'understated' else dice.choice((0, 5, 896, 10_000))
    n = dice.choice((2, 3000, 30_000)) if kind in ('many', 'twice') else size
    raw = made(kind, ends, how, n)
    if kind in LARGE_KINDS: raw = claim(raw, how, size)
    if kind == 'lying': raw = lie(raw, dice)
    if kind == 'shared': raw = share(raw, dice.choice((150, 20_000)))
    if kind == 'dictionary': raw = remember(raw)
    path = path.with_suffix(ends)
    path.write_bytes(raw)
    return path, f'{kind} {ends} {how}'


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


def in_a_file(folder, data, zipped):
    "The pickle as what torch.save has written, in its new or in its old form"
    path = folder/'state.pt'
    if zipped:
        with zipfile.ZipFile(path, 'w') as z: z.writestr('archive/data.pkl', data)
    else:
        head = [0x1950a86a20f9469cfc6c, 1001, dict(little_endian=True, protocol_version=1001)]
        path.write_bytes(b''.join(pickle.dumps(o, 2) for o in head) + data + pickle.dumps([], 2))
    return path


def main(folder, n, seed=0):
    folder, dice = Path(folder), random.Random(seed)
    (folder/'good').mkdir()
    raw = database(folder/'good')
    (folder/'db').mkdir()
    base, out, wrong = most(), {}, []

    def late(*_): raise TimeoutError('over a minute')
    if hasattr(signal, 'SIGALRM'): signal.signal(signal.SIGALRM, late)

    def attempt(strategy, what, read, *args):
        o = out.setdefault(strategy, dict(inputs=0, read=0, refused=0, slowest=0.))
        if hasattr(signal, 'SIGALRM'): signal.alarm(60)
        begun = time.perf_counter()
        try:
            read(*args)
            o['read'] += 1
        except ValueError as e:
            o['refused'] += 1
            if '\n' in str(e) or len(str(e)) > 600: wrong.append(f'{what}: {e}'[:300])
        except BaseException as e: wrong.append(f'{what}: {type(e).__name__}: {e}'[:300])
        took = time.perf_counter()-begun
        if hasattr(signal, 'SIGALRM'): signal.alarm(0)
        o['inputs'] += 1
        if took > o['slowest']: o['slowest'], o['slowest_is'] = round(took, 2), what
        o['most_mib'] = max(o.get('most_mib', 0), round((most()-base)/1024))

    for i in range(10*n):
        data = grammar(dice)
        if i % 20: attempt('grammar', f'grammar {i}', read_pickle, data)
        else: attempt('grammar', f'grammar {i} in a file', read_state_dict, in_a_file(folder, data, i % 40))
    for i in range(max(6, n//100)): attempt('colliding', f'colliding {i}', read_pickle, colliding(dice))
    for i in range(n):
        file = folder/'db'/'data.mdb'
        file.unlink(missing_ok=True)
        file.write_bytes(pages(raw, dice))
        attempt('pages', f'pages {i}', lambda: in_memory(ImageLMDB(folder/'db')))
    for i in range(max(60, n//20)):
        path, kind = archive(folder/f'bomb{i}', dice)
        attempt('archives', f'archive {i} ({kind})', read_archive, path)
        path.unlink()
    return dict(strategies=out, n=sum(o['inputs'] for o in out.values()), wrong=wrong[:8], n_wrong=len(wrong),
                slowest=max(o['slowest'] for o in out.values()), most_mib=round((most()-base)/1024))


if __name__ == '__main__': print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
