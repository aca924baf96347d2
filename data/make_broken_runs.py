"""The runs of the notebook 19c_diagnose: one healthy and four broken ones, and their curves.

    python data/make_broken_runs.py --out data/runs

Five toy runs of some 5,000 iterations, a few minutes on one core; writes broken_toy.csv (one row for every 25th iteration)
and broken_toy_clouds.csv (points of the raw generator at the end). Each broken run differs from the healthy one in one thing."""
import argparse, csv, os, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond, dsm_loss
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.gan import GanHead
from dmd2_nb.metrics import sliced_wasserstein
from dmd2_nb.nets import ToyNet
from dmd2_nb.noise import sample_sigma
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.toy import Mixture, ring
from dmd2_nb.train import train

healthy = DMD2Config(
    levels=(2.5,),
    ttur=5,
    batch=256,
    lr_g=1e-3,
    lr_fake=1e-4,
    lr_head=1e-3,
    betas_g=(0.0, 0.99),
    betas_fake=(0.0, 0.99),
    gan_g=0.3,
    gan_d=0.1,
    dm_bins=(150, 650),
    fake_bins=(50, 750),
    gan_bins=(50, 700),
    warmup_fake=150,
    ema_halflife=50,
    dtype='float32',
    seed=0,
)
broken = {
    'healthy': {},
    'ratio 1': dict(ttur=1),
    'dead discriminator': {},
    'GAN x 30': dict(gan_g=30 * healthy.gan_g),
    'stale critic': dict(lr_fake=0.0),
}
letters = dict(zip(broken, 'CAEBD'))
columns = (
    'dmd_loss fake_loss gan_g_loss gan_d_loss d_real d_fake x_mean x_std grad_dm grad_gan'.split()
)

def moved(mix, by): return Mixture(mix.weights, mix.means+torch.tensor(by), mix.covs)
# what is wanted, and what generator and fake score know at the start
data, begin = moved(ring(8), [1.5, 1.5]), moved(ring(8), [-.5, -.5])

class DeadHead(GanHead):
    "A norm over groups of one number, which makes each of them 0: every sample gets the same logit"
    def __init__(self, shape):
        super().__init__(shape)
        self.insert(1, nn.GroupNorm(shape[0], shape[0]))

def first_net(steps):
    torch.manual_seed(0)
    net = EDMPrecond(ToyNet(width=64, depth=4), sigma_data=data.std, sigma_max=20.)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for i in range(steps):
        opt.param_groups[0]['lr'] = 2e-3*(1-i/steps)
        loss = dsm_loss(
            net,
            begin.sample(256, generator=rng(1, i)),
            sample_sigma(net, 256, generator=rng(2, i)),
            noise=torch.randn(256, 2, generator=rng(3, i)),
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net

def reals(i=0):
    while True:
        yield data.sample(256, generator=rng(4, i)), None
        i += 1

def run(name, net, updates):
    "Rows of the log, and the points at the end"
    cfg = replace(healthy, **broken[name])
    dmd = DMD2.from_teacher(
        data, cfg, init=net, head=DeadHead((64,)) if name == 'dead discriminator' else None
    )
    rows, last, start = [], {}, time.process_time()
    z, ref = torch.randn(2048, 2, generator=rng(5)), data.sample(2048, seed=1)
    # ratio 1 gets the same time, not the same number of updates
    iters = cfg.warmup_fake+updates*healthy.ttur
    for i, log in enumerate(train(dmd, None, iters, reals())):
        last |= {k: v.item() for k, v in log.items()}
        if i%25==24:
            rows.append(
                dict(
                    run=letters[name],
                    iteration=i + 1,
                    updates=dmd.g_updates,
                    **{c: f'{last[c]:.4g}' if c in last else '' for c in columns},
                )
            )
    x = few_step_sample(dmd.G, z, dmd.sigmas)
    print(
        f'{letters[name]} {name}: {time.process_time() - start:.0f} s, sliced W {sliced_wasserstein(x, ref):.3f}',
        flush=True,
    )
    return rows, dict(
        run=letters[name],
        what=name,
        sw=f'{sliced_wasserstein(x, ref):.4g}',
        points=' '.join(f'{v:.2f}' for v in x[:200].flatten().tolist()),
    )

def write(path, rows):
    with open(path, 'w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        w.writeheader()
        w.writerows(rows)

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--out', default='data/runs')
    ap.add_argument('--updates', type=int, default=1000)
    a = ap.parse_args()
    net = first_net(600)
    logs, ends = zip(*(run(n, net, a.updates) for n in sorted(broken, key=letters.get)))
    write(Path(a.out)/'broken_toy.csv', sum(logs, []))
    write(Path(a.out)/'broken_toy_clouds.csv', ends)
