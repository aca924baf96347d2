"What a user gets: the README's lines, the wheel, its data and scripts in a clean environment"
import base64, configparser, hashlib, json, os, re, shutil, subprocess, sys, sysconfig, venv, zipfile
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {
    k.removesuffix('_requirements'): v.split()
    for k, v in cfg.items()
    if k.endswith('_requirements')
}
scripts = dict(o.split('=') for o in cfg['console_scripts'].split())
has_cli = (root/'nbs'/'90_cli.ipynb').exists()
max_wheel, max_tracked = 25_000_000, 45_000_000


def bare(requirement):
    return re.sub(r'[-_.]+', '-', re.split(r'[<>=!~;\[ ]', requirement)[0]).lower()
def blocks():
    return re.findall(
        r'^```bash\n(.*?)^```$', (root / 'README.md').read_text(encoding='utf-8'), re.M | re.S
    )


def test_tracked_files_fit():
    "All that git tracks, so that it can be sent to a GPU together with wheels and data"
    if not (root/'.git').exists(): pytest.skip('no git checkout')
    names = (
        subprocess.run(['git', 'ls-files', '-z'], cwd=root, capture_output=True, check=True)
        .stdout.decode()
        .split('\0')
    )
    size = sum((root/n).stat().st_size for n in names if n and (root/n).is_file())
    assert 1_000_000 < size < max_tracked, f'{size/1e6:.1f} MB'


# README and requirements

def test_readme_has_two_set_up_lines():
    "One does all set-up and the main job, one all set-up and the tests; each is one line in a fresh clone"
    job, tests = blocks()[:2]
    for line in (job, tests):
        assert line.count('\n') == 1 and line.startswith('python3 -m venv .venv && ')
        assert '-c constraints.txt' in line and not re.search(r'[;|]|sudo|git ', line)
    assert job.rstrip().endswith('.venv/bin/dmd2_distill')
    assert "'.[all]'" in tests and tests.rstrip().endswith('.venv/bin/python tests/run.py')
    assert sum('venv .venv' in b for b in blocks()) == 2, 'exactly two set-up commands'


def test_ci_runs_the_second_line():
    "The line is taken from the README when CI runs, not kept a second time"
    awk = re.search(r"awk '(.+)' README.md", (root/'.ci'/'run').read_text(encoding='utf-8'))[1]
    out = subprocess.run(
        ['awk', awk, 'README.md'], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert out == blocks()[1]


def test_readme_keeps_step_with_index():
    "Same title and promise, same set-up lines; what it links to exists"
    text = (root/'README.md').read_text(encoding='utf-8')
    cells = json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    index = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert re.search(r'^# .+', text, re.M)[0] == re.search(r'^# .+', index, re.M)[0]
    assert re.search(r'^> .+', text, re.M)[0] == re.search(r'^> .+', index, re.M)[0]
    for line in blocks()[:2]: assert line.strip() in index
    for link in re.findall(r'\]\(([^)#\s]+)', text):
        if not re.match(r'\w+:', link): assert (root/link).exists(), f'README links to {link}'
    assert re.search(r'!\[[^\]]*\]\(', text), 'no picture'
    code = ''.join(
        line for c in cells if c['cell_type'] == 'code' for line in (*c['source'], '\n')
    ).splitlines()
    snippet = re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S)[-1]
    assert not set(snippet.splitlines()) - set(code), (
        'the last Python example of the README is one that index runs'
    )


@pytest.mark.parametrize(
    'notebook, words, name, shown',
    [
        ('index', 'clouds.items()', 'index.png', 'README.md'),
        ('14_distill', 'g,c = axes_row(', 'turns.png', 'nbs/index.ipynb'),
        ('26_emoji_dmd2', '# as in the README', 'emoji.png', 'README.md'),
    ],
)
def test_kept_pictures(notebook, words, name, shown):
    "As their notebook drew them; `.ci/execute.py` writes them"
    cells = json.loads((root/'nbs'/f'{notebook}.ipynb').read_text(encoding='utf-8'))['cells']
    (png,) = [
        o['data']['image/png']
        for c in cells
        if c['cell_type'] == 'code' and words in ''.join(c['source'])
        for o in c['outputs']
        if 'image/png' in o.get('data', {})
    ]
    stored = root/'nbs'/'images'/name
    assert stored.read_bytes() == base64.b64decode(''.join(png)) and stored.stat().st_size < 100_000
    assert f'images/{name})' in (root/shown).read_text(encoding='utf-8')


