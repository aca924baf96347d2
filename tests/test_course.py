"What a course promises: the way from notebook to notebook, and words for everything that is exported"
import ast, importlib.util, io, re, tokenize
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def load(path):
    "A script of the repository as a module"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = load(root/'.ci'/'links.py')


@pytest.mark.parametrize('name, line', links.lines().items())
def test_links_back_and_forth(name, line):
    "`python .ci/links.py` writes them"
    cell = links.cell_of(links.read(links.nbs/name))
    assert cell and cell['source'] == [line]


def test_map_has_each_notebook_once():
    files = [f for _, f in links.order()]
    assert len(files) == len(set(files)) and set(files) == {
        p.name for p in links.nbs.glob('*.ipynb') if not p.name.startswith('.')
    } - {'index.ipynb'}


def test_links_of_the_pages():
    "Every file that INSTRUCTOR.md links to is there"
    for link in re.findall(r'\]\(([^)#\s]+)', (root/'INSTRUCTOR.md').read_text(encoding='utf-8')):
        if not re.match(r'\w+:', link): assert (root/link).exists(), link


def wordless(source):
    """What is exported without words: functions and classes without a docstring, and lines of a
    signature, or fields of a dataclass,
    without a comment. A line may hold several parameters; its comment then says what they are."""
    said = {
        t.start[0]
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    def parameters(f):
        a = f.args
        return [
            o
            for o in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg)
            if o and o.arg not in ('self', 'cls')
        ]
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'):
            continue
        patched = any('patch' in ast.unparse(d) for d in node.decorator_list)
        if not ast.get_docstring(node) and not patched: yield node.name
        makers = (
            [node]
            if isinstance(node, ast.FunctionDef)
            else [o for o in node.body if isinstance(o, ast.FunctionDef) and o.name == '__init__']
        )
        yield from (
            f'{node.name}: {o.arg}'
            for f in makers
            for o in parameters(f)
            if o.end_lineno not in said
        )
        if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
            yield from (
                f'{node.name}: {o.target.id}'
                for o in node.body
                if isinstance(o, ast.AnnAssign) and o.end_lineno not in said
            )


def test_wordless_sees():
    found = list(
        wordless(
            'def f(a, b): # both\n    "Doc"\ndef g(\n    a, # one\n    b,\n): "Doc"\nclass C:\n    '
            'def __init__(self, x): self.x = x\ndef _h(a): pass\n'
            '@dataclass\nclass D:\n    "Doc"\n    x:int=1\n    y:int=2 # said\n'
        )
    )
    assert found == ['g: b', 'C', 'C: x', 'D: x']


@pytest.mark.parametrize(
    'path',
    sorted(p for p in (root / 'dmd2_nb').rglob('*.py') if not p.name.startswith('_')),
    ids=lambda p: p.stem,
)
def test_exported_names_have_words(path):
    assert not list(wordless(path.read_text(encoding='utf-8')))


def test_config_fields_say_default_source_and_effect():
    "`field:type=default # Effect, in words [source]`"
    from dataclasses import MISSING, fields
    from fastcore.docments import docments
    from dmd2_nb.distill import DMD2Config
    notes = docments(DMD2Config)
    for f in fields(DMD2Config):
        effect, source = re.fullmatch(r'(.+) \[(.+)\]', notes[f.name] or '').groups()
        assert f.default is not MISSING and len(effect.split()) >= 5, f.name
        assert re.match(r'(ours|code|\d\.\d|[A-G](\.\d)?)\b', source), (
            f'{f.name}: {source} is no section, appendix, "code" or "ours"'
        )


def test_every_recipe_says_every_number():
    "What has no default in `Recipe` is set in each recipe"
    from dataclasses import MISSING, fields
    from dmd2_nb.recipes import RECIPES, Recipe
    for f in fields(Recipe):
        if f.default is MISSING:
            assert all(getattr(r, f.name) not in (None, '', 0) for r in RECIPES.values()), f.name
