"""The small SDXL of notebook 39 on a GPU: its teacher, then the rows of the paper's Table 4 and others, sized by time. Logs, sheets and
float16 weights go to OUT as they come.

    python data/make_mini_runs.py teacher --seconds 450 --out DIR
    python data/make_mini_runs.py rows --seconds 60 --seeds 0,1 --only full,no_gan,no_matching,no_backsim --out DIR   # seconds a row
    python data/make_mini_runs.py rows --seconds 60 --only one_step_399,one_step_999,shared --out DIR
    python data/make_mini_runs.py teacher --tiny --seconds 5 --out DIR && python data/make_mini_runs.py rows --tiny --seconds 3 --out DIR   # CPU
    python data/make_mini_runs.py adapt --seconds 60 --out DIR     # after the row `shared`: three starts for a teacher fine-tuned on one style

Rows need DIR/mini_teacher; --teacher names another folder. --px 64 reads emoji64.npz (data/README.md tells how it is made; DMD2_NB_DATA
may name its folder), --px 32 the bundled set; without it 64 if it is there. A row whose mini_ROW_SEED.json is there is not run again."""
import argparse, json, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from dmd2_nb.checkpoint import write_text
from dmd2_nb.cli import save_sheet
from dmd2_nb.core import cond_index, rng
from dmd2_nb.distill import DMD2
from dmd2_nb.features import extract, lite0
from dmd2_nb.graphs import GraphedDMD2
from dmd2_nb.images import emoji
from dmd2_nb.plot import tile
from dmd2_nb.recipes import config_changes, falling_rate
from dmd2_nb.runs import CsvLog, Means
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.sdxl.adapt import adapt, denoise_only
from dmd2_nb.sdxl.adapter import few_step_timesteps, sdxl_sigmas
from dmd2_nb.sdxl.checkpoints import export_lora, export_unet, load_dmd2_lora
from dmd2_nb.sdxl.judge import PromptJudge
from dmd2_nb.sdxl.mini import (MINI_UNET, NANO_UNET, ONE_STEP, STYLES, TABLE4, MiniData, draw_mini, emoji_prompts, load_mini, mini_config, mini_sdxl, save_mini,
                               take_average, train_mini)
from dmd2_nb.sdxl.recipe import distill_sdxl, sdxl_dmd2
from dmd2_nb.sdxl.roles import FullCopies, SharedBase

SHEET = ['fluent 3d: strawberry', 'noto: fox', 'fluent flat: clock', 'firefox: house', 'noto: high brightness', 'fluent 3d: red heart', 'noto first: grinning cat', 'fluent emoji: woman']
NUMBERS = 'kid', 'kid_se', 'patch_kid', 'patch_kid_se', 'kid_train', 'kid_train_se', 'class_right', 'style_right', 'diversity', 'n'
LOSSES = 'dmd_loss', 'fake_loss', 'gan_g_loss', 'gan_d_loss', 'd_real', 'd_fake', 'x_mean', 'x_std', 'grad_dm', 'grad_gan', 'grad_cos', 'norm_g', 'norm_fake'
ROWS = {**TABLE4, **ONE_STEP, 'shared': {}}  # shared: two adapters of rank 64 on one base in place of full copies


