"""What other people's code computed, and what this library computes from the same weights, draws and inputs.

The values in `tests/parity` come from the official DMD2 trainers (float64, tiny networks), from five programs that
compute image metrics, and from files that the peers' own code wrote. diffusers' schedulers are run beside ours.
These checks are the licence to move walls: they hold before and after every rearrangement of the code."""
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.fid import kid_subsets, precision_recall
from dmd2_nb.gan import GanHead
from dmd2_nb.metrics import frechet, kid
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.teacher import load_edm
from dmd2_nb.train import train
from dmd2_nb.unet import ADMUNet

LOSSES = ('dmd_loss', 'gan_g_loss', 'fake_loss', 'gan_d_loss')
BETAS = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
TINY_UNET = dict(block_out_channels=(16, 32, 32), attention_head_dim=(2, 2, 2),
                 transformer_layers_per_block=(1, 1, 1), cross_attention_dim=24, norm_num_groups=4,
                 layers_per_block=1)


@pytest.fixture
def values(root):
    "Opens one of the stored files"
    return lambda name: np.load(root/'tests'/'parity'/f'{name}.npz', allow_pickle=False)


@pytest.fixture
def double(monkeypatch):
    "All in float64, on one thread, as the stored values were computed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, 'float', lambda t: t.double())
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture
def quiet():
    "diffusers without its advice"
    diffusers = pytest.importorskip('diffusers')
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield diffusers
    diffusers.logging.set_verbosity(level)


def generator(seed): return torch.Generator().manual_seed(seed)
def draw_of(step, stream): return generator(1000*step+stream)
def rows(n): return sum(n) if isinstance(n, tuple) else n


def fill(net, seed):
    "Weights named by a seed, in the order of the sorted names"
    state, g = net.state_dict(), generator(seed)
    for k in sorted(state):
        if 'resample_filter' in k: continue
        gain = 1. if k.endswith('weight') and state[k].ndim == 1 else 0.
        state[k] = torch.randn(state[k].shape, generator=g)*.08 + gain
    net.load_state_dict(state)
    return net


def probe(net):
    "Every tensor of a network through a fixed random projection: one number each"
    state = net.state_dict()
    res = []
    for i, k in enumerate(sorted(state)):
        if 'resample_filter' in k: continue
        direction = torch.randn(state[k].shape, generator=generator(i), dtype=torch.float64)
        res.append(float((state[k]*direction).sum()))
    return np.array(res)


def run(dmd, nets, batches, stored):
    "Largest errors over the run: of the losses, and of the weights relative to the way that they went"
    start, losses = [probe(m) for m in nets], []
    for conds, reals in batches:
        log, = train(dmd, iter([conds]), 1, iter([reals]))
        losses.append([float(log[k]) if k in log else np.nan for k in LOSSES])
    turns = np.isnan(losses) == np.isnan(stored['losses'])
    assert turns.all(), 'a loss was computed in another iteration than in the official trainer'
    loss = np.nanmax(abs(np.array(losses)/stored['losses']-1))
    ways = zip(nets, ('generator', 'fake', 'head'), start)
    weight = max(abs(probe(m)-stored[k]).max()/abs(stored[k]-s).max() for m, k, s in ways)
    return loss, weight


def test_imagenet_trainer(double, values):
    "Twelve iterations of the official ImageNet trainer: losses, and all weights of the three networks"
    lo, hi = .002**(1/7), 80**(1/7)

    class Fed(DMD2):
        "Draws by iteration and stream, as the stored run had them"
        def randn(self, stream, n):
            return torch.randn(rows(n), *self.shape, generator=draw_of(self.step, stream))

        def sigma(self, stream, n, bins):
            i = torch.randint(bins[0], bins[1]+1, (rows(n),), generator=draw_of(self.step, stream))
            return (lo + i/999*(hi-lo))**7

    def denoiser(seed):
        net = ADMUNet(
            8,
            3,
            3,
            5,
            model_channels=16,
            channel_mult=(1, 4),
            channel_mult_emb=2,
            num_blocks=1,
            attn_resolutions=(),
            dropout=0.0,
        )
        return fill(EDMPrecond(net), seed)

    def batch(t):
        conds = F.one_hot(torch.randint(5, (4,), generator=draw_of(t, 50)), 5).double()
        g = draw_of(t, 60)
        x = torch.rand(4, 3, 8, 8, generator=g)*2-1
        labels = F.one_hot(torch.randint(5, (4, 1), generator=g)[:, 0], 5).double()
        return conds, (x, labels)

    cfg = DMD2Config(batch=4, lr_g=1e-3, lr_fake=1e-3, lr_head=1e-3, clip=.5, ema_halflife=0.)
    dmd = Fed(denoiser(1), denoiser(1), denoiser(3), cfg, head=fill(GanHead((64, 4, 4)), 2))
    loss, weight = run(
        dmd, (dmd.G, dmd.fake, dmd.head), map(batch, range(12)), values('dmd2_imagenet_steps')
    )
    assert loss < 1e-12
    assert weight < 1e-10


