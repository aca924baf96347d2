"""Time the ImageNet-64 step and one-step sampling on this GPU, variant by variant; run by hand: python tests/gpu_edm.py --out DIR

Random weights of the published geometry. Prints a table last; --tiny dry-runs it on any machine."""
import argparse, gc, json, os, sys, time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, DMD2Config
from dmd2_nb.fused import fused
from dmd2_nb.graphs import CudaGraph, GraphedDMD2
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.train import train
from dmd2_nb.unet import ADMUNet

def sync(dev):
    if dev=='cuda': torch.cuda.synchronize()

def matmul_rate(dev, n):
    "Measured bf16 matrix rate in TFLOP/s"
    a,b = (torch.randn(n, n, device=dev, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3): a@b
    sync(dev); t = time.perf_counter()
    for _ in range(10): a@b
    sync(dev)
    return 2*n**3*10/(time.perf_counter()-t)/1e12

def network(args, dev):
    "Random weights with nothing left at zero, so that no kernel works on zeros"
    kw = dict(img_resolution=64, label_dim=1000, dropout=0.)  # the other defaults are ImageNet-64's
    if args.tiny: kw |= dict(model_channels=32, num_blocks=1, channel_mult=(1,2), img_resolution=16, attn_resolutions=(8,))
    torch.manual_seed(0)
    with torch.device(dev): net = ADMUNet(**kw)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim>1 and p.std()<1e-4: p.normal_(0, 0.02)
    return EDMPrecond(net)

def reals(shape, batch, dev, classes):
    x = torch.randn(batch, *shape, device=dev).clamp(-1, 1)
    while True: yield x, torch.randint(classes, (batch,), device=dev)
def labels(batch, dev, classes):
    while True: yield torch.randint(classes, (batch,), device=dev)

def time_training(name, make, args, dev, cycles):
    "ms per iteration over whole 1:5 cycles, and the peak"
    if dev=='cuda': gc.collect(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    t0 = time.perf_counter()
    dmd = make()
    it = lambda n: [o for o in train(dmd, labels(args.batch, dev, 1000), n, reals(dmd.shape, args.batch, dev, 1000))]
    it(5*args.warm_cycles); sync(dev)
    warm = time.perf_counter()-t0
    if dev=='cuda': torch.cuda.reset_peak_memory_stats()
    t = time.perf_counter(); logs = it(5*cycles); sync(dev)
    ms = (time.perf_counter()-t)/(5*cycles)*1e3
    if args.profile and dev=='cuda':
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof: it(5); sync(dev)
        print(prof.key_averages().table(sort_by='cuda_time_total', row_limit=28, max_name_column_width=70)[:9000], flush=True)
    assert all(torch.isfinite(v).all() for o in logs for v in o.values()), f'{name}: not finite'
    peak = torch.cuda.max_memory_allocated()/2**30 if dev=='cuda' else 0.
    row = dict(what='train', name=name, ms=round(ms, 1), peak_gib=round(peak, 2), warmup_s=round(warm, 1), fake_loss=round(logs[-1]['fake_loss'].item(), 4))
    print(json.dumps(row), flush=True)
    del dmd
    return row

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument('--out', default='.'); ap.add_argument('--tiny', action='store_true'); ap.add_argument('--batch', type=int, default=40)
    ap.add_argument('--cycles', type=int, default=4); ap.add_argument('--warm-cycles', type=int, default=5); ap.add_argument('--variants', default='plain,fused,graphed')
    ap.add_argument('--profile', action='store_true'); ap.add_argument('--seconds', type=float, default=420)
    args = ap.parse_args()
    start,dev = time.perf_counter(),'cuda' if torch.cuda.is_available() else 'cpu'
    card = torch.cuda.get_device_name() if dev=='cuda' else 'cpu'
    if dev=='cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.tiny: args.batch = 4
    rate = matmul_rate(dev, 256 if args.tiny else 8192)
    rows = [dict(what='card', name=card, bf16_tflops=round(rate))]
    print(json.dumps(rows[0]), flush=True)
    cfg = DMD2Config(dtype='bfloat16', batch=args.batch)
    def make(kind):
        "plain: separate operations; fused: channels-last, fused norms, bf16 teacher; graphed: replayed as CUDA graphs as well"
        fused(kind!='plain')
        net = network(args, dev)
        if kind!='plain': net = net.to(memory_format=torch.channels_last)
        dmd = (GraphedDMD2 if kind=='graphed' and dev=='cuda' else DMD2).from_teacher(net, cfg)
        if kind!='plain': dmd.teacher.to(torch.bfloat16)
        return dmd
    for kind in args.variants.split(','):
        if time.perf_counter()-start>args.seconds*0.7: print('out of time before', kind); break
        try: rows.append(time_training(kind, lambda: make(kind), args, dev, args.cycles))
        except Exception as e:
            if kind=='plain': raise
            print(f'{kind} failed: {type(e).__name__}: {str(e)[:1500]}', flush=True)
    # sampling and the error of the fast path
    net = network(args, dev)
    n = 8 if args.tiny else 256
    z,y = torch.randn(n, *net.shape, device=dev, generator=rng(0, device=dev)), torch.arange(n, device=dev)%1000
    lv = torch.tensor([80.])
    with torch.no_grad(): exact = torch.cat([few_step_sample(net, a, lv, c) for a,c in zip(z.split(64), y.split(64))])
    def cast(f): 
        with torch.no_grad(), torch.autocast(dev, torch.bfloat16): return f()
    one_step = lambda z,y: cast(lambda: few_step_sample(net, z, lv, y))
    fused(False); plain = one_step(z, y); times = [('plain bf16', one_step)]
    fused(True)
    weights = network(args, dev).to(torch.bfloat16).to(memory_format=torch.channels_last)
    quick = lambda z,y: cast(lambda: few_step_sample(weights, z.to(memory_format=torch.channels_last), lv, y))
    fast = quick(z, y)
    times += [('fused bf16', quick)] + ([('graphed bf16', CudaGraph(quick))] if dev=='cuda' else [])
    for name,f in times:
        fused(name!='plain bf16')
        for _ in range(5): f(z, y)
        sync(dev); t = time.perf_counter()
        for _ in range(10): f(z, y)
        sync(dev)
        rows.append(dict(what='sample', name=name, n=n, ms=round((time.perf_counter()-t)*100, 1)))
        print(json.dumps(rows[-1]), flush=True)
    err = lambda a: ((a.float()-exact).norm()/exact.norm()).item()
    rows.append(dict(what='error', name='relative to float32 (tf32)', plain_bf16=err(plain), fast=err(fast)))
    Path(args.out, 'edm_bench.json').write_text(json.dumps(rows, indent=1))
    print('\n'.join(json.dumps(r) for r in rows))

if __name__=='__main__': main()
