"What all tests share"
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
# so that `pytest` works without an installation too
if str(root) not in sys.path: sys.path.insert(0, str(root))


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random state"
    import torch
    torch.manual_seed(0)


@pytest.fixture(scope='session', name='root')
def root_(): return root
