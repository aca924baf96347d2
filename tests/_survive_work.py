"""Runs that are killed, asked to leave, or out of disk: what test_survive.py looks at.

    python tests/_survive_work.py FOLDER

One process imports everything and forks each run, so that a kill costs a second and not a start of
Python. It prints one line of JSON."""
import contextlib, hashlib, io, json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from dmd2_nb import cli, jobs, recipes, teacher_job
from dmd2_nb.system.checkpoint import load_folder, steps
from dmd2_nb.system.tensors import read_tensors
from dmd2_nb.weights import build_denoiser, save_denoiser

net = dict(
    net='UNet',
    args=dict(img_resolution=8, in_channels=1, label_dim=10, channels=[4], emb=8),
    sigma_data=0.6,
)
every = dict(log=4, show=0, save=5, eval=10)  # rows and checkpoints out of step
iters = 22
r = recipes.RECIPES['fashion16']
tiny = replace(
    r,
    net=net,
    config=replace(r.config, batch=8, warmup_fake=4, gan_start=3, levels=(10.0, 1.0)),
    iters=iters,
    teacher=r.teacher | dict(steps=iters, batch=8),
    sampler=dict(steps=2),
    features='pixels',
    n_eval=12,
    n_watch=12,
    every=every,
    teacher_every=every,
)
commands = dict(
    distill='distill --teacher {0}/teacher.safetensors --data {0}/good.npz --device cpu --keep-state',
    train_teacher='train_teacher --data {0}/good.npz --device cpu',
)
written = dict(distill='generator.safetensors', train_teacher='teacher.safetensors')


def prepare(folder):
    torch.manual_seed(0)
    save_denoiser(build_denoiser(net), folder/'teacher.safetensors', data='fashion16')
    x = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez(
        folder / 'good.npz',
        images=x,
        labels=np.arange(80) % 10,
        class_names=[f'kind {i}' for i in range(10)],
    )


def warm(folder):
    "Run both commands in this process, so that no fork has to import what they need"
    home = os.getcwd()
    (folder/'warm').mkdir()
    os.chdir(folder/'warm')
    with contextlib.redirect_stdout(io.StringIO()):
        codes = [cli.main(c.format(folder).split()) for c in commands.values()]
    os.chdir(home)
    assert codes == [0, 0]


def start(job, here, arm=None):
    "Fork a process that gives the command in the folder `here`"
    here.mkdir(exist_ok=True)
    pid = os.fork()
    if pid: return pid
    try:
        os.chdir(here)
        for n, name in ((1, 'out'), (2, 'err')):
            os.dup2(
                os.open(here.parent / f'{here.name}.{name}', os.O_CREAT | os.O_WRONLY | os.O_TRUNC),
                n,
            )
        if arm: arm()
        code = cli.main(commands[job].format(here.parent).split())
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    os._exit(code)


def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def said(here, name='err'): return (here.parent/f'{here.name}.{name}').read_text().strip()
def the_run(here): return next(here.glob('runs/fashion16-*'), here/'none')


def digest(job, here):
    "One sha256 of all that has to be the same: weights, whole state, log without its seconds"
    h, run = hashlib.sha256(), the_run(here)
    parts = {'file': read_tensors(run/written[job])[0]}
    if (run/'state').exists():
        tensors, state = load_folder(steps(run/'state')[0])
        # of the process, not of the run
        parts |= {k: v for k, v in tensors.items() if k != 'random'}
        state['extra'].pop('seconds')
        # The sum of the log holds its seconds, which always differ: it has to be this log's own
        assert (
            state['extra']['rows'].pop('sha256')
            == hashlib.sha256((run / 'log.csv').read_bytes()).hexdigest()
        )
        h.update(json.dumps(state, sort_keys=True).encode())
    for name, d in sorted(parts.items()):
        for k, v in sorted(d.items()):
            h.update(f'{name} {k} {v.dtype} {tuple(v.shape)}'.encode())
            h.update(v.contiguous().numpy().tobytes())
    for line in (run/'log.csv').read_text().splitlines():
        cells = line.split(',')
        h.update(','.join(cells[:1]+cells[2:]).encode())
    h.update(
        json.dumps(json.loads((run / 'metrics.json').read_text())['rows'], sort_keys=True).encode()
    )
    return h.hexdigest()


