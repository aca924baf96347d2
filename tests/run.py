"""All checks in order: notebooks clean, export in step, lessons pass, pages, pytest.

    python tests/run.py

The lessons run as a user's would: with the package installed from its wheel in an environment of
its own, outside of this
checkout. Needs the extras of `pip install -e '.[all]'`. The first failing check ends the run with its exit code."""
import os, shutil, subprocess, sys, sysconfig, tempfile, time, venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
scripts = sysconfig.get_path('scripts')
env = os.environ | {
    'PATH': os.pathsep.join([scripts, os.environ.get('PATH', '')]),
    'PYTHONUNBUFFERED': '1',
}


def run(*args, **extra):
    "Run a command of this environment in the repository; stop with its exit code if it fails"
    code = subprocess.run(
        [os.path.join(scripts, args[0]), *args[1:]], cwd=root, env=env | extra
    ).returncode
    if code: sys.exit(f'failed with exit code {code}: {" ".join(args)}')


def unchanged(folder, pattern, *args):
    "Run a command that rewrites files below `folder`; stop if any of them differs after it"
    def read():
        return {
            p: p.read_bytes()
            for p in sorted((root / folder).rglob(pattern))
            if '.ipynb_checkpoints' not in p.parts
        }
    was = read()
    run(*args)
    now = read()
    if changed := [
        str(p.relative_to(root))
        for p in sorted(was.keys() | now.keys())
        if was.get(p) != now.get(p)
    ]:
        sys.exit(f'{args[0]} changed {", ".join(changed)}: look at the change and commit it')


def installed(tmp):
    "Python of a new environment with the wheel of this package in it, beside the libraries of this environment"
    copy, env = tmp/'copy', tmp/'env'
    copy.mkdir()
    for p in root.iterdir():
        if p.is_file() and not p.name.startswith('.'): shutil.copy2(p, copy)
    for d in ('dmd2_nb', 'data'):
        shutil.copytree(root/d, copy/d, ignore=shutil.ignore_patterns('__pycache__', 'cache'))
    run(
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '--no-index',
        '-w',
        str(tmp),
        str(copy),
    )
    shutil.rmtree(copy)
    venv.create(env, with_pip=False)
    python = env/('Scripts' if os.name == 'nt' else 'bin')/'python'
    wheel, = tmp.glob('*.whl')
    run('pip', '--python', str(python), 'install', '-q', '--no-deps', '--no-index', str(wheel))
    site = subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # Plain entries on sys.path: the .pth file of an editable installation in there is not read
    (Path(site) / 'libraries.pth').write_text(
        '\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})
    )
    return python


def lessons(*args):
    "The notebooks' unflagged cells, away from the checkout; `args` for nbdev-test"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        python, course = installed(tmp), tmp/'course'
        shutil.copytree(
            root / 'nbs',
            course / 'nbs',
            ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'runs'),
        )
        shutil.copy(root/'pyproject.toml', course)
        clean = {k: v for k, v in env.items() if k not in ('PYTHONPATH', 'DMD2_NB_DATA')} | {
            'OMP_NUM_THREADS': '1'
        }
        where = subprocess.run(
            [python, '-c', 'import dmd2_nb; print(dmd2_nb.__file__)'],
            cwd=course,
            env=clean,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if not where.startswith(str(tmp)):
            sys.exit(f'the lessons would not use the wheel, but {where or "nothing"}')
        print(f'dmd2_nb is {where}', flush=True)
        code = subprocess.run(
            [python, '-c', 'from nbdev.test import nbdev_test; nbdev_test()', *args],
            cwd=course,
            env=clean,
        ).returncode
        if code: sys.exit(f'failed with exit code {code}: lessons')


def step(title, f, *args, **kwargs):
    print(f'== {title}', flush=True)
    start = time.time()
    f(*args, **kwargs)
    print(f'== {title}: ok, {time.time()-start:.0f} s', flush=True)


if __name__ == '__main__':
    step('notebooks are clean', unchanged, 'nbs', '*.ipynb', 'nbdev-clean')
    step('modules are what the notebooks export', unchanged, 'dmd2_nb', '*.py', 'nbdev-export')
    step('lessons, from the installed wheel', lessons, '--n-workers', '2', '--timing')
    step('pages', run, 'python', 'docs/build.py')
    run('pytest', 'tests/test_long_run.py')  # measures time, so nothing runs beside it
    # Two processes of one thread each: with more threads than cores they wait for one another
    args = '-n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_long_run.py'.split()
    run('pytest', 'tests', *args, '--durations', '25', OMP_NUM_THREADS='1')
