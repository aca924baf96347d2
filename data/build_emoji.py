"""Draw the emoji of data/emoji32.npz again at another size: data/cache/emoji64.npz, which `emoji64()` finds there.

    python data/build_emoji.py                       # about 10 minutes on 2 cores; needs npm and
    rsvg-convert (Debian: librsvg2-bin)
    python data/build_emoji.py --size 32 --out x.npz # the bundled file itself, as a check of the sources

The pictures come from six npm packages (their licences: data/LICENSES). Each is drawn at 128
pixels, averaged over boxes and put
on white. emoji32.npz says which of them belong to the set, in which order, of which class: a
picture is found by its 32-pixel version."""
import argparse, io, json, os, subprocess, sys, tarfile, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

here = Path(__file__).resolve().parent
packages = dict(fluent3d='@lobehub/fluent-emoji-3d@1.1.0') | {
    k: f'@iconify-json/{k}@{v}'
    for k, v in {
        'fluent-emoji': '1.2.7',
        'fluent-emoji-flat': '1.2.6',
        'noto': '1.2.9',
        'noto-v1': '1.2.5',
        'fxemoji': '1.2.2',
    }.items()
}


def unpacked(spec, folder):
    "Folder of an npm package, fetched when it isn't there"
    name = spec.rsplit('@', 1)[0].replace('@', '').replace('/', '-')
    out = folder/name
    if not out.exists():
        made = subprocess.run(
            ['npm', 'pack', '-s', spec], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        tmp = folder/f'{name}.tmp'
        with tarfile.open(folder/made) as t: t.extractall(tmp, filter='data')
        (folder/made).unlink()
        os.replace(tmp, out)
    return out/'package'


def sources(style, folder):
    "Functions that draw each picture of a style"
    root = unpacked(packages[style], folder)
    if style == 'fluent3d':
        return [
            lambda p=p: Image.open(p).convert('RGBA')
            for p in sorted((root / 'assets').glob('*.webp'))
        ]
    icons = json.loads((root/'icons.json').read_text(encoding='utf-8'))
    size = {
        k: icons.get(k, 16 if k in ('width', 'height') else 0)
        for k in ('left', 'top', 'width', 'height')
    }
    def svg(o):
        o = size | o
        box = f"{o['left']} {o['top']} {o['width']} {o['height']}"
        text = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="128" height="128">{o["body"]}</svg>'
        )
        r = subprocess.run(
            ['rsvg-convert', '-w', '128', '-h', '128'], input=text.encode(), capture_output=True
        )
        return Image.open(io.BytesIO(r.stdout)).convert('RGBA') if r.returncode == 0 else None
    return [lambda o=o: svg(o) for o in icons['icons'].values()]


def small(im, size):
    "RGB on white, (size, size, 3)"
    im = im.resize((size, size), Image.Resampling.BOX)
    return np.asarray(Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB'))


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--size', type=int, default=64)
    ap.add_argument('--out', type=Path, help='default: data/cache/emojiSIZE.npz')
    ap.add_argument(
        '--packages',
        type=Path,
        default=here / 'cache' / 'emoji',
        help='where npm packages are unpacked',
    )
    a = ap.parse_args()
    a.packages.mkdir(parents=True, exist_ok=True)
    out = a.out or here/'cache'/f'emoji{a.size}.npz'
    with np.load(here/'emoji32.npz', allow_pickle=False) as z: index = {k: z[k] for k in z.files}
    n, images, todo = (
        len(index['images']),
        np.zeros((len(index['images']), a.size, a.size, 3), 'uint8'),
        {},
    )
    for i in range(n):
        todo.setdefault((int(index['styles'][i]), index['images'][i].tobytes()), []).append(i)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for s, style in enumerate(index['style_names']):
            rows = sum(k[0] == s for k in todo)
            for im in pool.map(lambda f: f(), sources(str(style), a.packages)):
                if im is None: continue
                for i in todo.pop((s, small(im, 32).tobytes()), ()): images[i] = small(im, a.size)
            print(f'{style}: {rows-sum(k[0] == s for k in todo)} of {rows} found', flush=True)
    left = sum(len(v) for v in todo.values())
    if left:
        sys.exit(
            f'{left} of {n} pictures were not found: another version of a package or of '
            'rsvg-convert? Nothing was written.'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(out.name+'.tmp')
    with zipfile.ZipFile(tmp, 'w', zipfile.ZIP_LZMA) as z:
        for k, v in (index | dict(images=images)).items():
            info = zipfile.ZipInfo(f'{k}.npy', (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_LZMA
            with z.open(info, 'w', force_zip64=True) as f:
                np.lib.format.write_array(f, v, allow_pickle=False)
    os.replace(tmp, out)
    print(f'{out.name}: {n} pictures')


if __name__ == '__main__': main()
