"""A run survives: killed, asked to leave, out of disk or with a damaged checkpoint, the same
command ends in the same bits"""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

from _nightly import on
from dmd2_nb.system import atomic, checkpoint
from dmd2_nb.system.checkpoint import load_folder, newest, save_folder, save_step, steps
from dmd2_nb.system.tensors import read_tensors

posix = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the runs are forked')
both = pytest.mark.parametrize('job', ['distill', 'train_teacher'])


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    "What happened to the runs of _survive_work.py"
    folder = tmp_path_factory.mktemp('survive')
    work = Path(__file__).parent/'_survive_work.py'
    r = subprocess.run(
        [sys.executable, str(work), str(folder), 'all' if on else 'some'],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        timeout=3000,
    )
    assert not r.returncode, r.stderr[-3000:]
    return json.loads(r.stdout)


def kills(job):
    return [(kind, t) for kind in ('inside', 'others', 'times', 'storm') for t in job[kind]]


@posix
@both
def test_killed_runs_end_in_the_same_bits(seen, job):
    "Weights, optimisers, averages, random positions and log of each killed run have the sha256 of the unbroken one"
    job = seen[job]
    # two unbroken runs agree, so there is something to compare
    assert job['again']['digest'] == job['unbroken']
    for kind, t in kills(job):
        where = f"{kind} {t.get('event', t.get('at'))}"
        assert set(t.get('codes', [t.get('code')])) == {-9}, where
        assert t['digest'] == job['unbroken'], where
        assert t['runs'] == 1 and t['left'] == [], f"{where}: {t['left']}"


@posix
def test_kills_were_many_and_everywhere(seen):
    "At least twenty, in every part of a checkpoint's write and at all stages of a run"
    n = sum(
        len(t.get('codes', [0]))
        for job in ('distill', 'train_teacher')
        for _, t in kills(seen[job])
    )
    events = {t['event'] for t in seen['distill']['inside']}
    assert n >= (40 if on else 20)
    assert {
        'os.mkdir .step-15.tmp',
        'open state.json',
        'fsync state.json',
        'fsync .step-15.tmp',
        'os.rename .step-15.tmp',
        'fsync state',
        'os.rename step-5',
    } <= events
    assert sum(e.startswith('half a file') for e in events) == 7 and any(
        e.endswith('step-5.gone') for e in events
    )
    assert len({a for t in seen['distill']['times'] for a in t['at']}) >= 3


@posix
@both
@pytest.mark.parametrize('name, code', [('SIGTERM', 143), ('SIGINT', 130)])
def test_asked_to_leave(seen, job, name, code):
    "It finishes the iteration, saves, says one line, and the same command goes on from there"
    t = seen[job]['signals'][name]
    step = int(t['at'].removeprefix('step-'))
    assert t['code'] == code and 7 <= step < 12
    assert t['err'].splitlines() == [
        f'dmd2_{job}: stopped by {name} at iteration {step}, which is saved; the same command goes '
        'on from the last checkpoint'
    ]
    assert t['mid']['left'] == [] and t['mid']['steps'][0] == f'step-{step}'
    assert t['digest'] == seen[job]['unbroken'] and t['left'] == []


@posix
@pytest.mark.parametrize(
    'how, word',
    dict(
        cut='ema.safetensors is damaged',
        bit='ema.safetensors is damaged',
        gone='ema.safetensors is missing',
        state='state.json is damaged',
        empty='state.json is damaged',
    ).items(),
)
def test_damaged_newest(seen, how, word):
    "The warning names the file and what is taken instead; the end is the same"
    t = seen['damaged'][how]
    warning, then = t['said'].splitlines()[:2]
    assert (
        f"state/{t['new']} cannot be used" in warning
        and word in warning
        and f"going on from {t['old']}" in warning
    )
    assert then.endswith(f"goes on at iteration {t['old'].removeprefix('step-')}")
    assert t['digest'] == seen['distill']['unbroken'] and t['left'] == []


@posix
def test_full_disk(seen):
    "A disk with room for two and a half checkpoints: one line, both are whole, and with more room it goes on"
    t = seen['full']
    if t is None:
        pytest.skip(
            'no right to mount a small disk; test_full_anywhere in test_cli_refusals.py acts one by a limit'
        )
    assert (
        t['code'] == 2
        and 'state/step-15 could not be written (No space left on device)' in t['err']
        and len(t['err'].splitlines()) == 1
    )
    assert t['found'] == [10, 5] and t['mid']['left'] == []
    assert t['digest'] == seen['distill']['unbroken'] and t['left'] == []


def test_to_the_disk_before_the_name(tmp_path, monkeypatch):
    "Every file and the folder are synced before the rename, the parent after it"
    done, fsync, rename = [], atomic.fsync, Path.rename
    monkeypatch.setattr(
        atomic, 'fsync', lambda p: (done.append(('fsync', Path(p).name)), fsync(p))[1]
    )
    monkeypatch.setattr(
        Path,
        'rename',
        lambda p, q: (done.append(('rename', p.name, Path(q).name)), rename(p, q))[1],
    )
    save_step(
        tmp_path,
        7,
        lambda p: save_folder(p, dict(a=dict(w=torch.ones(2)), b=dict(w=torch.ones(2))), {}),
    )
    i = done.index(('rename', '.step-7.tmp', 'step-7'))
    assert {
        ('fsync', n) for n in ('a.safetensors', 'b.safetensors', 'state.json', '.step-7.tmp')
    } <= set(done[:i])
    assert done[i+1:] == [('fsync', tmp_path.name)]
    done.clear()
    atomic.write_text(tmp_path/'x.json', '{}')
    assert len(done) == 2 and 'tmp' in done[0][1] and done[1] == ('fsync', tmp_path.name)


def test_names_stay_inside(tmp_path):
    "Names that a file brings never become paths outside its folder"
    for bad in ('../a', '/a', 'a/b', '..', '', '.hidden'):
        with pytest.raises(ValueError, match='is no name for a file'):
            save_folder(tmp_path/'c', {bad: dict(w=torch.ones(1))}, {})
    assert list(tmp_path.iterdir()) == []
    save_folder(tmp_path/'c', dict(a=dict(w=torch.ones(1))), {})
    (tmp_path/'b.safetensors').write_bytes((tmp_path/'c'/'a.safetensors').read_bytes())
    state = json.loads((tmp_path/'c'/'state.json').read_text())
    for bad in ('../b.safetensors', str(tmp_path/'b.safetensors')):
        sums = {bad: state['sha256']['a.safetensors']}
        (tmp_path/'c'/'state.json').write_text(checkpoint._signed({}, sums))
        with pytest.raises(FileNotFoundError, match='c/b.safetensors is missing'):
            load_folder(tmp_path/'c')


def test_old_and_new_layout(tmp_path):
    "A folder that is a checkpoint itself, and one of steps; a step that is no number is none"
    save_folder(tmp_path/'one', dict(a=dict(w=torch.ones(1))), dict(step=1))
    for n in (9, 10):
        save_step(
            tmp_path / 'many',
            n,
            lambda p: save_folder(p, dict(a=dict(w=torch.ones(1))), dict(step=n)),
        )
    (tmp_path/'many'/'step-x').mkdir()
    assert (
        newest(tmp_path / 'one') == tmp_path / 'one'
        and newest(tmp_path / 'many').name == 'step-10'
        and newest(tmp_path / 'none') is None
    )
    assert [p.name for p in steps(tmp_path/'many')] == ['step-10', 'step-9']
    assert read_tensors(newest(tmp_path/'many')/'a.safetensors')[0]['w'].item() == 1
