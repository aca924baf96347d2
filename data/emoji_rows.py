"""The rows of the emoji32 ablation: what each changes, and the two kinds of run that the package has no recipe for"""
from dataclasses import fields

import torch
from torch.nn import functional as F

from dmd2_nb.core import EMA, append_dims, rng
from dmd2_nb.distill import DMD2Config
from dmd2_nb.graphs import CudaGraph
from dmd2_nb.noise import add_noise, karras_sigmas
from dmd2_nb.recipes import FOUR_STEPS, config_changes
from dmd2_nb.weights import build_denoiser

BASE = dict(
    levels=2.5,
    ttur=2,
    batch=128,
    lr_g=3e-4,
    lr_fake=6e-4,
    lr_head=1e-3,
    gan_g=0.03,
    gan_d=0.1,
    gan_start=150,
    warmup_fake=150,
    ema_halflife=100.0,
    dm_bins=(20, 980),
    fake_bins=(0, 999),
    gan_bins=(0, 999),
    betas_g=(0.0, 0.99),
    betas_fake=(0.0, 0.99),
)  # what all rows share, whatever the recipe is now
NOGAN = dict(gan_g=0, gan_d=0)
ONLY = dict(w_dm=0, gan_start=0, warmup_fake=300)
FOUR = dict(levels=FOUR_STEPS)

ROWS = {
    'one': {},                                                # ratio 2 and the GAN
    'regression': dict(NOGAN, ttur=1, w_reg=1.),              # DMD
    'ratio1': dict(NOGAN, ttur=1),
    'ratio1_slow': dict(NOGAN, ttur=1, lr_g=1e-4, lr_fake=2e-4),
    'ratio1_slower': dict(NOGAN, ttur=1, lr_g=3e-5, lr_fake=6e-5),
    # the paper's other remedy: a faster critic in place of more updates
    'ratio1_fake5': dict(NOGAN, ttur=1, lr_fake=3e-3),
    'ratio2': dict(NOGAN, ttur=2),
    'ratio5': dict(NOGAN, ttur=5),
    'ratio10': dict(NOGAN, ttur=10),
    'ratio5_gan': dict(ttur=5),
    'gan_alone5': dict(ONLY, ttur=5),
    'gan_alone1': dict(ONLY, ttur=1),
    # its trunk is a discriminator and nothing else
    'gan_plain5': dict(ONLY, ttur=5, w_fake=0, gan_d=1.),
    'gan_plain1': dict(ONLY, ttur=1, w_fake=0, gan_d=1.),
    # half of the time without GAN, then afresh with it
    'two_stage': dict(ttur=5, stage=0.5),
    'consistency': dict(levels=80., lr_g=3e-4, consistency=18),
    'four': FOUR,
    'four_no_gan': dict(FOUR, **NOGAN),
    'four_no_match': dict(FOUR, w_dm=0, gan_start=0, warmup_fake=300),
    'four_real': dict(FOUR, rollout='real'),
    'four_mix': dict(FOUR, rollout='mix'),
    # a generator of half the width that starts from nothing
    'small_sim': dict(FOUR, small=32),
    'small_real': dict(FOUR, small=32, rollout='real'),
}

def parse(text):
    "Row name, seed, changes to the config, what else the row says"
    name,_,more = text.partition(':')
    base,_,seed = name.partition('@')
    own = BASE | ROWS.get(base, {})
    if base not in ROWS and not more:
        raise ValueError(f"'{base}' is none of {', '.join(ROWS)}: give NAME:FIELD=VALUE,...")
    own |= {k: v for k,_,v in (o.partition('=') for o in more.split(',') if o)}
    known = {f.name for f in fields(DMD2Config)}
    words = lambda v: ','.join(map(str, v)) if isinstance(v, tuple) else str(v).replace(';', ',')
    return (
        name,
        int(seed or 0),
        config_changes([f'{k}={words(v)}' for k, v in own.items() if k in known]),
        {k: float(v) for k, v in own.items() if k not in known},
    )

