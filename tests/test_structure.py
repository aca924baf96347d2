"The house: who may import whom, how large a module gets, what a notebook looks like"
import ast, configparser, json, re, subprocess, sys, tomllib
from pathlib import Path
from statistics import median

import pytest

root = Path(__file__).resolve().parent.parent
package = root/'dmd2_nb'

# A module imports from lower floors only. A new module is entered here.
floors = {
    12.6: 'lab.toy_runs lab.emoji_table lab.mini_adapt lab.mini_pages',
    12.4: 'lab.toy_paths lab.emoji_ablation lab.mini_rows lab.mini_teacher',
    12.2: 'lab.toy_rows lab.mini_bench lab.health_runs lab.broken_runs lab.brightness_runs lab.emoji_runs',
    12: 'lab.bench lab.toy_parts lab.emoji_rows',
    11: 'cli',
    10.5: 'options sheets',
    10: 'imagenet64 measure',
    9: 'jobs',
    8.5: 'own teacher_job',
    8: 'job coco_eval sdxl.mini sdxl.adapt',
    7: 'dashboard evaluate sdxl.recipe sdxl.judge',
    6.5: 'sdxl.pretrain',
    6: 'teacher generator runs parallel_run sdxl.roles sdxl.data sdxl.checkpoints',
    5: 'train recipes graphs follow sdxl.graphs',
    4: 'distill guards ttur sdxl.lora',
    3: 'fake_score backsim regression parts fid presets weights health sdxl.adapter sdxl.conditioning sdxl.memory',
    2: 'cifar layers.lora panels preference denoiser sampling dmd gan unet features',
    1: (
        'refusals layers.lora_strength plot toy noise nets metrics images grids parallel parallel_cost '
        'blocks feature_nets logs launch'
    ),
    0: 'layers.lora_names core image_files fused signals system.checkpoint system.texts',
    -1: 'system.plan system.image_files',
    -2: 'system.image_labels',
    -3: 'system.image_names',
    -4: 'system.tensors',
    -5: 'system.torch_files',
    -6: 'system.atomic system.zips system.safe_pickle assets system.lmdb_pages',
}
floor_of = {m: f for f, ms in floors.items() for m in ms.split()}
# names promised at the root whose body lives in a wing
handed_on = {'image_files': 'system.image_files'}
only_shown = {'plot', 'panels', 'dashboard', 'sheets'}  # for notebooks, cli and one another
max_lines = 450
still_long = {  # lines of modules that wait to be taken apart: the numbers may only fall
    'distill': 480,
    'fused': 520,
    'sdxl.adapter': 510,
    'system.safe_pickle': 600,
    'system.tensors': 520,
}
late = {
    'matplotlib',
    'diffusers',
    'transformers',
    'torchvision',
    'PIL',
    'IPython',
    'peft',
    'accelerate',
    'torch_fidelity',
}  # imported inside functions

paths = sorted(p for p in package.rglob('*.py') if not p.name.startswith('_'))
notebooks = sorted(
    p
    for p in (root / 'nbs').rglob('*.ipynb')
    if not p.name.startswith('.') and '.ipynb_checkpoints' not in p.parts
)


def name_of(path): return '.'.join(path.relative_to(package).with_suffix('').parts)
modules = {name_of(p): p for p in paths}
each_module = pytest.mark.parametrize('name', modules)
each_notebook = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.name)


def tree(name): return ast.parse(modules[name].read_text(encoding='utf-8'))