def test_sdxl_trainer(double, quiet, values):
    "Eleven iterations of the official SDXL trainer: backward simulation, guidance 8, GAN"
    from dmd2_nb.sdxl.adapter import (
        EpsDenoiser,
        TINY_SDXL,
        few_step_timesteps,
        make_unet,
        sdxl_sigmas,
    )
    from dmd2_nb.sdxl.conditioning import SDXLCond
    from dmd2_nb.sdxl.recipe import sdxl_config, sdxl_dmd2
    from dmd2_nb.sdxl.roles import FullCopies
    stored = values('dmd2_sdxl_steps')
    ids = torch.tensor(stored['time_ids']).double().repeat(2, 1)
    alphas = quiet.DDIMScheduler(**BETAS).alphas_cumprod.double()

    class Fed(DMD2):
        "Draws by iteration and stream; the trained step goes round"
        k = property(lambda self: self.step % 4)

        def randn(self, stream, n):
            return torch.randn(rows(n), *self.shape, generator=draw_of(self.step, stream))

        def sigma(self, stream, n, bins):
            i = torch.randint(bins[0], bins[1]+1, (rows(n),), generator=draw_of(self.step, stream))
            return self.fake.levels[i]

    def batch(t, stream):
        g = draw_of(t, stream)
        text, pooled = torch.randn(2, 5, 24, generator=g), torch.randn(2, 32, generator=g)
        return torch.randn(2, 4, 16, 16, generator=g), SDXLCond(text, pooled, ids)

    unet = fill(make_unet(TINY_SDXL | TINY_UNET), 1).double()
    roles = FullCopies(EpsDenoiser(unet, alphas, shape=(4, 16, 16)), checkpointing=False)
    fill(roles.fake.net.unet, 3)
    fill(roles.generator.net.unet, 1)
    levels = sdxl_sigmas(few_step_timesteps(4), alphas).tolist()
    cfg = replace(
        sdxl_config, levels=levels, batch=2, lr_g=1e-3, lr_fake=1e-3, lr_head=1e-3, lr_warmup=0
    )
    dmd = sdxl_dmd2(roles, cfg, batch(0, 50)[1], head=fill(GanHead((32, 4, 4)), 2), make=Fed)
    nets = (roles.generator.net.unet, roles.fake.net.unet, dmd.head)
    loss, weight = run(dmd, nets, ((batch(t, 50)[1], batch(t, 60)) for t in range(11)), stored)
    assert loss < 1e-12
    assert weight < 1e-10


def relative(a, b): return float((a.double()-b.double()).abs().max()/b.double().abs().max())


def lcm_steps(scheduler, unet, z, cond, seed):
    "The loop of diffusers around its LCMScheduler"
    g, x = generator(seed), z.clone()
    for t in scheduler.timesteps:
        out = unet(x, t, return_dict=False, **cond)[0]
        x = scheduler.step(out, t, x, generator=g, return_dict=False)[0]
    return x


@pytest.mark.parametrize('timesteps', [(999, 749, 499, 249), (399,)], ids=['four steps', 'one step'])
def test_lcm_scheduler(quiet, timesteps):
    "The few-step sampler against LCMScheduler on a random U-Net"
    from dmd2_nb.sdxl.adapter import EpsDenoiser, sdxl_sigmas
    torch.manual_seed(41)
    unet = (
        quiet.UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 48, 64),
            norm_num_groups=8,
            attention_head_dim=(2, 3, 4),
            cross_attention_dim=40,
            use_linear_projection=True,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
            transformer_layers_per_block=(1, 1, 2),
            addition_embed_type='text_time',
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 48,
        )
        .eval()
        .requires_grad_(False)
    )
    more = dict(text_embeds=torch.randn(3, 24), time_ids=torch.randint(0, 1024, (3, 6)).float())
    cond = dict(encoder_hidden_states=torch.randn(3, 7, 40), added_cond_kwargs=more)
    z = torch.randn(3, 4, 16, 16)
    scheduler = quiet.LCMScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=list(timesteps), original_inference_steps=1000)
    want = lcm_steps(scheduler, unet, z, cond, 9)
    got = few_step_sample(
        EpsDenoiser(unet), z, sdxl_sigmas(timesteps), cond, generator=generator(9)
    )
    assert relative(got, want) < 1e-5


def tiny_unet():
    "A random U-Net, its condition and noise"
    from dmd2_nb.sdxl.adapter import TINY_SDXL, make_unet
    torch.manual_seed(3)
    unet = make_unet(TINY_SDXL | dict(block_out_channels=(32, 32, 64), layers_per_block=1))
    more = dict(text_embeds=torch.randn(2, 32), time_ids=torch.full((2, 6), 128.))
    cond = dict(encoder_hidden_states=torch.randn(2, 7, 64), added_cond_kwargs=more)
    return unet, cond, torch.randn(2, 4, 16, 16)


