"The solvers of the teacher's ODE: diffusers' scheduler takes the same steps, and errors fall by the order"
import pytest
import torch

from dmd2_nb.core import rng
from dmd2_nb.noise import karras_sigmas
from dmd2_nb.sampling import euler_sample, heun_sample, heun_states, multistep_sample
from dmd2_nb.toy import ring

mix = ring(8, std=0.1)
z = torch.randn(64, 2, generator=rng(0))


def by_diffusers(name, z, n):
    "Samples of a scheduler that is told the same levels; it gets the network from inside EDM's preconditioning"
    diffusers = pytest.importorskip('diffusers')
    solver = getattr(diffusers, name)(sigma_min=0.002, sigma_max=80., sigma_data=0.5)
    solver.set_timesteps(n)
    x = z.double()*80
    for t, sigma in zip(solver.timesteps, solver.sigmas.double()):
        skip = 0.5**2/(sigma**2+0.5**2)
        out = sigma*0.5/(sigma**2+0.5**2).sqrt()
        answer = mix(x.float(), sigma.float().expand(len(x))).double()
        x = solver.step((answer-skip*x)/out, t, x).prev_sample
    return x.float()


@pytest.mark.parametrize('n', [1, 2, 3, 5, 20])
@pytest.mark.parametrize(
    'ours, theirs',
    [
        (multistep_sample, 'EDMDPMSolverMultistepScheduler'),
        (euler_sample, 'EDMEulerScheduler'),
    ],
)
def test_equals_diffusers(ours, theirs, n):
    gap = (ours(mix, z, karras_sigmas(n))-by_diffusers(theirs, z, n)).abs().max()
    assert gap < 1e-5, gap


@pytest.mark.parametrize('solver, order', [(euler_sample, 1), (multistep_sample, 2), (heun_sample, 2)])
def test_order(solver, order):
    "Twice as many steps: half of the error, or a quarter"
    fine = heun_sample(mix, z, karras_sigmas(400))
    errors = [(solver(mix, z, karras_sigmas(n))-fine).norm(dim=1).mean() for n in (40, 80)]
    assert 0.7*2**order < errors[0]/errors[1] < 1.6*2**order


def test_one_evaluation_a_level():
    "As many calls as levels, at exactly the levels given"
    seen = []
    def spy(x, sigma, cond):
        seen.append(sigma[0].item())
        return x*0+cond
    for solver in (euler_sample, multistep_sample):
        seen.clear()
        assert torch.equal(solver(spy, z, torch.tensor([80., 5., 1.]), 3.), torch.full_like(z, 3.))
        assert seen == [80., 5., 1.]
    with pytest.raises(ValueError, match='fall'): multistep_sample(spy, z, torch.tensor([1., 5.]), 3.)


def test_paths_are_as_before():
    "What Heun's states end with is what `heun_sample` returns"
    *_, (x, sigma) = heun_states(mix, z, karras_sigmas(9))
    assert sigma == 0 and torch.equal(x, heun_sample(mix, z, karras_sigmas(9)))
