"""A long run: flat memory, no open files left, and a log that costs nothing to speak of (NIGHTLY=1
for the 10,000 iterations)"""
import json, os, subprocess, sys
from pathlib import Path

import pytest

from _nightly import nightly

pytestmark = pytest.mark.skipif(
    not Path('/proc/self/statm').exists(), reason='memory is read from /proc'
)


def long(tmp_path, n, warm, **changes):
    "What _long_work.py saw"
    r = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / '_long_work.py'),
            str(n),
            str(warm),
            str(tmp_path),
            json.dumps(changes),
        ],
        capture_output=True,
        text=True,
        timeout=3600,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    assert not r.returncode, r.stderr[-2000:]
    return json.loads(r.stdout)


@pytest.mark.parametrize('n, warm', [(1500, 500), pytest.param(10_000, 2000, marks=nightly)])
def test_flat_memory(tmp_path, n, warm):
    "Less than 1 % more memory after the warm-up, as many open files at the end, two checkpoints"
    out = long(tmp_path, n, warm)
    assert out['growth'] < 0.01, out['seen']
    assert out['files'][1] <= out['files'][0], out['seen']
    assert out['steps'] == [f'step-{n}', f'step-{n-500}']


def test_logger_cost(tmp_path):
    """Rows, bar and log file take less than 2 % of a run whose iterations take as long as the
    smallest recipe's (batch 2048 in the plane)"""
    out = long(tmp_path, 300, 100, batch=2048)
    assert out['logger'] < 0.02, out


def test_watching_cost(tmp_path):
    """Guard, log and dashboard together, in a run in the plane whose iterations take 3 ms: measured
    2 %, and not half as much again; the median over blocks"""
    r = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / 'gpu_guard_cost.py'),
            '--recipe',
            'toy',
            '--device',
            'cpu',
            '--length',
            '150',
            '--rounds',
            '9',
            '--check',
            '60',
            '--out',
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    assert not r.returncode, r.stderr[-2000:]
    out = json.loads((tmp_path/'guard_cost.json').read_text())['toy cpu']
    assert out['same_weights'] and 0.001 < out['share']['guard'] < 0.03, out
