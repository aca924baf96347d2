"""Brightness of generated garments through distillations at ratio 1 and 5: what the notebook 11b_ttur shows beside its model.

    python data/make_brightness_runs.py --out data/runs

The bundled teacher of fashion16 and its recipe, without the GAN and with one learning rate for generator and fake score, as in the paper.
The same number of generator updates for each ratio; some minutes on a CPU. Writes brightness.csv: after every second generator update the
mean and spread over the pixels that the raw generator makes of the same 100 noises, beside those of the data."""
import argparse, csv, os, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dmd2_nb.core import rng
from dmd2_nb.distill import DMD2
from dmd2_nb.jobs import first_networks, open_data, open_teacher
from dmd2_nb.recipes import recipe
from dmd2_nb.runs import cond_batches
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.train import train

def run(ratio, lr, seed, updates, device, batch):
    "Rows of one run"
    r = recipe('fashion16')
    data, _ = open_data(r)
    T, _ = open_teacher(r, data, device=device)
    cfg = replace(
        r.config,
        ttur=ratio,
        lr_g=lr,
        lr_fake=lr,
        gan_g=0.0,
        gan_d=0.0,
        warmup_fake=40,
        seed=seed,
        batch=batch,
    )
    dmd, start, rows = DMD2(T, *first_networks(r, T), cfg), time.time(), []
    z, kinds = (
        torch.randn(100, *data.shape, generator=rng(7)).to(device),
        (torch.arange(100) % 10).to(device),
    )
    real = (data.images.float()/127.5-1).mean().item()
    for log in train(
        dmd, cond_batches(data, batch, seed, 0, device), cfg.warmup_fake + (updates - 1) * ratio + 1
    ):
        if (
            dmd.g_updates % 2 == 0
            and (dmd.g_updates == 0 or 'dmd_loss' in log)
            and (not rows or rows[-1]['updates'] != dmd.g_updates)
        ):
            x = few_step_sample(dmd.G, z, dmd.sigmas, kinds)
            rows.append(
                dict(
                    ratio=ratio,
                    lr=lr,
                    seed=seed,
                    updates=dmd.g_updates,
                    x_mean=f'{x.mean():.4f}',
                    x_std=f'{x.std():.4f}',
                    data_mean=f'{real:.4f}',
                    fake_loss=f"{log['fake_loss']:.4g}",
                )
            )
    print(
        f'ratio {ratio} seed {seed}: {time.time() - start:.0f} s, means '
        f'{min(float(o["x_mean"]) for o in rows):.3f} to '
        f'{max(float(o["x_mean"]) for o in rows):.3f}',
        flush=True,
    )
    return rows

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--out', default='data/runs')
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--updates', type=int, default=150)
    ap.add_argument('--batch', type=int, default=32)
    ap.add_argument('--seeds', type=int, default=1)
    ap.add_argument('--lr', type=float, default=1e-3)
    a = ap.parse_args()
    rows = sum(
        (
            run(ratio, a.lr, seed, a.updates, torch.device(a.device), a.batch)
            for seed in range(a.seeds)
            for ratio in (1, 5)
        ),
        [],
    )
    with open(Path(a.out)/'brightness.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        w.writeheader()
        w.writerows(rows)
