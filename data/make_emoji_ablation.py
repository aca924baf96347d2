"""One step, four steps and the ablation on emoji32, each row for the same number of seconds alone on a GPU.

    python data/make_emoji_ablation.py --teacher emoji32_teacher.safetensors --out DIR --seconds 60 one no_gan 'mine:lr_g=3e-4,levels=2.5'
    python data/make_emoji_ablation.py --collect data/runs/emoji32_sweep DIR   # all rows of DIR as one .csv and one .json

A row is a name of ROWS, or NAME:FIELD=VALUE,... on top of the recipe; NAME@SEED gives another seed. Writes DIR/NAME.csv (log and
evaluations), NAME.json (its settings), NAME.png (eight fixed noises through training) and, for rows under --keep, float16 weights. The
clock of a row counts iterations alone, the critic's warm-up among them: no evaluation, and not the first --log iterations, in which
graphs are recorded; later recordings count as long as the iterations before them."""
import argparse, gc, json, sys, time, traceback
from dataclasses import asdict, replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch.nn import functional as F

from dmd2_nb.core import cond_index, cond_to, rng
from dmd2_nb.distill import DMD2
from dmd2_nb.evaluate import draw, eval_conds, student_sampler
from dmd2_nb.gan import noisy_logits
from dmd2_nb.images import to_float
from dmd2_nb.jobs import COLUMNS, first_networks, open_data, open_judge, open_teacher
from dmd2_nb.noise import karras_sigmas
from dmd2_nb.recipes import config_changes, config_levels, recipe
from dmd2_nb.regression import TeacherPairs
from dmd2_nb.runs import CsvLog, Means, batches, cond_batches, read_log
from dmd2_nb.train import train
from dmd2_nb.weights import save_denoiser

LOGGED = ('step', 'seconds', *COLUMNS, *(f'{p}{c}{s}' for p in ('', 'raw_') for c in ('kid', 'kid_held') for s in ('', '_se')), 'logit_train', 'logit_held', 'logit_gen')
NOGAN = dict(gan_g=0, gan_d=0)
ROWS = dict(one={}, no_gan=NOGAN)

def encoder_distance(T):
    "Huber on pixels plus on the features of the teacher's encoder, for the regression loss; not what is measured with"
    def distance(a, b):
        s = torch.full((len(a),), 0.1, device=a.device)
        y = torch.zeros(len(a), T.model.label_dim, device=a.device)
        with torch.no_grad(): fb = T.encode(b, s, y)
        return F.huber_loss(a, b, delta=0.1) + F.huber_loss(T.encode(a, s, y).float(), fb.float(), delta=0.1)
    return distance

def parse(text):
    "Row name, seed, changes"
    name,_,more = text.partition(':')
    base,_,seed = name.partition('@')
    pairs = [o for o in more.split(',') if o]
    own = dict(ROWS.get(base, {}))
    for o in pairs:
        k,_,v = o.partition('=')
        own[k] = v
    return name, int(seed or 0), own

def changes(own):
    "Texts and numbers as fields of the config; what is not a field stays apart"
    from dataclasses import fields
    from dmd2_nb.distill import DMD2Config
    known = {f.name for f in fields(DMD2Config)}
    res = config_changes([f"{k}={str(v).replace(';', ',')}" for k,v in own.items() if k in known])
    return res, {k: v for k,v in own.items() if k not in known}

