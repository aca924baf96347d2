"""One step, four steps and the ablation on emoji32, each row for the same number of seconds alone on a GPU.

    python data/make_emoji_ablation.py --teacher emoji32_teacher.safetensors --out DIR --seconds 60 one ratio5@1 'mine:lr_g=3e-4,levels=2.5'
    python data/make_emoji_ablation.py --collect data/runs/emoji32_sweep DIR   # all rows of DIR as one .csv and one .json

A row is a name of emoji_rows.ROWS, or NAME:FIELD=VALUE,... on top of what they share; NAME@SEED gives another seed; seconds=, decay= (share of
the time over which the rates fall to a hundredth), wall= (seconds by the clock on the wall in the place of the row's own) belong to one row. Writes DIR/NAME.csv (log and evaluations), NAME.json (settings and
final figures), NAME.png (eight fixed noises through training) and, for rows under --keep, float16 weights: the average, and what a later run
can begin from (NAME_generator, NAME_fake, NAME_head).

The clock of a row counts iterations alone: it is the time that they take with the card to themselves, no evaluation, and not the
first --log iterations, in which graphs are recorded; later recordings count as long as the iterations before them. Kernels of so small a
network leave most of a GPU idle, so --together rows share it, each on a stream of its own; whenever the graphs of a row have changed,
its next --log iterations have the card to themselves, and say what one costs."""
import argparse, gc, json, sys, time, traceback
from dataclasses import asdict, replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file

from dmd2_nb.core import cond_index, cond_to, rng
from dmd2_nb.distill import DMD2
from dmd2_nb.evaluate import draw, eval_conds, student_sampler
from dmd2_nb.fid import precision_recall
from dmd2_nb.gan import noisy_logits
from dmd2_nb.images import to_float
from dmd2_nb.jobs import COLUMNS, first_networks, open_data, open_judge, open_teacher
from dmd2_nb.metrics import kid, sliced_wasserstein
from dmd2_nb.noise import add_noise, karras_sigmas
from dmd2_nb.recipes import falling_rate, recipe
from dmd2_nb.regression import TeacherPairs
from dmd2_nb.runs import CsvLog, Means, batches, cond_batches, read_log
from dmd2_nb.sampling import few_step_states
from dmd2_nb.train import train
from dmd2_nb.weights import save_denoiser
from emoji_rows import NOGAN, Consistency, encoder_distance, parse, small, spread

LOGGED = (
    'step',
    'seconds',
    *COLUMNS,
    'loss',
    *(f'{p}{c}{s}' for p in ('', 'raw_') for c in ('kid', 'kid_held') for s in ('', '_se')),
    'logit_train',
    'logit_held',
    'logit_gen',
    'kid_1',
    'kid_2',
    'kid_3',
    'gap_2',
    'gap_3',
    'gap_4',
)

