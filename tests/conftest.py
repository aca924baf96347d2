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


# Files that take longest begin first, so that two processes end together (`--no-loadscope-reorder`)
LONGEST = """parallel survive guards sdxl_roles fused browser fuzz packaging pages commands sdxl_pretrain
parts lora_files convergence""".split()


def pytest_collection_modifyitems(items):
    place = {f'test_{n}': i for i, n in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
