"""What a user can cause ends in one line and exit code 2; what only the program can cause shows
itself; pictures never cost a run"""
import os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmd2_nb import cli, jobs, recipes, sheets, teacher_job
from dmd2_nb.weights import build_denoiser, save_denoiser

net = dict(
    net='UNet',
    args=dict(img_resolution=8, in_channels=1, label_dim=10, channels=[4], emb=8),
    sigma_data=0.6,
)
distil = 'distill --teacher teacher.safetensors --data good.npz --device cpu'
teach = 'train_teacher --data good.npz --device cpu'


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a tiny teacher and images; the recipe takes a second"
    r = recipes.RECIPES['fashion16']
    every = dict(log=10, show=0, save=3, eval=0)
    tiny = replace(
        r,
        net=net,
        config=replace(r.config, batch=8, warmup_fake=2, gan_start=1),
        iters=8,
        teacher=r.teacher | dict(steps=8, batch=8),
        sampler=dict(steps=2),
        features='pixels',
        n_eval=12,
        n_watch=12,
        every=every,
        teacher_every=every,
    )
    monkeypatch.setitem(recipes.RECIPES, 'fashion16', tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DMD2_NB_DEBUG', raising=False)
    torch.manual_seed(0)
    save_denoiser(build_denoiser(net), tmp_path/'teacher.safetensors', data='fashion16')
    x = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.savez(
        tmp_path / 'good.npz',
        images=x,
        labels=np.arange(80) % 10,
        class_names=[f'kind {i}' for i in range(10)],
    )
    return tmp_path


def listing(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def refused(line, capsys, *words, folder=None):
    "The one line with which a command ends; nothing is left behind"
    capsys.readouterr()
    before = listing(Path.cwd())
    code = cli.main(line.split())
    out, err = capsys.readouterr()
    lines = err.lstrip('\r').splitlines()
    assert (
        code == 2 and len(lines) == 1 and len(lines[0]) <= 600 and lines[0].startswith('dmd2_')
    ), out + err
    for w in words: assert w in err, err
    if folder is None: assert listing(Path.cwd()) == before
    return err


values = dict(
    betas=(f'{distil} --set betas_g=0.5', 'betas_g', '0.5'),
    betas_fake=(f'{distil} --set betas_fake=0.9,1.5', 'betas_fake', '1.5'),
    bins_inf=(f'{distil} --set dm_bins=inf', 'dm_bins', 'inf'),
    bins_one=(f'{distil} --set gan_bins=nan,3', 'gan_bins', 'nan'),
    rate=(f'{distil} --set lr_g=1e300', 'lr_g', '1e300'),
    rate_fake=(f'{distil} --set lr_fake=1e39', 'lr_fake', '1e39'),
    teacher_rate=(f'{teach} --lr 1e300', '--lr', '1e+300'),
    teacher_rate_nan=(f'{teach} --lr nan', '--lr', 'nan'),
    teacher_rate_negative=(f'{teach} --lr=-1', '--lr', '-1'),
    half_ttur=(f'{distil} --set ttur=2.5', 'ttur', '2.5'),
    silence=(f'{distil} --silence nan', '--silence', 'nan'),
    nproc=(f'{distil} --nproc 100000', '--nproc', '100000'),
    iters=(f'{distil} --iters 99999999999999999999', '--iters', '99999999999999999999'),
    steps=(f'{teach} --steps 99999999999999999999', '--steps', '99999999999999999999'),
    save_every=(
        f'{distil} --save-every 99999999999999999999',
        '--save-every',
        '99999999999999999999',
    ),
    sample_n=('sample teacher.safetensors --n 1000000000', '--n 1000000000', 'GiB'),
    sample_n_npz=('sample teacher.safetensors --n 1000000000 --out a.npz', '--n 1000000000', 'GiB'),
    sample_n_long=(
        'sample teacher.safetensors --n 99999999999999999999',
        '--n',
        '99999999999999999999',
    ),
    sample_n_sheet=('sample teacher.safetensors --n 100000', '100000 samples', '.npz'),
    scale=('sample teacher.safetensors --scale 100000', '--scale 100000', 'pixels'),
    scale_long=(
        'sample teacher.safetensors --scale 99999999999999999999',
        '--scale',
        '99999999999999999999',
    ),
    sample_steps=('sample teacher.safetensors --steps 1000000000', '--steps', '1000000000'),
    sample_seed=(
        'sample teacher.safetensors --seed 99999999999999999999',
        '--seed 99999999999999999999',
        '19 digits',
    ),
    distil_seed=(f'{distil} --seed 99999999999999999999', '--seed 99999999999999999999'),
    distil_seed_set=(f'{distil} --set seed=99999999999999999999', 'seed', '9999999999'),
    teacher_seed=(f'{teach} --seed -99999999999999999999', '--seed -99999999999999999999'),
    evaluate_seed=(
        'evaluate teacher.safetensors --data good.npz --seeds 1,99999999999999999999',
        '--seeds 99999999999999999999',
    ),
    evaluate_n=(
        'evaluate teacher.safetensors --data good.npz --n 1000000000000',
        '--n 1000000000000',
        'GiB',
    ),
    batch=(f'{distil} --batch 1000000000', '--batch 1000000000', 'GiB'),
    batch_teacher=(f'{teach} --batch 1000000000', '--batch 1000000000', 'GiB'),
    eval_n=(f'{distil} --eval-n 10000000000', '--eval-n 10000000000', 'GiB'),
    prepare_size=('prepare . a.zip --size 1000000000', '--size', '1000000000'),
    prepare_workers=('prepare . a.zip --workers -1', '--workers', '-1'),
    **{
        f'device_{d}': (f'{c} --device {d}', f"'{d}'")
        for d in ('meta', 'vulkan', 'cuda:99', 'cpu:x')
        for c in (
            ['sample teacher.safetensors'] if d != 'meta' else [teach.replace(' --device cpu', '')]
        )
    },
    device_meta_sample=('sample teacher.safetensors --device meta', "'meta'"),
    device_meta_distil=(distil.replace('cpu', 'meta'), "'meta'"),
    device_meta_evaluate=(
        'evaluate teacher.safetensors --data good.npz --n 16 --device meta',
        "'meta'",
    ),
)


@pytest.mark.parametrize('name', values)
def test_values(name, here, capsys):
    line, *words = values[name]
    refused(line, capsys, *words)


def test_negative_seeds_are_seeds(here, capsys, monkeypatch):
    "They work everywhere, and give other samples than their absolute values"
    monkeypatch.setattr(cli, 'PICTURES', {})
    for s in (-1, 1):
        assert (
            cli.main(f'sample teacher.safetensors --seed {s} --n 4 --out seed{s}.npz'.split()) == 0
        )
    assert (np.load('seed-1.npz')['images'] != np.load('seed1.npz')['images']).any()
    assert (
        cli.main(f'{distil} --seed -3'.split()) == 0 and cli.main(f'{teach} --seed -3'.split()) == 0
    )
    assert cli.main('evaluate teacher.safetensors --data good.npz --n 12 --seeds=-1'.split()) == 0


@pytest.mark.parametrize('what', ['bytes', 'text', 'number'])
def test_npz_whose_images_are_no_array(what, here, capsys):
    "An entry of that name which is something else than images"
    import zipfile
    if what == 'number': np.savez('odd.npz', images=5)
    else:
        with zipfile.ZipFile('odd.npz', 'w') as z:
            z.writestr('images.npy' if what == 'bytes' else 'images', b'these are no images')
    refused(distil.replace('good', 'odd'), capsys, 'odd.npz')
    refused(teach.replace('good', 'odd'), capsys, 'odd.npz')
    refused('evaluate good.npz --data odd.npz', capsys, 'odd.npz')


# -- memory --

class NoRoom:
    "Words with which PyTorch, NumPy and the system say that there is none"
    cuda = torch.OutOfMemoryError(
        'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB '
        'of which 1.2 GiB is free.'
    )
    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    )
    driver = RuntimeError(
        'CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported'
    )
    numpy = MemoryError('Unable to allocate 931. GiB for an array')
    python = MemoryError()
    thread = RuntimeError("can't start new thread")
    system = OSError(12, 'Cannot allocate memory')
room = {k: v for k, v in vars(NoRoom).items() if isinstance(v, Exception)}


@pytest.mark.parametrize('kind', room)
def test_no_memory(kind, here, capsys, monkeypatch):
    "One line with what needs less, for each command its own"
    def full(*args, **kwargs): raise room[kind]
    monkeypatch.setattr(jobs, 'train', full)
    refused(
        distil, capsys, 'dmd2_distill: not enough memory', '--accum 2', '--batch', folder='stays'
    )
    monkeypatch.setattr(teacher_job, 'train_teacher', full)
    refused(
        teach, capsys, 'dmd2_train_teacher: not enough memory', 'smaller --batch', folder='stays'
    )
    monkeypatch.setattr(cli, 'save_sheet', full)
    refused('sample teacher.safetensors', capsys, 'dmd2_sample: not enough memory', '--n')


def test_limit_of_memory(here, capsys):
    "A limit of the system counts, in a process of its own"
    pytest.importorskip('resource')
    code = ("import resource, sys; from dmd2_nb import cli, jobs, evaluate\n"
            "used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used+300*2**20,)*2)\n"
            "sys.exit(cli.main('sample teacher.safetensors --n 3000000 --out a.npz'.split()))")
    if not sys.platform.startswith('linux'):
        pytest.skip('Linux counts the memory of a process in /proc')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (
        r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and '--n 3000000' in r.stderr
    ), r.stderr
    assert not (here/'a.npz').exists()


# -- whose fault --

@pytest.mark.parametrize(
    'error',
    [
        TypeError("f() missing 1 required positional argument: 'x'"),
        AttributeError("'NoneType' object has no attribute 'x'"),
        KeyError('x'),
        IndexError('x'),
        ZeroDivisionError('division by zero'),
        AssertionError(),
        RuntimeError('mat1 and mat2 shapes cannot be multiplied'),
        NotImplementedError('x'),
    ],
    ids=lambda e: type(e).__name__,
)
def test_mistakes_of_the_program_show_themselves(error, here, monkeypatch):
    "In training, sampling and measuring alike"
    def wrong(*args, **kwargs): raise error
    monkeypatch.setattr(jobs, 'prepare', wrong)
    with pytest.raises(type(error)): cli.main(distil.split())
    monkeypatch.setattr(jobs, 'open_model', wrong)
    with pytest.raises(type(error)): cli.main('sample teacher.safetensors'.split())
    monkeypatch.setattr(teacher_job, 'open_data', wrong)
    with pytest.raises(type(error)): cli.main(teach.split())


@pytest.mark.parametrize(
    'error',
    [
        ValueError('bad\n value'),
        OSError('no such disk'),
        ImportError('no module'),
        OverflowError('int too large'),
        PermissionError(13, 'Permission denied', 'x'),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_a_user_can_cause(error, here, capsys, monkeypatch):
    def wrong(*args, **kwargs): raise error
    monkeypatch.setattr(jobs, 'prepare', wrong)
    refused(distil, capsys, ' '.join(str(error).split()))


# -- pictures --

def test_a_single_row_of_the_log(here, capsys):
    "So short a run that its log has one row, as `--iters 8 --set warmup_fake=3` of fashion16: it is drawn as points"
    assert (
        cli.main(
            f'{distil} --iters 8 --batch 4 --eval-n 12 --eval-every 0 --set warmup_fake=3'.split()
        )
        == 0
    )
    assert {'generator.safetensors', 'metrics.json', 'curves.png', 'samples.png'} <= {
        p.name for p in (here / 'runs' / 'fashion16-1').iterdir()
    }
    assert cli.main(f'{teach} --steps 3'.split()) == 0
    assert {'teacher.safetensors', 'metrics.json', 'curves.png', 'samples.png'} <= {
        p.name for p in (here / 'runs' / 'fashion16-teacher-1').iterdir()
    }


def test_curves_of_nothing(tmp_path):
    sheets.draw_curves(tmp_path/'a.png', [], 'loss kid')
    sheets.draw_curves(tmp_path/'a.png', [dict(step=1, other=2.)], 'loss kid')
    assert not list(tmp_path.iterdir())
    sheets.draw_curves(tmp_path/'a.png', [dict(step=1, kid=-0.1)], 'loss kid')
    assert (tmp_path/'a.png').exists()


@pytest.mark.parametrize('name', ['grid', 'curves', 'pairs'])
@pytest.mark.parametrize('job', ['distill', 'train_teacher'])
def test_a_picture_that_fails(name, job, here, capsys, monkeypatch):
    "Whatever goes wrong with it, the run is finished, and one line says which picture there is none of"
    def wrong(*args, **kwargs): raise ZeroDivisionError('float division\nby zero')
    monkeypatch.setattr(cli, 'PICTURES', cli.PICTURES | {name: wrong})
    r = recipes.RECIPES['fashion16']
    monkeypatch.setitem(
        recipes.RECIPES,
        'fashion16',
        replace(r, every=r.every | dict(show=4), teacher_every=r.teacher_every | dict(show=4)),
    )
    capsys.readouterr()
    assert cli.main((distil if job == 'distill' else teach).split()) == 0
    out, err = capsys.readouterr()
    folder, = (here/'runs').iterdir()
    weights = 'generator' if job == 'distill' else 'teacher'
    assert (
        (folder / f'{weights}.safetensors').exists()
        and (folder / 'metrics.json').exists()
        and not (folder / 'state').exists()
        and not (folder / '.lock').exists()
    )
    if (job, name) != ('train_teacher', 'pairs'):
        assert (
            'is not drawn (ZeroDivisionError: float division by zero)' in out
            and 'Traceback' not in out + err
        )


def test_precious_things_are_there_before_pictures(here, monkeypatch):
    seen = []
    def look(path, *args): seen.append({p.name for p in path.parent.iterdir()})
    monkeypatch.setattr(cli, 'PICTURES', dict(curves=look, pairs=look, grid=look))
    assert cli.main(distil.split()) == 0 and cli.main(teach.split()) == 0
    assert len(seen) == 4 and all(
        'metrics.json' in s and {'generator.safetensors', 'teacher.safetensors'} & s for s in seen
    )


@pytest.mark.parametrize(
    'backend',
    [
        'module://matplotlib_inline.backend_inline',
        'module://there.is.no.such.module',
        'nonsense',
        'TkAgg',
    ],
)
def test_backend_of_the_surroundings(backend, tmp_path):
    "What MPLBACKEND says is for others: the commands draw with Agg, and leave the variable as it is"
    code = (
        "import torch, os; from dmd2_nb import sheets; from dmd2_nb.images import fashion16; d = fashion16()\n"
        "sheets.draw_curves('curves.png', [dict(step=i, loss=1/i, kid=1/i) for i in (1, 2, 3)], 'loss kid')\n"
        "sheets.draw_grid('grid.png', d.images[:20], d, d.labels[:20])\n"
        "sheets.draw_pairs('pairs.png', (d.images[:20], d.images[20:40]), d, d.labels[:20], (8, 1))\n"
        f"assert os.environ['MPLBACKEND'] == {backend!r}\n"
        "import sys; assert 'matplotlib.pyplot' not in sys.modules"
    )
    r = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env=os.environ | dict(MPLBACKEND=backend),
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert {p.name for p in tmp_path.iterdir()} == {'curves.png', 'grid.png', 'pairs.png'}


# -- names --

def test_names_of_the_commands(here):
    "Each command under the name it has in a shell, beside the `_main` that the shell calls"
    from dmd2_nb.cli import distill, evaluate, prepare, sample, train_teacher
    for f, name in (
        (distill, 'distill'),
        (evaluate, 'evaluate'),
        (prepare, 'prepare'),
        (sample, 'sample'),
        (train_teacher, 'train_teacher'),
    ):
        assert f is getattr(cli, f'{name}_main') is cli.COMMANDS[name]
    assert sample('teacher.safetensors --n 2 --out a.npz'.split()) == 0 and np.load('a.npz')[
        'images'
    ].shape == (2, 1, 8, 8)
