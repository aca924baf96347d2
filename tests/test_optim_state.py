"An optimiser that is loaded: memory format, places, and a run that goes on as if nothing had happened"
import torch
from torch import nn

from dmd2_nb.system.checkpoint import load_folder, load_optim, optim_tensors, save_folder
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.train import load_state, save_state, train
from dmd2_nb.unet import ADMUNet


def run(layout, graph=False):
    "A small run on images, its rates as tensors where a graph would want them so"
    torch.manual_seed(1)
    net = EDMPrecond(
        ADMUNet(
            8,
            label_dim=3,
            model_channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
            attn_resolutions=(),
            dropout=0.0,
        )
    ).to(memory_format=layout)
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.05*torch.randn_like(p))
    dmd = DMD2.from_teacher(
        net, DMD2Config(dtype='float32', batch=4, ttur=2, lr_g=1e-3, lr_fake=1e-3, lr_head=1e-3)
    )
    if graph:
        for o in (dmd.opt_g, dmd.opt_fake):
            o.defaults['foreach'] = False
            for g in o.param_groups: g['foreach'], g['lr'] = False, torch.tensor(float(g['lr']))
    return dmd


def go(dmd, n):
    def conds(i=0):
        while True: yield torch.arange(4) % 3
    def reals():
        while True: yield torch.linspace(-1, 1, 4*3*64).reshape(4, 3, 8, 8), torch.arange(4) % 3
    return [float(o['fake_loss']) for o in train(dmd, conds(), n, reals())]


def moments(dmd):
    return [
        (p, o.state[p][k])
        for o in (dmd.opt_g, dmd.opt_fake)
        for g in o.param_groups
        for p in g['params']
        for k in ('exp_avg', 'exp_avg_sq')
    ]


def test_channels_last_and_rates(tmp_path):
    "Averages come back in the layout of their weights, rates in the tensor they were"
    for layout in (torch.contiguous_format, torch.channels_last):
        a, b = run(layout, True), run(layout, True)
        go(a, 3)
        save_state(a, tmp_path/str(layout))
        rates = [g['lr'] for g in b.opt_fake.param_groups]
        for r in rates: r.fill_(7.)
        load_state(b, tmp_path/str(layout))
        assert all(g['lr'] is r for g, r in zip(b.opt_fake.param_groups, rates)) and [
            r.item() for r in rates
        ] == [g['lr'].item() for g in a.opt_fake.param_groups]
        kernels = [(p, v) for p, v in moments(b) if p.ndim == 4 and p.shape[2] > 1]
        assert len(kernels) > 20 and all(v.stride() == p.stride() for p, v in kernels)
        assert any(not p.is_contiguous() for p, _ in kernels) == (layout == torch.channels_last)
        assert all(torch.equal(u, v) for (_, u), (_, v) in zip(moments(a), moments(b)))
        assert go(a, 4) == go(b, 4)


def test_places_of_a_recorded_run(tmp_path):
    """A run that goes back to a checkpoint keeps every tensor where a graph has recorded it, even
    when the checkpoint is older than the first update"""
    dmd = run(torch.channels_last, True)
    save_state(dmd, tmp_path/'0')
    first = go(dmd, 4)
    save_state(dmd, tmp_path/'4')
    where = {
        (id(p), k): v.data_ptr()
        for o in (dmd.opt_g, dmd.opt_fake)
        for p, s in o.state.items()
        for k, v in s.items()
    }
    on = go(dmd, 3)
    for name, n, want in (('4', 3, on), ('0', 4, first)):
        load_state(dmd, tmp_path/name)
        assert {
            (id(p), k): v.data_ptr()
            for o in (dmd.opt_g, dmd.opt_fake)
            for p, s in o.state.items()
            for k, v in s.items()
        } == where
        assert go(dmd, n) == want


def test_unlike_optimisers(tmp_path):
    "A weight that was never updated has no averages, before and after; another number of weights is refused"
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    opt = torch.optim.AdamW(net.parameters())
    net[1](torch.randn(4, 3)).sum().backward()
    opt.step()
    folder = save_folder(
        tmp_path / 'o', dict(opt=optim_tensors(opt)[0]), dict(groups=optim_tensors(opt)[1])
    )
    tensors, state = load_folder(folder)
    again = torch.optim.AdamW(net.parameters())
    load_optim(again, tensors['opt'], state['groups'])
    assert not again.state.get(net[0].weight) and torch.equal(
        again.state[net[1].weight]['exp_avg'], opt.state[net[1].weight]['exp_avg']
    )
    assert sorted(optim_tensors(again)[0]) == sorted(tensors['opt'])
    try: load_optim(torch.optim.AdamW(net[0].parameters()), tensors['opt'], state['groups'])
    except ValueError as e: assert 'other networks' in str(e)
    else: raise AssertionError('taken')
