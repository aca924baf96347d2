"""Every notebook opens in Colab by a badge, and its first code cell installs the package there.

    python .ci/colab.py           # write what is missing into the notebooks of nbs/; a second time changes nothing
    python .ci/colab.py --check   # say what is missing, exit 1 if anything is

Badge, first cell and last cell are the same in all notebooks but for the name; no other cell knows where it runs."""
import hashlib, json, re, sys, tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
repository = tomllib.loads((root / 'pyproject.toml').read_text(encoding='utf-8'))['project'][
    'urls'
]['Repository']
badge_of = (
    '[![Open in '
    'Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://'
    'colab.research.google.com/github/{}/blob/main/nbs/{})'
)
install = (
    "#| hide\n#| eval: false\n! [ -e /content ] && pip install -q nbdev "
    f"'dmd2_nb[sdxl,eval,lmdb,study] @ git+{repository}'"
)
export = (
    "#| hide\nfrom nbdev.doclinks import is_nbdev, nbdev_export\nif is_nbdev(): nbdev_export()  # "
    "nothing to export to outside of the repository"
)


def badge(name): return badge_of.format(repository.removeprefix('https://github.com/'), name)
def lines(text): return text.splitlines(keepends=True)
def source(c): return ''.join(c['source'])


def dressed(nb, name):
    "The notebook with its badge, first and last cell"
    cells = [dict(c) for c in nb['cells']]
    text = re.sub(r'\n*^\[!\[Open in Colab\].*$\n*', '\n\n', source(cells[0]), flags=re.M).rstrip()
    m = re.match(r'(# [^\n]+\n+> [^\n]+)\n*(.*)', text, re.S)
    if not m: raise ValueError(f'{name}: no `# Title` and `> subtitle` in its first cell')
    head, more = m.groups()
    cells[0]['source'] = lines('\n\n'.join(filter(None, (head, badge(name), more))))
    cells = [
        c
        for c in cells
        if not (c['cell_type'] == 'code' and '/content' in source(c) and 'pip install' in source(c))
    ]
    i = hashlib.sha256(f'{name} colab'.encode()).hexdigest()[:8]
    cells.insert(
        1,
        dict(
            cell_type='code',
            execution_count=None,
            id=i,
            metadata={},
            outputs=[],
            source=lines(install),
        ),
    )
    if 'nbdev_export' in source(cells[-1]): cells[-1]['source'] = lines(export)
    return nb | dict(cells=cells)


def main():
    missing = 0
    for p in sorted((root/'nbs').glob('*.ipynb')):
        if p.name.startswith('.'): continue
        text = p.read_text(encoding='utf-8')
        new = (
            json.dumps(
                dressed(json.loads(text), p.name), indent=1, ensure_ascii=False, sort_keys=True
            )
            + '\n'
        )
        if new == text: continue
        missing += 1
        print(p.relative_to(root))
        if '--check' not in sys.argv: p.write_text(new, encoding='utf-8')
    if missing and '--check' in sys.argv:
        sys.exit('these lack their badge, first or last cell as `python .ci/colab.py` writes them')


if __name__ == '__main__': main()
