"Triton's kernels without a GPU: run in Triton's interpreter against plain float32 operations, and compiled for an H100"
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from _nightly import nightly
from dmd2_nb.blocks import Block

need_triton = pytest.mark.skipif(
    importlib.util.find_spec('triton') is None,
    reason='triton is not installed: it comes with PyTorch on Linux',
)


def part(root, name):
    "What one part of the worker printed"
    path = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
    out = subprocess.run(
        [sys.executable, root / 'tests/_fused_work.py', name],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=path, CUDA_VISIBLE_DEVICES=''),
        timeout=1800,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@need_triton
@pytest.mark.parametrize(
    'name, n, bar',
    [('norms', 13, 2e-6), ('frozen', 5, 2e-6), ('maps', 15, 2e-6), pytest.param('networks', 9, 2e-5, marks=nightly)],
)
def test_kernels_in_the_interpreter(root, name, n, bar):
    "Results and all gradients; far from zero the sums of squares cost digits, but not those of half precision"
    errors = part(root, name)
    assert len(errors) == n
    far = errors.pop('far from zero', 0.)
    assert {k: v for k, v in errors.items() if not v < bar} == {} and far < 1e-4


@need_triton
def test_second_derivative(root):
    assert part(root, 'twice') == dict(refused=True)


@need_triton
def test_kernels_compile(root):
    "With and without SiLU, modulation and bias; the assembler comes with Triton where there are NVIDIA cards"
    from triton.backends import backends
    if 'nvidia' not in backends: pytest.skip('this Triton compiles for other cards only')
    sizes = part(root, 'compiled')
    assert len(sizes) == 14 and min(sizes.values()) > 1000


class Copies(TorchDispatchMode):
    "Sizes of what is copied or joined"
    def __init__(self):
        super().__init__()
        self.sizes = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in (
            torch.ops.aten.clone,
            torch.ops.aten.copy_,
            torch.ops.aten._to_copy,
            torch.ops.aten.stack,
            torch.ops.aten.cat,
        ):
            self.sizes.append(out.numel())
        return out


def test_attention_joins_once():
    "The way back through attention puts the gradients of q, k and v together once, and copies them no second time"
    block = Block(32, 32, 8, heads=2)
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = block.attend(x)
    with Copies() as c: y.backward(torch.randn_like(y))
    assert [n for n in c.sizes if n >= 3*x.numel()] == [3*x.numel()]
