"""Build the documentation site from the notebooks and the package: `python docs/build.py [--out _docs]`

Pages and search by smalldocs, formulas by latex2mathml; the site asks no other server for
anything. Nothing is executed: pages
show the outputs that are stored in the notebooks."""
import argparse, json, os, re, shutil, subprocess, sys, sysconfig, tempfile, tomllib
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parent.parent
project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
repository = project['urls']['Repository']
colab = repository.replace('https://github.com', 'https://colab.research.google.com/github')
sections = {
    '0': 'Ground',
    '1': 'The method',
    '2': 'Images',
    '3': 'SDXL, many GPUs',
    '4': 'Practice',
    '5': 'Files',
    '6': 'Experiments',
    '9': 'Practice',
}


def notebooks():
    return sorted(p for p in (root/'nbs').glob('*.ipynb') if not p.name.startswith('.'))


def title_of(nb):
    "`# Title` and `> subtitle` of the first cell, and what else it says"
    title, _, rest = re.sub(
        r'^\[!\[Open in Colab\].*$', '', ''.join(nb['cells'][0]['source']), flags=re.M
    ).partition('\n')
    sub, _, more = rest.strip().partition('\n')
    return title.removeprefix('#').strip(), sub.removeprefix('>').strip(), more.strip()


def modules():
    "Every module's full name -> its page in api/, as smalldocs names them: shortly, where that is clear"
    names = [
        '.'.join(p.relative_to(root).with_suffix('').parts)
        for p in sorted((root / 'dmd2_nb').rglob('*.py'))
        if not p.name.startswith('_')
    ]
    last = [n.rpartition('.')[2] for n in names]
    return {n: n if last.count(s) > 1 else s for n, s in zip(names, last)}


def prepared(path):
    "A notebook as a page: front matter for its title cell, no cells and lines that only nbdev reads"
    nb = json.loads(path.read_text(encoding='utf-8'))
    title, sub, more = title_of(nb)
    module = next(
        (
            m[1]
            for c in nb['cells']
            if c['cell_type'] == 'code'
            and (m := re.search(r'^#\|\s*default_exp (\S+)', ''.join(c['source']), re.M))
        ),
        None,
    )
    links = [
        f'[Notebook]({repository}/blob/main/nbs/{path.name})',
        f'[Open in Colab]({colab}/blob/main/nbs/{path.name})',
    ] + (
        [f'[API of `dmd2_nb.{module}`](api/{modules()[f"dmd2_nb.{module}"]}.md)'] if module else []
    )
    cells = [
        dict(
            cell_type='raw',
            id='front',
            metadata={},
            source=f'---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(sub)}\n---',
        ),
        dict(
            cell_type='markdown',
            id='links',
            metadata={},
            source=' · '.join(links) + (f'\n\n{more}' if more else ''),
        ),
    ]
    for c in nb['cells'][1:]:
        src = ''.join(c['source'])
        if c['cell_type'] == 'code':
            if (
                re.search(r'^#\|\s*(hide|default_exp|eval: false)\b', src, re.M)
                or 'nbdev_export(' in src
            ):
                continue
            src = re.sub(r'^(#\|.*\n?)+', '', src)
        else: src = re.sub(r'\]\(\.\./([^)\s]+)\)', rf']({repository}/blob/main/\1)', src)
        cells.append(c | dict(source=src))
    return dict(nb, cells=cells), title


def api_index():
    "A list of all modules, with what each is for"
    lines = [
        '---\ntitle: API\ndescription: Every module, class and function, with its arguments and shapes\n---\n',
        '| module | |',
        '|---|---|',
    ]
    for n, page in modules().items():
        text = (root/Path(*n.split('.'))).with_suffix('.py').read_text(encoding='utf-8')
        lines.append(
            f'| [`{n}`]({page}.md) | {text.partition(chr(10))[0].strip(chr(34)).replace("|", chr(92) + "|")} |'
        )
    return '\n'.join(lines)