class Bench:
    "What all rows share"
    def __init__(self, a):
        self.a,self.r,self.device = a,recipe('emoji32'),torch.device(a.device)
        self.data,self.held = open_data(self.r)
        self.T,_ = open_teacher(self.r, self.data, a.teacher, self.device)
        self.judge = open_judge(self.r, self.data, self.held, self.device)
        self.judge.refs
        self.watch = eval_conds(self.data, a.n)
        self.kinds = eval_conds(self.data, 8, seed=3)
        g = rng(0, 5)
        pick = lambda d: torch.randperm(len(d), generator=g)[:512]
        self.reals = {k: (to_float(d.images[i]).to(self.device), cond_to(d.conds(i), self.device)) for k,d,i in (('train', self.data, pick(self.data)), ('held', self.held, pick(self.held)))}
        self._pairs = None

    def pairs(self):
        if self._pairs is None:
            t,n = time.time(),self.a.pairs
            sigmas = karras_sigmas(self.r.sampler['steps'], self.T.sigma_min, self.T.sigma_max).to(self.device)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type=='cuda'):
                self._pairs = TeacherPairs(self.T, sigmas, n, self.data.shape, cond_to(eval_conds(self.data, n, seed=9), self.device), seed=9, device=self.device, distance=encoder_distance(self.T))
            print(f'{n} pairs in {time.time()-t:.0f} s', flush=True)
        return self._pairs

    @torch.no_grad()
    def logits(self, dmd, x, cond):
        "What the discriminator says of training images, held-out ones, and samples"
        if not (dmd.gan_on and dmd.cfg.gan_d): return {}
        res = {}
        for k,(y,c) in (self.reals | dict(gen=(x, cond))).items():
            g = rng(0, 6, device=self.device)
            sigma = 10**torch.empty(len(y), device=self.device).uniform_(-1.5, 0.5, generator=g)
            with dmd.cast(): res[f'logit_{k}'] = noisy_logits(dmd.fake, dmd.head, y, sigma, c, torch.randn(y.shape, generator=g, device=self.device)).float().mean().item()
        return res

    def evaluate(self, dmd, n=None):
        conds,row = self.watch if n is None else eval_conds(self.data, n),{}
        for k,G in (('', dmd.ema.net), ('raw_', dmd.G)):
            x = draw(student_sampler(G, dmd.cfg.levels), self.data.shape, conds, 1, device=self.device)
            row |= {k+m: v for m,v in self.judge(x, fast=True).items() if m!='n'}
            if not k: row |= self.logits(dmd, to_float(x[:512]).to(self.device), cond_to(cond_index(conds, slice(0, 512)), self.device))
        return row

    def strip(self, dmd): return draw(student_sampler(dmd.ema.net, dmd.cfg.levels), self.data.shape, self.kinds, 3, device=self.device)

    def facts(self, text):
        "What a row is: changes to the recipe, card, processes that shared it"
        name,seed,own = parse(text)
        card = torch.cuda.get_device_name() if self.device.type=='cuda' else 'cpu'
        return dict(settings=dict(config=asdict(replace(self.r.config, seed=seed, **changes(own)[0])), more=changes(own)[1]), card=card, shared_by=self.a.shared_by, n=[self.a.n, self.a.final])

    def run(self, text):
        a,device = self.a,self.device
        name,seed,own = parse(text)
        ch,extra = changes(own)
        cfg = replace(self.r.config, seed=seed, **ch)
        make = DMD2
        if device.type=='cuda': from dmd2_nb.graphs import GraphedDMD2 as make
        dmd = make(self.T, *first_networks(self.r, self.T, extra.get('begin')), cfg, probe=cond_to(self.data.conds(torch.arange(1)), device), pairs=self.pairs() if cfg.w_reg else None)
        reals = batches(self.data, cfg.batch, seed+1, 0, device) if cfg.gan or cfg.rollout!='sim' else None
        conds,means = cond_batches(self.data, cfg.batch, seed+2, 0, device),Means()
        log = CsvLog(a.out/f'{name}.csv', LOGGED)
        (a.out/f'{name}.json').write_text(json.dumps(self.facts(text), indent=1))
        seconds,strips,clock,step,limit = 0.,[self.strip(dmd)],None,0,float(extra.get('seconds', a.seconds))
        marks = [limit*(i+1)/a.evals for i in range(a.evals)]
        recorded,per = 0,0.  # a block in which a graph was recorded counts as long as the one before
        for step,o in enumerate(train(dmd, conds, 10**9, reals), 1):
            means.add(o)
            if step%a.log: continue
            row = means.take() | dict(g_updates=dmd.g_updates)
            now = time.perf_counter()
            slots = list(getattr(dmd, '_slots', {}).values())
            whole = all(o['graph'].graph is not None for o in slots) and len(slots)==recorded
            recorded = len(slots) if all(o['graph'].graph is not None for o in slots) else -1
            if clock is not None and whole: per = (now-clock)/a.log
            if clock is not None: seconds += per*a.log
            if marks and seconds>=marks[0] or any(v!=v for v in row.values()):
                row |= self.evaluate(dmd, a.final if len(marks)<=1 else None)
                strips.append(self.strip(dmd)); marks[:1] = []
            log.add(dict(step=step, seconds=seconds, **row))
            if any(v!=v for v in row.values()): print(f'{name}: diverged at {step}', flush=True); break
            if not marks: break
            clock = time.perf_counter()
        sheet = torch.stack(strips).permute(0, 3, 1, 4, 2).reshape(len(strips)*self.data.shape[1], 8*self.data.shape[2], 3)
        Image.fromarray(sheet.numpy()).save(a.out/f'{name}.png')
        if a.keep and name.split('@')[0] in a.keep.split(','):
            save_denoiser(dmd.ema.net, a.out/f'{name}.safetensors', torch.float16, levels=cfg.levels, classes=self.data.class_names, styles=self.data.style_names, data='emoji32')
        return name,step,dmd.g_updates,seconds

