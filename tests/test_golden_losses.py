"""Each loss against a second, slower way of writing it: through scores, probabilities and loops
over samples, in double precision"""
import math

import pytest
import torch
from torch import nn

from dmd2_nb.core import at_least_float32
from dmd2_nb.denoiser import EDMPrecond, Guided, dsm_loss
from dmd2_nb.dmd import dmd_grad, dmd_loss
from dmd2_nb.fake_score import empirical_denoiser, fake_score_loss, tracking_error
from dmd2_nb.gan import GanHead, gan_d_loss, gan_g_loss, noisy_logits
from dmd2_nb.nets import ToyNet, UNet
from dmd2_nb.noise import edm_weight
from dmd2_nb.regression import regression_loss
from dmd2_nb.toy import Mixture

b, shapes = 5, [(2,), (3, 2, 2)]
each_shape = pytest.mark.parametrize('shape', shapes, ids=str)
narrow = [torch.float16, torch.bfloat16, torch.float32]


def mixture(d, seed):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(3, d, d, generator=g, dtype=torch.double)
    return Mixture(
        torch.rand(3, generator=g).double() + 0.1,
        torch.randn(3, d, generator=g, dtype=torch.double),
        A @ A.mT / d + 0.1 * torch.eye(d).double(),
    )


class Shaped:
    "A mixture of vectors as a denoiser of any shape"
    def __init__(self, mix): self.mix = mix
    def __call__(self, x, sigma, cond=None): return self.mix(x.flatten(1), sigma).reshape(x.shape)


def score_of(mix, x, sigma):
    "Score of one sample by differentiating the log density"
    x = x.detach().flatten()[None].requires_grad_()
    s, = torch.autograd.grad(mix.logp(x, sigma).sum(), x)
    return s[0]


def batch(shape):
    return (
        torch.randn(b, *shape, dtype=torch.double),
        0.2 + 2 * torch.rand(b, dtype=torch.double),
        torch.randn(b, *shape, dtype=torch.double),
    )
def close(a, b, tol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.double),
        torch.as_tensor(b, dtype=torch.double),
        rtol=tol,
        atol=tol,
    )


@each_shape
def test_dmd_loss_is_the_weighted_difference_of_scores(shape):
    "sigma²/mean|x - D_real| * (s_fake - s_real), sample by sample, with scores from log densities"
    d = math.prod(shape)
    real, fake = mixture(d, 1), mixture(d, 2)
    x, sigma, n = batch(shape)
    noisy = x + sigma.reshape(-1, *[1]*len(shape))*n
    x.requires_grad_()
    loss = dmd_loss(x, Shaped(real)(noisy, sigma), Shaped(fake)(noisy, sigma))
    loss.backward()
    grads = []
    for i in range(b):
        y, s = noisy[i].flatten(), sigma[i].item()
        s_real, s_fake = (score_of(m, y, s) for m in (real, fake))
        # Tweedie
        off = [abs(u-v) for u, v in zip(x[i].flatten().tolist(), (y + s**2*s_real).tolist())]
        grads.append((s**2/(sum(off)/d)*(s_fake-s_real)).tolist())
    close(x.grad.flatten(1), torch.tensor(grads, dtype=torch.double)/(b*d), 1e-8)
    close(loss, sum(v**2 for g in grads for v in g)/(2*b*d), 1e-8)


