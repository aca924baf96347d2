"What a course promises: the way from notebook to notebook, and words for everything that is exported"
import ast, importlib.util, json, re
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
    assert len(files) == len(set(files)) and set(files) == {p.name for p in links.nbs.glob('*.ipynb') if not p.name.startswith('.')}-{'index.ipynb'}


def test_links_of_the_pages():
    "Every file that INSTRUCTOR.md links to is there"
    for link in re.findall(r'\]\(([^)#\s]+)', (root/'INSTRUCTOR.md').read_text(encoding='utf-8')):
        if not re.match(r'\w+:', link): assert (root/link).exists(), link
