"""Run notebooks in a real kernel and keep what they show.

    python .ci/execute.py nbs/10_dmd.ipynb ...                # these notebooks; all of nbs/ when none is named
    RUN_SLOW=1 python .ci/execute.py --flags slow nbs/X.ipynb # flagged cells too; their switches are the caller's

Only the cells that `nbdev-test` would run are run; cells under a flag (`slow`, `cuda`, ...) and
cells with `eval: false`
keep the outputs they have. A notebook is written only if every cell passed and its outputs are fit to be stored."""
import argparse, base64, io, os, re, sys, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))

import nbformat
from fastcore.nbio import read_nb, write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.test import nb_test_cells

max_bytes = 1_000_000
machine_path = re.compile(
    r'(?<![\w.:/<-])/(?:home|root|work|tmp|farm|usr|opt|mnt|var|Users|content|private|data)/[\w.]|\b[A-Z]:\\\w'
)


def tidy(outputs):
    "Last state of progress bars, one stream per run of lines, pictures without slack"
    res = []
    for o in outputs:
        data = o.get('data', {})
        if 'application/vnd.jupyter.widget-view+json' in data: continue  # lives in its kernel alone
        if (
            '<style>' in data.get('text/html', '')
            and not re.sub(r'<style>.*?</style>', '', data['text/html'], flags=re.S).strip()
        ):
            continue
        if (
            o['output_type'] == 'display_data'
            and 'text/html' in data
            and not data['text/html'].strip()
        ):
            continue
        if o['output_type'] == 'stream' and res and res[-1].get('name') == o['name']:
            res[-1]['text'] += o['text']
        else: res.append(o)
        if 'image/png' in data: data['image/png'] = squeeze(data['image/png'])
    for o in res:
        if o['output_type'] == 'stream':
            o['text'] = re.sub(
                r'[^\n]*\r(?!\n)(?=[^\n])', '', o['text'].replace('\r\n', '\n')
            ).replace('\r', '')
    return [o for o in res if o['output_type'] != 'stream' or o['text'].strip()]


def squeeze(png):
    "The picture in fewer bytes: its 256 most useful colours"
    from PIL import Image
    raw = base64.b64decode(png if isinstance(png, str) else ''.join(png))
    im, tries = Image.open(io.BytesIO(raw)), [raw]
    for o in (
        im,
        *([im.convert('RGB').quantize(256, dither=Image.Dither.NONE)] if im.mode != 'P' else []),
    ):
        buf = io.BytesIO()
        o.save(buf, 'PNG', optimize=True)
        tries.append(buf.getvalue())
    return base64.b64encode(min(tries, key=len)).decode()


def texts(outputs):
    "Everything in `outputs` that is text"
    for o in outputs:
        yield o.get('text', '')
        for mime, v in o.get('data', {}).items():
            if not mime.startswith('image/') or 'svg' in mime:
                yield v if isinstance(v, str) else str(v)


def unfit(nb, own):
    "What keeps the outputs of `nb` from being stored, one line each; `own` are other texts that name this machine"
    for i, c in enumerate(nb.cells):
        for t in texts(c.get('outputs', [])):
            t = re.sub(r'data:image/[\w+]+;base64,[\w+/=]+', '', t)
            hit = machine_path.search(t)
            found = next((s for s in own if s in t), None) or (
                t[hit.start() :].split('\n')[0][:80] if hit else None
            )
            if found: yield f'cell {i} ({c.id}): machine path in its output: {found}'
        if any(o['output_type'] == 'error' for o in c.get('outputs', [])):
            yield f'cell {i} ({c.id}): an error is stored as output'


def execute(path, flags='', timeout=600):
    "Run one notebook and write it back; the messages that say why it was not written"
    skip = get_config(root).tst_flags
    run = {
        c.id
        for c in nb_test_cells(path, skip.split() if isinstance(skip, str) else skip, flags.split())
    }
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name='python3',
        record_timing=False,
        resources={'metadata': {'path': str(path.parent)}},
    )
    with client.setup_kernel():
        for i, c in enumerate(nb.cells):
            if c.cell_type != 'code': continue
            if c.id not in run:
                if 'nbdev_export(' in c.source: c.outputs = []
                continue
            try: client.execute_cell(c, i)
            except CellExecutionError as e:
                return [f'cell {i} ({c.id}): {e.ename}: {e.evalue}\n{e.traceback or e}']
            except (CellTimeoutError, DeadKernelError) as e:
                return [f'cell {i} ({c.id}): {type(e).__name__}: {str(e).strip().splitlines()[0]}']
            c.outputs = tidy(c.outputs)
    if bad := list(unfit(nb, {str(root), sys.prefix, str(Path.home())} - {'/', '/root'})):
        return bad
    tmp = path.with_name(f'.{path.name}.tmp')
    try:
        tmp.write_text(nbformat.writes(nb), encoding='utf-8')
        res = read_nb(tmp)
        res.pop('path_', None)
        clean_nb(res)
        write_nb(res, tmp)
        size = tmp.stat().st_size
        if size > max_bytes:
            return [
                f'{size / 1e6:.2f} MB, over {max_bytes / 1e6:.0f} MB: draw smaller pictures (dpi 72) or fewer'
            ]
        if tmp.read_bytes() != path.read_bytes(): os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)
    if path.stem in kept: keep_picture(res, *kept[path.stem], path.parent/'images')
    return []


# A picture that stands elsewhere too: notebook -> words in the cell that draws it, and the name of
# its file
kept = {
    'index': ('clouds.items()', 'index.png'),
    '14_distill': ('g,c = axes_row(', 'turns.png'),
    '26_emoji_dmd2': ('# as in the README', 'emoji.png'),
}


def keep_picture(nb, words, name, folder):
    "The picture of one cell as a file, for the README or another notebook"
    (png,) = [
        o['data']['image/png']
        for c in nb.cells
        if c.cell_type == 'code' and words in c.source
        for o in c.get('outputs', [])
        if 'image/png' in o.get('data', {})
    ]
    folder.mkdir(exist_ok=True)
    (folder/name).write_bytes(base64.b64decode(png if isinstance(png, str) else ''.join(png)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('notebooks', nargs='*', type=Path, help='notebooks; all of nbs/ when absent')
    p.add_argument(
        '--flags', default='', help='flags whose cells are to be run too, as in nbdev-test'
    )
    p.add_argument('--timeout', type=int, default=600, help='seconds for one cell')
    a = p.parse_args()
    paths = a.notebooks or sorted(
        o
        for o in (root / 'nbs').rglob('*.ipynb')
        if not o.name.startswith('.') and '.ipynb_checkpoints' not in o.parts
    )
    if gone := [str(o) for o in paths if not o.is_file()]:
        sys.exit(f'No such notebook: {", ".join(gone)}')
    failed = 0
    for path in paths:
        start = time.time()
        bad = execute(path.resolve(), a.flags, a.timeout)
        for o in bad: print(f'{path}: {o}', file=sys.stderr)
        print(f'{path}: {"not written" if bad else "ok"} ({time.time()-start:.1f} s)', flush=True)
        failed += bool(bad)
    sys.exit(1 if failed else 0)


if __name__ == '__main__': main()
