"""What is written appears whole or not at all, and what is not whole is named: files, folders,
checkpoints, of one process and of many"""
import errno, os, re, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.fid import Stats
from dmd2_nb.grids import ComparisonGrid
from dmd2_nb.system.atomic import (
    begin_folder,
    drop_folder,
    finish_folder,
    naming,
    one_move,
    one_move_folder,
    vanish,
    write_json,
    write_text,
)
from dmd2_nb.system.checkpoint import (
    load_folder,
    load_last,
    load_optim,
    newest,
    optim_tensors,
    read_signed_json,
    save_folder,
    save_step,
    write_signed_json,
)
from dmd2_nb.system.tensors import Damaged
from dmd2_nb.train import load_state, run_nets, save_state, train
from dmd2_nb.toy import ring

root = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name == 'nt', reason='permissions of Windows are others')


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


def mode(path): return Path(path).stat().st_mode & 0o777


def toy(**settings):
    "A small run in two dimensions"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))

    class Net(nn.Module):
        sigma_data, shape = 1., (2,)
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x, sigma, cond=None):
            return self.net(torch.cat([x, sigma[:, None].log()], 1))
    cfg = DMD2Config(
        **dict(
            batch=4,
            levels=(10.0, 1.0),
            ttur=2,
            lr_g=1e-3,
            lr_fake=1e-3,
            gan_g=0.0,
            gan_d=0.0,
            guidance=1.0,
            dtype='float32',
        )
        | settings
    )
    return DMD2.from_teacher(ring().denoise, cfg, init=Net())


def go(dmd, n): return [float(o['fake_loss']) for o in train(dmd, None, n)]


