"""Train the emoji32 teacher within a time budget and follow its KID; the log that 26_emoji_dmd2 shows.

    python data/make_emoji_runs.py teacher --seconds 450 --out DIR

One GPU. The learning rate falls over the second half of the budget. 10 % of the concepts are held out of training."""
import argparse, csv, json, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.features import lite0
from dmd2_nb.images import emoji32, image_batches
from dmd2_nb.metrics import kid
from dmd2_nb.noise import karras_sigmas
from dmd2_nb.sampling import heun_sample
from dmd2_nb.teacher import train_teacher
from dmd2_nb.unet import ADMUNet
from dmd2_nb.weights import save_denoiser

NET = dict(img_resolution=32, in_channels=3, out_channels=3, label_dim=23, model_channels=64, channel_mult=(1,1,2), channel_mult_emb=2,
           num_blocks=1, attn_resolutions=(16,8), dropout=0.1)

def to_bytes(x): return ((x.clamp(-1, 1)+1)*127.5).round().byte()

@torch.no_grad()
def sample_teacher(D, conds, steps, seed, batch=1000, churn=0.):
    "Bytes, one sample a condition"
    out = []
    for i in range(0, len(conds), batch):
        c = conds[i:i+batch]
        z = torch.randn(len(c), *D.shape, generator=rng(seed, i, device=c.device), device=c.device)
        with torch.autocast('cuda', torch.bfloat16, enabled=c.is_cuda):
            x = heun_sample(D, z, karras_sigmas(steps), c, S_churn=churn, S_min=0.05, S_max=50., S_noise=1.003, generator=rng(seed, i, 1, device=c.device))
        out.append(to_bytes(x))
    return torch.cat(out)

def batches(data, batch, dev, seed=0):
    "Shuffled batches from images that stay on the device"
    if dev=='cpu': yield from image_batches(data, batch, seed)
    images,conds,n,e = data.images.to(dev),data.cond.to(dev),len(data),0
    left = torch.empty(0, dtype=torch.long, device=dev)
    while True:
        while len(left)<batch: left = torch.cat((left, torch.randperm(n, generator=rng(seed, e, device=dev), device=dev))); e += 1
        i,left = left[:batch],left[batch:]
        yield (images[i].float()/127.5-1).contiguous(memory_format=torch.channels_last), conds[i]

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('what', choices=['teacher']); ap.add_argument('--seconds', type=float, default=450); ap.add_argument('--out', default='.')
    ap.add_argument('--batch', type=int, default=512); ap.add_argument('--lr', type=float, default=1e-3); ap.add_argument('--n', type=int, default=5000)
    ap.add_argument('--evals', type=int, default=8); ap.add_argument('--lite0', default=None)
    a = ap.parse_args()
    start,dev,out = time.time(),'cuda' if torch.cuda.is_available() else 'cpu',Path(a.out)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    train,held = emoji32().holdout(0.1, 0)
    feats = lite0(a.lite0, dev, batch=500)
    f_train,f_held = feats(train.images),feats(held.images)
    n = min(a.n, len(train))
    conds = train.cond[torch.randint(len(train), (n,), generator=rng(7))].to(dev)
    floor = kid(f_train, f_held)
    print(f'{len(train)} training, {len(held)} held-out images; KID between them {float(floor[0]):.4f} ± {float(floor[1]):.4f}', flush=True)
    torch.manual_seed(0)
    D = EDMPrecond(ADMUNet(**NET)).to(dev).to(memory_format=torch.channels_last)
    total = [10**9]
    def rate(step):
        f = step/total[0]
        return a.lr*(1. if f<0.5 else max(0.02, 0.5*(1+torch.cos(torch.tensor((f-0.5)*2*torch.pi)).item())))
    loop = train_teacher(D, batches(train, a.batch, dev), 10**9, lr=rate, halflife=1500., label_dropout=0.1, groups=(17,6), dtype='auto', warmup=200, graph=dev=='cuda')
    rows,loss,spent,seen,t,marks = [],0.,0.,0,time.time(),[]
    for log in loop:
        step = log['step']+1
        loss = loss + log['loss']
        if step==20:
            if dev=='cuda': torch.cuda.synchronize()
            t,t20 = time.time(),time.time()
        if step==220:
            if dev=='cuda': torch.cuda.synchronize()
            per = (time.time()-t20)/200
            total[0] = step + int((a.seconds-(time.time()-start)-10*a.evals)/per)
            marks = [round(total[0]*(i+1)/a.evals) for i in range(a.evals)]
            print(f'{per*1e3:.1f} ms a step, {a.batch/per:.0f} images/s, {total[0]} steps', flush=True)
        if step in marks:
            if dev=='cuda': torch.cuda.synchronize()
            spent += time.time()-t
            ema = log['ema'].net.eval()
            x = sample_teacher(ema, conds, 18, 1)
            f = feats(x)
            kt,kh = kid(f, f_train),kid(f, f_held)
            rows.append(dict(step=step, images=step*a.batch, seconds=round(spent, 1), loss=round((loss/(step-seen)).item(), 5), kid_train=float(kt[0]), kid_train_se=float(kt[1]),
                             kid_held=float(kh[0]), kid_held_se=float(kh[1]), brightness=x.float().mean().item()/255))
            print({k: round(v, 4) for k,v in rows[-1].items()}, flush=True)
            loss,seen,t = 0.,step,time.time()
            facts = dict(data='emoji32', classes=train.class_names, styles=train.style_names, licence='trained on emoji under MIT and Apache-2.0, see data/README.md', images=step*a.batch, floor=[float(v) for v in floor])
            save_denoiser(ema, out/'emoji32_teacher.safetensors', torch.float16, **facts)
            with open(out/'emoji32_teacher.csv', 'w', newline='') as fh: w = csv.DictWriter(fh, list(rows[0])); w.writeheader(); w.writerows(rows)
        if step>=total[0] or time.time()-start>a.seconds+30: ema = log['ema'].net.eval(); break
    best = []
    for steps,churn in ((4,0.),(9,0.),(18,0.),(32,0.),(18,20.),(32,40.)):
        f = feats(sample_teacher(ema, conds[:2000 if steps<18 else n], steps, 2, churn=churn))
        best.append(dict(steps=steps, churn=churn, nfe=2*steps-1, n=len(f), kid_train=float(kid(f, f_train)[0]), kid_held=float(kid(f, f_held)[0])))
        print(best[-1], flush=True)
    (out/'emoji32_teacher.json').write_text(json.dumps(dict(args=vars(a), card=torch.cuda.get_device_name() if dev=='cuda' else 'cpu', net=NET, samplers=best, floor=[float(v) for v in floor]), indent=1))
    from dmd2_nb.images import to_float
    from torchvision.utils import save_image
    save_image(sample_teacher(ema, conds[:96], 18, 3).float()/255, out/'emoji32_teacher.png', nrow=16)

if __name__=='__main__': main()