@pytest.mark.parametrize('kind', ['v_prediction', 'epsilon'])
def test_schedulers(quiet, kind):
    "Both predictions: four steps against LCMScheduler, the teacher's 25 against Euler with trailing timesteps"
    from dmd2_nb.sdxl.adapter import EpsDenoiser, VDenoiser, sdxl_sigmas
    from dmd2_nb.sdxl.pretrain import euler_sample, trailing_timesteps
    unet, cond, z = tiny_unet()
    denoiser = dict(v_prediction=VDenoiser, epsilon=EpsDenoiser)[kind](unet)
    few = quiet.LCMScheduler(**BETAS, prediction_type=kind)
    few.set_timesteps(timesteps=[999, 749, 499, 249], original_inference_steps=1000)
    want = lcm_steps(few, unet, z, cond, 5)
    got = few_step_sample(
        denoiser, z, sdxl_sigmas((999, 749, 499, 249)), cond, generator=generator(5)
    )
    assert relative(got, want) < 1e-5
    many = quiet.EulerDiscreteScheduler(**BETAS, prediction_type=kind, timestep_spacing='trailing')
    many.set_timesteps(25)
    assert [int(t) for t in many.timesteps] == list(trailing_timesteps(25))
    x = z.double()*many.sigmas[0].double()
    for t in many.timesteps:
        out = unet(many.scale_model_input(x, t).float(), t, return_dict=False, **cond)[0]
        x = many.step(out.double(), t, x, return_dict=False)[0]
    sigmas = sdxl_sigmas(trailing_timesteps(25))
    start = z.double()*float(many.sigmas[0]/(1+sigmas[0]**2).sqrt())
    assert relative(euler_sample(denoiser, start, sigmas, cond), x) < 1e-5


def test_bottleneck(quiet):
    "What the GAN head reads is the output of the U-Net's mid-block"
    from dmd2_nb.sdxl.adapter import unet_encode
    unet, cond, z = tiny_unet()
    seen, t = [], torch.tensor([749, 20])
    hook = unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    unet(z, t, **cond)
    hook.remove()
    assert relative(unet_encode(unet, z, t, **cond), seen[0]) < 1e-5


def test_peer_metrics(values):
    """Fréchet distance, KID, precision and recall of the same features by EDM's fid.py, clean-fid,
    torch-fidelity, torchmetrics and OpenAI's evaluator"""
    stored = values('metrics')
    a, b = torch.tensor(stored['a']), torch.tensor(stored['b'])
    error = lambda x, y: np.max(np.abs(np.array(x)/np.array(y)-1))
    assert error(frechet(a, b), stored['fid']) < 1e-6
    assert error(kid_subsets(a, b, 20, 200), stored['kid']) < 1e-5
    assert error(kid(a[:500], b)[0], stored['mmd']) < 1e-9
    for k in (3, 5):
        assert np.abs(np.array(precision_recall(a, b, k=k))-stored[f'pr{k}']).max() < 1e-9


@pytest.mark.parametrize('name', ['adm', 'ddpmpp'])
def test_edm_snapshots(values, tmp_path, name):
    "Snapshots as EDM's own code pickles them, read as data: the official networks' outputs"
    stored = values('files')
    (tmp_path/'snapshot.pkl').write_bytes(stored[name].tobytes())
    x, sigma, label = (
        torch.randn(2, 3, 8, 8, generator=generator(1)),
        torch.tensor([0.1, 20.0]),
        torch.eye(5)[:2],
    )
    with torch.no_grad(): got = load_edm(tmp_path/'snapshot.pkl')(x, sigma, label)
    assert relative(got, torch.tensor(stored[f'{name}_out'])) < 1e-4


def test_dmd2_lora(quiet, values, tmp_path):
    "The LoRA that the official extraction writes, in kohya's names: the U-Net's outputs with it"
    from dmd2_nb.sdxl.adapter import TINY_SDXL, make_unet
    from dmd2_nb.sdxl.checkpoints import fuse_lora
    stored = values('files')
    unet = fill(make_unet(TINY_SDXL | TINY_UNET), 1)
    (tmp_path/'k.safetensors').write_bytes(stored['kohya'].tobytes())
    fuse_lora(unet, tmp_path/'k.safetensors')
    z, text = (
        torch.randn(2, 4, 16, 16, generator=generator(2)),
        torch.randn(2, 5, 24, generator=generator(3)),
    )
    ids = torch.tensor([[128., 128, 0, 0, 128, 128]]*2)
    more = dict(text_embeds=torch.randn(2, 32, generator=generator(4)), time_ids=ids)
    with torch.no_grad():
        got = unet(z, torch.tensor([749, 249]), text, added_cond_kwargs=more, return_dict=False)[0]
    assert relative(got, torch.tensor(stored['lora_out'])) < 1e-4
