"""The kernels of dmd2_nb.fused, run value by value in Triton's interpreter: python
tests/_fused_work.py PART prints one JSON of errors

The interpreter has to be switched on before Triton is imported, so this is a process of its own.
The part "compiled" runs nothing."""
import json
import os
import sys

if sys.argv[1] != 'compiled': os.environ['TRITON_INTERPRET'] = '1'
import torch

from dmd2_nb import blocks, fused as K
from dmd2_nb.unet import ADMUNet, SongUNet


def rel(a, b): return ((a.double()-b.double()).norm()/b.double().norm().clamp(min=1e-30)).item()


def both(plain, fast, inputs, dy):
    "Largest relative error of result and gradients, of those that want one"
    res = []
    for f in (plain, fast):
        ins = [
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
            for t in inputs
        ]
        y = f(*ins)
        grads = torch.autograd.grad(
            y, [t for t in ins if isinstance(t, torch.Tensor) and t.requires_grad], dy
        )
        assert y.shape == dy.shape and all(
            g.shape == t.shape
            for g, t in zip(
                grads, [t for t in ins if isinstance(t, torch.Tensor) and t.requires_grad]
            )
        )
        res.append([y.detach(), *grads])
    return max(rel(b, a) for a, b in zip(*res))


# batch, channels, height, width, groups; A and B of samples or channels; pre, scale and shift,
# SiLU, wants
norm_cases = {
    'groups of 3':         (2, 12, 5, 5, 4, 'rows', '', '', True),
    'groups of 4':         (2, 16, 8, 8, 4, 'rows', 'rows', 'both', True),
    'groups of 5, wide':   (2, 20, 3, 7, 4, 'vec', 'expanded', 'both', True),
    'groups of 6':         (3, 24, 4, 4, 4, 'vec', 'vec', '', True),
    'groups of 7':         (2, 28, 4, 3, 4, 'vec', 'vec', 'both', False),
    'groups of 8':         (2, 16, 9, 9, 2, 'vec', 'rows', 'both', False),
    'many tiles':          (2, 12, 16, 17, 3, 'vec', 'vec', 'both', True),
    'one pixel':           (3, 8, 1, 1, 2, 'vec', 'rows', 'both', True),
    'one sample':          (1, 8, 4, 4, 2, 'rows', '', '', False),
    'scale alone':         (2, 8, 4, 4, 2, 'vec', 'expanded', 'scale', True),
    'slices of one':       (2, 8, 4, 4, 2, 'rows', 'slice', 'slices', True),
    'vector beside rows':  (2, 8, 4, 4, 2, 'mixed', 'vec', 'both', True),
    'far from zero':       (2, 16, 8, 8, 4, 'vec', 'vec', 'both', True),
}


def norm_case(n, c, h, w, g, gains, pre, mod, act, mean=0.):
    r = lambda *s: torch.randn(*s, requires_grad=True)
    x = (torch.randn(n, c, h, w) + mean).requires_grad_()
    A, B = (
        r(*((c,) if gains == 'vec' else (n, c))),
        r(*((c,) if gains in ('vec', 'mixed') else (n, c))),
    )
    p = dict(
        rows=lambda: r(n, c), vec=lambda: r(c), expanded=lambda: r(c), slice=lambda: r(c, n)
    ).get(pre, lambda: None)()
    q = r(n, 2*c) if mod in ('both', 'slices') else r(n, c) if mod else None

    def call(f):
        def go(x, A, B, p, q):
            if pre == 'expanded': p = p.expand(n, -1)
            if pre == 'slice': p = p.t()  # rows whose numbers lie apart
            scale, shift = (
                (None, None) if q is None else q.chunk(2, 1) if mod != 'scale' else (q, None)
            )
            return f(x, A, B, g, 1e-5, p, act, scale, shift)
        return go
    return both(
        call(K.norm_silu_plain), call(K._NormSilu.apply), (x, A, B, p, q), torch.randn(n, c, h, w)
    )


def norms():
    return {
        k: norm_case(*v, mean=8.0 if k == 'far from zero' else 0.0) for k, v in norm_cases.items()
    }


def frozen():
    "Some inputs that want no gradient: the rest get theirs all the same"
    res = {}
    for k, want in dict(
        x=(1, 0, 0, 0, 0),
        gains=(0, 1, 1, 0, 0),
        pre=(0, 0, 0, 1, 0),
        scale=(0, 0, 0, 0, 1),
        offset=(1, 0, 1, 0, 1),
    ).items():
        ins = [
            torch.randn(*s).requires_grad_(bool(q))
            for s, q in zip(((2, 8, 4, 4), (8,), (8,), (8,), (2, 16)), want)
        ]
        call = lambda f: lambda x, A, B, p, q: f(x, A, B, 2, 1e-5, p, True, *q.chunk(2, 1))
        res[k] = both(
            call(K.norm_silu_plain), call(K._NormSilu.apply), ins, torch.randn(2, 8, 4, 4)
        )
    return res


