"""Files made to cost memory or time: pickles of the reader's own instructions, colliding keys,
archives whose entries lie, damaged LMDB pages"""
import json, os, subprocess, sys
from pathlib import Path

import pytest

from _nightly import on

pytest.importorskip('lmdb')
N = 16_000 if on else 320
MOST_MIB, MOST_SECONDS = 1536, 20


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    "What `_bombs_work.py` measured in a process of its own"
    folder = tmp_path_factory.mktemp('bombs')
    work = [sys.executable, str(Path(__file__).parent/'_bombs_work.py'), str(folder), str(N)]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    r = subprocess.run(work, capture_output=True, text=True, timeout=3000, env=env)
    assert not r.returncode, r.stderr[-2000:]  # a crash or a bus error would show here
    return json.loads(r.stdout.splitlines()[-1])  # before it: what readers say of what they leave out


def test_each_ends_in_a_value_or_a_line(seen):
    "No other error, no line of more than 600 characters"
    assert seen['n_wrong'] == 0, seen['wrong']
    assert seen['n'] > N


@pytest.mark.parametrize('strategy', ['grammar', 'colliding', 'pages', 'archives'])
def test_memory_and_time_are_bounded(seen, strategy):
    "1.5 GiB over what the process had before, 20 seconds an input"
    o = seen['strategies'][strategy]
    assert o['refused'] and (o['read'] or strategy == 'colliding'), 'an input that tries nothing'
    assert o['most_mib'] < MOST_MIB, o
    assert o['slowest'] < MOST_SECONDS, o