def whole(here):
    "The names that are in the folders, and that only one run was begun"
    run = the_run(here)
    left = [
        str(p.relative_to(here))
        for p in here.rglob('*')
        if any(s in p.name for s in ('tmp', '.old', '.gone', '.lock'))
    ]
    return dict(
        runs=len(list((here / 'runs').iterdir())),
        left=left,
        steps=[p.name for p in steps(run / 'state')],
    )


class Killer:
    "Kills its process at the n-th thing that is done to the disk below the runs' folder; without n it counts them"
    def __init__(self, n=None, half=False):
        self.n, self.half, self.seen, self.events = n, half, 0, []
    def __call__(self):
        sys.addaudithook(self.hook)
        fsync, from_safetensors = os.fsync, __import__('safetensors.torch').torch
        save_file = from_safetensors.save_file
        def synced(fd):
            self.step(
                'fsync',
                os.readlink(f'/proc/self/fd/{fd}') if os.path.exists('/proc/self/fd') else 'runs',
            )
            fsync(fd)
        def saved(tensors, path, **kw):
            save_file(tensors, path, **kw)
            if self.step('half a file', str(path), last=False):
                os.truncate(path, os.path.getsize(path)//2)
                self.die()
        os.fsync, from_safetensors.save_file = synced, saved
    def hook(self, event, args):
        if event in (
            'open',
            'os.rename',
            'os.mkdir',
            'os.rmdir',
            'os.remove',
            'os.truncate',
        ):
            if event != 'open' or (
                len(args) > 2 and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                self.step(event, str(args[0]))
    def step(self, what, path, last=True):
        if 'runs' not in path and path != 'log.csv' and 'step-' not in path and 'state' not in path:
            return False
        self.seen += 1
        if self.n is None:
            self.events.append(f'{what} {Path(path).name}')
            return False
        if self.seen == self.n:
            if last: self.die()
            return True
        return False
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(9)


def count(job, here):
    "What an unbroken run does to the disk, in order"
    killer = Killer()
    def arm():
        killer()
        end = cli.main
        def main(argv):
            code = end(argv)
            (here.parent/f'{here.name}.events').write_text(json.dumps(killer.events))
            return code
        cli.main = main
    assert wait(start(job, here, arm)) == 0, said(here)
    return json.loads((here.parent/f'{here.name}.events').read_text())


def finish(job, here):
    "Give the same command again until it ends by itself"
    code = wait(start(job, here))
    assert code == 0, f'{code}: {said(here)}'
    return dict(digest=digest(job, here), **whole(here))


def killed_inside(job, folder, events, choose):
    "Killed at chosen events of the run"
    out = []
    for n in choose:
        here = folder/f'{job}-at-{n}'
        code = wait(start(job, here, Killer(n)))
        out.append(dict(event=events[n-1], code=code, **finish(job, here)))
        shutil.rmtree(here)
    return out


def ticking(pipe, pause=0.):
    "Tells the other end of a pipe of each iteration"
    def arm():
        f = {o: o.follow for o in (jobs, teacher_job)}
        def ticks(logs):
            for o in logs:
                os.write(pipe, b'.')
                if pause: time.sleep(pause)
                yield o
        def ticking(o): return lambda logs, *args, **kwargs: f[o](ticks(logs), *args, **kwargs)
        for o in f: o.follow = ticking(o)
    return arm


def begun(job, here, n, pause=0.):
    "Start, and wait for iteration `n` of this process; its number, or None where it ended before"
    get, put = os.pipe()
    pid = start(job, here, ticking(put, pause))
    os.close(put)
    for _ in range(n):
        if not os.read(get, 1): break
    os.close(get)
    return pid


def killed_any_time(job, folder, n, dice, storm=1):
    "Killed at random moments of random iterations, `storm` times before it may end"
    out = []
    for i in range(n):
        here, codes, at = folder/f'{job}-time-{i}', [], []
        while len(codes) < storm:
            pid = begun(job, here, dice.randint(1, (iters-1)//storm))
            time.sleep(dice.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            codes.append(wait(pid))
            at.append(
                steps(the_run(here) / 'state')[0].name if steps(the_run(here) / 'state') else 'none'
            )
        out.append(dict(codes=codes, at=at, **finish(job, here)))
        shutil.rmtree(here)
    return out


def asked(job, folder, name):
    "Asked to leave by a signal while it trains"
    here = folder/f'{job}-{name}'
    pid = begun(job, here, 7, pause=0.02)
    os.kill(pid, getattr(signal, name))
    code = wait(pid)
    return dict(
        code=code,
        err=said(here),
        at=steps(the_run(here) / 'state')[0].name,
        mid=whole(here),
        **finish(job, here),
    )


def damaged(job, folder, how, events):
    "The newest checkpoint is damaged; the one before is taken"
    here = folder/f'{job}-{how}'
    # killed after the third checkpoint is there
    third = [i for i, e in enumerate(events) if e == 'os.rename .step-15.tmp'][0]+2
    wait(start(job, here, Killer(third)))
    new, old = steps(the_run(here)/'state')[:2]
    file = sorted(new.glob('*.safetensors'))[0]
    data = file.read_bytes()
    if how == 'cut': file.write_bytes(data[:-9])
    elif how == 'bit': file.write_bytes(data[:-9]+bytes([data[-9] ^ 4])+data[-8:])
    elif how == 'gone': file.unlink()
    elif how == 'state':
        (new / 'state.json').write_text(
            (new / 'state.json').read_text().replace('"step": 15', '"step": 16')
        )
    elif how == 'empty': (new/'state.json').write_text('')
    end = finish(job, here)
    return dict(new=new.name, old=old.name, said=said(here, 'out'), **end)


def full(job, folder):
    "A disk with room for two checkpoints and a half"
    size = sum(
        p.stat().st_blocks * 512
        for p in steps(the_run(folder / f'{job}-unbroken') / 'state')[0].rglob('*')
    )
    here = folder/f'{job}-full'
    here.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={int(2.5 * size) + 8 * 4096}', 'tmpfs', str(here)],
        capture_output=True,
    ).returncode:
        return None
    try:
        code = wait(start(job, here))
        err, mid, found = (
            said(here),
            whole(here),
            [load_folder(p)[1]['step'] for p in steps(the_run(here) / 'state')],
        )
        subprocess.run(['mount', '-o', 'remount,size=64m', str(here)], check=True)
        return dict(code=code, err=err, mid=mid, found=found, **finish(job, here))
    finally: subprocess.run(['umount', str(here)], check=True)


# Moments inside the write of a checkpoint that CI kills at; the night and `reliability.py` take every one
KINDS = (
    'os.mkdir .step-15.tmp',
    'half a file',
    'open state.json',
    'fsync state',
    'fsync .step-15.tmp',
    'os.rename .step-15.tmp',
    'os.rename step-5',
)


def chosen(event): return event.startswith(KINDS) or event.endswith('step-5.gone')


def main(folder, every=True, seed=0):
    "Everything, as JSON; without `every` about half of the kills"
    folder, dice, out = Path(folder), random.Random(seed), {}
    prepare(folder)
    warm(folder)
    for job in commands:
        begun = time.perf_counter()
        events, few = count(job, folder/f'{job}-unbroken'), job == 'train_teacher'
        out[job] = dict(
            unbroken=digest(job, folder / f'{job}-unbroken'),
            events=events,
            again=finish(job, folder / f'{job}-again'),
        )
        inside = range(
            events.index('os.mkdir .step-15.tmp') + 1,
            max(i for i, e in enumerate(events) if 'step-5.gone' in e) + 2,
        )
        others = range(
            1, 1 + max(i for i, e in enumerate(events) if e.startswith('os.rename .metrics'))
        )  # then it is finished
        if few: inside = dice.sample(inside, 3)
        elif not every: inside = [n for n in inside if chosen(events[n-1])]
        out[job] |= dict(
            inside=killed_inside(job, folder, events, inside),
            others=killed_inside(job, folder, events, dice.sample(others, 4 if every and not few else 2)),
            times=killed_any_time(job, folder, 2 if few else 6 if every else 3, dice),
            storm=killed_any_time(job, folder, 1, dice, storm=2 if few else 4),
        )
        out[job] |= dict(
            signals={n: asked(job, folder, n) for n in ('SIGTERM', 'SIGINT')},
            seconds=time.perf_counter() - begun,
        )
    out['damaged'] = {
        how: damaged('distill', folder, how, out['distill']['events'])
        for how in ('cut', 'bit', 'gone', 'state', 'empty')
    }
    out['full'] = full('distill', folder)
    return out


if __name__ == '__main__':
    torch.set_num_threads(1)  # threads do not survive a fork
    recipes.RECIPES['fashion16'], cli.PICTURES = tiny, {}
    print(json.dumps(main(sys.argv[1], every=sys.argv[2:]!=['some'])))
