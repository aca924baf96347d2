"""A run of two processes survives, too: asked to leave, with a process killed or standing still,
the same command ends in the same bits"""
import hashlib, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from _nightly import nightly
from dmd2_nb.system.checkpoint import load_folder, steps

pytestmark = [
    pytest.mark.skipif(
        not Path('/proc/self/stat').exists() or not torch.distributed.is_available(),
        reason='processes are looked up in /proc',
    ),
    nightly,
]
ITERS, SILENCE = 300, 4
command = [
    sys.executable,
    '-m',
    'dmd2_nb.cli',
    'distill',
    'fashion16',
    *(
        '--device cpu --features pixels --batch 4 --eval-n 8 --save-every 14 --eval-every 0 --keep-state --nproc 2 '
        f'--iters {ITERS} --set warmup_fake=4 --set gan_start=3 --silence {SILENCE}'
    ).split(),
]


def children(pid):
    "Processes that a process has started, the oldest first"
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: parent = int((p/'stat').read_text().rpartition(')')[2].split()[1])
        except (OSError, ValueError): continue
        if parent == pid: found.append(int(p.name))
    return sorted(found)


def below(pid): return [o for c in children(pid) for o in (c, *below(c))]
def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError: return False


class Command:
    "The command in a folder; `ranks` once it trains"
    def __init__(self, folder, after=0):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        root = str(Path(__file__).resolve().parent.parent)
        env = os.environ | dict(
            OMP_NUM_THREADS='1',
            PYTHONPATH=os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]).strip(os.pathsep),
        )
        # of the run that it goes on from, which may have come further than was asked for
        had = self.rows()
        self.p = subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not after: return
        begun = time.time()
        while self.rows() < max(after, had+1) and self.p.poll() is None and time.time() < begun+100:
            time.sleep(0.02)
        assert self.p.poll() is None, self.p.communicate()
        start, = children(self.p.pid)
        self.all, self.ranks = below(self.p.pid), children(start)[:2]
    def rows(self):
        log = self.folder/'runs'/'fashion16-1'/'log.csv'
        return (
            int(
                (log.read_text().splitlines()[-1:] or ['step'])[0]
                .split(',')[0]
                .replace('step', '0')
                or 0
            )
            if log.exists()
            else 0
        )
    def end(self, timeout=100):
        "Exit code, what it said last, seconds; nothing that it started is left"
        begun = time.time()
        out, err = self.p.communicate(timeout=timeout)
        took = time.time()-begun
        while any(map(alive, getattr(self, 'all', ()))) and time.time() < begun+took+10:
            time.sleep(0.05)
        assert not [o for o in getattr(self, 'all', ()) if alive(o)], 'orphans'
        return self.p.returncode, err.strip(), took