class Bench:
    "What all rows share"
    def __init__(self, a):
        self.a,self.r,self.device = a,recipe('emoji32'),torch.device(a.device)
        self.data,self.held = open_data(self.r)
        self.T,_ = open_teacher(self.r, self.data, a.teacher, self.device)
        self.judge = open_judge(self.r, self.data, self.held, self.device)
        self.judge.refs
        self.watch,self.end = (eval_conds(self.data, n) for n in (a.n, a.final))
        self.kinds = eval_conds(self.data, 8, seed=3)
        # 4 images of each class and style
        self.groups = self.data.cond.unique(dim=0).repeat_interleave(4, 0)
        g = rng(0, 5)
        pick = lambda d: torch.randperm(len(d), generator=g)[:512]
        self.reals = {
            k: (to_float(d.images[i]).to(self.device), cond_to(d.conds(i), self.device))
            for k, d, i in (
                ('train', self.data, pick(self.data)),
                ('held', self.held, pick(self.held)),
            )
        }
        self._pairs = None

    def pairs(self):
        if self._pairs is None:
            t,n = time.time(),self.a.pairs
            sigmas = karras_sigmas(self.r.sampler['steps'], self.T.sigma_min, self.T.sigma_max).to(
                self.device
            )
            with (
                torch.no_grad(),
                torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.device.type == 'cuda'
                ),
            ):
                self._pairs = TeacherPairs(
                    self.T,
                    sigmas,
                    n,
                    self.data.shape,
                    cond_to(eval_conds(self.data, n, seed=9), self.device),
                    seed=9,
                    device=self.device,
                    distance=encoder_distance(self.T),
                )
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
            with dmd.cast():
                res[f'logit_{k}'] = (
                    noisy_logits(
                        dmd.fake,
                        dmd.head,
                        y,
                        sigma,
                        c,
                        noise=torch.randn(y.shape, generator=g, device=self.device),
                    )
                    .float()
                    .mean()
                    .item()
                )
        return res

    @torch.no_grad()
    def steps(self, dmd, n=1000):
        """Kernel distance after each step but the last, and how far the inputs it makes are from
        noised real images, in units of the noise"""
        if len(dmd.cfg.levels)==1: return {}
        levels, res, seen, known = (
            torch.tensor(dmd.cfg.levels),
            {},
            [],
            self.reals['train'][0][: min(n, self.a.n)],
        )
        def noting(x, s, c):
            seen.append(dmd.ema.net(x, s, c))
            return seen[-1]
        def states(z, cond, generator):
            del seen[:]
            for _i,(x,_s) in enumerate(few_step_states(noting, z, levels, cond, generator)):
                inputs = x
            return torch.cat([seen[i] for i in range(len(levels)-1)], 1)
        x = draw(
            states, self.data.shape, cond_index(self.watch, slice(0, n)), 1, device=self.device
        ).chunk(len(levels) - 1, 1)
        real = next(iter(self.judge.refs.values()))
        g = rng(0, 8, device=self.device)
        for i,y in enumerate(x, 1):
            res[f'kid_{i}'] = kid(self.judge.extract(y), real)[0]
            s = levels[i].to(self.device).expand(len(known))
            a, b = (
                add_noise(o, s, torch.randn(o.shape, generator=g, device=self.device))
                for o in (to_float(y[: len(known)]).to(self.device), known)
            )
            res[f'gap_{i+1}'] = sliced_wasserstein(a, b)/levels[i].item()
        return res

    def evaluate(self, dmd, last=False):
        "On the default stream, so that all rows use the same memory"
        if self.device.type!='cuda': return self._evaluate(dmd, last)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.default_stream()):
            row = self._evaluate(dmd, last)
            torch.cuda.synchronize()
        return row

    def _evaluate(self, dmd, last):
        conds,row = self.end if last else self.watch,{}
        for k,G in (('', dmd.ema.net), ('raw_', dmd.G)):
            x = draw(
                student_sampler(G, dmd.cfg.levels), self.data.shape, conds, 1, device=self.device
            )
            row |= {k+m: v for m,v in self.judge(x, fast=True).items() if m!='n'}
            if not k:
                row |= self.logits(
                    dmd,
                    to_float(x[:512]).to(self.device),
                    cond_to(cond_index(conds, slice(0, 512)), self.device),
                ) | self.steps(dmd)
                if last: self.finals = self.final(dmd, x)
        return row

    def final(self, dmd, x):
        "Precision, recall, and mean distance of 4 images of the same class and style, as features"
        p,r = precision_recall(self.judge.extract(x), next(iter(self.judge.refs.values())))
        d = spread(
            self.judge.extract,
            draw(
                student_sampler(dmd.ema.net, dmd.cfg.levels),
                self.data.shape,
                self.groups,
                4,
                device=self.device,
            ),
        )
        return dict(precision=p, recall=r, diversity=d, n=len(x))

    def strip(self, dmd):
        return draw(
            student_sampler(dmd.ema.net, dmd.cfg.levels),
            self.data.shape,
            self.kinds,
            3,
            device=self.device,
        )

    def facts(self, text):
        "What a row is: its settings, card, rows that share it"
        name,seed,changes,extra = parse(text)
        card = torch.cuda.get_device_name() if self.device.type=='cuda' else 'cpu'
        return dict(
            settings=dict(config=asdict(replace(self.r.config, seed=seed, **changes)), more=extra),
            card=card,
            together=self.a.together,
            n=[self.a.n, self.a.final],
        )

    def make(self, cfg, extra, nets=None):
        "A run and its loop"
        device,r = self.device,self.r
        reals = lambda: batches(self.data, cfg.batch, cfg.seed+1, 0, device)
        if 'consistency' in extra:
            run = Consistency(self.T, first_networks(r, self.T)[0], cfg, int(extra['consistency']))
            return run, run.train(reals())
        make = DMD2
        if device.type=='cuda': from dmd2_nb.graphs import GraphedDMD2 as make
        G,fake = nets or first_networks(r, self.T)
        if 'small' in extra: G = small(r, self.T, extra['small'])
        dmd = make(
            self.T,
            G,
            fake,
            cfg,
            probe=cond_to(self.data.conds(torch.arange(1)), device),
            pairs=self.pairs() if cfg.w_reg else None,
        )
        return dmd, train(
            dmd,
            cond_batches(self.data, cfg.batch, cfg.seed + 2, 0, device),
            10**9,
            reals() if cfg.gan or cfg.rollout != 'sim' else None,
        )

    def row(self, text):
        "One row, iteration by iteration; yields whether the coming block of iterations wants the card for itself"
        a = self.a
        name,seed,changes,extra = parse(text)
        cfg, limit = (
            replace(self.r.config, seed=seed, **changes),
            extra.get('wall', extra.get('seconds', a.seconds)),
        )
        stage = extra.get('stage')
        dmd,loop = self.make(replace(cfg, **NOGAN) if stage else cfg, extra)
        means,log,facts = Means(),CsvLog(a.out/f'{name}.csv', LOGGED),self.facts(text)
        begun = step0 = g0 = 0
        seconds,per,recorded,strips,block,t = 0.,None,None,[self.strip(dmd)],0,time.time()
        rate = falling_rate(1., limit, extra['decay'], 0.01) if 'decay' in extra else lambda s: 1.
        spent = (lambda: time.time()-t) if 'wall' in extra else lambda: seconds
        marks = [limit*(i+1)/a.evals for i in range(a.evals)]
        while marks:
            # graphs are new: what does an iteration cost now?
            alone = per is None or recorded!=self.graphs(dmd)
            before = recorded = self.graphs(dmd)
            if alone and self.device.type=='cuda': torch.cuda.synchronize()
            for o in ([dmd.opt_g, dmd.opt_fake] if hasattr(dmd, 'opt_fake') else [dmd.opt_g]):
                for g in o.param_groups:
                    g.setdefault('full_lr', g['base_lr'])
                    g['base_lr'] = g['full_lr']*rate(spent())
                    if isinstance(dmd, Consistency):
                        g['lr'].fill_(g['base_lr']) if torch.is_tensor(g['lr']) else g.update(
                            lr=g['base_lr']
                        )
            clock = time.perf_counter()
            for _ in range(a.log):
                yield alone
                means.add(next(loop))
                begun += 1
            if alone:
                if self.device.type=='cuda': torch.cuda.synchronize()
                whole = self.graphs(dmd)==before
                if whole: per = (time.perf_counter()-clock)/a.log
            block += 1
            seconds += 0. if per is None else per*a.log
            due,bad = spent()>=marks[0] or time.time()>a.end,False
            if block%a.thin and not due: continue
            row = (
                dict(step=begun, seconds=seconds, ms=1e3 * (per or 0.0))
                | means.take()
                | dict(g_updates=dmd.g_updates + g0)
            )
            bad = any(v!=v for v in row.values())
            if stage and spent()>=limit*stage and not bad:
                nets,g0,stage = (dmd.G, dmd.fake),g0+dmd.g_updates,None
                del loop
                dmd,loop = self.make(replace(cfg, gan_start=0), extra, nets)
                per,recorded = None,None
            if time.time()>a.end or bad: marks = marks[-1:]
            if due or bad:
                last = len(marks)==1
                row |= self.evaluate(dmd, last)
                strips.append(self.strip(dmd))
                marks[:1] = []
                if last:
                    facts['final'] = self.finals | {
                        k: v for k, v in row.items() if 'kid' in k and 'gap' not in k
                    }
            log.add({k: v for k,v in row.items() if k in LOGGED})
            if bad: print(f'{name}: diverged at {begun}', flush=True)
        facts |= dict(steps=begun, g_updates=dmd.g_updates+g0, seconds=seconds, ms=1e3*(per or 0.))
        (a.out/f'{name}.json').write_text(json.dumps(facts, indent=1))
        sheet = rearrange(torch.stack(strips), 'row n c h w -> (row h) (n w) c')
        Image.fromarray(sheet.numpy()).save(a.out/f'{name}.png')
        if name in a.keep.split(','):
            facts = dict(
                levels=cfg.levels,
                classes=self.data.class_names,
                styles=self.data.style_names,
                data='emoji32',
            )
            save_denoiser(dmd.ema.net, a.out/f'{name}.safetensors', torch.float16, **facts)
            for k,net in dict(generator=dmd.G, fake=getattr(dmd, 'fake', None)).items():
                if net is not None:
                    save_denoiser(net, a.out/f'{name}_{k}.safetensors', torch.float16, **facts)
            if getattr(dmd, 'head', None) is not None:
                save_file(
                    {k: v.half().contiguous() for k, v in dmd.head.state_dict().items()},
                    a.out / f'{name}_head.safetensors',
                )
        rows = [o for o in read_log(a.out/f'{name}.csv') if 'kid' in o]
        o,f = rows[-1],getattr(self, 'finals', {})
        print(
            f'{text}: {begun} its, {dmd.g_updates + g0} g, {seconds:.0f} s counted, '
            f'{time.time() - t:.0f} s; {1e3 * (per or 0.0):.1f} ms/it; kid '
            + ' '.join(f"{r['kid']:.4f}/{r['raw_kid']:.4f}" for r in rows)
            + (
                f" held {o['kid_held']:.4f} se {o['kid_se']:.4f} P {f.get('precision', 0):.3f} R "
                f"{f.get('recall', 0):.3f} div {f.get('diversity', 0):.2f}"
            )
            + ''.join(f" {k} {o[k]:.2f}" for k in LOGGED[-9:] if k in o),
            flush=True,
        )
        return seconds

    def graphs(self, dmd):
        "How many graphs there are; none while one is still to be recorded"
        slots = list(getattr(dmd, '_slots', {}).values())
        return len(slots) if all(o['graph'].graph is not None for o in slots) else -1

    def run(self, texts):
        "All rows, --together at a time: each iteration of each in turn, on its own stream"
        queue,active,total,t0 = list(texts),[],0.,time.time()
        while queue or active:
            while queue and len(active)<self.a.together and time.time()<self.a.end-self.a.least:
                text = queue.pop(0)
                active.append(
                    [
                        text,
                        self.row(text),
                        torch.cuda.Stream() if self.device.type == 'cuda' else None,
                        True,
                    ]
                )
            if not active:
                print('no time left for', *queue, flush=True)
                break
            for o in list(active):
                text,loop,s,alone = o
                try:
                    if s: s.wait_stream(torch.cuda.default_stream())
                    with torch.cuda.stream(s):
                        if alone and s: torch.cuda.synchronize()
                        o[3] = next(loop)
                        while o[3]: o[3] = next(loop)  # a block alone
                except StopIteration as e: total += e.value or 0.
                except Exception: traceback.print_exc()
                else: continue
                if s: torch.cuda.synchronize()
                active.remove(o)
                del loop, o
                gc.collect()
                if s: torch.cuda.empty_cache()
        print(f'{total:.0f} s alone in {time.time()-t0:.0f} s', flush=True)

