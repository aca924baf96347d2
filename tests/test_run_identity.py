"""Which run goes on: the newest unfinished one of the same settings, images and weights; what is
not whole is named, and comes back where it can"""
import os, stat
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmd2_nb import cli, jobs, recipes, runs, teacher_job
from dmd2_nb.job import images_facts
from dmd2_nb.logs import CsvLog, read_log
from dmd2_nb.runs import claim_run, run_config
from dmd2_nb.system.checkpoint import load_folder, save_folder, steps
from dmd2_nb.system.tensors import read_tensors
from dmd2_nb.weights import build_denoiser, save_denoiser

net = dict(
    net='UNet',
    args=dict(img_resolution=8, in_channels=1, label_dim=10, channels=[4], emb=8),
    sigma_data=0.6,
)
distil = 'distill --teacher teacher.safetensors --data good.npz --device cpu'
teach = 'train_teacher --data good.npz --device cpu'
jobs_of = {
    'distill': (distil, 'train', 'fashion16-1', 'generator.safetensors', '--iters'),
    'train_teacher': (
        teach,
        'train_teacher',
        'fashion16-teacher-1',
        'teacher.safetensors',
        '--steps',
    ),
}
both = pytest.mark.parametrize('job', jobs_of)


def pictures(folder, seed=0):
    x = np.random.default_rng(seed).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez(
        folder / 'good.npz',
        images=x,
        labels=np.arange(80) % 10,
        class_names=[f'kind {i}' for i in range(10)],
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a tiny teacher and images; the recipe takes a second"
    r = recipes.RECIPES['fashion16']
    every = dict(log=3, show=0, save=3, eval=0)
    tiny = replace(
        r,
        net=net,
        config=replace(r.config, batch=8, warmup_fake=2, gan_start=1),
        iters=9,
        teacher=r.teacher | dict(steps=9, batch=8),
        sampler=dict(steps=2),
        features='pixels',
        n_eval=12,
        n_watch=12,
        every=every,
        teacher_every=every,
    )
    monkeypatch.setitem(recipes.RECIPES, 'fashion16', tiny)
    monkeypatch.setattr(cli, 'PICTURES', {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DMD2_NB_DEBUG', raising=False)
    torch.manual_seed(0)
    save_denoiser(build_denoiser(net), tmp_path/'teacher.safetensors', data='fashion16')
    pictures(tmp_path)
    return tmp_path


@pytest.fixture
def tell(capsys):
    "Gives a command; `(code, what it said)`"
    def go(line):
        capsys.readouterr()
        code = cli.main(line.split())
        out, err = capsys.readouterr()
        for text in (out+err).splitlines():
            assert len(text) <= 600 and 'Traceback' not in text, text
        return code, out+err
    return go


def room_of(loop): return teacher_job if loop == 'train_teacher' else jobs


def stopped(monkeypatch, tell, line, at=5):
    "The command, with Ctrl-C at an iteration"
    loop = 'train_teacher' if line.startswith('train') else 'train'
    where = room_of(loop)
    f = getattr(where, loop)
    def breaks(*args, **kwargs):
        for i, log in enumerate(f(*args, **kwargs), 1):
            yield log
            if i == at: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(where, loop, breaks)
        assert tell(line)[0] == 130


def weights(folder, file):
    return {k: v.numpy().tobytes() for k, v in read_tensors(folder/file)[0].items()}
def listing(folder):
    return {
        str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob('*'))
    }


# -- which run goes on --

def test_the_newest_of_the_same_config_goes_on(here, tell, monkeypatch):
    """A run, another setting, the first command again: the first run goes on, and a line says what
    else is unfinished and how it differs"""
    stopped(monkeypatch, tell, distil)
    stopped(monkeypatch, tell, f'{distil} --set batch=16')
    code, said = tell(distil)
    assert code == 0 and 'runs/fashion16-1: goes on at iteration 3' in said
    assert 'also unfinished: runs/fashion16-2 (config.batch 16 there, 8 now)' in said
    assert sorted(p.name for p in (here/'runs').iterdir()) == ['fashion16-1', 'fashion16-2']
    code, said = tell(f'{distil} --set batch=16')
    assert (
        code == 0
        and 'runs/fashion16-2: goes on at iteration 3' in said
        and 'unfinished' not in said
    )


@both
def test_of_two_equal_ones_the_newer_goes_on(job, here, tell, monkeypatch):
    line, _, first, *_ = jobs_of[job]
    stopped(monkeypatch, tell, line)
    # another process is at work there
    held = claim_run('runs', run_config(here/'runs'/first), name=first, iters=9)
    stopped(monkeypatch, tell, line)
    held.close()
    code, said = tell(line)
    assert (
        code == 0
        and f'{first[:-1]}2: goes on at' in said
        and f'runs/{first} (the same config)' in said
    )


def test_named_runs_are_named(here, tell, monkeypatch):
    stopped(monkeypatch, tell, f'{distil} --name mine')
    code, said = tell(f'{distil} --ttur 2')
    assert code == 0 and 'also unfinished: runs/mine (config.ttur 3 there, 2 now)' in said


def test_settings_that_are_no_part_of_it(here, tell, monkeypatch):
    "How often something is looked at, and where a file lies, makes no other run"
    stopped(monkeypatch, tell, distil)
    (here/'elsewhere').mkdir()
    for n in ('good.npz', 'teacher.safetensors'): (here/n).rename(here/'elsewhere'/n)
    moved = distil.replace('teacher.s', 'elsewhere/teacher.s').replace(
        'good.npz', 'elsewhere/good.npz'
    )
    code, said = tell(f'{moved} --eval-n 16 --eval-every 2 --save-every 2')
    assert code == 0 and 'runs/fashion16-1: goes on at iteration 3' in said
    assert run_config(here/'runs'/'fashion16-1')['paths']['images'] == 'elsewhere/good.npz'


# -- how long --

@both
def test_more_iterations_go_on(job, here, tell, monkeypatch):
    "A run of 9, asked for 12 while unfinished, ends in the bits of one that had 12 from the start"
    line, _, first, file, option = jobs_of[job]
    r = recipes.RECIPES['fashion16']
    monkeypatch.setitem(
        recipes.RECIPES, 'fashion16', replace(r, teacher=r.teacher | dict(decay=0.0))
    )
    stopped(monkeypatch, tell, line)
    code, said = tell(f'{line} {option} 12')
    assert code == 0 and 'goes on at' in said and 'learning rate' not in said
    assert tell(f'{line} {option} 12 --out whole')[0] == 0
    assert weights(here/'runs'/first, file) == weights(here/'whole'/first, file)
    assert run_config(here/'runs'/first)['iters'] == 12


@both
def test_more_iterations_of_a_finished_run(job, here, tell):
    "With its checkpoints it goes on, to the bits of a longer run; without them it says what it would take"
    line, _, first, file, option = jobs_of[job]
    short = f'{line} --set warmup_fake=3' if job == 'distill' else line
    r = recipes.RECIPES['fashion16']
    # put back by the fixture
    recipes.RECIPES['fashion16'] = replace(r, teacher=r.teacher | dict(decay=0.))
    assert tell(f'{short} --name mine --keep-state')[0] == 0
    code, said = tell(f'{short} --name mine {option} 12')
    assert code == 0 and 'goes on at' in said and (here/'runs/mine/metrics-9.json').exists()
    assert tell(f'{short} {option} 12 --out whole')[0] == 0
    assert weights(here/'runs'/'mine', file) == weights(here/'whole'/first, file)
    before = listing(here)
    code, said = tell(f'{short} --name mine {option} 20')
    assert (
        code == 2
        and 'a finished run of 12 iterations without checkpoints' in said
        and '--keep-state' in said
        and listing(here) == before
    )


@both
def test_fewer_iterations_than_are_done(job, here, tell, monkeypatch):
    line, _, first, _, option = jobs_of[job]
    stopped(monkeypatch, tell, line, at=7)
    before = listing(here)
    for name in ('', f' --name {first}'):
        code, said = tell(f'{line} {option} 5{name}')
        assert (
            code == 2
            and f'runs/{first} is at iteration 6 already, 5 were asked for: nothing is changed'
            in said
        )
        assert listing(here) == before


def test_equal_and_fewer_on_a_finished_run(here, tell):
    assert tell(f'{distil} --name mine')[0] == 0
    before = listing(here)
    assert 'holds a finished run of 9 iterations' in tell(f'{distil} --name mine')[1]
    assert (
        'holds a finished run of 9 iterations, 6 were asked for: nothing is changed'
        in tell(f'{distil} --name mine --iters 6')[1]
    )
    assert listing(here) == before
    assert tell(distil)[0] == 0
    code, said = tell(distil)
    assert (
        code == 0
        and 'runs/fashion16-1 is finished with the same config; this is a new run, runs/fashion16-2'
        in said
    )


@both
def test_a_rate_that_falls_says_from_where_it_differs(job, here, tell, monkeypatch):
    line, _, first, _, option = jobs_of[job]
    r = recipes.RECIPES['fashion16']
    monkeypatch.setitem(
        recipes.RECIPES, 'fashion16', replace(r, decay=0.5, teacher=r.teacher | dict(decay=0.5))
    )
    stopped(monkeypatch, tell, line, at=7)
    code, said = tell(f'{line} {option} 18')
    unit = 'iteration' if job == 'distill' else 'update'
    assert (
        code == 0
        and (
            f'the learning rate falls for 18 {unit}s now instead of 9, which differs from {unit} 4 '
            'on; those from there to 6'
        )
        in said
    )


# -- images and weights by their contents --

@both
def test_other_pixels_in_the_same_file(job, here, tell, monkeypatch):
    "Refused, with and without a name, as long as the run is unfinished; what was there before goes on"
    line, _, first, *_ = jobs_of[job]
    stopped(monkeypatch, tell, line)
    old = (here/'good.npz').read_bytes()
    pictures(here, seed=1)
    before = listing(here)
    for name in ('', f' --name {first}'):
        code, said = tell(line+name)
        assert (
            code == 2
            and f'runs/{first} is unfinished and was begun with other contents of good.npz' in said
            and 'images.sha256' in said
        )
        assert listing(here) == before
    assert (
        tell(f'{line} --overwrite')[0] == 0
        and (here / 'runs' / f'{first[:-1]}2' / 'metrics.json').exists()
    )
    (here/'good.npz').write_bytes(old)
    code, said = tell(line)
    assert code == 0 and f'runs/{first}: goes on at' in said


def test_another_teacher_in_the_same_file(here, tell, monkeypatch):
    stopped(monkeypatch, tell, distil)
    torch.manual_seed(1)
    save_denoiser(build_denoiser(net), here/'teacher.safetensors', data='fashion16')
    code, said = tell(distil)
    assert code == 2 and 'other contents of teacher.safetensors' in said and 'teacher ' in said


def test_another_begin_in_the_same_folder(here, tell, monkeypatch):
    assert tell(f'{distil} --name first --keep-state')[0] == 0
    line = f'{distil} --begin runs/first --set seed=3'
    stopped(monkeypatch, tell, line)
    file = steps(here/'runs/first/state')[0]
    tensors, state = load_folder(file)
    tensors['generator'] = {k: v+1 for k, v in tensors['generator'].items()}
    save_folder(file, tensors, state)
    code, said = tell(line)
    assert code == 2 and 'other contents of runs/first' in said and 'begin ' in said


def test_what_counts_of_a_set_of_images(here):
    "Each pixel, each label, order, classes; not how it is packed"
    x, y = np.zeros((20, 4, 4), 'uint8'), np.arange(20) % 5
    from dmd2_nb.images import npz_images
    def facts(images=x, labels=y, name='a.npz', **more):
        np.savez(here/name, images=images, labels=labels, **more)
        return images_facts(npz_images(here/name))
    first, other = facts(), x.copy()
    other[19, 3, 3] = 1
    assert first['images'] == 20 and first['shape'] == [1, 4, 4] and first['classes'] == 5
    differ = [
        facts(other),
        facts(labels=y[::-1].copy()),
        facts(class_names=list('abcde')),
        facts(x[:19], y[:19]),
        facts(np.zeros((20, 4, 4, 3), 'uint8')),
    ]
    assert len({o['sha256'] for o in [first, *differ]}) == 6
    np.savez_compressed(here/'b.npz', images=x[..., None], labels=y.astype('int32'))
    assert images_facts(npz_images(here/'b.npz')) == first


# -- what PyTorch was set to --

def test_settings_of_the_program_change_no_bit(here, tell, monkeypatch):
    """A run begun and one taken up under another default dtype ends in the bits of an undisturbed
    one; the setting is as it was after"""
    assert tell(f'{distil} --out whole')[0] == 0
    torch.set_default_dtype(torch.float64)
    try:
        stopped(monkeypatch, tell, distil)
        torch.set_default_dtype(torch.float16)
        assert tell(distil)[0] == 0 and torch.get_default_dtype() == torch.float16
    finally: torch.set_default_dtype(torch.float32)
    assert weights(here / 'runs/fashion16-1', 'generator.safetensors') == weights(
        here / 'whole/fashion16-1', 'generator.safetensors'
    )


# -- what is not whole --

broken = dict(
    cut=lambda b: b[: len(b) // 2],
    empty=lambda b: b'',
    braces=lambda b: b'{}',
    null=lambda b: b'null',
    list=lambda b: b'[]',
    number=lambda b: b'1',
    bit=lambda b: b.replace(b'"ttur": 3', b'"ttur": 2').replace(b'"seed": 0', b'"seed": 1'),
    binary=lambda b: b'\xff\xfe\x00' + b,
    gone=None,
)


@both
def test_config_comes_back_from_the_checkpoint(job, here, tell, monkeypatch):
    "Whatever happened to config.json, the run is taken up with a line that names it, and ends as usual"
    line, _, first, *_ = jobs_of[job]
    stopped(monkeypatch, tell, line)
    file = here/'runs'/first/'config.json'
    whole, config = file.read_bytes(), run_config(here/'runs'/first)
    own = {k: v for k, v in config.items() if k not in runs.OUTSIDE}
    def damage(how):
        if broken[how]: file.write_bytes(broken[how](whole))
        else: file.unlink()
        assert not file.exists() or file.read_bytes() != whole, how
    for how in broken:
        for name in (None, first):
            damage(how)
            said = []
            run = claim_run(
                'runs',
                own,
                first[:-2],
                name,
                iters=config['iters'],
                paths=config['paths'],
                say=said.append,
            )
            run.close()
            assert run.resumed and run.name == first and file.read_bytes() == whole, how
            assert (
                f'runs/{first}/config.json is ' in said[0]
                and f'restored from runs/{first}/state/step-3' in said[0]
                and len(said[0]) < 600
            ), said
    damage('braces')
    code, said = tell(line)
    assert (
        code == 0
        and f'restored from runs/{first}/state/step-3' in said
        and f'runs/{first}: goes on at' in said
    )
    assert file.read_bytes() == whole and len(list((here/'runs').iterdir())) == 1


def test_config_that_cannot_come_back_is_named(here, tell, monkeypatch):
    stopped(monkeypatch, tell, distil, at=1)
    file = here/'runs/fashion16-1/config.json'
    file.write_text('{}')
    before = listing(here/'runs')
    code, said = tell(f'{distil} --name fashion16-1')
    assert (
        code == 2
        and 'runs/fashion16-1/config.json is damaged' in said
        and '--overwrite' in said
        and listing(here / 'runs') == before
    )
    code, said = tell(distil)
    assert (
        code == 0
        and 'left alone: runs/fashion16-1/config.json is damaged' in said
        and (here / 'runs/fashion16-2/metrics.json').exists()
    )
    assert tell(f'{distil} --name fashion16-1 --overwrite')[0] == 0


logs = dict(
    emptied=lambda b: b'',
    garbage=lambda b: bytes(range(256)),
    zeros=lambda b: bytes(200),
    other=lambda b: b'a,b\n1,2\n',
    short=lambda b: b[: b.index(b'6,')],
    digit=lambda b: b.replace(b'0.25', b'0.35'),
    heading=lambda b: b.partition(b'\n')[0],
    folder=None,
)


@pytest.mark.parametrize('how', logs)
def test_log_that_is_not_whole_is_put_aside(how, tmp_path):
    "Emptied, overwritten, cut, or one digit changed: it gets another name, and a line says so"
    columns, file, said = ('step', 'seconds', 'loss'), tmp_path/'log.csv', []
    log = CsvLog(file, columns)
    for i in (3, 6): log.add(dict(step=i, seconds=i*1.1, loss=i/12))
    mark = log.mark()
    data = logs[how] and logs[how](file.read_bytes())
    if data is None:
        file.unlink()
        file.mkdir()
    else:
        assert data != file.read_bytes()
        file.write_bytes(data)
    again = CsvLog(file, columns, 6, mark, said.append)
    assert (
        len(said) == 1
        and str(file) in said[0]
        and 'put aside as log-damaged.csv' in said[0]
        and len(said[0]) < 600
    )
    assert data is None or (tmp_path/'log-damaged.csv').read_bytes() == data
    again.add(dict(step=9, loss=1.))
    assert [r['step'] for r in read_log(file)] == dict(short=[3, 9], digit=[3, 6, 9]).get(how, [9])


@both
def test_log_is_put_aside_when_a_run_goes_on(job, here, tell, monkeypatch):
    line, _, first, *_ = jobs_of[job]
    stopped(monkeypatch, tell, line, at=8)
    file = here/'runs'/first/'log.csv'
    file.write_text('')
    code, said = tell(line)
    assert (
        code == 0
        and f'runs/{first}/log.csv holds 0 rows up to step 6, not the 2 that were written: put aside as log-damaged.csv'
        in said
    )
    assert [r['step'] for r in read_log(file)] == [9]


def test_log_that_is_gone_is_named(here, tell, monkeypatch):
    stopped(monkeypatch, tell, distil)
    (here/'runs/fashion16-1/log.csv').unlink()
    code, said = tell(distil)
    assert code == 0 and 'runs/fashion16-1/log.csv is missing' in said


def test_a_whole_log_is_taken_up_without_a_word(tmp_path):
    "Also with numbers that change their look when they are written again, and rows after the checkpoint"
    said = []
    log = CsvLog(tmp_path/'log.csv', ('step', 'seconds', 'loss'))
    for i in range(1, 5):
        log.add(dict(step=i, seconds=i*1.1, loss=[1234567.5, 1e-9, -0., 1e20][i-1]))
    mark, text = log.mark(), (tmp_path/'log.csv').read_text()
    log.add(dict(step=5, loss=1.))
    again = CsvLog(tmp_path/'log.csv', ('step', 'seconds', 'loss'), 4, mark, said.append)
    assert not said and again.mark() == mark and (tmp_path/'log.csv').read_text() == text
    for _ in range(2):
        (tmp_path/'log.csv').write_text('')
        CsvLog(tmp_path/'log.csv', ('step', 'seconds', 'loss'), 4, mark, said.append)
    assert {p.name for p in tmp_path.iterdir()} == {
        'log.csv',
        'log-damaged.csv',
        'log-damaged-2.csv',
    } and len(said) == 2


# -- one at a time --

def test_lock_of_a_file_that_is_gone(tmp_path):
    "Who opened the lock before its holder removed it does not hold the run: a third one may have made a new file"
    fcntl = pytest.importorskip('fcntl')
    first = claim_run(tmp_path, dict(a=1), name='x')
    late = os.open(tmp_path/'x'/'.lock', os.O_RDWR)  # the second process has come this far
    first.close()
    third = claim_run(tmp_path, dict(a=1), name='x')
    # it gets a lock, on a file that nobody else sees
    fcntl.flock(late, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not runs._same_file(late, tmp_path/'x'/'.lock')
    with pytest.raises(ValueError, match='another process'):
        claim_run(tmp_path, dict(a=1), name='x')
    os.close(late)
    third.close()
    assert not (tmp_path/'x'/'.lock').exists()


def test_second_process_asks_again(tmp_path, monkeypatch):
    "Between its opening and its locking the holder leaves: what is locked then is asked for once more"
    first, taken, seen = claim_run(tmp_path, dict(a=1), name='x'), runs._taken, []
    def slow(fd):
        if not seen: first.close()
        seen.append(fd)
        return taken(fd)
    monkeypatch.setattr(runs, '_taken', slow)
    second = claim_run(tmp_path, dict(a=1), name='x')
    assert len(seen) > 1 and runs._same_file(second._lock, tmp_path/'x'/'.lock')


def test_lock_of_another_is_not_removed(tmp_path):
    "A folder that was taken away and made anew has a lock of its own"
    import shutil
    first = claim_run(tmp_path, dict(a=1), name='x')
    shutil.rmtree(tmp_path/'x')
    second = claim_run(tmp_path, dict(a=1), name='x')
    first.close()
    assert (tmp_path/'x'/'.lock').exists()
    with pytest.raises(ValueError, match='another process'):
        claim_run(tmp_path, dict(a=1), name='x')
    second.close()


# -- files --

@both
def test_files_have_the_usual_rights(job, here, tell):
    "Every file of a run can be read by whom the umask lets"
    line, _, first, *_ = jobs_of[job]
    old = os.umask(0o022)
    try:
        assert tell(f'{line} --keep-state')[0] == 0
        (here/'plain').touch()
    finally: os.umask(old)
    usual = stat.S_IMODE((here/'plain').stat().st_mode)
    modes = {
        str(p.relative_to(here)): stat.S_IMODE(p.stat().st_mode)
        for p in (here / 'runs').rglob('*')
        if p.is_file()
    }
    assert len(modes) > 6 and set(modes.values()) == {usual}, modes


# -- what is no number --

@both
def test_nothing_is_exported_from_a_loss_that_is_none(job, here, tell, monkeypatch):
    line, loop, first, file, _ = jobs_of[job]
    f = getattr(room_of(loop), loop)
    def sick(*args, **kwargs):
        for i, log in enumerate(f(*args, **kwargs)):
            yield {k: v*float('nan') if i == 8 and 'loss' in k else v for k, v in log.items()}
    monkeypatch.setattr(room_of(loop), loop, sick)
    code, said = tell(line + (' --guard off' if job == 'distill' else ''))
    assert code == 2 and 'diverged at step 9' in said
    assert not (here/'runs'/first/file).exists() and not (here/'runs'/first/'metrics.json').exists()


@both
def test_nothing_is_exported_from_weights_that_are_none(job, here, tell, monkeypatch):
    "Broken after the last checkpoint was written"
    line, loop, first, file, _ = jobs_of[job]
    where = room_of(loop)
    f = where.follow
    def breaks(*args, **kwargs):
        seconds = f(*args, **kwargs)
        for net in nets: next(net.parameters()).data.view(-1)[0] = float('inf')
        return seconds
    nets, check = [], teacher_job.check_weights
    monkeypatch.setattr(
        teacher_job, 'check_weights', lambda d, step: nets.extend(d.values()) or check(d, step)
    )
    if job == 'distill':
        made = jobs.DMD2
        monkeypatch.setattr(
            jobs, 'DMD2', lambda *a, **k: [d := made(*a, **k), nets.append(d.ema.net)][0]
        )
    monkeypatch.setattr(where, 'follow', breaks)
    code, said = tell(line)
    assert code == 2 and 'not finite' in said and not (here/'runs'/first/file).exists()
