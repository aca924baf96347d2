"""A runner that does on a CPU what `GraphRunner` does on a GPU: run a few times, record, then
replay without asking Python anything"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmd2_nb.core import cond_map
from dmd2_nb.distill import DMD2
from dmd2_nb.graphs import GraphRunner
from dmd2_nb.parallel_run import ParallelDMD2
from dmd2_nb.parts import Draws


class NoDecisions(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: a number read into Python, random numbers. What is
    only done on a CPU is left alone: checks of arguments,
    which read a truth or a label, and AdamW's count of steps, which is a tensor where the
    optimiser is capturable. So is a single random number, such as the
    generator's step: it is a decision, and the key of the recording names it"""
    stepping = False
    draws = ('rand', 'randn', 'randint', 'normal_', 'uniform_', 'random_', 'bernoulli_')
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split('::')[-1].split('.')[0]
        out = func(*args, **(kwargs or {}))
        read = (
            name == '_local_scalar_dense'
            and args[0].is_floating_point()
            and not NoDecisions.stepping
        )
        if read or (name in self.draws and out.ndim):
            raise RuntimeError(f'{name} inside a recording')
        return out


class EchoGraph:
    "The contract of `CudaGraph` without a GPU: from the capture on, `fn` reads and writes fixed places"
    def __init__(self, fn, warmup=3):
        self.fn, self.warmup, self.calls, self.replays, self.outputs = fn, warmup, 0, 0, None
    @property
    def warm(self): return self.calls >= self.warmup
    def __call__(self, *args):
        if not self.warm:
            out = self.fn(*args)
            self.calls += 1
            return out
        if self.outputs is None: self.inputs = cond_map(torch.clone, args)
        cond_map(lambda a, b: a.copy_(b), self.inputs, args)
        with NoDecisions(): out = self.fn(*self.inputs)
        self.replays += 1
        self.outputs = (
            out if self.outputs is None else cond_map(lambda a, b: a.copy_(b), self.outputs, out)
        )
        return self.outputs


class EchoRunner(GraphRunner):
    "`GraphRunner` with `EchoGraph`"
    capturable = False
    def start(self, dmd):
        def stepping(on): NoDecisions.stepping = on
        for o in (dmd.opt_g, dmd.opt_fake):
            o.register_step_pre_hook(lambda *a: stepping(True))
            o.register_step_post_hook(lambda *a: stepping(False))
    def record(self, fn): return EchoGraph(fn)
    def replays(self, kind):
        "How many turns of that kind were replayed"
        return sum(graph.replays for (key, _), (graph, _) in self.turns.items() if key[0] == kind)


class Seen(DMD2):
    "A discriminator that sees its samples moved at random, and notes what it saw"
    def view(self, x, n, stream):
        if self.runner.__class__ is not EchoRunner:
            self.__dict__.setdefault('seen', []).append((stream, n, x.detach().clone()))
        return x * (0.5 + self.uniform(stream, n, *[1] * len(self.shape))) + self.uniform(
            stream + 1, n, *self.shape
        )


class SeenByMany(Seen, ParallelDMD2):
    "The same over several processes"


class Shifted(Draws):
    "Draws of another kind, for all methods and runners"
    def randn(self, dmd, stream, n): return super().randn(dmd, stream, n)+0.1