def weights(net): return {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- files --

writers = dict(
    weights=lambda p: _in_one(p, lambda tmp: save_file(dict(a=torch.ones(3)), tmp)),
    text=lambda p: write_text(p, 'text'),
    json=lambda p: write_json(p, dict(a=1)),
    signed=lambda p: write_signed_json(p, dict(a=1)),
    stats=lambda p: Stats('pixels', 3, torch.zeros(2), torch.eye(2)).save(p.with_suffix('.npz')),
    page=lambda p: _grid().save(p.with_suffix('.html')),
    grid=lambda p: _grid().save(p.with_suffix('.png')),
    checkpoint=lambda p: save_folder(p, dict(a=dict(w=torch.ones(2))), dict(step=1)))


def _grid():
    grid = ComparisonGrid(['a'])
    grid.add('x', torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    return grid


def _in_one(path, write):
    with one_move(path) as tmp: write(tmp)


@posix
@pytest.mark.parametrize('name', writers)
@pytest.mark.parametrize('mask', [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read(tmp_path, name, mask):
    "safetensors and temporary files are 0600 whatever the umask; ours have what every other file has"
    before = os.umask(mask)
    try: writers[name](tmp_path/'new'/'x')
    finally: os.umask(before)
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert files and all(mode(p) == 0o666 & ~mask for p in files), [
        (p.name, oct(mode(p))) for p in files
    ]
    assert mode(tmp_path/'new') == 0o777 & ~mask


@pytest.mark.parametrize('name', writers)
def test_a_new_folder_is_made_and_written_twice(tmp_path, name):
    "Into a folder that is not there yet; a second time it replaces; nothing is left beside it"
    for _ in range(2): writers[name](tmp_path/'a'/'b'/'x')
    assert len(names(tmp_path/'a'/'b')) == 1


@pytest.mark.parametrize('name', writers)
def test_windows_refuses_to_open_folders(tmp_path, monkeypatch, name):
    opened = os.open
    def refusing(path, *args, **kwargs):
        if os.path.isdir(path): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return opened(path, *args, **kwargs)
    monkeypatch.setattr(os, 'open', refusing)
    for _ in range(2): writers[name](tmp_path/'a'/'x')
    assert len(names(tmp_path/'a')) == 1
    for i in (1, 2, 3): save_step(tmp_path/'run', i, writers['checkpoint'])
    assert names(tmp_path / 'run') == ['step-2', 'step-3'] and load_folder(
        newest(tmp_path / 'run')
    )[1] == dict(step=1)


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    "Some disks refuse to sync a folder, which is no error; a disk that fails is one, and is named"
    real, code = os.fsync, None
    def failing(fd):
        if os.path.isdir(f'/proc/self/fd/{fd}') and code: raise OSError(code, os.strerror(code))
        real(fd)
    if not os.path.exists('/proc/self/fd'): pytest.skip('no /proc to ask what is synced')
    monkeypatch.setattr(os, 'fsync', failing)
    code = errno.EINVAL
    write_text(tmp_path/'x', 'text')
    code = errno.EIO
    with pytest.raises(OSError, match=r'x could not be written \(Input/output error\)'):
        write_text(tmp_path/'x', 'more')


@pytest.mark.parametrize(
    'write',
    [lambda p: write_text(p, 'b'), lambda p: save_folder(p, {}, dict(step=2))],
    ids=['file', 'folder'],
)
def test_links_stay_links(tmp_path, write):
    "What is written through a link lies where the link leads"
    (tmp_path/'disk').mkdir()
    (tmp_path/'link').symlink_to(Path('disk')/'x')
    for _ in range(2): write(tmp_path/'link')
    assert (
        (tmp_path / 'link').is_symlink()
        and names(tmp_path / 'disk') == ['x']
        and names(tmp_path) == ['disk', 'link']
    )


def test_errors_name_the_file_once(tmp_path):
    "A writer within a writer, and a file that is only read meanwhile"
    with pytest.raises(OSError) as e:
        with one_move_folder(tmp_path/'model'):
            with naming(tmp_path/'.model.tmp'/'README.md'):
                raise OSError(errno.ENOSPC, 'No space left on device')
    assert (
        str(e.value)
        == f'{tmp_path}/model could not be written (No space left on device); what was there before is untouched'
    )
    with pytest.raises(FileNotFoundError, match='photo.png'):
        with one_move(tmp_path/'out.zip'): (tmp_path/'photos'/'photo.png').read_bytes()
    with pytest.raises(OSError, match='f/x could not be written'):
        (tmp_path/'f').write_text('')
        write_text(tmp_path/'f'/'x', 'text')
    assert names(tmp_path) == ['f']


def test_a_writer_that_writes_nothing(tmp_path):
    "Leaves no empty file under the final name"
    with pytest.raises(OSError, match='x could not be written'):
        with one_move(tmp_path/'x'): pass
    assert names(tmp_path) == []


def test_one_place_that_moves_files():
    "Temporary names and moves are made in system/atomic alone; what else renames a folder makes it vanish"
    allowed = {'system/atomic.py', 'system/checkpoint.py', 'runs.py'}
    for p in (root/'dmd2_nb').rglob('*.py'):
        text = p.read_text(encoding='utf-8')
        if p.relative_to(root/'dmd2_nb').as_posix() in allowed: continue
        assert not re.search(
            r'os\.replace\(|os\.rename\(|\.rename\(|shutil\.move\(|tmp\.replace\(', text
        ), p.name


# -- folders --

def test_what_the_user_keeps_beside_it_stays(tmp_path):
    for n in ('model.old', 'model.tmp', 'model.bak'):
        (tmp_path/n).mkdir()
        (tmp_path/n/'mine').write_text('')
    for _ in range(2): save_folder(tmp_path/'model', dict(a=dict(w=torch.ones(1))), {})
    load_folder(tmp_path/'model')
    assert names(tmp_path) == ['model', 'model.bak', 'model.old', 'model.tmp'] and all(
        names(tmp_path / f'model.{o}') == ['mine'] for o in ('old', 'tmp', 'bak')
    )
    (tmp_path/'run'/'copy-of-step-3.good').mkdir(parents=True)
    for i in (1, 2, 3): save_step(tmp_path/'run', i, writers['checkpoint'])
    assert names(tmp_path/'run') == ['copy-of-step-3.good', 'step-2', 'step-3']


def test_a_folder_vanishes_in_one_move(tmp_path, monkeypatch):
    "Killed while it deletes: the name is free; what an earlier kill has left goes too"
    from dmd2_nb.system import atomic

    run = tmp_path/'run-1'
    for _ in range(2):
        (run/'state').mkdir(parents=True)
        (run/'state'/'a').write_text('x')
        with monkeypatch.context() as m:
            m.setattr(atomic, 'remove', lambda folder: None if not folder.exists() else 1/0)
            with pytest.raises(ZeroDivisionError): vanish(run)
        assert names(tmp_path) == ['.run-1.gone']
        run.mkdir()
        vanish(run)
        assert names(tmp_path) == []


def test_places_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError, match='file'): save_folder(tmp_path/'file', {}, {})
    assert (tmp_path/'file').read_text() == 'mine' and names(tmp_path) == ['file']
    monkeypatch.chdir(tmp_path)
    for bad in ('.', '..', ''):
        with pytest.raises(ValueError, match='has no name to write under'): save_folder(bad, {}, {})
    save_folder('here', {}, dict(step=1))
    monkeypatch.chdir(tmp_path/'here')
    assert load_folder('.')[1] == dict(step=1)  # reading it is no matter


@pytest.mark.parametrize('stage', [1, 2])
def test_a_move_that_fails_puts_the_old_one_back(tmp_path, monkeypatch, stage):
    "The first or the second rename is refused; by one process and in the steps that many share"
    rename, calls = Path.rename, []
    def refusing(self, target):
        calls.append(self)
        if len(calls) == stage: raise PermissionError(errno.EACCES, 'Permission denied')
        return rename(self, target)
    for write in (lambda: save_folder(tmp_path/'c', {}, dict(step=2)), lambda: _many(tmp_path/'c')):
        save_folder(tmp_path/'c', {}, dict(step=1))
        calls.clear()
        monkeypatch.setattr(Path, 'rename', refusing)
        with pytest.raises(OSError, match='Permission denied'): write()
        monkeypatch.setattr(Path, 'rename', rename)
        assert names(tmp_path) == ['c'] and load_folder(tmp_path/'c')[1] == dict(step=1)


def _many(folder):
    "The steps of `save_parallel`"
    tmp = begin_folder(folder)
    try:
        (tmp/'state.json').write_text('{"step": 2}')
        finish_folder(folder)
    except BaseException:
        drop_folder(folder)
        raise


kill = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_atomic as t
here, how, rename = Path(sys.argv[1]), sys.argv[2], Path.rename
def one(n): t.save_folder(here, dict(a=dict(w=torch.full((2,), float(n)))), dict(step=n))
write = one if how == 'one' else lambda n: t.save_many(here, n)
write(1)
def once(self, target):
    rename(self, target)
    os._exit(9)
Path.rename = once
write(2)
"""


def save_many(folder, n):
    "`save_parallel` of a run over processes, as the only one of them"
    from dmd2_nb import parallel_run
    dmd = many(n)
    parallel_run.save_parallel(dmd, folder, position=n)


def many(n=0):
    "A run that believes to be one of many processes"
    import torch.distributed as dist
    from types import SimpleNamespace
    if not dist.is_initialized():
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    dmd = toy()
    dmd.step = n
    dmd.world = SimpleNamespace(
        many=True, main=True, rank=0, size=1, device=torch.device('cpu'), mode='ddp'
    )
    dmd.mode = 'ddp'
    return dmd


@posix
@pytest.mark.parametrize('how', ['one', 'many'])
def test_killed_between_two_renames(tmp_path, how):
    """The old checkpoint has no name at that moment; the same path finds it again, and the next
    save keeps it until it is done"""
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(root), *filter(None, sys.path)]))
    r = subprocess.run(
        [sys.executable, '-c', kill, str(tmp_path / 'state'), how, str(Path(__file__).parent)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 9, r.stderr
    assert not (tmp_path/'state').exists()
    if how == 'one':
        assert newest(tmp_path / 'state') == tmp_path / 'state' and load_folder(tmp_path / 'state')[
            1
        ] == dict(step=1)
    else:
        r = subprocess.run(
            [sys.executable, '-c', go_on, str(tmp_path / 'state'), str(Path(__file__).parent)],
            env=env,
            capture_output=True,
            text=True,
        )
        assert r.returncode == 0, r.stderr
        assert r.stdout.split() == ['1', '5']
    assert all(p.name.startswith(('state', '.state.tmp')) for p in tmp_path.iterdir())


go_on = """
import sys
sys.path.insert(0, sys.argv[2])
import test_atomic as t
from dmd2_nb.parallel_run import load_parallel
dmd = t.many()
print(load_parallel(dmd, sys.argv[1])['position'])
t.save_many(t.Path(sys.argv[1]), 5)
print(load_parallel(t.many(), sys.argv[1])['position'])
"""


# -- checkpoints that are not whole --

broken = [
    'null',
    '1',
    '{}',
    '[]',
    '"x"',
    'true',
    '3.5',
    '',
    '{"step": 1',
    '[[1]]',
    '{"sha256": 5}',
    '{"sha256": []}',
    '{"sha256": {}}',
    '[' * 100_000,
    '\ufeff{}',
    b'\xff\xfe{}',
    b'\0' * 20,
]


@pytest.mark.parametrize('text', broken, ids=lambda t: repr(t[:16]))
def test_falls_back(tmp_path, text):
    "A state that is no state: named, and the checkpoint before serves"
    dmd = toy()
    for n in (1, 2):
        go(dmd, 1)
        save_step(tmp_path, n, lambda p: save_state(dmd, p, position=n))
    (tmp_path/'step-2'/'state.json').write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(Damaged, match=r'step-2/state\.json is damaged') as e:
        load_state(toy(), tmp_path/'step-2')
    assert len(str(e.value)) < 600 and '\n' not in str(e.value)
    told = []
    fresh = toy()
    extra, p = load_last(tmp_path, lambda p: load_state(fresh, p), told.append)
    assert (extra, p.name, fresh.step) == (dict(position=1), 'step-1', 1)
    assert (
        len(told) == 1 and 'state.json is damaged' in told[0] and 'going on from step-1' in told[0]
    )


@pytest.mark.parametrize('key', ['config', 'step', 'g_updates', 'warm_until', 'groups', 'scalers', 'extra'])
def test_a_state_that_lacks_something(tmp_path, key):
    "Also when its sum is right: another version may have written it"
    dmd = toy()
    save_state(dmd, tmp_path/'s')
    tensors, state = load_folder(tmp_path/'s')
    del state[key]
    save_folder(tmp_path/'s', tensors, state)
    with pytest.raises(Damaged, match=rf'state\.json is damaged \(it lacks {key}\)'):
        load_state(dmd, tmp_path/'s')


def test_no_flipped_bit_is_read(tmp_path):
    "Every bit of a signed file: what comes back is what was written, or the file is named"
    write_signed_json(tmp_path/'config.json', dict(lr=1e-3, data='x'))
    good = (tmp_path/'config.json').read_bytes()
    for i in range(len(good)):
        for bit in range(8):
            (tmp_path/'config.json').write_bytes(good[:i]+bytes([good[i] ^ 1 << bit])+good[i+1:])
            try: assert read_signed_json(tmp_path/'config.json') == dict(lr=1e-3, data='x')
            except Damaged as e: assert 'config.json is damaged' in str(e)


def test_signed_files(tmp_path):
    write_signed_json(tmp_path/'a.json', dict(x=[1, 2.5, None, 'ü'], y={'z': float('inf')}))
    assert read_signed_json(tmp_path/'a.json') == dict(x=[1, 2.5, None, 'ü'], y={'z': float('inf')})
    (tmp_path/'old.json').write_text('{"x": 1}')
    assert read_signed_json(tmp_path/'old.json') == dict(x=1)  # from before they were signed
    with pytest.raises(FileNotFoundError, match='none.json is missing'):
        read_signed_json(tmp_path/'none.json')
    with pytest.raises(ValueError, match='sha256'):
        write_signed_json(tmp_path/'b.json', dict(sha256='x'))
    assert names(tmp_path) == ['a.json', 'old.json']


def test_one_folder_or_steps(tmp_path):
    "`load_last` reads what `newest` finds: a folder that is a checkpoint itself, one of steps, or none"
    assert load_last(tmp_path/'none', load_folder) == (None, None)
    save_folder(tmp_path/'one', {}, dict(step=1))
    assert load_last(tmp_path/'one', load_folder) == (({}, dict(step=1)), tmp_path/'one')
    for n in (2, 3): save_step(tmp_path/'many', n, lambda p: save_folder(p, {}, dict(step=n)))
    assert load_last(tmp_path/'many', load_folder) == (({}, dict(step=3)), tmp_path/'many'/'step-3')
    seen = load_last(
        tmp_path / 'none', load_folder, agree=lambda found: [str(tmp_path / 'many' / 'step-2')]
    )
    assert seen == (({}, dict(step=2)), tmp_path/'many'/'step-2')  # another process saw it


class Prompts:
    "Stands for shards: conditions without end"
    index = dict(kind='conditions')
    def batches(self, n, seed, at, device):
        while True: yield torch.zeros(n)


def test_distill_sdxl_takes_either_layout(tmp_path):
    "One folder written again and again, or steps: found, gone on with, and kept as it is"
    from dmd2_nb.sdxl.recipe import distill_sdxl
    whole = toy()
    losses = [float(o['fake_loss']) for o in distill_sdxl(whole, Prompts(), 6)]
    for layout in ('one', 'steps'):
        first = toy()
        if layout == 'one': list(distill_sdxl(first, Prompts(), 4, folder=tmp_path/layout))
        else:
            list(distill_sdxl(first, Prompts(), 4))
            save_step(tmp_path/layout, 4, lambda p: save_state(first, p))
        rest = [
            float(o['fake_loss'])
            for o in distill_sdxl(toy(), Prompts(), 6, folder=tmp_path / layout, save_every=1)
        ]
        assert rest == losses[4:]
    assert (
        names(tmp_path / 'steps') == ['step-5', 'step-6']
        and (tmp_path / 'one' / 'state.json').is_file()
    )
    (tmp_path/'steps'/'step-6'/'state.json').write_text('null')
    with pytest.warns(UserWarning, match='going on from step-5'):
        assert len(list(distill_sdxl(toy(), Prompts(), 6, folder=tmp_path/'steps'))) == 1


# -- optimisers and averages --

flags = [
    dict(),
    dict(foreach=False),
    dict(foreach=True),
    dict(fused=True),
    dict(capturable=True, foreach=False),
    dict(differentiable=True, foreach=False),
]


@pytest.mark.parametrize('saved', flags, ids=str)
@pytest.mark.parametrize('mine', flags, ids=str)
def test_an_optimiser_keeps_its_flags(saved, mine):
    "How it computes is its own affair; averages, rates and decays are the file's"
    def make(kind):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1, **kind)
    def update(net, opt):
        opt.zero_grad()
        net(torch.ones(4, 3)).square().sum().backward()
        opt.step()
    # what a CPU can step with
    cpu = lambda kind: {k: v for k, v in kind.items() if k not in ('capturable', 'differentiable')}
    (net, opt), (mine_net, mine_opt) = make(cpu(saved)), make(mine)
    for _ in range(3): update(net, opt)
    for g in opt.param_groups: g.update(saved)
    tensors, groups = optim_tensors(opt)
    before = {
        k: mine_opt.param_groups[0][k] for k in ('capturable', 'differentiable', 'foreach', 'fused')
    }
    load_optim(mine_opt, {k: v.clone() for k, v in tensors.items()}, groups)
    mine_net.load_state_dict(net.state_dict())
    assert {k: mine_opt.param_groups[0][k] for k in before} == before
    assert (
        mine_opt.param_groups[0]['lr'] == 1e-2 and mine_opt.param_groups[0]['weight_decay'] == 0.1
    )
    if cpu(mine) != mine: return
    for g in opt.param_groups: g.update(capturable=False, differentiable=False)
    update(net, opt)
    update(mine_net, mine_opt)
    assert all(
        torch.allclose(p, q, atol=1e-6) for p, q in zip(net.parameters(), mine_net.parameters())
    )


class Itself(nn.Module):
    "As for SDXL without an average"
    def __init__(self, net):
        super().__init__()
        self.__dict__['net'] = net
    def update(self, net): pass


def without_average():
    dmd = toy(ema_halflife=0.)
    dmd.ema = Itself(dmd.G)
    return dmd


@pytest.mark.parametrize('make', [without_average, lambda: toy(ema_halflife=0.)], ids=['itself', 'halflife 0'])
def test_the_generator_is_saved_once(tmp_path, make):
    "Where no average is kept; checkpoints that hold it twice are read all the same"
    dmd = make()
    go(dmd, 3)
    save_state(dmd, tmp_path/'new')
    assert 'ema.safetensors' not in names(tmp_path/'new') and 'ema' not in run_nets(dmd)
    tensors, state = load_folder(tmp_path/'new')
    save_folder(tmp_path/'old', tensors | dict(ema=tensors['generator']), state)
    on = go(dmd, 4)
    for layout in ('new', 'old'):
        again = make()
        load_state(again, tmp_path/layout)
        assert same(weights(again.ema.net), tensors['generator']) and go(again, 4) == on


def test_with_and_without_an_average(tmp_path):
    """A run saved without one begins it at the generator, and says so; one saved with it lets it
    go. The rest of the config still has to agree"""
    for there, here in ((0., 5.), (5., 0.), (5., 9.)):
        dmd, other = toy(ema_halflife=there), toy(ema_halflife=here)
        go(dmd, 4)
        save_state(dmd, tmp_path/'s')
        if there: load_state(other, tmp_path/'s')
        else:
            with pytest.warns(UserWarning, match='holds no average'):
                load_state(other, tmp_path/'s')
        assert same(weights(other.ema.net), weights(dmd.ema.net if there and here else dmd.G))
        assert go(dmd, 3) == go(other, 3)
    with pytest.raises(ValueError, match='another config: lr_g'):
        load_state(toy(lr_g=5e-3), tmp_path/'s')
