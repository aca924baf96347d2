"""JupyterLab in a real browser: all cells of a lesson, the progress bar and the final picture; the
ballot of the user study, clicked"""
import csv, importlib.util, json, os, re
from pathlib import Path

import pytest

from _browser import chromium, find_chromium, jupyterlab, open_notebook, run_all

root = Path(__file__).resolve().parent.parent
missing = [
    m for m in ('jupyterlab', 'websocket', 'ipywidgets') if importlib.util.find_spec(m) is None
]
pytestmark = [
    pytest.mark.skipif(
        find_chromium() is None, reason='no Chromium at hand: apt-get install chromium'
    ),
    pytest.mark.skipif(bool(missing), reason=f'not installed: {", ".join(missing)}'),
]


def stripped(name, folder):
    "The notebook without outputs and without the cell that exports, in a folder of its own"
    nb = json.loads((root/'nbs'/name).read_text(encoding='utf-8'))
    nb['cells'] = [
        c | (dict(outputs=[], execution_count=None) if c['cell_type'] == 'code' else {})
        for c in nb['cells']
        if 'nbdev_export(' not in ''.join(c['source'])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text(json.dumps(nb), encoding='utf-8')
    return len([c for c in nb['cells'] if c['cell_type'] == 'code'])


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "The address of a JupyterLab, its folder and one for pictures; the switches of slow and GPU cells are off"
    tmp = tmp_path_factory.mktemp('browser')
    shots = Path(os.environ.get('SCREENSHOTS') or tmp/'screenshots')
    shots.mkdir(parents=True, exist_ok=True)
    off = dict.fromkeys(('RUN_SLOW', 'RUN_CUDA', 'RUN_SDXL', 'CUDA_VISIBLE_DEVICES'), '')
    with jupyterlab(tmp, tmp/'nbs', OMP_NUM_THREADS='1', VOTES=str(tmp/'votes.csv'), **off) as url:
        yield url, tmp, shots


@pytest.fixture
def page(lab, tmp_path, request):
    "A browser; the last it showed is kept as a picture"
    with chromium(tmp_path) as page:
        yield page
        page.screenshot(lab[2]/f'{request.node.name}.png')


# Keeps the values of the progress bar, and counts the dashboard's drawings, as the page changes
watch = """window.seen = []; window.live = 0; window.drawn = '';
new MutationObserver(() => {
  document.querySelectorAll('.jp-OutputArea-output progress')
    .forEach(p => { if (!seen.includes(p.value)) seen.push(p.value) });
  const now = document.querySelector('.dmd2board figure')?.outerHTML;
  if (now && now != window.drawn) { window.live++; window.drawn = now }
}).observe(document.body, {subtree: true, childList: true}); 0"""


def saved_as(page, path):
    page.screenshot(path)
    assert path.read_bytes()[:4] == b'\x89PNG' and path.stat().st_size > 20_000
    print(f'screenshot: {path}')


def test_lesson_runs_from_top_to_bottom(lab, page):
    """17_toy_dmd2: its progress bar moves while its cells run, its panels are drawn live, its last
    picture appears, no cell fails"""
    url, tmp, shots = lab
    n = stripped('17_toy_dmd2.ipynb', tmp/'nbs')
    open_notebook(page, url.format('17_toy_dmd2.ipynb'))
    assert not page.js('document.querySelectorAll(".jp-OutputArea-output img").length')
    page.js(watch)
    shot = []
    def look():
        if not shot and page.js('!!document.querySelector(".dmd2board figure")'):
            page.js('document.querySelector(".dmd2board").scrollIntoView({block:"center"})')
            shot.append(page.screenshot(shots/'dashboard_live.png'))
    errors = run_all(page, 600, look)
    assert not errors, errors
    seen = page.js('window.seen')
    assert len(seen) >= 3 and seen == sorted(seen), f'the progress bar took the values {seen}'
    assert page.js('window.live') >= 1, 'the dashboard was not drawn while the run went on'
    last = '[...document.querySelectorAll(".jp-NotebookPanel .jp-OutputArea-output img")].at(-1)'
    page.wait(f'(e=>e && e.complete && e.naturalWidth>100)({last})', 60, 'the last picture')
    assert (
        page.js('document.querySelectorAll(".jp-NotebookPanel .jp-OutputArea-output img").length')
        >= 8
    )
    numbers = [
        int(m[1])
        for o in page.js(
            '[...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(o=>o.textContent)'
        )
        if (m := re.search(r'\[(\d+)\]', o))
    ]
    assert len(numbers) == n, 'a cell was left out'
    page.js(f'{last}.scrollIntoView({{block:"center"}})')
    saved_as(page, shots/'toy_dmd2.png')


def test_ballot_takes_votes(lab, page):
    """41_preference: two pictures; clicks on two answers and the button are one line in the file;
    the models' names are not in the page"""
    url, tmp, shots = lab
    stripped('41_preference.ipynb', tmp/'nbs')
    add = "import os\nstudy = PairVote(few, prompts[:4], os.environ['VOTES'], voter='browser', votes=1)\nballot(study)"
    path = tmp/'nbs'/'41_preference.ipynb'
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['cells'].append(
        dict(
            cell_type='code', id='ballot', metadata={}, outputs=[], execution_count=None, source=add
        )
    )
    path.write_text(json.dumps(nb), encoding='utf-8')
    open_notebook(page, url.format('41_preference.ipynb'))
    errors = run_all(page, 300)
    assert not errors, errors
    box = '[...document.querySelectorAll(".widget-vbox")].at(-1)'
    page.wait(
        '(b=>b && b.querySelectorAll("img").length==2 && '
        f'[...b.querySelectorAll("img")].every(o=>o.complete && o.naturalWidth>100))({box})',
        120,
        'two pictures',
    )
    page.js(f'{box}.scrollIntoView({{block:"center"}})')
    saved_as(page, shots/'ballot.png')
    shown = page.js(f'{box}.outerHTML')
    assert not re.search('sharp|blurred', shown), 'the page says which model is which'
    button = f'{box}.querySelector("button.widget-button")'
    def votes():
        with open(tmp/'votes.csv', newline='', encoding='utf-8') as f:
            return list(csv.DictReader(f))
    for i in range(4):
        page.wait(f'{button}?.disabled', 30, 'the button waits for answers')
        for row, answer in enumerate(('left', 'right')):
            page.click(
                f'{box}.querySelectorAll(".widget-toggle-buttons")[{row}].querySelector("[data-value={answer}]")'
            )
        page.wait(f'!{button}.disabled', 30, 'the button can be pressed')
        page.click(button)
        page.wait(
            f'{box}.textContent.includes("{i + 1} of 4") || {box}.textContent.includes("Thank you")',
            30,
            f'vote {i + 1} is counted',
        )
        assert [(o['voter'], o['quality'], o['alignment']) for o in votes()] == [
            ('browser', 'left', 'right')
        ] * (i + 1)
    assert page.js(f'{box}.textContent.includes("Thank you")')
    assert {o['prompt'] for o in votes()} and len({o['item'] for o in votes()}) == 4
