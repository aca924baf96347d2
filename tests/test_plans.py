"What cached files were made from: one hash for files, tensors and networks, and caches that refuse other inputs"
import hashlib, json, os
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


@pytest.mark.parametrize('change', [{'a/1': b'y'}, {'a/3': b''}, {'b': b''}, {'a/1': b'xb', 'a/2': b''}], ids=['bytes', 'one more file', 'emptied', 'moved from one file to the next'])
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
    tree(one, {'.DS_Store': b'1', '.ipynb_checkpoints/a': b'2', '__MACOSX/._a': b'3', 'lock.mdb': b'4'})
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
    monkeypatch.setattr(plan, '_read', lambda path, at, n: read.append((at, n)) or inner(path, at, n))
    assert content_hash(f).endswith('(sizes, times and 64 MB drawn from 300 MB)')
    assert 63*2**20 < sum(n for _, n in read) <= 64*2**20
    gaps = [b-a for (a, _), (b, _) in zip(read, read[1:])]
    assert max(gaps) < 2**18 and read[0][0] == 0 and sum(read[-1]) == 300*2**20


@pytest.mark.parametrize('a, b', [(['ab', 'c'], ['a', 'bc']), ([1, [2]], [[1], 2]), ([[], []], [[[]]]), ({'a': 1}, ['a', 1]), ([1], ['1']), ([1], [1.]),
                                  (torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(2), torch.zeros(2).half()), (torch.zeros(1), -torch.zeros(1)), (np.zeros(2000), np.ones(2000))],
                         ids=lambda o: '')
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


@pytest.mark.parametrize('other', [lambda: guide(8.), lambda: guide(1., zeros), lambda: guide(1., torch.zeros(1)), lambda: guide(1., seed=1), lambda: guide(1.).half(), lambda: partial(guide(1.), 1)],
                         ids=['number', 'function', 'tensor', 'weights', 'dtype', 'an argument'])
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
    assert identity(EpsDenoiser(make_unet())) == identity(EpsDenoiser(make_unet())) != identity(VDenoiser(make_unet()))
    used = EpsDenoiser(make_unet())
    was = identity(used)
    used.timestep(used.levels[-1:])
    assert identity(used) == was, 'tables that were filled on the way are no setting'