def test_dmd_loss_descends_the_kl():
    """For x = m + s z the loss without its scaling gives the parameters the gradient of the closed-
    form KL of the noisy distributions"""
    m, s, sigma, n = (
        torch.tensor(-1.0, dtype=torch.double, requires_grad=True),
        torch.tensor(0.5, dtype=torch.double, requires_grad=True),
        0.7,
        400_000,
    )
    z, e = torch.randn(2, n, 1, dtype=torch.double)
    x = m + s*z
    real, fake = (
        Mixture(
            torch.ones(1).double(), torch.tensor([[c]]).double(), torch.tensor([[[v]]]).double()
        )
        for c, v in ((1.0, 0.36), (-1.0, 0.25))
    )
    y, lev = (x+sigma*e).detach(), torch.full((n,), sigma, dtype=torch.double)
    # scaling undone
    g = dmd_grad(x.detach(), real(y, lev), fake(y, lev))*(x.detach()-real(y, lev)).abs()/sigma**2
    by_loss = torch.autograd.grad((g*x).mean(), (m, s))
    p, q = (s**2+sigma**2), .36+sigma**2
    kl = .5*(p/q + (m-1)**2/q - 1 - (p/q).log())
    close(torch.stack(by_loss), torch.stack(torch.autograd.grad(kl, (m, s))), 1e-2)


def test_dmd_loss_reaches_a_generator_by_the_chain_rule():
    G = nn.Linear(3, 4).double()
    z, r, f = torch.randn(b, 3).double(), torch.randn(b, 4).double(), torch.randn(b, 4).double()
    dmd_loss(G(z), r, f).backward()
    slow = torch.zeros(4, 3, dtype=torch.double)
    for i in range(b):
        x = (G.weight@z[i]+G.bias).tolist()
        scale = sum(abs(x[j]-r[i,j].item()) for j in range(4))/4
        for j in range(4):
            for k in range(3): slow[j,k] += (f[i,j]-r[i,j])/scale*z[i,k]/(4*b)
    close(G.weight.grad, slow)


@each_shape
def test_dsm_loss_on_scores(shape):
    "A mixture's loss is λ σ⁴ |score(y) + n/σ|²: D - x written with scores only"
    mix = mixture(math.prod(shape), 3)
    x, sigma, n = batch(shape)
    total = 0.
    for i in range(b):
        s = sigma[i].item()
        gap = score_of(mix, x[i]+s*n[i], s) + n[i].flatten()/s
        total += (s**2+.25)/(s*.5)**2*s**4*sum(v**2 for v in gap.tolist())/gap.numel()
    close(dsm_loss(Shaped(mix), x, sigma, noise=n), total/b, 1e-8)


@pytest.mark.parametrize('loss', [dsm_loss, fake_score_loss])
def test_denoising_loss_of_a_network_has_unit_weight_on_its_raw_output(loss):
    "λ |D - x|² = |F - F*|², with the raw network F asked directly and sample by sample"
    net, sd = ToyNet(width=8).double(), 1.3
    nn.init.normal_(net.out.weight)
    D = EDMPrecond(net, sigma_data=sd)
    x, sigma, n = batch((2,))
    got = loss(D, x, sigma, noise=n)
    total = 0.
    for i in range(b):
        s, y = sigma[i].item(), x[i]+sigma[i]*n[i]
        raw = net(
            y[None] / math.sqrt(s * s + sd * sd),
            torch.tensor([math.log(s) / 4], dtype=torch.double),
        )[0]
        target = (x[i]-sd**2/(s*s+sd*sd)*y)*math.sqrt(s*s+sd*sd)/(s*sd)
        total += sum(v**2 for v in (raw-target).tolist())/2
    close(got, total/b, 1e-7)
    close(edm_weight(sigma, sd), [(s*s+sd*sd)/(s*sd)**2 for s in sigma.tolist()])


def test_fake_score_loss_gives_the_samples_no_gradient():
    x = torch.randn(b, 2, requires_grad=True)
    fake = EDMPrecond(ToyNet(width=8))
    fake_score_loss(fake, x*1, torch.ones(b)).backward()
    assert x.grad is None and any(p.grad is not None for p in fake.parameters())