def maps():
    "Residual sums, sums over tiles, halving and doubling"
    res = {}
    for s in ((2, 12, 5, 7), (1, 5, 1, 1), (3, 8, 9, 16)):
        x, h, b = (
            torch.randn(*s, requires_grad=True),
            torch.randn(*s, requires_grad=True),
            torch.randn(s[1], requires_grad=True),
        )
        res[f'residual {s}'] = both(
            lambda x, h, b: x + h + b[:, None, None], K._Residual.apply, (x, h, b), torch.randn(*s)
        )
        res[f'residual, no bias to learn {s}'] = both(
            lambda x, h, b: x + h + b[:, None, None],
            K._Residual.apply,
            (x, h, b.detach()),
            torch.randn(*s),
        )
        t = x.detach().contiguous(memory_format=torch.channels_last)
        res[f'sums {s}'] = rel(
            K._launch('sums', t, out='sums').sum(1),
            torch.stack((t.sum((2, 3)), t.square().sum((2, 3))), 1),
        )
        res[f'double {s}'] = both(
            lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
            lambda x: K._Resize.apply(x, 'spread'),
            (x,),
            torch.randn(s[0], s[1], 2 * s[2], 2 * s[3]),
        )
        big = torch.randn(s[0], s[1], 2*s[2], 2*s[3], requires_grad=True)
        res[f'halve {s}'] = both(
            lambda x: x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)),
            lambda x: K._Resize.apply(x, 'pool'),
            (big,),
            torch.randn(*s),
        )
    return res


def networks():
    """Blocks and whole networks on the fused path, against the plain one: results, gradients of the
    input and of every weight"""
    res = {}
    K.fusable = blocks.fusable = lambda x: K.fused.on
    names = set()
    for f in ('_launch', '_resize', '_small'):
        setattr(
            K, f, lambda name, *a, was=getattr(K, f), **kw: names.add(name) or was(name, *a, **kw)
        )
    def compare(net, *args, **kw):
        with torch.no_grad():
            for p in net.parameters(): p.add_(0.1*torch.randn_like(p))
        out = []
        for on in (False, True):
            with K.fused(on):
                y = net(*args, **kw)
                out.append(
                    [
                        y.detach(),
                        *torch.autograd.grad(
                            y,
                            list(net.parameters()) + [args[0]],
                            torch.linspace(-1, 1, y.numel()).reshape(y.shape),
                        ),
                    ]
                )
        # a constant added to all keys changes nothing: the gradient of its bias is rounding alone
        scale = max(b.norm().item() for b in out[0][1:])
        return max((b-a).norm().item()/max(a.norm().item(), 1e-3*scale) for a, b in zip(*out))
    x, e = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 12)
    for k, kw in {
        'adaptive': dict(),
        'added': dict(adaptive=False, skip_scale=0.5**0.5),
        'attention': dict(heads=2),
        'down': dict(down=True),
        'up': dict(up=True, heads=1, adaptive=False),
        'filter': dict(down=True, taps=(1, 3, 3, 1)),
        'projected': dict(up=True, project=True),
    }.items():
        res[f'block {k}'] = compare(
            blocks.Block(16, 24 if k in ('adaptive', 'attention') else 16, 12, **kw), x, e
        )
    z, v, y = (
        torch.randn(2, 3, 8, 8, requires_grad=True),
        torch.tensor([-1.0, 0.5]),
        torch.tensor([0, 2]),
    )
    res['ADM'] = compare(
        ADMUNet(
            8,
            label_dim=3,
            model_channels=16,
            channel_mult=(1, 4),
            num_blocks=1,
            attn_resolutions=(4,),
            dropout=0.0,
        ),
        z,
        v,
        y,
    )
    res['Song'] = compare(
        SongUNet(
            8,
            label_dim=3,
            model_channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(4,),
            dropout=0.0,
        ),
        z,
        v,
        y,
    )
    assert names == set(K._cache), f'no use of {set(K._cache)-names}'
    return res


def compiled():
    """Each kernel compiled for compute capability 9.0, with half-precision maps; no card is needed.
    Bytes of machine code"""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    res = {}
    for name, k in K._kernels().items():
        for act in (True, False) if {'ACT', 'MOD'} & {*k.arg_names} else (True,):
            const = dict(T=64, BC=64, BD=4, ACT=act, MOD=act, PRE=act, K=.25)
            maps, real = ('x_', 'h_', 'dy_', 'dx_', 'y_', 'dS_', 'dH_'), ('eps',)
            sort = lambda n: (
                'constexpr'
                if n in const
                else '*bf16'
                if n in maps
                else '*fp32'
                if n.endswith('_')
                else 'fp32'
                if n in real
                else 'i32'
            )
            constants = {(i,): const[n] for i, n in enumerate(k.arg_names) if n in const}
            out = compile(
                ASTSource(fn=k, signature={n: sort(n) for n in k.arg_names}, constexprs=constants),
                target=GPUTarget('cuda', 90, 32),
            )
            res[f'{name} {act}'] = len(out.asm['cubin'])
    return res


def twice():
    "A second derivative is refused, not wrong"
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    A, B = torch.ones(8), torch.zeros(8)
    (g,) = torch.autograd.grad(
        K._NormSilu.apply(x, A, B, 2, 1e-5, None, True).square().sum(), x, create_graph=True
    )
    try: g.sum().backward()
    except RuntimeError as e: return dict(refused='once_differentiable' in str(e))
    return dict(refused=False)


if __name__ == '__main__':
    torch.manual_seed(0)
    print(
        json.dumps(
            dict(
                norms=norms,
                frozen=frozen,
                maps=maps,
                networks=networks,
                compiled=compiled,
                twice=twice,
            )[sys.argv[1]]()
        )
    )
