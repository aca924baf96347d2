"The documentation site: a page for each notebook and module, nothing that leads nowhere, nothing from other servers"
import html, importlib.util, json, re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
missing = [m for m in ('smalldocs', 'latex2mathml', 'yaml') if importlib.util.find_spec(m) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"not installed: {', '.join(missing)} (the extra `docs`)"
)
spec = importlib.util.spec_from_file_location('docs_build', root/'docs'/'build.py')
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site in `_docs`, where it is newer than everything that it is made from; else a new one elsewhere"
    made = root/'_docs'/'search.json'
    sources = [
        *docs.notebooks(),
        *(root / 'dmd2_nb').rglob('*.py'),
        root / 'docs' / 'build.py',
        root / 'pyproject.toml',
    ]
    if made.is_file() and made.stat().st_mtime > max(p.stat().st_mtime for p in sources):
        return root/'_docs'
    return docs.build(tmp_path_factory.mktemp('pages')/'site')


def test_no_link_leads_nowhere(site): assert list(docs.broken(site)) == []


def test_nothing_comes_from_other_servers(site): assert list(docs.elsewhere(site)) == []


def test_the_checks_see_what_they_look_for(tmp_path):
    (tmp_path / 'a.html').write_text(
        '<h2 id="here"></h2><a href="#here">1</a><a href="#gone">2</a><a href="b.html">3</a><a '
        'href="b.html#x">4</a><img src="no.png"><a href="c.html">5</a>'
    )
    (tmp_path/'b.html').write_text('<p id="y"></p><a href="https://example.org">6</a>')
    assert sorted(docs.broken(tmp_path)) == [
        'a.html: #gone',
        'a.html: b.html#x',
        'a.html: c.html',
        'a.html: no.png',
    ]
    assert list(docs.elsewhere(tmp_path)) == []
    (tmp_path / 'c.html').write_text(
        '<script defer src="https://example.org/x.js"></script><img alt="" src="https://example.org/y.png">'
    )
    assert len(list(docs.elsewhere(tmp_path))) == 2


def test_a_page_for_each_notebook(site):
    "With its title, its pictures and its formulas, without the cells that only nbdev reads"
    for p in docs.notebooks():
        nb, page = (
            json.loads(p.read_text(encoding='utf-8')),
            (site / f'{p.stem}.html').read_text(encoding='utf-8'),
        )
        title, sub, _ = docs.title_of(nb)
        assert (
            f'<h1 class="title">{html.escape(title)}' in page
            or html.escape(title, quote=False) in page
        ), f'{p.name}: no title'
        pictures = sum(
            'image/png' in o.get('data', {})
            for c in nb['cells']
            if c['cell_type'] == 'code' and '#| hide' not in ''.join(c['source'])
            for o in c['outputs']
        )
        assert page.count('<img') >= pictures, (
            f'{p.name} has {pictures} pictures, its page {page.count("<img")}'
        )
        assert 'nbdev_export(' not in re.sub(r'<code>.*?</code>', '', page), (
            f'{p.name}: shows the export cell'
        )
        assert r'\(' not in re.sub(
            r'<pre.*?</pre>|<code.*?</code>|<script.*?</script>', '', page, flags=re.S
        ), f'{p.name}: a formula is left as TeX'
    assert (site/'10_dmd.html').read_text(encoding='utf-8').count('<math') > 10


def test_reference_has_docments_and_sources(site):
    "Each module has a page; parameters come with their comments, that is shapes, and each name with its source"
    for name, page in docs.modules().items():
        assert (site/'api'/f'{page}.html').is_file(), f'no page for {name}'
    page = (site/'api'/'noise.html').read_text(encoding='utf-8')
    assert 'Noise level of each sample, (b,)' in page and 'Noisy samples, (b, *dims)' in page
    links = re.findall(r'href="([^"]*/blob/main/dmd2_nb/[^"#]+)#L(\d+)', page)
    assert links, 'no links to the source'
    line = (root/'dmd2_nb'/'noise.py').read_text(encoding='utf-8').splitlines()[int(links[0][1])-1]
    assert re.match(r'(@|def |class )', line), f'the first source link points to: {line}'


def test_search_knows_words_of_lessons_and_names(site):
    text = (site/'search.json').read_text(encoding='utf-8')
    assert all(w in text for w in ('Two clocks', 'dmd_grad', 'Wilson'))
