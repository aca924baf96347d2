"""Code that can be read: what `ruff` says of notebooks, tests and tools, and four rules of the house

At most 100 characters a line (a comment behind a parameter may run to 120), one statement a line,
keyword-only beyond five parameters, functions of at most 40 statements."""
import ast, io, json, re, subprocess, tokenize
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').rglob('*.ipynb'))
notebooks = [p for p in notebooks if '.ipynb_checkpoints' not in p.parts]


def cells(path):
    "Sources of a notebook's code cells that are Python"
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] == 'code' and not re.search(r'^\s*[!%]', source, re.M):
            yield c['id'], source


def documents(tree):
    "Rows of docstrings"
    rows = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant):
            rows |= set(range(n.lineno, n.end_lineno+1))
    return rows


def texts(tree):
    "Rows inside of texts in triple quotes: a text that becomes a file keeps its lines"
    kinds = (ast.Constant, ast.JoinedStr)
    many = [n for n in ast.walk(tree) if isinstance(n, kinds) and n.end_lineno > n.lineno]
    return {row for n in many for row in range(n.lineno+1, n.end_lineno+1)}


def uncommented(source):
    "Lines without their comments"
    lines = source.split('\n')
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = t.start
        if t.type == tokenize.COMMENT: lines[row-1] = lines[row-1][:column].rstrip()
    return lines


def test_ruff():
    "Lines of at most 120 characters, one statement a line, nothing unused, nothing undefined, no known trap"
    ruff = pytest.importorskip('ruff')
    args = [ruff.find_ruff_bin(), 'check', '--output-format', 'concise']
    args += ['nbs', 'tests', 'docs', 'data', '.ci', 'setup.py']
    r = subprocess.run(args, cwd=root, capture_output=True, text=True)
    assert not r.returncode, r.stdout


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_lines(path):
    "100 characters a line without the comment of a parameter"
    long = []
    for id, source in cells(path):
        tree = ast.parse(source)
        skip = documents(tree) | (texts(tree) if "\"\"\"" in source or "'''" in source else set())
        for i, line in enumerate(uncommented(source), 1):
            if len(line) > 100 and i not in skip: long.append(f'{id}:{i}: {line.strip()[:60]}')
    assert not long, long


def several(tree):
    "Rows with more than one simple statement; `if x: return y` is one"
    rows, said = {}, set()
    for n in ast.walk(tree):
        if not isinstance(n, ast.stmt) or hasattr(n, 'body'): continue
        if n.lineno in rows: said.add(n.lineno)
        rows[n.lineno] = n
    return said


# What may have more parameters by position, and why; beside them, all that autograd calls (`ctx`)
by_place = {
    '20c_fused': 'kernels get their arguments by place, and autograd hands them on by place',
    '19b_exercises': "the answers have the paper's inputs, each once",
    '36c_launch': 'a new process gets its arguments by place',
}


def own(f):
    "Nodes of a function without those of functions inside it"
    for n in ast.iter_child_nodes(f):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        yield n
        yield from own(n)


def wide(f):
    "Parameters beyond `self` that may be given by place"
    names = [a.arg for a in f.args.posonlyargs+f.args.args]
    return 0 if names[:1] == ['ctx'] else len(names)-(names[:1] in (['self'], ['cls']))


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_statements(path):
    "One statement a line, five parameters by position, forty statements a function"
    wrong = []
    for id, source in cells(path):
        tree = ast.parse(source)
        wrong += [f'{id}:{row}: two statements' for row in several(tree)]
        for f in ast.walk(tree):
            if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            place = f'{id}:{f.lineno}: {f.name} has'
            if wide(f) > 5 and path.stem not in by_place:
                wrong.append(f'{place} {wide(f)} parameters by position')
            count = sum(isinstance(n, ast.stmt) for n in own(f))
            if count > 40: wrong.append(f'{place} {count} statements')
    assert not wrong, wrong
