"Training a teacher: any network, exact resume, what may go wrong"
import itertools

import pytest
import torch

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.nets import UNet
from dmd2_nb.teacher import drop_labels, load_teacher_run, save_teacher_run, train_teacher
from dmd2_nb.unet import ADMUNet, SongUNet

small = dict(img_resolution=8, in_channels=1, label_dim=3)
edm = small | dict(
    out_channels=1,
    model_channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    dropout=0.2,
)
nets = dict(
    adm=lambda: ADMUNet(**edm, label_dropout=0.1),
    song=lambda: SongUNet(**edm),
    unet=lambda: UNet(**small, channels=(16, 16), dropout=0.1),
)


def batches(start=0, cond='rows'):
    for i in itertools.count(start):
        y = torch.arange(4) % 3
        yield (
            torch.rand(4, 1, 8, 8, generator=rng(9, i)) * 2 - 1,
            dict(rows=torch.eye(3)[y], labels=y, none=None)[cond],
        )


def fresh(kind):
    torch.manual_seed(1)
    return EDMPrecond(nets[kind]())


@pytest.mark.parametrize('kind', nets)
def test_resume(kind, tmp_path):
    """Stopped and gone on equals unbroken to the last bit, with dropout in the network and the
    global random state disturbed"""
    whole, part = fresh(kind), fresh(kind)
    start = [p.clone() for p in whole.parameters()]
    for a in train_teacher(whole, batches(cond='labels'), 5): pass
    for b in train_teacher(part, batches(cond='labels'), 3): pass
    save_teacher_run(tmp_path/'run', part, b)
    torch.manual_seed(77)
    later = EDMPrecond(nets[kind]())
    kept = load_teacher_run(tmp_path/'run', later)
    for c in train_teacher(later, batches(kept['start'], 'labels'), 2, **kept): pass
    assert (a['step'], kept['start'], c['step']) == (4, 3, 4) and torch.equal(a['loss'], c['loss'])
    for x, y in ((whole, later), (a['ema'].net, c['ema'].net)):
        assert all(torch.equal(u, v) for u, v in zip(x.parameters(), y.parameters()))
    assert sum(torch.equal(u, v) for u, v in zip(start, whole.parameters())) == 0, (
        'a weight was not trained'
    )


def test_labels_and_rows_are_one_condition():
    losses = [
        [o['loss'] for o in train_teacher(fresh('song'), batches(cond=c), 3)]
        for c in ('rows', 'labels')
    ]
    assert torch.allclose(torch.stack(losses[0]), torch.stack(losses[1]))
    assert len(list(train_teacher(fresh('song'), batches(cond='none'), 2))) == 2


def test_global_random_state_is_left_alone():
    D = fresh('adm')
    state = torch.get_rng_state()
    for _ in train_teacher(D, batches(), 2): pass
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_and_rates():
    "Weights stay float32; the rate warms up and may be a function of the step"
    D = fresh('song')
    logs = list(
        train_teacher(
            D, batches(), 4, lr=lambda step: 1e-3 / (1 + step), warmup=2, dtype='bfloat16', clip=1.0
        )
    )
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in D.parameters()) and all(
        o['loss'].isfinite() for o in logs
    )
    assert torch.allclose(
        torch.tensor([float(o['lr']) for o in logs]),
        torch.tensor([0.5e-3, 0.5e-3, 1e-3 / 3, 0.25e-3]),
    )


def test_first_step_is_the_loss_of_the_paper():
    "lambda(sigma) |D - x|^2 with sigma log-normal, drawn from the stream (seed, step)"
    D = fresh('song')
    x, c = next(batches())
    g = rng(5, 0)
    sigma = (-1.2+1.2*torch.randn(4, generator=g)).exp()
    noise = torch.randn(x.shape, generator=g)
    with torch.no_grad():
        D.model.dropout = 0
        for m in D.modules():
            if hasattr(m, 'dropout'): m.dropout = 0.
        s = sigma.reshape(4, 1, 1, 1)
        want = ((s**2+.25)/(s*.5)**2*(D(x+s*noise, sigma, c)-x)**2).mean()
    log = next(train_teacher(D, batches(), 1, seed=5, label_dropout=0.))
    assert torch.allclose(log['loss'], want, rtol=1e-5)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match='0..2'):
        next(
            train_teacher(fresh('song'), iter([(torch.zeros(2, 1, 8, 8), torch.tensor([0, 3]))]), 1)
        )
    with pytest.raises(ValueError, match='add up'):
        drop_labels(torch.ones(2, 5), 5, .5, groups=(2, 2))
    with pytest.raises(FileNotFoundError, match='state.json'):
        load_teacher_run(tmp_path, fresh('song'))
    D = fresh('song')
    for log in train_teacher(D, batches(), 1): pass
    save_teacher_run(tmp_path/'run', D, log)
    with pytest.raises(ValueError, match='net.safetensors does not fit'):
        load_teacher_run(tmp_path/'run', fresh('adm'))
    data = (tmp_path/'run/ema.safetensors').read_bytes()
    (tmp_path/'run/ema.safetensors').write_bytes(data[:-9])
    with pytest.raises(ValueError, match='ema.safetensors'):
        load_teacher_run(tmp_path/'run', fresh('song'))
    (tmp_path/'run/state.json').write_text('{"step": 1')
    with pytest.raises(ValueError, match='damaged'): load_teacher_run(tmp_path/'run', fresh('song'))