class Job:
    "Data, judge and what both commands share"
    def __init__(self, a):
        self.a, self.device, self.out, self.start = a, a.device, Path(a.out), time.time()
        self.out.mkdir(parents=True, exist_ok=True)
        try: data = emoji(a.px or (32 if a.tiny else 64))
        except FileNotFoundError:
            if a.px: raise
            data = emoji(32)
        self.train, self.held = data.holdout()
        if a.what == 'adapt': return
        if a.tiny: self.train, self.held = (d.subset(torch.arange(0, len(d), k)) for d, k in ((self.train, 80), (self.held, 40)))
        sees = lite0(device=self.device, batch=256)
        self.judge = PromptJudge(lambda x: extract(x, sees), self.train, self.held)
        self.prompts = emoji_prompts(self.train)
        self.say(f'{data.name}: {len(self.train)} images, {len(self.held)} held out')

    def say(self, *text): print(f'[{time.time()-self.start:4.0f} s]', *text, flush=True)
    def note(self, name, **what): write_text(self.out/f'mini_{name}.json', json.dumps(what, indent=1)+'\n')
    def pick(self, n, seed=5): return torch.randperm(len(self.train), generator=rng(seed, 81))[:max(n//2, 8)]
    def look(self, draw, n, seed=5):
        "Two pictures of each of n/2 prompts, judged"
        i = self.pick(n, seed)
        return self.judge(draw([self.prompts[j] for j in i.repeat_interleave(2).tolist()]), self.train.subset(i), 2)

    def follow(self, name, loop, columns, look, share, looks):
        "Log the means of 200 parts of a run, judge `looks` times; `share(step, seconds)` says how much of it is done. Judging takes no time of it"
        log, means, t, spent, logged, seen = CsvLog(self.out/f'mini_{name}.csv', ('step', 'seconds', *columns, *NUMBERS)), Means(), time.time(), 0., 0, 0
        for step, o in enumerate(loop, 1):
            means.add(o)
            p = share(step, time.time()-t-spent)
            if p < 1 and int(p*200) <= logged: continue
            row = dict(step=step, **means.take())  # the transfer waits for the GPU
            row['seconds'] = time.time()-t-spent
            p, logged = min(share(step, row['seconds']), 1.), int(p*200)
            if int(p*looks) > seen:
                b = time.time()
                row |= look()
                spent, seen = spent+time.time()-b, int(p*looks)
                self.say(name, step, {k: round(row[k], 4) for k in ('kid', 'kid_train', 'patch_kid', 'class_right', 'style_right', 'diversity')})
            log.add(row)
            if p >= 1: break
        return log.rows


def speed(loop, n):
    "Seconds a turn of the second half of 2n turns"
    for i, o in enumerate(loop):
        if i == n: o['loss'].item(); t = time.time()
    o['loss'].item()
    return (time.time()-t)/(n-1)


def teacher(a):
    job = Job(a)
    m = mini_sdxl(job.train, NANO_UNET if a.tiny else MINI_UNET).to(a.device)
    x = torch.stack([m.latents(i) for i in (job.train.images, job.train.images.flip(-1))])
    ids, dtype, batch, n = m.text.tokens(job.prompts), 'bfloat16' if a.graph else 'float32', 16 if a.tiny else a.batch, 32 if a.tiny else a.n
    def loop(steps, rate):
        for o in train_mini(m, x, ids, steps, batch, rate, halflife=1000., dtype=dtype, graph=a.graph, warmup=10 if a.tiny else 500):
            loop.ema = o['ema']
            yield dict(loss=o['loss'])
    was, trial = {k: v.clone() for k, v in m.state_dict().items()}, 10 if a.tiny else 200
    try: sec = speed(loop(2*trial, 1e-4), trial)
    except RuntimeError as e:
        if not a.graph: raise
        job.say(f'no CUDA graphs: {str(e).splitlines()[0]}')
        a.graph = False
        m.load_state_dict(was)
        sec = speed(loop(2*trial, 1e-4), trial)
    m.load_state_dict(was)
    steps = max(int(a.seconds/sec), 20)
    job.say(f'{sec*1e3:.2f} ms an update of {batch}, {steps} updates')
    def look():
        now = {k: v.clone() for k, v in m.state_dict().items()}
        take_average(m, loop.ema)
        r = job.look(lambda p: draw_mini(m, p, 4 if a.tiny else 20), n//2)
        m.load_state_dict(now)
        m.train().requires_grad_(True)
        return r
    rows = job.follow('teacher', loop(steps, falling_rate(a.lr, steps)), ('loss',), look, lambda step, sec: step/steps, 2 if a.tiny else 8)
    take_average(m, loop.ema)
    real = job.train.subset(job.pick(n, 6))
    table = dict(real=job.judge(real.images, real), code=job.judge(m.images(m.latents(real.images)), real))
    for g in (1., 3.) if a.tiny else (1., 1.5, 2., 3., 4.):
        table[f'guidance {g:g}'] = job.look(lambda p: draw_mini(m, p, 4 if a.tiny else 30, g), n)
        job.say(f'guidance {g:g}', {k: round(v, 4) for k, v in table[f'guidance {g:g}'].items() if v is not None})
    g = float(min((k for k in table if k.startswith('guidance')), key=lambda k: table[k]['kid']).split()[1])
    for s in () if a.tiny else (10, 20, 50): table[f'{s} steps'] = job.look(lambda p: draw_mini(m, p, s, g), n)
    facts = dict(seconds=rows[-1]['seconds'], updates=steps, batch=batch, px=m.px, ms=sec*1e3, device=a.card, guidance=g)
    job.note('teacher', rows=table, **facts)
    save_mini(m, job.out/'mini_teacher', **facts)
    save_sheet(draw_mini(m, SHEET*2, 4 if a.tiny else 30, g), job.out/'mini_teacher.png')
    job.say(f'guidance {g:g} has the lowest kid')


def student(job, name, seed, folder):
    "One row"
    a, (m, guidance) = job.a, job.model
    cfg = replace(mini_config, **ROWS[name], seed=seed, guidance=guidance, **(dict(batch=8, ttur=2, warmup_fake=2) if a.tiny else {}))
    cfg = replace(cfg, **config_changes(a.set))
    m = load_mini(folder, a.device)
    D, shared = m.denoiser(), name == 'shared'
    if shared and a.graph: m.unet.to(torch.bfloat16)
    roles = SharedBase(D, rank=4 if a.tiny else 64, checkpointing=False) if shared else FullCopies(D, checkpointing=False)
    dmd = sdxl_dmd2(roles, cfg, job.texts.cond, ema_device=None, make=GraphedDMD2 if a.graph and not shared else DMD2)
    if shared: roles.record()
    def draw(prompts):
        out = []
        for i in range(0, len(prompts), 256):
            c = job.model[0].cond(prompts[i:i+256])
            z = torch.randn(len(c.text), *m.shape, generator=rng(5, i)).to(a.device)
            out.append(job.model[0].images(few_step_sample(dmd.ema, z, dmd.sigmas, c, rng(6, i, device=a.device))))
        return torch.cat(out)
    full = f'{name}_{seed}'
    rows = job.follow(full, distill_sdxl(dmd, job.texts, 10**7, job.pictures), LOSSES, lambda: job.look(draw, (32 if a.tiny else a.n)//2), lambda step, sec: sec/a.seconds, 2 if a.tiny else 3)
    end = job.look(draw, 32 if a.tiny else a.n)
    job.say(full, dmd.step, 'iterations', {k: round(v, 4) for k, v in end.items() if v is not None})
    job.note(full, row=end, seconds=rows[-1]['seconds'], iterations=dmd.step, updates=dmd.g_updates, batch=cfg.batch, seed=seed, levels=list(cfg.levels), guidance=guidance, px=m.px,
             graph=a.graph, device=a.card)
    save_sheet(draw(SHEET*2), job.out/f'mini_{full}.png')
    if seed == 0:
        steps = [int((sdxl_sigmas()-s).abs().argmin()) for s in cfg.levels]
        (export_lora if shared else export_unet)(dmd.ema.net.net, job.out/f'mini_{full}', steps)


def rows(a):
    job, folder = Job(a), Path(a.teacher or Path(a.out)/'mini_teacher')
    m = load_mini(folder, a.device)
    facts = json.loads((folder/'state.json').read_text())['facts']
    if m.px != job.train.shape[-1]: raise ValueError(f'{folder} draws {m.px} pixels, the images have {job.train.shape[-1]}: pass --px {m.px}')
    job.model = m, facts['guidance']
    conds = m.cond(job.prompts)
    job.texts, job.pictures = MiniData(conds), MiniData(conds, m.latents(job.train.images))
    for seed in (int(s) for s in a.seeds.split(',')):
        for name in a.only.split(',') if a.only else ROWS:
            if name not in ROWS: raise ValueError(f"'{name}' is none of {', '.join(ROWS)}")
            if (job.out/f'mini_{name}_{seed}.json').is_file(): continue
            if time.time()-job.start > a.limit-a.seconds: job.say(f'{name} {seed}: no time left'); continue
            try: student(job, name, seed, folder)
            except RuntimeError as e:
                if not a.graph or name == 'shared': raise
                job.say(f'{name}: no CUDA graphs: {str(e).splitlines()[0]}')
                a.graph = False
                student(job, name, seed, folder)
            if a.device == 'cuda': torch.cuda.empty_cache()


class Curve:
    "Kernel distance to the style's held-out images while a generator changes"
    def __init__(self, job, m, i, rows, n):
        self.job, self.m, self.rows, self.updates, self.points, self.spent = job, m, rows, 0, [], 0.
        self.c = m.cond([job.prompts[j] for j in i.tolist()])
        self.n = n
    def draw(self, G):
        out, sigmas, a = [], sdxl_sigmas(few_step_timesteps(4)).float().to(self.job.device), self.job.a
        for i in range(0, len(self.c.text), 256):
            c = cond_index(self.c, slice(i, i+256))
            z = torch.randn(len(c.text), *self.m.shape, generator=rng(5, i)).to(a.device)
            out.append(self.m.images(few_step_sample(G, z, sigmas, c, rng(6, i, device=a.device))))
        return torch.cat(out)
    def __call__(self, G):
        b = time.time()
        x = self.draw(G)
        r = self.judge(x, self.rows, 1)
        self.points.append(dict(updates=self.updates, **{k: r[k] for k in ('kid', 'patch_kid', 'class_right')}))
        self.job.say(self.name, self.points[-1])
        self.spent += time.time()-b
        return Image.fromarray(tile(x[:16], ncols=8).numpy())


def adaptation(a):
    "A teacher fine-tuned until it draws one style whatever style is asked for, and three ways to a four-step generator of it"
    job, folder = Job(a), Path(a.teacher or Path(a.out)/'mini_teacher')
    m = load_mini(folder, a.device)
    guidance = json.loads((folder/'state.json').read_text())['facts']['guidance']
    s = list(job.train.style_names).index(a.style)
    of = lambda d: d.subset((d.cond[:,len(d.class_names):].argmax(1)==s).nonzero()[:,0])
    style, held = of(job.train), of(job.held)
    if a.tiny: style, held = (d.subset(torch.arange(0, len(d), k)) for d, k in ((style, 40), (held, 10)))
    sees = lite0(device=a.device, batch=256)
    judge = PromptJudge(lambda x: extract(x, sees), style, held)
    names = [p.split(': ', 1)[1] for p in emoji_prompts(style)]
    job.prompts = [f'{v}: {n}' for v in STYLES.values() for n in names]
    rows = torch.arange(len(style)).repeat(len(STYLES))
    x = torch.stack([m.latents(i) for i in (style.images, style.images.flip(-1))])[:,rows.to(a.device)]
    ids = m.text.tokens(job.prompts)
    i = torch.randperm(len(rows), generator=rng(7))[:32 if a.tiny else a.n//2]
    asked, wanted = [job.prompts[j] for j in i.tolist()], style.subset(rows[i])
    many = lambda: judge(draw_mini(m, asked, 4 if a.tiny else 30, guidance), wanted)
    table = {'teacher before fine-tuning, many steps': many()}
    for o in train_mini(m, x, ids, 10 if a.tiny else a.tune, 8 if a.tiny else 256, 2e-4, warmup=50, dtype='bfloat16' if a.graph else 'float32', graph=a.graph): pass
    take_average(m, o['ema'])
    table['teacher, many steps'] = many()
    job.say('teacher', {n: {k: round(r[k], 4) for k in ('kid', 'patch_kid', 'class_right')} for n, r in table.items()})
    save_mini(m, job.out/'mini_style', style=a.style)
    conds = m.cond(job.prompts)
    texts, pictures = MiniData(conds), MiniData(conds, x[0])
    lora = job.out/'mini_shared_0'/'pytorch_lora_weights.safetensors'
    cfg = replace(mini_config, guidance=guidance, warmup_fake=2 if a.tiny else 200, **(dict(batch=8, ttur=2) if a.tiny else {}))
    cfg = replace(cfg, **config_changes(a.set))
    curves = {}
    def fresh():
        t = load_mini(job.out/'mini_style', a.device)
        if a.graph: t.unet.to(torch.bfloat16)
        return t.denoiser()
    for name, init in dict(warm=lora, scratch=None, denoising=lora).items():
        see = curves[name] = Curve(job, m, i, wanted, a.n)
        see.judge, see.name = judge, name
        t = time.time()
        if name == 'denoising':
            G = load_dmd2_lora(lora, (roles := SharedBase(fresh(), rank=4 if a.tiny else 64, checkpointing=False)).generator.net) and roles.generator
            see(G)
            at = time.time()
            for see.updates, _ in enumerate(denoise_only(G, pictures, 10**7, cfg.batch, cfg.lr_g), 1):
                if time.time()-at > a.seconds/8: see(G); at = time.time()
                if time.time()-t-see.spent > a.seconds: break
            see(G)
        else:
            with tempfile.TemporaryDirectory() as tmp:
                for log in adapt(fresh(), init, texts, tmp, pictures, 10**7, cfg, rank=4 if a.tiny else 64, sheet=see, minutes=a.seconds/8/60, checkpointing=False, ema_device=None, save_every=10**8):
                    see.updates += 'dmd_loss' in log
                    if time.time()-t-see.spent > a.seconds: break
        if a.device == 'cuda': torch.cuda.empty_cache()
    kids = [p['kid'] for c in curves.values() for p in c.points]
    target = (curves['warm'].points[0]['kid']+min(kids))/2
    first = lambda c: next((p['updates'] for p in c.points if p['kid'] <= target), None)
    table |= {f'{n}, four steps': c.points[-1] | {f'updates to kid {target:.3f}': first(c)} for n, c in curves.items()}
    for r in table.values(): r.pop('diversity', None)
    keep = 'kid', 'patch_kid', 'class_right', 'updates', f'updates to kid {target:.3f}'
    job.note('adapt', table={n: {k: r[k] for k in keep if r.get(k) is not None} for n, r in table.items()}, target=target, seconds=a.seconds, batch=cfg.batch, style=a.style, device=a.card,
             curves={n: {k: [p[k] for p in c.points] for k in ('updates', 'kid', 'patch_kid', 'class_right')} for n, c in curves.items()})


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument('what', choices=['teacher', 'rows', 'adapt']); ap.add_argument('--out', default='.'); ap.add_argument('--teacher', help='folder of the teacher')
    ap.add_argument('--seconds', type=float, default=450, help='of training: the teacher, or each row'); ap.add_argument('--limit', type=float, default=1e9, help='seconds after which no row is begun')
    ap.add_argument('--seeds', default='0'); ap.add_argument('--only', default='', help='rows, with commas between; all when absent')
    ap.add_argument('--n', type=int, default=2000, help='pictures of an evaluation'); ap.add_argument('--px', type=int, choices=(32, 64)); ap.add_argument('--batch', type=int, default=256)
    ap.add_argument('--lr', type=float, default=1e-3, help='of the teacher'); ap.add_argument('--set', action='append', help='field=value of the rows\' config')
    ap.add_argument('--style', default='fxemoji', help='of the fine-tuned teacher'); ap.add_argument('--tune', type=int, default=1500, help='updates of its fine-tuning')
    ap.add_argument('--tiny', action='store_true', help='a nano network and few images'); ap.add_argument('--eager', action='store_true', help='no CUDA graphs, float32')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = ap.parse_args()
    a.graph, a.card = a.device == 'cuda' and not a.eager, torch.cuda.get_device_name() if a.device == 'cuda' else a.device
    if a.device == 'cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dict(teacher=teacher, rows=rows, adapt=adaptation)[a.what](a)


if __name__ == '__main__': main()
