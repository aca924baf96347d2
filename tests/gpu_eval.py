"""Time our pass of Inception statistics against torch-fidelity's on this GPU: python
tests/gpu_eval.py --out eval_gpu.json

50,000 random pictures and random weights in the layout of the published file, so that nothing has
to be fetched; the same file, batch and
cards for both. Parts, each printed and written as soon as it is known: the two passes in turn,
with their peak memory; FID and KID of the
same features, ours beside theirs; the whole table. A file that is there already keeps its runs.
--tiny runs the same on a CPU."""
import argparse, gc, json, os, sys, tempfile, time, traceback, warnings
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch_fidelity
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
from dmd2_nb.core import rng
from dmd2_nb.features import InceptionNet, extract, inception
from dmd2_nb.fid import Stats, compare, frechet_of, kid_subsets

GIB = 2**30
CUDA = torch.cuda.is_available()
DEV = 'cuda' if CUDA else 'cpu'
BAR = 1.2     # Our pass may take this many times theirs
PARITY = 1e-3 # Relative

def sync():
    if CUDA: torch.cuda.synchronize()
def host(what='VmRSS', reset=False):
    "GiB of this process, or its highest since the last reset; 0 where the system doesn't tell"
    try:
        if reset: Path('/proc/self/clear_refs').write_text('5')
        return (
            next(
                int(l.split()[1])
                for l in Path('/proc/self/status').read_text().splitlines()
                if l.startswith(what)
            )
            / 2**20
        )
    except (OSError, StopIteration): return 0.
def clean():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    host(reset=True)
def rel(a, b): return abs(a-b)/abs(b)

class Pictures(Dataset):
    "What torch-fidelity takes"
    def __init__(self, x): self.x = x
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]

class Report:
    "Rows of one run; the file is whole after each"
    def __init__(self, args):
        self.path, self.rows, self.start, self.limit = (
            Path(args.out),
            [],
            time.perf_counter(),
            args.seconds,
        )
        self.log = (
            json.loads(self.path.read_text()) if self.path.exists() else dict(note=NOTE, runs=[])
        )
        self.log['runs'] = [*self.log['runs'], dict(run=args.run, rows=self.rows)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
    @property
    def gone(self): return time.perf_counter()-self.start
    def add(self, **row):
        row = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k,v in row.items()}
        self.rows.append(row)
        print(f'[{self.gone:5.1f} s] {json.dumps(row)}', flush=True)
        self.path.write_text(json.dumps(self.log, indent=1)+'\n')
    def part(self, f, *args, needs=0.):
        "One part; its error costs one line, and its return value is None"
        if needs and self.gone+needs>self.limit:
            return print(f'[{self.gone:5.1f} s] {f.__name__} left out: no time', flush=True)
        try: return f(self, *args)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            self.add(
                what='failed',
                name=f.__name__,
                error=f'{type(e).__name__}: {" ".join(str(e).split())[:300]} ({Path(at.filename).name}:{at.lineno})',
            )

NOTE = (
    "Inception statistics of random pictures with random weights of the published layout: ours "
    "(features.inception, fid.Stats) and torch-fidelity's "
    "own pass, the same file and batch, in turn on one card. ratio is ours over theirs, the median "
    "of each. Written by tests/gpu_eval.py."
)

def random_weights(path):
    "Weights that keep the signal's size from layer to layer, so that features are numbers like any others"
    torch.manual_seed(0)
    net = InceptionNet(None).graph
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
    torch.save(net.state_dict(), path)
    return str(path)

def pictures(n, px, seed, lo=0):
    "Bytes, smooth in the large and rough in the small, so that features differ from picture to picture"
    g = rng(seed, n)
    x = torch.randint(lo, 256, (n, 3, px, px), generator=g, dtype=torch.uint8)
    for part in x.split(4096): # a colour of its own for each picture
        part.copy_((part.float()*.5 + 127*torch.rand(len(part), 3, 1, 1, generator=g)).byte())
    return x

def theirs_opts(args, w):
    return dict(
        cuda=CUDA,
        batch_size=args.batch,
        feature_extractor_weights_path=w,
        verbose=False,
        cache=False,
    )

def passes(rep, args, w, x, name):
    "Features and statistics of all pictures, ours and theirs in turn"
    ours = inception(w, DEV, layer=args.layer, batch=args.batch)
    opts = theirs_opts(args, w)
    theirs = create_feature_extractor('inception-v3-compat', [args.layer], **opts)
    def run_ours(x): return Stats.of(x, ours)
    def run_theirs(x):
        return fid_features_to_statistics(
            extract_featuresdict_from_input_id(1, theirs, input1=Pictures(x), **opts)[args.layer]
        )
    for f in (run_ours, run_theirs): f(x[:2*args.batch])  # each card picks its kernels once
    seen,last = dict(ours=[], theirs=[]),{}
    order = ['ours', 'theirs', 'theirs', 'ours'][:2*args.rounds]
    for k in order:
        clean()
        base = host()
        t = time.perf_counter()
        last[k] = (run_ours if k=='ours' else run_theirs)(x)
        sync()
        seen[k].append(time.perf_counter()-t)
        rep.add(
            what='pass',
            name=k,
            set=name,
            n=len(x),
            px=x.shape[-1],
            batch=args.batch,
            seconds=seen[k][-1],
            images_s=len(x) / seen[k][-1],
            host_gib=max(0.0, host('VmHWM') - base),
            **(dict(peak_gib=torch.cuda.max_memory_allocated() / GIB) if CUDA else {}),
        )
    s,t = last['ours'],last['theirs']
    worst = max(
        (s.mu.cpu() - torch.from_numpy(t['mu']).double()).abs().max().item() / abs(t['mu']).max(),
        (s.cov.cpu() - torch.from_numpy(t['sigma'])).abs().max().item() / abs(t['sigma']).max(),
    )
    ratio = median(seen['ours'])/median(seen['theirs'])
    rep.add(
        what='ratio',
        set=name,
        ours=seen['ours'],
        theirs=seen['theirs'],
        ratio=ratio,
        bar=BAR,
        worst_statistic=float(worst),
        ok=ratio <= BAR,
    )
    return ours,theirs

