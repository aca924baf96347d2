"""Seconds that each notebook's lessons take, measured one after another in processes of their own.

    OMP_NUM_THREADS=1 python tests/notebook_times.py --cores 2                  # on a machine that does nothing else
    python tests/notebook_times.py --only 10_dmd 14_distill --out /dev/null     # try it on some

Runs what `nbdev-test` runs (cells without a flag), writes data/runs/notebook_seconds.json, from
which the tables of INSTRUCTOR.md are
written again, and ends with 1 if a notebook failed. `--table` only writes the tables from the file that is there."""
import argparse, json, os, platform, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
log = root/'data'/'runs'/'notebook_seconds.json'
one = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
flags = get_config(Path(sys.argv[1]).parent).tst_flags
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=flags.split() if isinstance(flags, str) else flags)
sys.exit(not ok)
"""


def cpu():
    "Name of the processor"
    info = Path('/proc/cpuinfo')
    return (
        next(
            (
                o.partition(':')[2].strip()
                for o in info.read_text().splitlines()
                if o.startswith('model name')
            ),
            '',
        )
        if info.exists()
        else platform.processor()
    )


def measure(path, cores):
    "`(passed, wall seconds, processor seconds)` of one notebook, its start included"
    before, start = os.times(), time.time()
    env = os.environ | {
        'IN_TEST': '1',
        'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', '1'),
        'PYTHONPATH': str(root),
    }
    pin = (
        (lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores]))
        if hasattr(os, 'sched_setaffinity')
        else None
    )
    r = subprocess.run(
        [sys.executable, '-c', one, str(path)],
        cwd=root / 'nbs',
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=pin,
    )
    after = os.times()
    if r.returncode: print(r.stderr[-2000:], file=sys.stderr)
    return (
        not r.returncode,
        time.time() - start,
        after.children_user + after.children_system - before.children_user - before.children_system,
    )


def marked(text, name, table):
    "`text` with a new table between its two marks"
    a, b = f'<!-- {name} -->', f'<!-- end of {name} -->'
    if text.count(a) != 1 or text.count(b) != 1:
        raise ValueError(f'INSTRUCTOR.md must have {a} and {b} once each')
    return text[:text.index(a)+len(a)]+'\n'+table+'\n'+text[text.index(b):]


def gpu_rows():
    "What ran on a GPU, from the logs in data/runs"
    read = lambda n: json.loads((root/'data'/'runs'/f'{n}.json').read_text(encoding='utf-8'))
    edm, sdxl = read('edm_h100')['runs'][-1]['rows'], read('sdxl_gpu')['rows']
    emoji = (root/'data'/'runs'/'emoji32_teacher.csv').read_text().split()[-1].split(',')
    card = next(o['name'] for o in edm if o['what'] == 'card')
    step = next(o for o in edm if o['what'] == 'train' and o['name'] == 'graphed')
    yield (
        '| [26](nbs/26_emoji_dmd2.ipynb), teacher of emoji32 | all of it | '
        f'{float(emoji[2]) / 60:.1f} min | H100, then H200 |'
    )
    small, one = read('mini_teacher'), read('emoji32_long')['long']
    yield (
        f'| [26](nbs/26_emoji_dmd2.ipynb), emoji32 in one step | all of it, {one["g_updates"]:,} '
        f'generator updates | {one["seconds"] / 60:.1f} min | '
        f'{one["card"].removeprefix("NVIDIA ")} |'
    )
    four = read('emoji32_four')['slower']
    yield (
        '| [26](nbs/26_emoji_dmd2.ipynb), emoji32 in four steps | all of it, '
        f'{four["g_updates"]:,} generator updates; seconds alone on the card | '
        f'{four["seconds"] / 60:.1f} min | {four["card"].removeprefix("NVIDIA ")} |'
    )
    yield (
        '| [39](nbs/39_mini_sdxl.ipynb), teacher of the small SDXL | all of it | '
        f'{small["seconds"] / 60:.1f} min | {small["device"].removeprefix("NVIDIA ")} |'
    )
    yield (
        f'| [23](nbs/23_imagenet64.ipynb), ImageNet-64, batch {step["batch"]} | one iteration, '
        f'mean over a cycle of five | {step["ms"] / 1000:.2f} s | {card} |'
    )
    for name, what in (
        ('bf16', 'one iteration within 14 GiB'),
        ('speed', 'one iteration, memory as it likes'),
    ):
        o = next(o for o in sdxl if o['row'] == name)
        yield (
            f'| [32](nbs/32_sdxl.roles.ipynb), SDXL at 1024 pixels | {what} '
            f'({o["peak_allocated"] / 2**30:.1f} GiB) | {o["s_per_iteration"]:.2f} s | {o["card"]} '
            '|'
        )


def tables(m):
    "INSTRUCTOR.md with the times of `m`"
    path = root/'INSTRUCTOR.md'
    titles = {
        p.stem: ''.join(json.loads(p.read_text(encoding='utf-8'))['cells'][0]['source'])
        .splitlines()[0]
        .lstrip('# ')
        for p in (root / 'nbs').glob('*.ipynb')
    }
    rows = [
        f'| [{n}](nbs/{n}.ipynb) | {titles[n]} | {o["seconds"]:.0f} | {o["processor"]:.0f} |'
        for n, o in m['notebooks'].items()
        if n in titles
    ]
    total = sum(o['seconds'] for n, o in m['notebooks'].items() if n in titles)
    head = f'Measured on {m["cores"]} cores of {m["cpu"]}, {m["date"]}, {m["note"]}. Together {total / 60:.0f} minutes.'
    text = marked(
        path.read_text(encoding='utf-8'),
        'times',
        '\n'.join(
            [
                head,
                '',
                '| notebook | title | seconds | of processor time |',
                '|---|---|---|---|',
                *rows,
            ]
        ),
    )
    text = marked(
        text,
        'gpu',
        '\n'.join(['| what | how much | time | device |', '|---|---|---|---|', *gpu_rows()]),
    )
    path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', nargs='*', default=(), help='names of notebooks, without .ipynb')
    p.add_argument('--cores', type=int, default=2, help='processors to use')
    p.add_argument(
        '--note', default='nothing else running', help='what the reader of the times has to know'
    )
    p.add_argument('--out', type=Path, default=log)
    p.add_argument('--table', action='store_true', help='measure nothing, write the tables')
    a = p.parse_args()
    if a.table:
        tables(json.loads(log.read_text(encoding='utf-8')))
        sys.exit()
    paths = sorted(
        o
        for o in (root / 'nbs').glob('*.ipynb')
        if not o.name.startswith('.') and (not a.only or o.stem in a.only)
    )
    if gone := set(a.only)-{o.stem for o in paths}:
        sys.exit(f'No such notebook: {", ".join(sorted(gone))}')
    done, failed = {}, []
    for path in paths:
        ok, wall, used = measure(path, a.cores)
        done[path.stem] = dict(seconds=round(wall, 1), processor=round(used, 1))
        if not ok: failed.append(path.stem)
        print(
            f'{path.stem}: {"ok" if ok else "failed"}, {wall:.0f} s, {used:.0f} s of processor time',
            flush=True,
        )
    if failed: sys.exit(f'nothing written: {", ".join(failed)} failed')
    m = dict(cores=a.cores, cpu=cpu(), date=time.strftime('%Y-%m-%d'), note=a.note, notebooks=done)
    a.out.write_text(json.dumps(m, indent=1)+'\n', encoding='utf-8')
    if a.out == log: tables(m)