def test_gan_losses_are_log_probabilities():
    fake, real = (
        (4 * torch.randn(b, 1, dtype=torch.double)).requires_grad_(),
        4 * torch.randn(b + 2, 1, dtype=torch.double),
    )
    p = lambda l: 1/(1+math.exp(-l))  # of being real
    pf, pr = [p(l) for l in fake.flatten().tolist()], [p(l) for l in real.flatten().tolist()]
    g = gan_g_loss(fake)
    close(g, -sum(math.log(v) for v in pf)/b)
    close(torch.autograd.grad(g, fake)[0].flatten(), [-(1-v)/b for v in pf])
    d = gan_d_loss(real, fake)
    close(d, -sum(math.log(1-v) for v in pf)/b - sum(math.log(v) for v in pr)/(b+2))
    close(torch.autograd.grad(d, fake)[0].flatten(), [v/b for v in pf])


def test_gan_losses_do_not_overflow():
    far = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    loss = gan_g_loss(far) + gan_d_loss(far, far)
    loss.backward()
    close(loss, 5e3*3)
    assert far.grad.isfinite().all()


@pytest.mark.parametrize(
    'net',
    [ToyNet(width=8, label_dim=3), UNet(8, 1, label_dim=3, channels=(8, 16), emb=16)],
    ids=['points', 'images'],
)
def test_noisy_logits_treat_samples_one_by_one(net):
    net, sigma, y = net.double().eval(), 0.2+torch.rand(b).double(), torch.arange(b)%3
    fake = EDMPrecond(net)
    x, n = torch.randn(2, b, *net.shape, dtype=torch.double)
    head = GanHead(getattr(net, 'bottleneck', (8,))).double()
    one = [noisy_logits(fake, head, x[i:i+1], sigma[i:i+1], y[i:i+1], noise=n[i:i+1]) for i in range(b)]
    both = noisy_logits(fake, head, x, sigma, y, noise=n)
    close(both, torch.cat(one), 1e-7)
    assert both.std() > 1e-4  # a head that answers alike to everything is dead


@pytest.mark.parametrize('c', [4, 8, 16, 24, 32, 48, 64, 96, 128, 192])
def test_a_head_of_any_width_is_alive(c):
    x = torch.randn(16, c, 4, 4, requires_grad=True)
    logits = GanHead((c, 4, 4))(x)
    g, = torch.autograd.grad(logits.sum(), x)
    assert logits.std() > .03 and g.abs().mean() > 1e-3


def test_regression_loss():
    G = EDMPrecond(ToyNet(width=8).double())
    nn.init.normal_(G.model.out.weight)
    z, x = torch.randn(2, b, 2, dtype=torch.double)
    total = 0.
    for i in range(b):
        out = G(10*z[i:i+1], torch.tensor([10.], dtype=torch.double))[0]
        total += sum((u-v)**2 for u, v in zip(out.tolist(), x[i].tolist()))/2
    close(regression_loss(G, z, x, torch.tensor(10., dtype=torch.double)), total/b)
    close(
        regression_loss(G, z, x, 10.0, distance=lambda u, v: (u - v).abs().max()),
        max((G(10 * z, torch.full((b,), 10.0).double()) - x).abs().flatten().tolist()),
    )


@each_shape
def test_empirical_denoiser_and_tracking_error(shape):
    cloud, (x, sigma, n) = torch.randn(7, *shape, dtype=torch.double), batch(shape)
    sigma[0] = .01  # nearly a look-up of the nearest point
    def slow(y, s):
        w = [
            -sum((u - v) ** 2 for u, v in zip(y.flatten().tolist(), p.flatten().tolist()))
            / (2 * s * s)
            for p in cloud
        ]
        e = [math.exp(v-max(w)) for v in w]
        return sum(v*p for v, p in zip(e, cloud))/sum(e)
    D = empirical_denoiser(cloud)
    ys = [x[i]+sigma[i]*n[i] for i in range(b)]
    outs = [slow(y, s) for y, s in zip(ys, sigma.tolist())]
    close(D(torch.stack(ys), sigma), torch.stack(outs), 1e-8)
    D1 = empirical_denoiser(cloud, chunk=2)
    close(D1(torch.stack(ys), sigma), torch.stack(outs), 1e-8)
    other = Shaped(mixture(math.prod(shape), 4))
    gap = (
        sum(
            ((other(y[None], s[None])[0] - o) / s).pow(2).mean().item()
            for y, s, o in zip(ys, sigma, outs)
        )
        / b
    )
    close(tracking_error(other, x, sigma, noise=n, exact=D), gap, 1e-8)