def imported(source, name):
    "Modules of this package that the module `name` with this `source` imports, wherever in it"
    parents = ['dmd2_nb', *name.split('.')[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(
                (parents[: len(parents) - node.level + 1] if node.level else [])
                + ([node.module] if node.module else [])
            )
            targets = [f'{base}.{a.name}' for a in node.names] + [base]
        else: continue
        for t in targets:
            parts = t.split('.')
            if parts[0] != 'dmd2_nb': continue
            for n in range(2, len(parts)+1):
                if (m := '.'.join(parts[1:n])) in floor_of: yield m


def top_level(node):
    "Statements that run when the module is imported"
    for o in node.body if isinstance(node, ast.Module) else [node]:
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        yield o
        for block in ('body', 'orelse', 'finalbody', 'handlers'):
            for s in getattr(o, block, []): yield from top_level(s)


def cells(path, kind='code'):
    return [
        c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind
    ]
def source(cell): return ''.join(cell['source'])


def directives(src):
    "nbdev's directives at the top of a cell, name -> value"
    res = {}
    for line in src.splitlines():
        if not line.strip(): continue
        if not line.startswith('#|'): break
        key, _, value = line[2:].strip().replace(':', ' ', 1).partition(' ')
        res[key] = value.strip()
    return res


def python(src):
    "The syntax tree of a cell, its magics left out"
    return ast.parse('\n'.join('pass' if re.match(r'\s*[%!]', o) else o for o in src.splitlines()))


def test_there_is_something_to_test():
    assert len(modules) > 5 and len(notebooks) > 5


def test_imported_sees_every_way_to_import():
    "The floors test rests on `imported`"
    for s, name in {
        'from .core import x': 'gan',
        'from . import core': 'gan',
        'from ..core import x': 'sdxl.roles',
        'import dmd2_nb.core': 'gan',
        'from dmd2_nb import core': 'gan',
        'def f():\n    from dmd2_nb.core import x': 'gan',
    }.items():
        assert set(imported(s, name)) == {'core'}, s
    assert set(imported('from .adapter import x', 'sdxl.roles')) == {'sdxl.adapter'}
    assert not set(imported('from .core import x', 'sdxl.roles'))  # sdxl.core is no module
    assert not set(imported('from torch import core', 'gan'))


def test_floors_name_modules_only():
    "Who deletes or renames a module takes it out of the table"
    assert not set(floor_of) - set(modules), 'the table of floors lists modules that are not there'
    assert len(floor_of) == sum(len(ms.split()) for ms in floors.values()), (
        'a module has two floors'
    )


@each_module
def test_floors(name):
    assert name in floor_of, f'enter {name} in the table of floors'
    for other in set(imported(modules[name].read_text(encoding='utf-8'), name)):
        assert floor_of[other] < floor_of[name], (
            f'{name} (floor {floor_of[name]}) imports {other} (floor {floor_of[other]})'
        )
        shows = name in only_shown | {'cli'} or name.startswith('lab.')
        assert other not in only_shown or shows, (
            f'{name} imports {other}, which is for notebooks and cli only'
        )


def test_nothing_rests_on_experiments():
    "The lab may import everything; only notebooks and tests import it, and data/ builds data alone"
    for name in modules:
        if name.startswith('lab.'): continue
        text = modules[name].read_text(encoding='utf-8')
        assert not re.search(r'(from|import) +(dmd2_nb)?\.+lab\b', text), f'{name} imports the lab'
    scripts = {p.name for p in (root/'data').rglob('*.py')}
    other = sorted(n for n in scripts if not n.startswith('build_'))
    assert scripts and not other, f'experiments belong into dmd2_nb/lab: {other}'


def test_distill_names_no_kind_of_network():
    words = {n.id for n in ast.walk(tree('distill')) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree('distill')) if isinstance(n, ast.Attribute)}
    words |= {
        a.name
        for n in ast.walk(tree('distill'))
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    assert not {w for w in words if re.search('edm|sdxl', w, re.I)}


@pytest.mark.parametrize('name', handed_on)
def test_names_handed_on(name):
    "A module that keeps promised names holds one import and their list, nothing else"
    doc, *body = tree(name).body
    kinds = {type(o) for o in body}
    lists = {
        t.id: ast.literal_eval(o.value)
        for o in body
        if isinstance(o, ast.Assign)
        for t in o.targets
    }
    imports = [o for o in body if isinstance(o, ast.ImportFrom)]
    assert (
        kinds == {ast.ImportFrom, ast.Assign}
        and len(imports) == 1
        and imports[0].module == handed_on[name]
    )
    assert (
        sorted(lists['__all__']) == sorted(a.name for a in imports[0].names)
        and lists['__all__']
        and set(lists) == {'__all__', '_all_'}
    )


@each_module
def test_size(name):
    limit = still_long.get(name, max_lines)
    assert len(modules[name].read_text(encoding='utf-8').splitlines()) <= limit


@each_module
def test_module_code(name):
    "What exported code does without: star imports, `.cuda()`, executed pickles, slow imports at its top"
    t = tree(name)
    for node in top_level(t):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or '']
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        assert not {n.split('.')[0] for n in names} & late, (
            f'line {node.lineno}: import this inside the function that needs it'
        )
    for node in ast.walk(t):
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != '*' for a in node.names), f'line {node.lineno}: star import'
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.endswith('.cuda') or called == 'torch.cuda', (
                f'line {node.lineno}: {called}()'
            )
            assert called not in (
                'pickle.load',
                'pickle.loads',
                'dill.load',
                'joblib.load',
                'eval',
                'exec',
            ), f'line {node.lineno}: {called}()'
            keys = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert (
                keys.get('weights_only', 'True') == 'True'
                and keys.get('allow_pickle', 'False') == 'False'
            ), f'line {node.lineno}: executes pickles'
            if called == 'torch.load':
                assert 'weights_only' in keys, (
                    f'line {node.lineno}: torch.load without weights_only=True'
                )


