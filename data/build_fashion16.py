"""Make data/fashion16_6k.npz again from the whole Fashion-MNIST: the first 600 training images of each class at 16x16.

    python data/build_fashion16.py FOLDER [--out fashion16_6k.npz]

FOLDER is what `fashion32` reads: torchvision's, or Debian's /usr/share/datasets/fashion-mnist."""
import argparse, os, sys, zipfile
from pathlib import Path

import numpy as np
import torch
from einops import reduce

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from dmd2_nb.images import fashion32  # noqa: E402

ap = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
ap.add_argument('folder', type=Path)
ap.add_argument('--out', type=Path, default=here/'fashion16_6k.npz')
a = ap.parse_args()
data = fashion32(a.folder)
rows = torch.cat([(data.labels == c).nonzero()[:600, 0] for c in range(10)]).sort().values
x = reduce(data.images[rows].double(), 'n 1 (h two) (w too) -> n h w', 'mean', two=2, too=2)
arrays = dict(
    images=x.round().byte().numpy(),
    labels=data.labels[rows].byte().numpy(),
    class_names=np.array(data.class_names),
)
tmp = a.out.with_name(a.out.name+'.tmp')
with zipfile.ZipFile(tmp, 'w', zipfile.ZIP_LZMA) as z:
    for k, v in arrays.items():
        info = zipfile.ZipInfo(f'{k}.npy', (1980, 1, 1, 0, 0, 0))
        info.compress_type = zipfile.ZIP_LZMA
        with z.open(info, 'w') as f: np.lib.format.write_array(f, v, allow_pickle=False)
os.replace(tmp, a.out)
print(f'{a.out.name}: {len(rows):,} images, {a.out.stat().st_size:,} bytes')