def parity(rep, args, ours, theirs, w, a, b):
    "FID and KID, through torch-fidelity's public call and through ours"
    size = min(1000, len(b)//2)
    t = time.perf_counter()
    o = torch_fidelity.calculate_metrics(
        input1=Pictures(a),
        input2=Pictures(b),
        fid=True,
        kid=True,
        kid_subset_size=size,
        feature_layer_fid=args.layer,
        feature_layer_kid=args.layer,
        **theirs_opts(args, w),
    )
    rep.add(
        what='calculate_metrics',
        name='theirs',
        n=len(a),
        n_real=len(b),
        seconds=time.perf_counter() - t,
        fid=o['frechet_inception_distance'],
        kid=o['kernel_inception_distance_mean'],
        kid_std=o['kernel_inception_distance_std'],
    )
    t = time.perf_counter()
    fa,fb = (extract(x, ours) for x in (a, b))
    d, (k, s) = (
        frechet_of(Stats.of_features(fa), Stats.of_features(fb)),
        kid_subsets(fa, fb, 100, size),
    )
    rep.add(
        what='calculate_metrics',
        name='ours',
        n=len(a),
        n_real=len(b),
        seconds=time.perf_counter() - t,
        fid=d,
        kid=k,
        kid_std=s,
    )
    e = dict(
        fid=rel(d, o['frechet_inception_distance']), kid=rel(k, o['kernel_inception_distance_mean'])
    )
    rep.add(what='parity', name='from pixels', **e, bar=PARITY, ok=max(e.values())<=PARITY)
    fa,fb = (f.double().cpu() for f in (fa, fb))  # the same float64 features for both
    o = fid_statistics_to_metric(
        fid_features_to_statistics(fa), fid_features_to_statistics(fb), False
    )
    o |= kid_features_to_metric(
        fa, fb, kid_subsets=20, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    e = dict(
        fid=rel(frechet_of(fa.to(DEV), fb.to(DEV)), o['frechet_inception_distance']),
        kid=rel(
            kid_subsets(fa.to(DEV), fb.to(DEV), 20, size)[0], o['kernel_inception_distance_mean']
        ),
    )
    rep.add(
        what='parity', name='same float64 features', **e, bar=PARITY, ok=max(e.values()) <= PARITY
    )
    return fa,fb

def whole_table(rep, args, ours, a, b):
    "All distances with their errors, from pixels: what `compare` needs"
    clean()
    t = time.perf_counter()
    row = compare(a, b, ours)
    sync()
    rep.add(
        what='table',
        seconds=time.perf_counter() - t,
        **(dict(peak_gib=torch.cuda.max_memory_allocated() / GIB) if CUDA else {}),
        **row,
    )

def main():
    ap = argparse.ArgumentParser()
    ap.add_argument(
        '--out', default='eval_gpu.json', help='the JSON to write; runs that are in it stay'
    )
    ap.add_argument('--tiny', action='store_true')
    ap.add_argument('--n', type=int, default=50_000)
    ap.add_argument('--px', type=int, default=32)
    ap.add_argument('--batch', type=int, default=64, help="torch-fidelity's default is 64")
    ap.add_argument('--rounds', type=int, default=2)
    ap.add_argument('--layer', default='2048', help="of the network; '2048' is FID's")
    ap.add_argument(
        '--seconds', type=float, default=120, help='no optional part begins when it would end later'
    )
    ap.add_argument(
        '--run', default='one process, alone on the machine', help='what the json calls this run'
    )
    args = ap.parse_args()
    if not CUDA and not args.tiny: ap.error('no CUDA device here: --tiny runs the same on a CPU')
    # an early layer: 64 features, so that few pictures will do
    if args.tiny: args.n,args.batch,args.layer,args.rounds,args.seconds = 96,8,'64',1,600
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    for m in ('This DataLoader', '.*not the published file'):
        warnings.filterwarnings('ignore', message=m)
    rep = Report(args)
    rep.add(
        what='card',
        name=torch.cuda.get_device_name() if CUDA else 'cpu',
        torch=torch.__version__,
        torch_fidelity=torch_fidelity.__version__,
        layer=args.layer,
        cores=os.cpu_count(),
    )
    with tempfile.TemporaryDirectory() as tmp:
        w,a = random_weights(Path(tmp)/'w.pth'),pictures(args.n, args.px, 1)
        b = pictures(80 if args.tiny else args.n//10, args.px, 2, lo=40)
        nets = rep.part(passes, args, w, a, 'generated')
        if nets:
            rep.part(parity, args, *nets, w, a[:len(b)], b, needs=30)
            rep.part(whole_table, args, nets[0], a[:len(b)], b, needs=15)
    print(f'{rep.path} written after {rep.gone:.0f} s')
    return int(any(r.get('ok') is False or r['what']=='failed' for r in rep.rows))

if __name__=='__main__': sys.exit(main())