def digest(folder):
    "Weights, whole state, log without its seconds, results"
    run = folder/'runs'/'fashion16-1'
    tensors, state = load_folder(steps(run/'state')[0])
    state['extra'].pop('seconds')
    h = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name, d in sorted(tensors.items()):
        if name == 'ranks': continue  # generators of the processes, not of the run
        for k, v in sorted(d.items()):
            h.update(f'{name} {k} {v.dtype}'.encode())
            h.update(v.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for line in (run/'log.csv').read_text().splitlines():
        cells = line.split(',')
        h.update(','.join(cells[:1]+cells[2:]).encode())
    h.update(
        json.dumps(json.loads((run / 'metrics.json').read_text())['rows'], sort_keys=True).encode()
    )
    return h.hexdigest()


def left(folder):
    return sorted(
        p.name
        for p in (folder / 'runs').rglob('*')
        if re.search(r'tmp|\.old|\.gone|\.lock', p.name)
    )


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    code, err, _ = Command(folder).end()
    assert (code, err) == (0, '')
    return digest(folder)


@pytest.fixture(scope='module')
def seen(tmp_path_factory, unbroken):
    """One run that is asked to leave twice, loses a process, has one that stands still, loses its
    parent, and at last may end"""
    folder, out = tmp_path_factory.mktemp('broken'), {}
    for name, after, act in (
        ('SIGTERM', 40, lambda c: c.p.send_signal(signal.SIGTERM)),
        ('SIGINT', 80, lambda c: c.p.send_signal(signal.SIGINT)),
        ('killed', 120, lambda c: os.kill(c.ranks[1], signal.SIGKILL)),
        ('still', 160, lambda c: os.kill(c.ranks[1], signal.SIGSTOP)),
        ('parent', 200, lambda c: os.kill(c.p.pid, signal.SIGKILL)),
    ):
        c = Command(folder, after)
        act(c)
        code, err, took = c.end()
        out[name] = dict(
            code=code,
            err=err,
            took=took,
            at=[int(p.name[5:]) for p in steps(folder / 'runs' / 'fashion16-1' / 'state')],
        )
    new, old = steps(folder/'runs'/'fashion16-1'/'state')
    file = sorted((new/'fake').glob('*.safetensors'))[-1]
    data = file.read_bytes()
    # and the newest checkpoint has a wrong bit
    file.write_bytes(data[:-9]+bytes([data[-9] ^ 4])+data[-8:])
    c = Command(folder)
    said, err = c.p.communicate(timeout=100)
    code = c.p.returncode
    return out | dict(
        damaged=dict(said=said, file=str(file.relative_to(new.parent)), old=old.name),
        end=dict(
            code=code,
            err=err,
            digest=digest(folder),
            left=left(folder),
            runs=len(list((folder / 'runs').iterdir())),
        ),
    )


def test_ends_in_the_same_bits(seen, unbroken):
    end = seen['end']
    assert (end['code'], end['err'], end['left'], end['runs']) == (0, '', [], 1)
    assert end['digest'] == unbroken


@pytest.mark.parametrize('name, code', [('SIGTERM', 143), ('SIGINT', 130)])
def test_asked_to_leave(seen, name, code):
    "One line for all processes, the documented exit code, and a checkpoint of that iteration"
    o = seen[name]
    assert o['code'] == code
    found = re.fullmatch(
        rf'dmd2_distill: stopped by {name} at iteration (\d+), which is saved; the same command '
        rf'goes on from the last checkpoint',
        o['err'],
    )
    assert found and int(found[1]) == o['at'][0], o


def test_killed_process(seen):
    "The run ends soon, with one line that names it"
    o = seen['killed']
    assert o['code'] == 2 and o['took'] < 45
    assert (
        o['err']
        == 'dmd2_distill: rank 1 died: signal SIGKILL; the same command goes on from the last checkpoint'
    ), o


def test_process_that_stands_still(seen):
    o = seen['still']
    # it was last heard of up to a second before
    assert o['code'] == 2 and SILENCE-2 < o['took'] < SILENCE+20
    assert (
        o['err']
        == (
            f'dmd2_distill: rank 1 has given no sign of life for {SILENCE} s (stopped, or cut '
            'off); the same command goes on from the last checkpoint'
        )
    ), o


def test_killed_parent(seen):
    "What it started leaves as well (`end` looks for that), and saves"
    assert seen['parent']['code'] == -9 and seen['parent']['at'][0] >= 50


def test_damaged_newest(seen):
    "A wrong bit in a piece of one process: the file is named, the checkpoint before is taken"
    o = seen['damaged']
    line = next(l for l in o['said'].splitlines() if 'cannot be used' in l)
    assert (
        f"{o['file']} is damaged (its sum differs)" in line and f"going on from {o['old']}" in line
    ), line


def test_no_card_is_asked_for_before_the_fork():
    "Processes that are forked could not use a GPU after that"
    code = (
        "import torch\ndef no(*a, **k): raise SystemExit('asked')\nfor n in ('is_available', "
        "'device_count', '_lazy_init', 'get_device_capability'): setattr(torch.cuda, n, "
        "no)\nimport dmd2_nb.cli, dmd2_nb.jobs, dmd2_nb.recipes, dmd2_nb.imagenet64"
    )
    assert not subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        env=os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent)),
    ).returncode