def collect(to, folder):
    "Logs and settings of all rows in two files"
    facts = {p.stem: json.loads(p.read_text()) for p in sorted(Path(folder).glob('*.json'))}
    rows = [dict(run=n) | o for n in facts for o in read_log(Path(folder)/f'{n}.csv')]
    cols = [c for c in ('run', *LOGGED) if any(c in o for o in rows)]
    text = lambda v: '' if v is None else f'{v:.5g}' if isinstance(v, float) else str(v)
    Path(f'{to}.csv').write_text('\n'.join([','.join(cols), *(','.join(text(o.get(c)) for c in cols) for o in rows)])+'\n')
    Path(f'{to}.json').write_text(json.dumps(facts, indent=1)+'\n')

def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument('rows', nargs='+'); ap.add_argument('--collect'); ap.add_argument('--shared-by', type=int, default=1, help='processes on the card'); ap.add_argument('--teacher'); ap.add_argument('--out', type=Path, default=Path('.')); ap.add_argument('--seconds', type=float, default=60)
    ap.add_argument('--n', type=int, default=2500, help='samples of an evaluation'); ap.add_argument('--final', type=int, default=5000, help='of the last one'); ap.add_argument('--evals', type=int, default=4)
    ap.add_argument('--log', type=int, default=50); ap.add_argument('--pairs', type=int, default=5000); ap.add_argument('--keep', default=''); ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = ap.parse_args()
    if a.collect: return collect(a.collect, a.rows[0])
    a.out.mkdir(parents=True, exist_ok=True)
    t0 = time.time()
    bench = Bench(a)
    print(f'set up in {time.time()-t0:.0f} s', flush=True)
    for text in a.rows:
        t = time.time()
        try: name,step,g,sec = bench.run(text)
        except Exception: traceback.print_exc(); continue
        finally:
            gc.collect()
            if a.device=='cuda': torch.cuda.empty_cache()
        rows = [o for o in read_log(a.out/f'{name}.csv') if 'kid' in o]
        print(f'{text}: {step} its, {g} g, {sec:.0f} s counted, {time.time()-t:.0f} s; {sec/step*1e3:.1f} ms/it; kid ' + ' '.join(f"{o['kid']:.4f}/{o['raw_kid']:.4f}" for o in rows) +
              f" held {rows[-1]['kid_held']:.4f} se {rows[-1]['kid_se']:.4f}" + ''.join(f" {k} {rows[-1][k]:.2f}" for k in ('logit_train', 'logit_held', 'logit_gen') if k in rows[-1]), flush=True)

if __name__=='__main__': main()
