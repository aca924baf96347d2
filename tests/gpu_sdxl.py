"""SDXL on one GPU: memory against plan, seconds per iteration, recordings against plain passes.

    python tests/gpu_sdxl.py predict                 # on any machine, before the GPU run: writes data/runs/sdxl_plan.json
    python tests/gpu_sdxl.py run                     # on the GPU: everything below, one process per row
    python tests/gpu_sdxl.py run --only check,bf16   # some rows
    python tests/gpu_sdxl.py run --tiny              # a dry run on the CPU, seconds

Full-size U-Nets are built from their config with random weights on the GPU; nothing is downloaded. Rows are written to
$OUT/sdxl_gpu.json (or runs/sdxl_gpu.json) as they come; the table is printed last."""
import argparse, json, os, subprocess, sys, time, traceback
from dataclasses import asdict, replace
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
import torch

from dmd2_nb.core import cond_map
from dmd2_nb.sdxl.adapter import SD15_UNET, SDXL_UNET, TINY_SDXL, EpsDenoiser, make_unet, sdxl_sigmas
from dmd2_nb.sdxl.conditioning import SDXLCond, micro_ids, zero_uncond
from dmd2_nb.sdxl.memory import GiB
from dmd2_nb.sdxl.recipe import sdxl_dmd2, sdxl_lora_config
from dmd2_nb.sdxl.roles import FullCopies, Setup, SharedBase, memory_plan

PLAN = root/'data'/'runs'/'sdxl_plan.json'
# rows: setup, and how it is run. cap: GiB the allocator may take; flash=False leaves what a T4 has; compile: blocks through inductor
base = Setup()
ROWS = {
    # the bars
    'bf16':        dict(setup=replace(base, recorded=True), cap=14.0, iters=50, graphs=True),
    'fp16_t4':     dict(setup=replace(base, dtype='float16', recorded=True), cap=14.0, iters=50, graphs=True, flash=False),
    'bf16_plain':  dict(setup=base, cap=14.0, iters=10),
    'fp16_plain':  dict(setup=replace(base, dtype='float16'), cap=14.0, iters=10, flash=False),
    'rank16_768':  dict(setup=replace(base, rank=16, px=768), cap=11.0, iters=10),
    'speed':       dict(setup=replace(base, recorded=True), iters=30, graphs=True),
    'compiled':    dict(setup=replace(base, recorded=True), iters=30, graphs=True, compile=True),
    'batch4':      dict(setup=replace(base, recorded=True, batch=4), iters=20, graphs=True),
    # the plan on setups that tuned nothing
    'p_rank16':    dict(setup=replace(base, rank=16), iters=4),
    'p_batch2':    dict(setup=replace(base, batch=2), iters=4),
    'p_batch4_768': dict(setup=replace(base, batch=4, px=768, rank=32), iters=4),
    'p_512_no_gan': dict(setup=replace(base, px=512, gan=False, rank=8), iters=4),
    'p_no_ckpt':   dict(setup=replace(base, checkpointing=False, px=768), iters=4),
    'p_unguided':  dict(setup=replace(base, guidance=False, rank=128), iters=4),
    'p_ema_gpu':   dict(setup=replace(base, ema='gpu', batch=3, px=640), iters=4),
    'p_sd15':      dict(setup=replace(base, unet=SD15_UNET, px=512, batch=8), iters=4),
    # an H200 only
    'full':        dict(setup=replace(base, kind='full'), iters=10, needs=100),
}
CHECKS = ('check',)