def collect(to, folder, most=100):
    "Logs and settings of all rows in two files; of a long log every second row, or third ..., and all evaluations"
    facts = {p.stem: json.loads(p.read_text()) for p in sorted(Path(folder).glob('*.json'))}
    logs = {n: read_log(Path(folder)/f'{n}.csv') for n in facts}
    rows = [
        dict(run=n) | o
        for n, log in logs.items()
        for i, o in enumerate(log)
        if 'kid' in o or i % max(-(-len(log) // most), 1) == 0
    ]
    cols = [c for c in ('run', *LOGGED) if any(c in o for o in rows)]
    text = lambda v: (
        ''
        if v is None
        else f'{v:.4g}'
        if isinstance(v, float) and abs(v) < 1000
        else f'{v:.0f}'
        if isinstance(v, float)
        else str(v)
    )
    Path(f'{to}.csv').write_text(
        '\n'.join([','.join(cols), *(','.join(text(o.get(c)) for c in cols) for o in rows)]) + '\n'
    )
    near = lambda o: (
        {k: near(v) for k, v in o.items()}
        if isinstance(o, dict)
        else float(f'{o:.6g}')
        if isinstance(o, float)
        else o
    )
    Path(f'{to}.json').write_text(
        '{\n'
        + ',\n'.join(f'{json.dumps(n)}: {json.dumps(near(o))}' for n, o in facts.items())
        + '\n}\n'
    )

def main():
    ap = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    ap.add_argument('rows', nargs='+')
    ap.add_argument('--collect')
    ap.add_argument('--together', type=int, default=1, help='rows that share the card')
    ap.add_argument('--teacher')
    ap.add_argument('--out', type=Path, default=Path('.'))
    ap.add_argument('--seconds', type=float, default=60)
    ap.add_argument(
        '--stop', type=float, default=1e9, help='seconds after which all rows end where they are'
    )
    ap.add_argument('--least', type=float, default=60, help='no row is begun so shortly before')
    ap.add_argument('--n', type=int, default=2500, help='samples of an evaluation')
    ap.add_argument('--final', type=int, default=5000, help='of the last one')
    ap.add_argument('--evals', type=int, default=4)
    ap.add_argument('--log', type=int, default=50, help='iterations of a block')
    ap.add_argument('--thin', type=int, default=4, help='blocks a row of the log')
    ap.add_argument('--pairs', type=int, default=5000)
    ap.add_argument('--keep', default='')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = ap.parse_args()
    if a.collect: return collect(a.collect, a.rows[0])
    a.out.mkdir(parents=True, exist_ok=True)
    for text in a.rows: parse(text)
    t0 = time.time()
    a.end = t0+a.stop
    bench = Bench(a)
    print(f'set up in {time.time()-t0:.0f} s', flush=True)
    bench.run(a.rows)

if __name__=='__main__': main()
