"""Make data/fashion16_6k.npz again from the whole Fashion-MNIST: the first 600 training images of each class at 16x16.

    python data/build_fashion16.py FOLDER [--out fashion16_6k.npz]

FOLDER holds train-images-idx3-ubyte and train-labels-idx1-ubyte, plain or .gz: torchvision's
FashionMNIST(download=True) puts them
into FashionMNIST/raw, Debian's package dataset-fashion-mnist into /usr/share/datasets/fashion-mnist."""
import argparse, gzip, hashlib, os, sys, zipfile
from pathlib import Path

import numpy as np

here = Path(__file__).resolve().parent
known = {
    'train-images-idx3-ubyte': 'c59f468a2f672dc8',
    'train-labels-idx1-ubyte': 'bad3541b69d91243',
}
names = [
    't-shirt/top',
    'trouser',
    'pullover',
    'dress',
    'coat',
    'sandal',
    'shirt',
    'sneaker',
    'bag',
    'ankle boot',
]


def read(folder, name):
    for p in (folder/name, folder/f'{name}.gz'):
        if p.exists():
            data = gzip.decompress(p.read_bytes()) if p.suffix == '.gz' else p.read_bytes()
            if not hashlib.sha256(data).hexdigest().startswith(known[name]):
                sys.exit(f'{p}: not the genuine file (its sha256 differs)')
            return np.frombuffer(data, np.uint8)
    sys.exit(f'{folder/name}: no such file, neither plain nor .gz')


ap = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
ap.add_argument('folder', type=Path)
ap.add_argument('--out', type=Path, default=here/'fashion16_6k.npz')
a = ap.parse_args()
x, y = (read(a.folder, n)[skip:] for n, skip in zip(known, (16, 8)))
rows = np.sort(np.concatenate([np.nonzero(y == c)[0][:600] for c in range(10)]))
x = np.pad(x.reshape(-1, 28, 28)[rows], ((0, 0), (2, 2), (2, 2)))
arrays = dict(
    images=np.rint(x.reshape(-1, 16, 2, 16, 2).mean((2, 4))).astype(np.uint8),
    labels=y[rows],
    class_names=np.array(names),
)
tmp = a.out.with_name(a.out.name+'.tmp')
with zipfile.ZipFile(tmp, 'w', zipfile.ZIP_LZMA) as z:
    for k, v in arrays.items():
        info = zipfile.ZipInfo(f'{k}.npy', (1980, 1, 1, 0, 0, 0))
        info.compress_type = zipfile.ZIP_LZMA
        with z.open(info, 'w') as f: np.lib.format.write_array(f, v, allow_pickle=False)
os.replace(tmp, a.out)
print(f'{a.out.name}: {len(rows):,} images, {a.out.stat().st_size:,} bytes')
