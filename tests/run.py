"""All checks in order: notebooks clean, export in step, lessons pass, pytest.

    python tests/run.py

Needs the extras of `pip install -e '.[all]'`. The first failing check ends the run with its exit code."""
import os, subprocess, sys, sysconfig, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
scripts = sysconfig.get_path('scripts')
env = os.environ | {'PATH': os.pathsep.join([scripts, os.environ.get('PATH', '')]), 'PYTHONUNBUFFERED': '1'}


def run(*args, **extra):
    "Run a command of this environment in the repository; stop with its exit code if it fails"
    code = subprocess.run([os.path.join(scripts, args[0]), *args[1:]], cwd=root, env=env | extra).returncode
    if code: sys.exit(f'failed with exit code {code}: {" ".join(args)}')


def unchanged(folder, pattern, *args):
    "Run a command that rewrites files below `folder`; stop if any of them differs after it"
    def read(): return {p: p.read_bytes() for p in sorted((root/folder).rglob(pattern)) if '.ipynb_checkpoints' not in p.parts}
    was = read()
    run(*args)
    now = read()
    if changed := [str(p.relative_to(root)) for p in sorted(was.keys() | now.keys()) if was.get(p) != now.get(p)]:
        sys.exit(f'{args[0]} changed {", ".join(changed)}: look at the change and commit it')


def step(title, f, *args, **kwargs):
    print(f'== {title}', flush=True)
    start = time.time()
    f(*args, **kwargs)
    print(f'== {title}: ok, {time.time()-start:.0f} s', flush=True)


if __name__ == '__main__':
    step('notebooks are clean', unchanged, 'nbs', '*.ipynb', 'nbdev-clean')
    step('modules are what the notebooks export', unchanged, 'dmd2_nb', '*.py', 'nbdev-export')
    step('lessons', run, 'nbdev-test', '--n-workers', '2', '--timing', OMP_NUM_THREADS='1')
    run('pytest', 'tests')
