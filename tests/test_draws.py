"The same seed draws the same pictures from Python, the shell, sheets and text-to-image, however many are drawn at once"
import numpy as np
import pytest
import torch

from dmd2_nb.cli import COMMANDS
from dmd2_nb.core import rng
from dmd2_nb.evaluate import FewSteps, draw, student_sampler
from dmd2_nb.generator import FewStepGenerator, load_generator
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.images import to_uint8
from dmd2_nb.nets import ToyNet, UNet
from dmd2_nb.sampling import few_step_batches, row_noise


def four_steps(**kw):
    torch.manual_seed(0)
    net = EDMPrecond(UNet(16, 1, label_dim=3, channels=(8, 16), emb=8))
    with torch.no_grad():
        for p in net.parameters(): p.add_(.1*torch.randn_like(p))
    return FewStepGenerator(net, (80., 5., 1.), ['Shirt', 'Bag', 'Boot'], **kw)


# a batch of another size rounds otherwise
def near(a, b): return (a.int()-b.int()).abs().max() <= 1


def test_python_shell_and_sheet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled, own = load_generator('fashion16_1step'), four_steps()
    own.save_pretrained(tmp_path/'own')
    for name, g in (('fashion16_1step', bundled), ('own', own)):
        for seed in (0, 5):
            assert (
                COMMANDS['sample']([name, '--n', '4', '--seed', str(seed), '--out', 's.npz']) == 0
            )
            with np.load('s.npz') as z: shell = torch.from_numpy(z['images'])
            python = to_uint8(g.sample(4, seed=seed))
            sheet = draw(student_sampler(g.G, g.levels), g.G.shape, g.condition(4, seed=seed), seed)
            assert torch.equal(shell, python) and torch.equal(sheet, python)
        assert not torch.equal(to_uint8(g.sample(4, seed=6)), python)


def test_batches_change_nothing():
    g = four_steps()
    whole = g.sample(9, 'Bag', seed=2)
    for batch in (1, 4, 9, 100):
        assert near(to_uint8(g.sample(9, 'Bag', seed=2, batch=batch)), to_uint8(whole))
    assert near(to_uint8(g.sample(3, 'Bag', seed=2)), to_uint8(whole[:3])), (
        'the first three of nine are the three'
    )
    s = student_sampler(g.G, g.levels)
    assert isinstance(s, FewSteps)
    assert near(draw(s, g.G.shape, g.condition(9, 'Bag'), 2, batch=2), to_uint8(whole))


def test_the_rule_itself():
    "Sample j, step k: (seed, j, k), the rule of text-to-image"
    from dmd2_nb.sampling import few_step_states
    g = four_steps()
    c = g.condition(2, 'Boot')
    noise = [
        torch.stack([torch.randn(g.G.shape, generator=rng(7, j, k)) for j in range(2)])
        for k in range(3)
    ]
    with torch.no_grad():
        for x, sigma in few_step_states(
            g.G, noise[0], torch.tensor(g.levels), c, noises=iter(noise[1:])
        ):
            pass
        x = g.G(x, sigma, c)
    assert torch.equal(x.clamp(-1, 1), g.sample(2, 'Boot', seed=7))
    assert torch.equal(row_noise((3,), [4, 9], 7, 2)[1], torch.randn(3, generator=rng(7, 9, 2)))


def test_many_samples_stay_small():
    "Ten thousand points go through the network a batch at a time"
    net, sizes = EDMPrecond(ToyNet(width=8)), []
    net.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    assert (
        FewStepGenerator(net, (10.0,)).sample(10_000).shape == (10_000, 2)
        and max(sizes) <= 1000
        and sum(sizes) == 10_000
    )


def test_labels_of_every_kind():
    g = four_steps()
    want = g.sample(2, 1)
    for label in (
        'Bag',
        np.int64(1),
        torch.tensor(1),
        ['Bag', 'Bag'],
        ('Bag', 1),
        [np.int32(1), torch.tensor(1)],
        torch.tensor([1, 1]),
    ):
        assert torch.equal(g.sample(2, label), want)
    assert torch.equal(g.sample(np.int64(2), 'Bag', seed=np.int64(0)), want)
    emo = four_steps(styles=['flat', '3d'])
    emo.G = EDMPrecond(UNet(16, 1, label_dim=5, channels=(8, 16), emb=8))
    assert torch.equal(
        emo.condition(2, ['Bag', 'Boot'], ['3d', 'flat']),
        torch.tensor([[0.0, 1, 0, 0, 1], [0, 0, 1, 1, 0]]),
    )


@pytest.mark.parametrize(
    'args, word',
    [
        ((2, np.int64(3)), 'label 3 is not in 0..2'),
        ((2, -1), '-1'),
        ((2, True), 'label'),
        ((2, ['Bag']), '1 labels given'),
        ((2, ['Bag', 'Hat']), "'Hat'"),
        ((2, [1.5, 1]), '1.5'),
        ((2, torch.zeros(3).long()), '3 rows'),
        ((2, torch.zeros(1, 3)), '1 rows'),
        ((0,), 'at least 1'),
        ((2.5,), 'whole'),
        ((True,), 'whole'),
        ((2, 'Bag', 1.5), 'seed'),
        ((2, 'Bag', 0, 'flat'), 'no styles'),
        ((2, None, 0, 'flat'), 'no styles'),
        ((2, torch.zeros(2).long(), 0, 'flat'), 'style'),
        ((2, None, 0, None, 0), 'batch'),
    ],
)
def test_what_cannot_be_drawn(args, word):
    with pytest.raises(ValueError) as e: four_steps().sample(*args)
    assert word in str(e.value) and len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match='7 samples were asked for, the condition has 3 rows'):
        next(few_step_batches(None, torch.tensor([1.]), (2,), 7, torch.zeros(3)))


def test_promised_names():
    import dmd2_nb.cli as cli
    from dmd2_nb.sdxl.pretrain import regression_pretrain
    from dmd2_nb.sdxl.recipe import regression_pretrain as promised
    assert promised is regression_pretrain
    for n in ('distill', 'sample', 'evaluate', 'prepare', 'train_teacher'):
        assert getattr(cli, n) is COMMANDS[n] is getattr(cli, f'{n}_main')