def test_empirical_denoiser_keeps_single_precision_clouds_sharp():
    "At the lowest level a point of the cloud is its own best guess, also far from the origin"
    cloud = 30 + torch.randn(200, 12)
    torch.testing.assert_close(
        empirical_denoiser(cloud)(cloud, torch.full((200,), 0.002)), cloud, atol=1e-5, rtol=0
    )


def test_guidance():
    D = EDMPrecond(ToyNet(width=8, label_dim=4).double())
    nn.init.normal_(D.model.out.weight)
    x, sigma, _ = batch((2,))
    y = torch.arange(b)%4
    for uncond in (None, torch.zeros(1, 4).double(), lambda c: torch.zeros_like(c)):
        cond = nn.functional.one_hot(y, 4).double()
        out = Guided(D, 3., uncond)(x, sigma, cond)
        for i in range(b):
            u, c = (D(x[i:i+1], sigma[i:i+1], k) for k in (None, cond[i:i+1]))
            close(out[i:i+1], c + 2*(c-u))


losses = dict(
    dmd=lambda x, n, r: dmd_loss(x, n, r),
    dmd_grad=lambda x, n, r: dmd_grad(x, n, r).pow(2).mean(),
    dsm=lambda x, n, r: dsm_loss(lambda y, s, c: y * 0.5, x, r[:, 0], noise=n),
    fake_score=lambda x, n, r: fake_score_loss(lambda y, s, c: y * 0.5, x, r[:, 0], noise=n),
    gan_g=lambda x, n, r: gan_g_loss(x),
    gan_d=lambda x, n, r: gan_d_loss(x, n),
    regression=lambda x, n, r: regression_loss(
        lambda y, s, c: y * 0.1, x, n, torch.tensor(2.0, dtype=x.dtype)
    ),
)


@pytest.mark.parametrize('name', losses)
def test_losses_compute_wide(name):
    "At least float32 whatever comes in, float64 unchanged, and no more error than the inputs' own rounding"
    x, n, r = torch.randn(3, 64, 2, dtype=torch.double)
    r = r.abs()+.1  # noise levels for those that take them
    exact = losses[name](x, n, r)
    assert exact.dtype == torch.double
    for d in narrow:
        got = losses[name](*(t.to(d) for t in (x, n, r)))
        # the same rounded inputs, double arithmetic
        again = losses[name](*(t.to(d).double() for t in (x, n, r)))
        assert got.dtype == torch.float32
        close(got, again, 1e-5)


@pytest.mark.parametrize('d', narrow[:2])
def test_low_levels_in_half_precision_have_finite_weights(d):
    "EDM's weight at sigma 0.002 is 250,000, more than float16 can hold"
    x, n = torch.randn(2, 8, 2).to(d)
    loss = dsm_loss(lambda y, s, c: y, x, torch.full((8,), .002, dtype=d), noise=n)
    assert loss.isfinite() and at_least_float32(x).dtype == torch.float32


def test_no_infinity_hides_in_the_gradient():
    r = torch.randn(b, 2)
    assert torch.equal(dmd_grad(r, r, r), torch.zeros(b, 2))
    g = dmd_grad(r, r, r+1e-3)
    close(g, (r+1e-3-r)/1e-6, 1e-3)
    assert g.isfinite().all()
    bad = dmd_grad(r*float('nan'), r, r+1)
    assert bad.isnan().all()  # what is broken stays visible