@each_module
def test_public_names_say_what_they_are(name):
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            patched = isinstance(node, ast.FunctionDef) and any(
                'patch' in ast.unparse(d) for d in node.decorator_list
            )
            assert patched or ast.get_docstring(node), f'{node.name} has no docstring'


def exported_by(path):
    "The module that a notebook exports to, or None"
    return next(
        (d['default_exp'] for c in cells(path) if 'default_exp' in (d := directives(source(c)))),
        None,
    )


def test_no_module_without_its_notebook():
    made = {exported_by(p): p for p in notebooks}
    for name, path in modules.items():
        assert name in made, (
            f'{path.relative_to(root)} is exported by no notebook: delete it or restore its notebook'
        )
        edit = re.search(r'File to edit: (\S+)\.$', path.read_text(encoding='utf-8'), re.M)
        assert edit and (path.parent / edit[1]).resolve() == made[name].resolve(), (
            f'{path.relative_to(root)} names another notebook than {made[name].name}'
        )


def test_no_notebook_without_its_module():
    exps = [(e, p) for p in notebooks if (e := exported_by(p))]
    for e, p in exps: assert e in modules, f'{p.name} was not exported'
    assert len(exps) == len({e for e, _ in exps}), 'two notebooks export one module'


def test_no_pickle_in_notebooks():
    for p in notebooks:
        for c in cells(p):
            assert not re.search(
                r'\bpickle\.loads?\(|weights_only *= *False|allow_pickle *= *True', source(c)
            ), f'{p.name}, cell {c["id"]}'


light = """
import socket, sys, time
def no_network(*args): raise OSError('the import asked for the network')
socket.socket.connect = socket.getaddrinfo = no_network
import torch
start = time.perf_counter()
import dmd2_nb, dmd2_nb.distill, dmd2_nb.train
took = time.perf_counter()-start
import importlib
for m in sys.argv[1:]: importlib.import_module(f'dmd2_nb.{m}')
print(took, *sorted({m.split('.')[0] for m in sys.modules}))
"""


def test_light_import():
    """`dmd2_nb.distill` and `.train` come within 0.3 s after torch; no module of the package loads
    a plotting, image or diffusers library"""
    times = []
    for _ in range(3):  # the fastest counts: a busy machine says nothing about the package
        r = subprocess.run(
            [sys.executable, '-c', light, *modules], cwd=root, capture_output=True, text=True
        )
        assert not r.returncode, r.stderr
        took, *loaded = r.stdout.split()
        assert not late & set(loaded)
        times.append(float(took))
        if times[-1] < 0.3: break
    assert min(times) < 0.3


def test_versions_agree():
    ini = configparser.ConfigParser(delimiters=['='], interpolation=None)
    ini.read(root/'settings.ini', encoding='utf-8')
    ini = ini['DEFAULT']
    project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
    assert (
        ini['version']
        == re.search(
            r'^__version__ = "(.+)"$', (package / '__init__.py').read_text(encoding='utf-8'), re.M
        )[1]
    )
    assert (ini['lib_name'], ini['description'], f">={ini['min_python']}") == (
        project['name'],
        project['description'],
        project['requires-python'],
    )
    assert f'## {ini["version"]}' in (root/'CHANGELOG.md').read_text(encoding='utf-8')


machine_path = re.compile(r'(?<![\w.:/<-])/(?:work|farm|root|tmp|home|usr|opt|mnt|var|Users)/[\w.]')


@each_notebook
def test_notebook_file(path):
    "Stored as nbdev stores it, small, without errors and machine paths, with outputs and pictures"
    assert path.stat().st_size < 1_000_000
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert all(
        isinstance(c['source'], list) and all(o.count('\n') <= 1 for o in c['source'])
        for c in nb['cells']
    ), 'source is not a list of lines'
    ids = [c['id'] for c in nb['cells']]
    assert len(ids) == len(set(ids))
    code = cells(path)
    outs = [(c['id'], o) for c in code for o in c['outputs']]
    for i, o in outs: assert o['output_type'] != 'error', f'cell {i}: an error is stored'
    texts = [(c['id'], source(c)) for c in nb['cells']] + [
        (i, ''.join(o.get('text', []))) for i, o in outs
    ]
    texts += [
        (i, ''.join(v) if isinstance(v, list) else str(v))
        for i, o in outs
        for k, v in o.get('data', {}).items()
        if not k.startswith('image/') or 'svg' in k
    ]
    for i, t in texts:
        hit = machine_path.search(re.sub(r'data:image/[\w+]+;base64,[\w+/=]+', '', t))
        assert not hit, f'cell {i}: machine path {t[hit.start():][:60]}'
    said = [directives(source(c)) for c in code]
    run = [d for d in said if d.get('eval') != 'false' and not {'export', 'exports'} & d.keys()]
    if len(run) > 6: assert outs, 'no stored outputs'
    if len(run) > 12: assert any('image/png' in o.get('data', {}) for _, o in outs), 'no picture'