def small(r, T, width):
    "A student of another width, with random weights"
    net = dict(r.net, args=dict(r.net['args'], model_channels=int(width)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_denoiser(net).to(next(T.parameters()).device)

def encoder_distance(T):
    "Huber on pixels plus on the features of the teacher's encoder, for the regression loss; not what is measured with"
    def distance(a, b):
        s = torch.full((len(a),), 0.1, device=a.device)
        y = torch.zeros(len(a), T.model.label_dim, device=a.device)
        with torch.no_grad(): fb = T.encode(b, s, y)
        return F.huber_loss(a, b, delta=0.1) + F.huber_loss(
            T.encode(a, s, y).float(), fb.float(), delta=0.1
        )
    return distance

def spread(extract, x):
    "Mean distance between the features within every four images, of one class and style each"
    f = extract(x).float()
    f = f.reshape(-1, 4, f.shape[1])
    return (torch.cdist(f, f).sum((1, 2))/12).mean().item()

class Consistency:
    """Consistency distillation (Song et al., 2023, algorithm 2): neighbours on a path of the
    teacher's ODE get the same answer"""
    gan_on = False
    def __init__(self, T, G, cfg, n=18):
        self.cfg,self.T,self.G,self.step,self.g_updates = cfg,T,G,0,0
        self.device = next(G.parameters()).device
        # what is sampled, and what is aimed at
        self.ema,self.target = EMA(G, cfg.ema_halflife),EMA(G, 10.)
        self.opt_g = torch.optim.AdamW(
            G.parameters(),
            lr=cfg.lr_g,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=self.device.type == 'cuda',
            capturable=self.device.type == 'cuda',
        )
        for g in self.opt_g.param_groups:
            g['base_lr'] = g['lr']
            g['lr'] = (
                torch.tensor(float(g['lr']), device=self.device)
                if self.device.type == 'cuda'
                else g['lr']
            )
        self.sigmas = karras_sigmas(n, T.sigma_min, cfg.levels[0]).to(self.device)
        self._stream = torch.cuda.Stream() if self.device.type=='cuda' else None
        self.turn = CudaGraph(self.update, stream=self._stream) if self._stream else self.update
        self._slots = dict(turn=dict(graph=self.turn)) if self._stream else {}

    def cast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type=='cuda')
    def update(self, x, cond, i, z):
        self.opt_g.zero_grad(set_to_none=True)
        s,t = self.sigmas[i],self.sigmas[i+1]
        up,dt = append_dims(s, x),append_dims(t-s, x)
        with torch.no_grad(), self.cast():
            a = add_noise(x, s, z)
            d = (a-self.T(a, s, cond))/up
            b = a + dt*d
            b = a + dt*(d + (b-self.T(b, t, cond))/append_dims(t, x))/2
            aim = self.target.net(b, t, cond).float()
        with self.cast(): y = self.G(a, s, cond)
        c = 0.00054*x[0].numel()**0.5
        loss = (((y.float()-aim).square().flatten(1).sum(1)+c*c).sqrt()-c).mean()  # pseudo-Huber
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.G.parameters(), self.cfg.clip)
        self.opt_g.step()
        self.ema.update(self.G)
        self.target.update(self.G)
        self.opt_g.zero_grad(set_to_none=True)
        return dict(
            loss=loss.detach(),
            norm_g=norm,
            x_mean=y.detach().float().mean(),
            x_std=y.detach().float().std(),
        )

    def train(self, reals):
        for x,cond in reals:
            g = rng(self.cfg.seed, self.step, 1, device=self.device)
            i = torch.randint(len(self.sigmas)-1, (len(x),), generator=g, device=self.device)
            o = self.turn(x, cond, i, torch.randn(x.shape, generator=g, device=self.device))
            self.step,self.g_updates = self.step+1,self.g_updates+1
            yield {k: v.clone() for k,v in o.items()}
