"""The line at the end of each notebook that leads to the one before, to the map and to the next,
in the order of the map in `index`.

    python .ci/links.py          # write it where it is missing or old; after a notebook was added, moved or renamed"""
import hashlib, json, re
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent/'nbs'
mark = '[map](index.ipynb)'


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def order():
    "`[(name shown, file)]`, the rows of the map in `index` from top to bottom"
    text = '\n'.join(''.join(c['source']) for c in read(nbs/'index.ipynb')['cells'] if c['cell_type'] == 'markdown')
    rows = '\n'.join(line for line in text.split('## The map')[1].splitlines() if line.startswith('| ['))
    return re.findall(r'\[([^\]]+)\]\(([^)]+\.ipynb)\)', rows)


def lines():
    "File -> its line"
    steps = order()
    link = lambda i: f'[{steps[i][0]}]({steps[i][1]})' if 0 <= i < len(steps) else ''
    return {f: ' · '.join(filter(None, (link(i-1) and f'← {link(i-1)}', mark, link(i+1) and
        f'{link(i+1)} →'))) for i, (_, f) in enumerate(steps)}


def cell_of(nb): return next((c for c in nb['cells'] if c['cell_type'] == 'markdown' and mark in
    ''.join(c['source'])), None)


def write(path, line):
    "Whether the notebook had to be changed"
    nb = read(path)
    cell = cell_of(nb)
    if cell is None:
        name = hashlib.sha256(f'links {path.name}'.encode()).hexdigest()[:8]
        cell = dict(cell_type='markdown', id=name, metadata={}, source=[])
        last = nb['cells'][-1]
        nb['cells'].insert(len(nb['cells'])-('nbdev_export(' in ''.join(last['source'])), cell)
    if cell['source'] == [line]: return False
    cell['source'] = [line]
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n', encoding='utf-8')
    return True


if __name__ == '__main__':
    for name, line in lines().items():
        if write(nbs/name, line): print(f'{name}: {line}')