def config(titles):
    "Settings of smalldocs"
    groups = {}
    for stem, t in titles.items():
        if stem != 'index':
            groups.setdefault(sections[stem[0]], []).append(
                dict(text=f'{stem.split("_")[0]} · {t}', href=f'{stem}.ipynb')
            )
    api = dict(packages=['dmd2_nb'], out='api', root=str(root), source=f'{repository}/blob/main')
    return dict(
        project=dict(type='website', **{'output-dir': '_site'}),
        api=api,
        website=dict(
            title='dmd2_nb',
            description=project['description'],
            search=True,
            **{'repo-url': repository},
            navbar=dict(
                left=[
                    dict(text='Course', href='index.ipynb'),
                    dict(text='API', href='api/index.md'),
                ],
                right=[dict(icon='github', text='GitHub', href=repository)],
            ),
            sidebar=[
                dict(
                    id='api',
                    contents=[dict(text='All modules', href='api/index.md')]
                    + [
                        dict(text=n.removeprefix('dmd2_nb.'), href=f'api/{page}.md')
                        for n, page in modules().items()
                    ],
                ),
                dict(
                    id='course',
                    contents=[dict(text='Overview', href='index.ipynb')]
                    + [dict(section=k, contents=v) for k, v in groups.items()],
                ),
            ],
        ),
        theme='cosmo',
        toc=True,
    )


def mathml(page):
    "Formulas as MathML, which browsers draw themselves, in place of TeX for a script from elsewhere"
    from latex2mathml.converter import convert
    def one(m):
        tex, block = unescape(m[2]).strip(), 'display' in m[1]
        m = convert(tex[2:-2], display='block' if block else 'inline')
        # wider than a telephone
        if block: m = f'<span style="display:block;overflow-x:auto">{m}</span>'
        return re.sub(
            r'<mi>(log|exp|sin|cos|min|max|tanh)</mi>',
            r'<mspace width="0.17em"/><mi>\1</mi><mspace width="0.17em"/>',
            m,
        )
    page = re.sub(r'<span class="(math (?:inline|display))">(.*?)</span>', one, page, flags=re.S)
    return re.sub(r'<(script|link)\b[^>]*cdn\.jsdelivr\.net[^>]*>(</script>)?', '', page)


def broken(site):
    "Links and pictures of a built site that lead nowhere: `page: target`"
    pages = {p: p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {p: set(re.findall(r'\s(?:id|name)="([^"]+)"', t)) for p, t in pages.items()}
    for p, t in pages.items():
        for link in {unescape(o) for o in re.findall(r'\s(?:href|src)="([^"]*)"', t)}:
            u = urlsplit(link)
            if u.scheme or u.netloc or not link: continue
            target = (p.parent/unquote(u.path)).resolve() if u.path else p
            if target.is_dir(): target = target/'index.html'
            if not target.is_file(): yield f'{p.relative_to(site)}: {link}'
            elif u.fragment and target in ids and unquote(u.fragment) not in ids[target]:
                yield f'{p.relative_to(site)}: {link}'


def elsewhere(site):
    "What pages would load from other servers: `page: address`"
    for p in site.rglob('*.html'):
        for tag, link in re.findall(
            r'<(script|link|img|iframe)\b[^>]*?\s(?:src|href)="(https?:[^"]+)"',
            p.read_text(encoding='utf-8'),
        ):
            if tag != 'link' or 'stylesheet' in link: yield f'{p.relative_to(site)}: {link}'


def build(out):
    "Write the site to the folder `out`"
    import yaml
    with tempfile.TemporaryDirectory() as tmp:
        src, titles = Path(tmp)/'site', {}
        shutil.copytree(root/'nbs'/'images', src/'images')
        for p in notebooks():
            nb, titles[p.stem] = prepared(p)
            (src/p.name).write_text(json.dumps(nb), encoding='utf-8')
        (src / '_smalldocs.yml').write_text(
            yaml.safe_dump(config(titles), sort_keys=False), encoding='utf-8'
        )
        tool = Path(sysconfig.get_path('scripts'))/'smalldocs'
        env = os.environ | {
            'PYTHONPATH': os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
        }
        subprocess.run([tool, 'api', 'build', '--dir', src], check=True, env=env)
        (src/'api'/'index.md').write_text(api_index(), encoding='utf-8')
        subprocess.run([tool, 'render', src, '--quiet'], check=True, env=env)
        for p in (src/'_site').rglob('*.html'):
            p.write_text(mathml(p.read_text(encoding='utf-8')), encoding='utf-8')
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(src/'_site', out)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, default=root/'_docs')
    out = build(p.parse_args().out.resolve())
    if bad := [*broken(out), *elsewhere(out)]:
        sys.exit('\n'.join(['leads nowhere, or to another server:', *bad]))
    print(f'{len(list(out.rglob("*.html")))} pages in {out}')


if __name__ == '__main__': main()