def tiny(row):
    "The same row on a toy network"
    s = row['setup']
    unet = TINY_SDXL if s.unet is not SD15_UNET else None
    if unet is None: return None
    return row | dict(setup=replace(s, unet=TINY_SDXL, px=s.px//8, tokens=7, rank=min(s.rank, 4), dtype='float32', recorded=False), iters=4, cap=None, graphs=False, compile=False)


def conds(s, device, n=None):
    b, u = n or s.batch, s.unet
    g = torch.Generator().manual_seed(1)
    text = torch.randn(b, s.tokens, u['cross_attention_dim'], generator=g).to(device)
    if u.get('addition_embed_type') != 'text_time': return text
    pooled = u['projection_class_embeddings_input_dim']-6*u['addition_time_embed_dim']
    return SDXLCond(text, torch.randn(b, pooled, generator=g).to(device), micro_ids(b, s.px, device=device))


def make(row, device):
    s = row['setup']
    n = s.px//8
    dtype = getattr(torch, s.dtype)
    unet = make_unet(s.unet, device=device, dtype=dtype if s.kind == 'shared' else torch.float32)
    D = EpsDenoiser(unet, shape=(4, n, n))
    roles = SharedBase(D, s.rank, checkpointing=s.checkpointing) if s.kind == 'shared' else FullCopies(D, s.checkpointing, dtype)
    cfg = replace(sdxl_lora_config, batch=s.batch, dtype=s.dtype, guidance=8. if s.guidance else 1., gan_g=5e-3*s.gan, gan_d=1e-2*s.gan,
                  ema_halflife=0. if s.ema == 'none' else 100.)
    c = conds(s, device)
    uncond = zero_uncond if isinstance(c, SDXLCond) else torch.zeros_like(c[:1])
    dmd = sdxl_dmd2(roles, cfg, c, uncond=uncond, ema_device='cpu' if s.ema == 'cpu' else None)
    if row.get('compile'): roles.base.compile()
    if row.get('graphs'): roles.record()
    return roles, dmd, c


def run_row(name, row, device):
    "One row, measured phase by phase; what went wrong is part of the result"
    s, cuda = row['setup'], device == 'cuda'
    out = dict(row=name, card=torch.cuda.get_device_name() if cuda else 'cpu', torch=torch.__version__, setup={k: v for k, v in asdict(s).items() if k != 'unet'},
               cap=row.get('cap'), graphs=bool(row.get('graphs')), compile=bool(row.get('compile')), flash=row.get('flash', True))
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        if row.get('cap'): torch.cuda.set_per_process_memory_fraction(min(1., row['cap']*GiB/torch.cuda.get_device_properties(0).total_memory))
        if not row.get('flash', True): torch.backends.cuda.enable_flash_sdp(False); torch.backends.cuda.enable_cudnn_sdp(False)
    sync = torch.cuda.synchronize if cuda else (lambda: None)
    torch.manual_seed(0)
    start = time.perf_counter()
    phases, seconds, iters = {}, {}, []

    def phase(name, f, *a):
        if cuda: torch.cuda.reset_peak_memory_stats()
        sync(); t = time.perf_counter()
        r = f(*a)
        sync(); t = time.perf_counter()-t
        seconds.setdefault(name, []).append(t)
        if cuda: phases[name] = max(phases.get(name, 0), torch.cuda.max_memory_reserved() if row.get('graphs') else torch.cuda.max_memory_allocated())
        return r

    try:
        roles, dmd, c = make(row, device)
        real = torch.randn(s.batch, *dmd.shape, device=device), c
        out['built_s'] = time.perf_counter()-start
        finite = True
        warm = 10 if row.get('graphs') and row['iters'] > 10 else 0  # two cycles: plain, recorded
        for i in range(row['iters']+warm):
            if i == warm:
                phases.clear(); seconds.clear()
                out['warmup_s'] = time.perf_counter()-start-out['built_s']
            sync(); t = time.perf_counter()
            if dmd.generators_turn(): x, log = phase('generator update', dmd.generator_step, c, real)
            else: x, log = phase('rollout', dmd.generate, c, real), {}
            log |= phase('critic update', dmd.fake_step, x, c, real if s.gan else None)
            sync()
            if i >= warm: iters.append(time.perf_counter()-t)
            if i % 10 == 0 or i+1 == row['iters']+warm: finite &= all(bool(v.isfinite()) for k, v in log.items() if not k.startswith('norm'))
        full = len(iters)//5*5 or len(iters)
        out |= dict(finite=finite, iterations=len(iters), s_per_iteration=sum(iters[-full:])/full, skipped=dict(scale_g=dmd.scaler_g.get_scale(), scale_fake=dmd.scaler_fake.get_scale()) if s.dtype == 'float16' else None)
        runner = getattr(getattr(roles, 'base', None), 'runner', None)
        if row.get('graphs'): out['recorded'] = None if runner is None else runner.failed or sum(len(p.replays) for p in runner.passes.values())
        if row.get('graphs') and row.get('profile', True): out['gpu_busy'] = busy(dmd, c, real if s.gan else None)
    except Exception as e:
        out['error'] = f'{type(e).__name__}: {str(e).splitlines()[0][:300]}'
        out['trace'] = traceback.format_exc()[-1500:]
    if cuda: out |= dict(peak_allocated=torch.cuda.max_memory_allocated(), peak_reserved=torch.cuda.max_memory_reserved())
    out |= dict(phases=phases, seconds={k: sorted(v)[len(v)//2] for k, v in seconds.items()}, total_s=time.perf_counter()-start)
    return out


def busy(dmd, c, real):
    "Share of one cycle in which the GPU computes, from the profiler"
    from torch.profiler import ProfilerActivity, profile
    torch.cuda.synchronize()
    t = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5):
            x = dmd.generator_step(c, real)[0] if dmd.generators_turn() else dmd.generate(c, real)
            dmd.fake_step(x, c, real)
        torch.cuda.synchronize()
    t = time.perf_counter()-t
    return dict(cycle_s=t, kernels_s=sum(e.self_device_time_total for e in p.key_averages())/1e6)


def check(device):
    "Recorded against plain: the same run on a small network in float32"
    out = dict(row='check', card=torch.cuda.get_device_name() if device == 'cuda' else 'cpu')
    row = dict(setup=Setup(unet=TINY_SDXL, px=128, tokens=7, rank=4, batch=2, dtype='float32', ema='none'))
    if device == 'cuda': torch.backends.cudnn.deterministic = True
    try:
        logs, weights = {}, {}
        for graphs in (False, True):
            torch.manual_seed(0)
            roles, dmd, c = make(row | dict(graphs=graphs and device == 'cuda'), device)
            if graphs and device != 'cuda':
                from dmd2_nb.sdxl.graphs import EchoRecorder, Graphs
                Graphs(roles.teacher.net, roles.generator.net, roles.fake.net, recorder=EchoRecorder(), share_grads=True)
            real = torch.randn(2, *dmd.shape, generator=torch.Generator().manual_seed(3)).to(device), c
            logs[graphs] = []
            for _ in range(12):
                x, log = dmd.generator_step(c, real) if dmd.generators_turn() else (dmd.generate(c, real), {})
                logs[graphs].append({k: v.item() for k, v in (log | dmd.fake_step(x, c, real)).items()})
            weights[graphs] = [p.detach().clone() for r in (roles.generator, roles.fake) for p in r.parameters()]
            out[f'recorded_{graphs}'] = None if roles.base.runner is None else roles.base.runner.failed or sum(len(p.replays) for p in roles.base.runner.passes.values())
        out['loss_gap'] = max(abs(a[k]-b[k])/(abs(a[k])+1e-6) for a, b in zip(*logs.values()) for k in a if k.endswith('loss'))
        out['weight_gap'] = max(((a-b).norm()/a.norm().clamp(min=1e-9)).item() for a, b in zip(*weights.values()))
        out['ok'] = out['loss_gap'] < 1e-2 and out['weight_gap'] < 1e-2
    except Exception as e: out |= dict(error=f'{type(e).__name__}: {str(e).splitlines()[0][:300]}', trace=traceback.format_exc()[-1500:])
    return out


def predict(names):
    "Plans of the rows, written before anything is measured"
    old = json.loads(PLAN.read_text()) if PLAN.is_file() else {}
    for n in names:
        t = time.perf_counter()
        p = memory_plan(ROWS[n]['setup'])
        old[n] = dict(peak=p.peak, phases=p.phases, rest=p.rest, workspace=p.workspace, predicted=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()))
        print(f'{n:<14}{p.peak/GiB:8.2f} GiB  ({time.perf_counter()-t:.0f} s)', flush=True)
        PLAN.parent.mkdir(parents=True, exist_ok=True)
        PLAN.write_text(json.dumps(old, indent=1)+'\n')


def table(rows, plan):
    gib = lambda v: f'{v/GiB:7.2f}' if v else '      -'
    print(f'{"row":<14}{"phase":<18}{"predicted":>9}{"measured":>9}{"ratio":>7}{"seconds":>9}')
    for r in rows:
        if r['row'] in CHECKS:
            print(f'{r["row"]:<14}{r.get("error") or {k: r[k] for k in r if k not in ("row", "card", "trace")}}')
            continue
        p = plan.get(r['row'], {}).get('phases', {})
        for k in r['seconds']:
            m, q = r['phases'].get(k), p.get(k)
            print(f'{r["row"]:<14}{k:<18}{gib(q):>9}{gib(m):>9}{(f"{q/m:.3f}" if q and m else "-"):>7}{r["seconds"][k]:9.3f}')
        print(f'{r["row"]:<14}s/iteration {r.get("s_per_iteration", float("nan")):.3f}  reserved {gib(r.get("peak_reserved"))} GiB  recorded {r.get("recorded")}  finite {r.get("finite")}  {r.get("gpu_busy") or ""} {r.get("error", "")}')
    print('card:', rows[-1]['card'] if rows else '-')


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('what', choices=('predict', 'run', 'one'))
    a.add_argument('--only', default='', help='rows, separated by commas; all that fit the card when absent')
    a.add_argument('--tiny', action='store_true', help='toy networks on the CPU')
    a.add_argument('--limit', type=float, default=540, help='seconds after which no further row is started')
    a = a.parse_args()
    names = [n for n in a.only.split(',') if n] or [*CHECKS, *ROWS]
    if bad := [n for n in names if n not in ROWS and n not in CHECKS]: sys.exit(f'unknown rows: {", ".join(bad)}; known are {", ".join((*CHECKS, *ROWS))}')
    device = 'cuda' if torch.cuda.is_available() and not a.tiny else 'cpu'
    if a.what == 'predict': return predict([n for n in names if n in ROWS])
    if a.what == 'one':
        row = ROWS.get(names[0])
        print('RESULT '+json.dumps(check(device) if names[0] in CHECKS else run_row(names[0], tiny(row) if a.tiny else row, device)))
        return
    if device == 'cpu' and not a.tiny: sys.exit('no GPU here: use --tiny for a dry run')
    folder = Path(os.environ.get('OUT') or root/'runs')
    folder.mkdir(parents=True, exist_ok=True)
    plan, rows, start = (json.loads(PLAN.read_text()) if PLAN.is_file() and not a.tiny else {}), [], time.time()
    env = os.environ | dict(PYTORCH_CUDA_ALLOC_CONF=os.environ.get('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:False'))
    for n in names:
        if n in ROWS and (a.tiny and (tiny(ROWS[n]) is None or ROWS[n]['setup'].kind == 'full') or device == 'cuda' and torch.cuda.get_device_properties(0).total_memory < ROWS[n].get('needs', 0)*1e9): continue
        if time.time()-start > a.limit: print(f'{n}: not started, out of time', flush=True); continue
        r = subprocess.run([sys.executable, __file__, 'one', '--only', n]+['--tiny']*a.tiny, capture_output=True, text=True, env=env)
        got = [l[7:] for l in r.stdout.splitlines() if l.startswith('RESULT ')]
        rows.append(json.loads(got[-1]) if got else dict(row=n, card='?', error=f'exit code {r.returncode}: {r.stderr.strip().splitlines()[-1:]}', phases={}, seconds={}))
        print(f'{n}: {rows[-1].get("error") or "ok"} ({time.time()-start:.0f} s)', flush=True)
        (folder/'sdxl_gpu.json').write_text(json.dumps(dict(rows=rows, plan=plan), indent=1)+'\n')
    table(rows, plan)
    if any('error' in r for r in rows): sys.exit(1)


if __name__ == '__main__': main()