def test_map_names_every_notebook():
    "A new notebook is entered in the map at the end of index"
    cells = json.loads((root/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells']
    links = set(
        re.findall(
            r'\]\(([^)#\s:]+\.ipynb)',
            ''.join(line for c in cells if c['cell_type'] == 'markdown' for line in c['source']),
        )
    )
    there = {p.name for p in (root / 'nbs').glob('*.ipynb') if not p.name.startswith('.')} - {
        'index.ipynb'
    }
    assert links == there, (
        f'not on the map: {sorted(there - links)}; not there: {sorted(links - there)}'
    )


def test_requirements_are_pinned_for_ci():
    "Bare names in settings.ini, one exact version each in constraints.txt"
    pins = [
        o.split('#')[0].strip()
        for o in (root / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    ]
    pins = dict(o.split('==') for o in pins if o)
    named = set(cfg['requirements'].split()).union(
        *(v for k, v in extras.items() if k in cfg['all_extras'].split())
    )
    assert not {bare(o) for o in named} - {bare(o) for o in pins}
    assert {
        'torch',
        'torchvision',
        'diffusers',
        'einops',
        'fastprogress',
        'jupyterlab',
        'nbdev',
    } <= {bare(o) for o in named}
    assert not {'diffusers', 'transformers', 'jupyterlab', 'nbdev', 'bitsandbytes'} & {
        bare(o) for o in cfg['requirements'].split()
    }
    assert 'bitsandbytes' not in {bare(o) for o in named}


def test_bundled_files_are_listed():
    "Each file of data/ is in data/README.md; checksums given there are right"
    text = (root/'data'/'README.md').read_text(encoding='utf-8')
    named = set(re.findall(r'`([^`\s]+)`', text))
    files = [
        p
        for p in (root / 'data').rglob('*')
        if p.is_file() and not {'cache', '__pycache__', 'LICENSES'} & set(p.parts)
    ]
    files = {
        p.relative_to(root / 'data').as_posix(): p
        for p in files
        if p.name not in ('README.md', 'emoji64.npz')
    }
    missing = [n for n in files if not any(fnmatch(n, o) for o in named)]
    assert not missing, f'enter in data/README.md: {missing}'
    sums = dict(re.findall(r'^\| `([^`]+)` .*\| `([0-9a-f]{12})` \|', text, re.M))
    assert {n for n in files if n.endswith(('.npz', '.zip', '.safetensors'))} <= set(sums), (
        'no checksum'
    )
    for n, s in sums.items():
        assert hashlib.sha256(files[n].read_bytes()).hexdigest().startswith(s), (
            f'{n} is not what data/README.md lists'
        )


# The wheel

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from the source distribution of a copy, so that nothing left in this checkout gets in, and without network"
    tmp = tmp_path_factory.mktemp('wheel')
    copy = tmp/'copy'
    copy.mkdir()
    for p in root.iterdir():
        if p.is_file() and not p.name.startswith('.'): shutil.copy2(p, copy)
    for d in ('dmd2_nb', 'data'):
        shutil.copytree(
            root / d, copy / d, ignore=shutil.ignore_patterns('__pycache__', 'cache', 'emoji64.npz')
        )
    (copy/'data'/'emoji64.npz').write_bytes(b'not for the wheel')
    build = f'import setuptools.build_meta as b; print(b.build_sdist({str(tmp)!r}))'
    r = subprocess.run([sys.executable, '-c', build], cwd=copy, capture_output=True, text=True)
    assert not r.returncode, r.stderr
    sdist = tmp/r.stdout.split()[-1]
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '-q',
            '--no-deps',
            '--no-build-isolation',
            '--no-index',
            '-w',
            str(tmp),
            str(sdist),
        ],
        capture_output=True,
        text=True,
    )
    assert not r.returncode, r.stderr
    found, = tmp.glob('*.whl')
    return found


@pytest.fixture(scope='module')
def names(wheel):
    with zipfile.ZipFile(wheel) as z: return z.namelist()


def test_wheel_size(wheel): assert wheel.stat().st_size < max_wheel


def test_wheel_content(names):
    "All modules, subpackages included; of data/ what settings.ini selects, with its notices; no tests, no notebooks"
    modules = {p.relative_to(root).as_posix() for p in (root/'dmd2_nb').rglob('*.py')}
    assert modules <= set(names)
    assert all(n.startswith(('dmd2_nb/', f'dmd2_nb-{cfg["version"]}.dist-info/')) for n in names)
    data = {n.removeprefix('dmd2_nb/data/') for n in names if n.startswith('dmd2_nb/data/')}
    assert {'emoji32.npz', 'fashion16_6k.npz', 'imagenet64_layout_demo.zip', 'README.md'} <= data, (
        'lessons read these, installed from the wheel too'
    )
    assert 'emoji64.npz' not in data
    assert {
        p.relative_to(root / 'data').as_posix() for p in (root / 'data' / 'LICENSES').iterdir()
    } <= data, 'bundled images travel with their licences'
    assert any(n.endswith('/LICENSE') and '.dist-info/' in n for n in names)
    chosen = {
        p.relative_to(root / 'data').as_posix()
        for g in cfg['data_files'].split()
        for p in (root / 'data').glob(g)
        if p.is_file()
    }
    assert chosen == data
    for glob in ('weights/fashion16*', 'runs/'):
        assert any(n.startswith(glob.rstrip('*')) for n in data), f'no {glob} in the wheel'


def test_wheel_metadata(wheel, names):
    with zipfile.ZipFile(wheel) as z:
        meta = Parser().parsestr(z.read(next(n for n in names if n.endswith('/METADATA'))).decode())
        entries = z.read(next(n for n in names if n.endswith('/entry_points.txt'))).decode()
    assert (meta['Name'], meta['Version'], meta['License'] or meta['License-Expression']) == (
        cfg['lib_name'],
        cfg['version'],
        cfg['license'],
    )
    assert {bare(o) for o in meta.get_all('Requires-Dist') if 'extra ==' not in o} == {
        bare(o) for o in cfg['requirements'].split()
    }
    assert set(meta.get_all('Provides-Extra')) == {*extras, 'all'}
    assert meta.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()
    assert 'dmd2_nb = dmd2_nb._modidx:d' in entries
    for name, target in scripts.items(): assert f'{name} = {target}' in entries


@pytest.fixture(scope='module')
def clean(wheel, tmp_path_factory):
    """Python of a new environment with the wheel in it, beside the libraries of this one, and an
    empty folder to stand in"""
    env = tmp_path_factory.mktemp('clean')/'env'
    venv.create(env, with_pip=False)
    python = env/('Scripts' if os.name == 'nt' else 'bin')/'python'
    site = Path(
        subprocess.run(
            [str(python), '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            '--python',
            str(python),
            'install',
            '-q',
            '--no-deps',
            '--no-index',
            str(wheel),
        ],
        capture_output=True,
        text=True,
    )
    assert not r.returncode, r.stderr
    # Plain entries on sys.path: the .pth file of an editable installation in there is not read
    (site / 'libraries.pth').write_text(
        '\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})
    )
    return python, tmp_path_factory.mktemp('elsewhere')


def run(clean, *args):
    "Run a command of the clean environment away from the checkout"
    python, cwd = clean
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'DMD2_NB_DATA')}
    env |= {'HOME': str(cwd), 'XDG_CACHE_HOME': str(cwd/'cache')}
    r = subprocess.run(
        [str(python.parent / args[0]), *args[1:]], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert not r.returncode, f'{" ".join(args)}\n{r.stdout}\n{r.stderr}'
    return r.stdout


def test_installed_package_finds_its_data(clean):
    "Imported from the wheel, not from the checkout; bundled sets are found and read"
    out = run(clean, 'python', '-c', '''
import dmd2_nb, dmd2_nb.distill
from dmd2_nb.assets import data_path
from dmd2_nb.images import fashion16, emoji32
print(dmd2_nb.__file__)
print(data_path('fashion16_6k.npz'))
print(data_path('weights'))
print(len(fashion16().images), len(emoji32().images))
''').splitlines()
    env = str(clean[0].parent.parent)
    assert all(o.startswith(env) for o in out[:3]), out
    assert out[3].split() == ['6000', '11127']


needs_cli = pytest.mark.skipif(
    not has_cli, reason='nbs/90_cli.ipynb, which exports the console scripts, is not written yet'
)


@needs_cli
@pytest.mark.parametrize('script', scripts)
def test_scripts_say_what_they_do(clean, script):
    assert 'usage' in run(clean, script, '--help').lower()


@needs_cli
def test_sample_with_bundled_weights(clean, names):
    "Bundled generators and teachers draw pictures where only the wheel is installed"
    bundled = [
        m[1]
        for n in names
        if (m := re.fullmatch(r'dmd2_nb/data/weights/(\w+_(?:\d+step|teacher))\.safetensors', n))
    ]
    assert {'fashion16_1step', 'fashion16_teacher'} <= set(bundled), (
        'what the commands use by default is not bundled'
    )
    for g in bundled:
        run(
            clean,
            'dmd2_sample',
            g,
            '--n',
            '4',
            '--out',
            f'{g}.png',
            *(['--steps', '4'] if g.endswith('teacher') else []),
        )
        from PIL import Image
        with Image.open(clean[1]/f'{g}.png') as im:
            assert len(set(im.convert('L').tobytes())) > 32, 'a picture of nothing'


@needs_cli
def test_sample_names_what_is_missing(clean):
    "Exit code 2 and one line"
    python, cwd = clean
    r = subprocess.run(
        [str(python.parent / 'dmd2_sample'), 'no_such_generator'],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 2 and 'no_such_generator' in r.stderr and 'Traceback' not in r.stderr
