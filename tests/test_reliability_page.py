"RELIABILITY.md: every promise has its test, every figure is the one that was measured"
import ast, json, re

import pytest


@pytest.fixture(scope='module')
def page(root): return (root/'RELIABILITY.md').read_text(encoding='utf-8')


def test_each_promise_has_a_test(page, root):
    "Every test that is named is there"
    rows = [
        r
        for r in re.findall(r'^\| (.+) \|$', page.split('## Figures')[0], re.M)
        if not r.startswith(('promise', '---'))
    ]
    assert len(rows) > 20
    for r in rows:
        named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', r)
        assert named, f'no test: {r}'
        for file, name in named:
            tree = ast.parse((root/'tests'/file).read_text(encoding='utf-8'))
            assert name in {o.name for o in tree.body if isinstance(o, ast.FunctionDef)}, (
                f'{file} has no {name}'
            )
    for link in re.findall(r'\]\(([^)#]+)\)', page): assert (root/link).exists(), link


def test_each_figure_was_measured(page, root):
    "Numbers of the last table against data/runs/reliability.json, to the last digit that is shown"
    log = json.loads((root/'data'/'runs'/'reliability.json').read_text())
    rows = [r.split(' | ') for r in re.findall(r'^\| (.+) \|$', page.split('## Figures')[1], re.M)][
        1:
    ]
    assert len(rows) > 8
    for what, figure, keys in rows:
        numbers, keys = (
            re.findall(r'\d[\d,]*(?:\.\d+)?(?: %)?', figure),
            re.findall(r'`([\w.]+)`', keys),
        )
        assert len(numbers) == len(keys) > 0, what
        for n, k in zip(numbers, keys):
            v = log
            for part in k.split('.'): v = v[part] if isinstance(v, dict) else v[int(part)]
            digits = len(n.removesuffix(' %').partition('.')[2])
            assert (
                abs(
                    float(n.removesuffix(' %').replace(',', ''))
                    - v * (100 if n.endswith('%') else 1)
                )
                <= 0.51 * 10**-digits
            ), f'{what}: {n} on the page, {k} is {v}'
    assert (
        log['kills']['same'] == log['kills']['runs']
        and log['kills']['kills'] >= 20
        and log['fuzz']['n'] >= 2000
        and log['fuzz']['harm'] == {}
        and log['fuzz']['n_wrong'] == 0
    )
    assert (
        log['guards']['named'] == log['guards']['planted']
        and log['guards']['latest'] <= 50
        and log['guards']['healthy_alarms'] == 0
    )
    assert (
        log['long']['iterations'] == 10_000
        and log['long']['growth'] < 0.01
        and log['long']['logger'] < 0.02
    )
    assert log['cost']['fashion16']['all'] < 0.02 and all(
        o['same_weights'] for o in log['cost'].values()
    )
