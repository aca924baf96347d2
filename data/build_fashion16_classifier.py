"""Train the small classifier whose features judge 16x16 garments, and store it as float16.

    python data/build_fashion16_classifier.py     # 2 to 3 minutes on one CPU core

Nine tenths of data/fashion16_6k.npz are trained on (`fashion16().holdout(0.1)`), the last tenth tells the accuracy."""
import json, sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))

import torch
from safetensors.torch import save_file
from dmd2_nb.feature_nets import SmallClassifier, accuracy, train_classifier
from dmd2_nb.features import small_classifier
from dmd2_nb.images import fashion16, image_batches

torch.set_num_threads(1)  # sums in one order
out, steps = here/'weights'/'fashion16_classifier.safetensors', 1500
train, held = fashion16().holdout(0.1)
torch.manual_seed(0)
net = train_classifier(SmallClassifier(), image_batches(train, 64, flip=True), steps)
tensors = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
out.parent.mkdir(exist_ok=True)
facts = dict(
    steps=steps,
    accuracy_held=round(accuracy(net, held), 4),
    data='fashion16_6k.npz (Fashion-MNIST, MIT, Zalando SE), 90 %',
    licence='Apache-2.0',
)
save_file(tensors, out, metadata=dict(classifier=json.dumps(net.config), meta=json.dumps(facts)))
kept = accuracy(small_classifier(out).net, held)
print(
    f'{out.name}: held-out accuracy {kept:.1%} with float16 weights, {out.stat().st_size:,} bytes'
)
assert kept > 0.85