switches = {
    'slow': r'RUN_SLOW',
    'cuda': r'cuda\.is_available|RUN_CUDA',
    'sdxl': r'RUN_SDXL|cuda\.is_available',
}


@each_notebook
def test_flagged_cells_ask_first(path):
    "JupyterLab and Colab know no flags: Run All must not start what takes long or needs a GPU"
    for c in cells(path):
        src = source(c)
        for flag in switches.keys() & directives(src).keys():
            first = next(
                (o for o in python(src).body if not isinstance(o, (ast.Import, ast.ImportFrom))),
                None,
            )
            asked = first is not None and re.search('|'.join(switches.values()), ast.unparse(first))
            assert asked and re.search(switches[flag], src), (
                f'cell {c["id"]} is under {flag} and does not ask for its switch first'
            )
            assert any(isinstance(o, (ast.If, ast.IfExp)) for o in ast.walk(python(src))), (
                f'cell {c["id"]} asks, but does the same either way'
            )


@each_notebook
def test_notebook_form(path):
    "Title and subtitle, imports apart, short cells, something to try, the export at the end"
    first = json.loads(path.read_text(encoding='utf-8'))['cells'][0]
    assert first['cell_type'] == 'markdown' and re.match(r'# .+\n+> .+', source(first)), (
        'begins with a title and a subtitle'
    )
    code = cells(path)
    for c in code:
        src = source(c)
        n, d = len([o for o in src.splitlines() if o.strip()]), directives(src)
        one = len(python(src).body) == 1  # a class, function or table may need its lines
        assert n <= 40 or one, f'cell {c["id"]} has {n} lines: split it'
        if {'export', 'exports'} & d.keys() or 'nbdev_export(' in src or d.get('eval') == 'false':
            continue
        imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in python(src).body]
        assert all(imports) or not any(imports), (
            f'cell {c["id"]} mixes imports with other statements'
        )
    lessons = [c for c in code if not {'export', 'exports'} & directives(source(c)).keys()]
    assert median(len(source(c).splitlines()) for c in lessons) <= 16
    if exported_by(path): assert 'nbdev_export()' in source(code[-1])
    if path.stem != 'index':
        assert any(re.search(r'try it', source(c), re.I) for c in cells(path, 'markdown')), (
            'no "Try it" at the end'
        )


def test_every_notebook_opens_in_colab():
    "A badge in the title cell, the package installed by the first code cell, as `.ci/colab.py` writes them"
    r = subprocess.run(
        [sys.executable, '.ci/colab.py', '--check'], cwd=root, capture_output=True, text=True
    )
    assert not r.returncode, r.stdout+r.stderr


@each_notebook
def test_only_the_first_cell_knows_of_colab(path):
    code = cells(path)
    assert 'pip install' in source(code[0]) and directives(source(code[0])).get('eval') == 'false'
    if path.stem == '38_sdxl_colab': return  # where the place is the lesson
    for c in code[1:]:
        assert not re.search(r'/content\b|google\.colab|COLAB', source(c)), f'cell {c["id"]}'


def test_tracked_text_names_no_machine():
    "No path of the machine it was written on in any text of the repository"
    files = [
        p
        for pat in ('*.md', '*.ini', '*.toml', '*.txt', '*.in', '.ci/*', 'tests/*', 'data/*')
        for p in root.glob(pat)
    ]
    for p in [*files, *paths]:
        if p.is_file() and p.suffix in (
            '.py',
            '.md',
            '.ini',
            '.toml',
            '.txt',
            '.in',
            '.csv',
            '.json',
            '',
        ):
            for i, line in enumerate(p.read_text(encoding='utf-8').splitlines(), 1):
                assert not re.search(r'/(?:work|farm|root|tmp)/[A-Za-z._]', line), (
                    f'{p.relative_to(root)}:{i}: {line.strip()[:100]}'
                )
