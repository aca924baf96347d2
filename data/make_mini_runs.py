"""The small SDXL of notebook 39 on a GPU: its teacher, then the rows of the paper's Table 4 and others, sized by time. Logs, sheets and
float16 weights go to OUT as they come, and the last lines say what there is.

    python data/make_mini_runs.py teacher --seconds 250 --batch 128 --limit 560 --out DIR
    python data/make_mini_runs.py sweep --seconds 35 --limit 560 --out DIR     # short runs of `full` under another seed; rows and adapt take the settings with the lowest kid, or without a sweep the package's
    python data/make_mini_runs.py rows --seconds 60 --limit 560 --seeds 0,1 --only full,no_gan,no_matching,no_backsim --out DIR   # seconds a row; again until all are there
    python data/make_mini_runs.py rows --seconds 60 --limit 560 --seeds 0,1 --only one_step_399,one_step_999 --out DIR
    python data/make_mini_runs.py rows --seconds 60 --limit 560 --only shared --out DIR
    python data/make_mini_runs.py adapt --seconds 50 --limit 560 --out DIR     # after the row `shared`: three starts for a teacher fine-tuned on one style
    python data/make_mini_runs.py collect --out DIR     # what notebooks 39 and 39b read, as a few files in data/runs
    for w in teacher sweep rows adapt; do python data/make_mini_runs.py $w --tiny --seconds 3 --out DIR; done   # CPU

Rows need DIR/mini_teacher; --teacher names another folder. --px 64 reads emoji64.npz (data/README.md tells how it is made; DMD2_NB_DATA
may name its folder), --px 32 the bundled set; without it 64 if it is there. A row whose mini_ROW_SEED.json is there is not run again, one
that fails is told and the next begins. The clock of a row counts iterations alone: no judging, and none that records a CUDA graph. Over the last --decay of it all rates fall."""
import time
START = time.time()
import argparse, gc, json, shutil, sys, tempfile, traceback
from collections import deque
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from dmd2_nb.assets import sha256
from dmd2_nb.system.atomic import write_text
from dmd2_nb.cli import save_sheet
from dmd2_nb.core import cond_index, rng
from dmd2_nb.distill import DMD2
from dmd2_nb.features import extract, lite0
from dmd2_nb.graphs import GraphedDMD2
from dmd2_nb.images import emoji
from dmd2_nb.plot import tile
from dmd2_nb.recipes import config_changes, falling_rate
from dmd2_nb.runs import CsvLog, Means, read_log
from dmd2_nb.sampling import few_step_sample
from dmd2_nb.sdxl.adapt import adapt, denoise_only
from dmd2_nb.sdxl.adapter import few_step_timesteps, sdxl_sigmas
from dmd2_nb.sdxl.checkpoints import export_lora, export_unet, load_dmd2_lora
from dmd2_nb.sdxl.judge import PromptJudge
from dmd2_nb.sdxl.mini import (
    MINI_UNET,
    NANO_UNET,
    ONE_STEP,
    STYLES,
    TABLE4,
    MiniData,
    draw_mini,
    emoji_prompts,
    load_mini,
    mini_config,
    mini_lora_config,
    mini_sdxl,
    save_mini,
    take_average,
    train_mini,
)
from dmd2_nb.sdxl.recipe import distill_sdxl, sdxl_dmd2
from dmd2_nb.sdxl.roles import FullCopies, SharedBase

SHEET = [
    'fluent 3d: strawberry',
    'noto: fox',
    'fluent flat: clock',
    'firefox: house',
    'noto: high brightness',
    'fluent 3d: red heart',
    'noto first: grinning cat',
    'fluent emoji: woman',
]
NUMBERS = (
    'kid',
    'kid_se',
    'patch_kid',
    'patch_kid_se',
    'kid_train',
    'kid_train_se',
    'class_right',
    'style_right',
    'diversity',
    'n',
)
LOSSES = (
    'dmd_loss',
    'fake_loss',
    'gan_g_loss',
    'gan_d_loss',
    'd_real',
    'd_fake',
    'x_mean',
    'x_std',
    'grad_dm',
    'grad_gan',
    'grad_cos',
    'norm_g',
    'norm_fake',
)
# shared: two adapters of rank 64 on one base in place of full copies
ROWS = {**TABLE4, **ONE_STEP, 'shared': {}}

# the rates that the sweep's factors are of, with a ratio of 2
FIRST = dict(lr_g=2e-4, lr_fake=4e-4, lr_head=1e-3)
FIRST_LORA = FIRST | dict(lr_g=1e-3, lr_fake=1e-3)
# factor on all rates, and other settings; the guidance is the teacher's best unless named
SWEEP = {
    'rates_1': (1.0, {}),
    'rates_4th': (1 / 4, {}),
    'rates_16th': (1 / 16, {}),
    'rates_4th_ratio_5': (1 / 4, dict(ttur=5)),
    'rates_16th_ratio_5': (1 / 16, dict(ttur=5)),
    'rates_4th_low_noise': (1 / 4, dict(dm_bins=(20, 600))),
    'rates_4th_high_noise': (1 / 4, dict(dm_bins=(200, 980))),
    'rates_16th_low_noise': (1 / 16, dict(dm_bins=(20, 600))),
    'rates_4th_guidance_1': (1 / 4, dict(guidance=1.0)),
    'rates_16th_guidance_1': (1 / 16, dict(guidance=1.0)),
    'rates_4th_guidance_2': (1 / 4, dict(guidance=2.0)),
}


def chosen(job):
    "Name of the sweep's run with the lowest kid, or none"
    found = {
        p.stem.removeprefix('mini_sweep_'): json.loads(p.read_text())['row']
        for p in job.out.glob('mini_sweep_*.json')
    }
    found = {n: r for n, r in found.items() if n in SWEEP}
    if not found: return
    best = min(found, key=lambda n: found[n]['kid'])
    job.say(
        f'sweep: {best} of {len(found)} has the lowest kid,',
        digits({n: r['kid'] for n, r in found.items()}),
    )
    return best

def settle(cfg, name, shared=False):
    "A config with the settings of a run of the sweep; unchanged without one"
    if name is None: return cfg
    factor, more = SWEEP[name]
    return replace(
        cfg,
        **{k: v * factor for k, v in (FIRST_LORA if shared else FIRST).items()},
        **dict(ttur=2) | more,
    )


class Job:
    "Data, judge and what both commands share"
    def __init__(self, a):
        self.a, self.device, self.out = a, a.device, Path(a.out)
        self.out.mkdir(parents=True, exist_ok=True)
        try: data = emoji(a.px or (32 if a.tiny else 64))
        except FileNotFoundError:
            if a.px: raise
            data = emoji(32)
        self.train, self.held = data.holdout()
        if a.what == 'adapt': return
        if a.tiny:
            self.train, self.held = (
                d.subset(torch.arange(0, len(d), k)) for d, k in ((self.train, 80), (self.held, 40))
            )
        sees = lite0(device=self.device, batch=256)
        self.judge = PromptJudge(lambda x: extract(x, sees), self.train, self.held)
        self.prompts = emoji_prompts(self.train)
        self.say(f'{data.name}: {len(self.train)} images, {len(self.held)} held out')

    def say(self, *text): print(f'[{time.time()-START:4.0f} s]', *text, flush=True)
    @property
    def left(self): return self.a.limit-(time.time()-START)  # seconds
    def note(self, name, **what):
        write_text(self.out/f'mini_{name}.json', json.dumps(what, indent=1)+'\n')
    def pick(self, n, seed=5):
        return torch.randperm(len(self.train), generator=rng(seed, 81))[:max(n//2, 8)]
    def look(self, draw, n, seed=5):
        "Two pictures of each of n/2 prompts, judged"
        i = self.pick(n, seed)
        return self.judge(
            draw([self.prompts[j] for j in i.repeat_interleave(2).tolist()]),
            self.train.subset(i),
            2,
        )

    def follow(self, name, loop, columns, look, share, looks, recorded=lambda: 0):
        """Log the means of 60 parts of a run, judge `looks` times with `look(whether it is the
        last)`; `share(step, seconds)` says how much of it is done. `(rows, last judgement)`"""
        log, means, spent, logged, seen, flying = (
            CsvLog(self.out / f'mini_{name}.csv', ('step', 'seconds', *columns, *NUMBERS)),
            Means(),
            0.0,
            0,
            0,
            deque(),
        )
        t = at = time.time()
        known = recorded()
        for step, o in enumerate(loop, 1):
            means.add(o)
            # Python is at most two iterations ahead, or the clock would not know where the GPU is
            if self.device == 'cuda':
                flying.append(torch.cuda.Event())
                flying[-1].record()
                if len(flying) > 2: flying.popleft().synchronize()
            if recorded() != known:
                if self.device == 'cuda': torch.cuda.synchronize()
                known, spent = recorded(), spent+time.time()-at
            at = time.time()
            p = share(step, at-t-spent)
            if p < 1 and int(p*60) <= logged: continue
            row = dict(step=step, **means.take())  # the transfer waits for the GPU
            row['seconds'] = time.time()-t-spent
            p, logged = min(share(step, row['seconds']), 1.), int(p*60)
            if int(p*looks) > seen:
                b = time.time()
                got = look(p >= 1)
                row, seen, spent = row | got, int(p*looks), spent+time.time()-b
                self.say(name, step, digits(got))
            log.add(row)
            at = time.time()
            if p >= 1: break
        self.say(f'{name}: {step/row["seconds"]:.1f} iterations a second')
        return log.rows, got


def digits(row): return {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}

def show(title, rows, columns):
    "A table on stdout"
    print('\n'+title.ljust(24), *(c.rjust(12) for c in columns))
    for n, r in rows.items():
        print(
            n.ljust(24),
            *(
                (
                    ''
                    if r.get(c) is None
                    else f'{r[c]:.4f}'
                    if isinstance(r[c], float)
                    else str(r[c])
                ).rjust(12)
                for c in columns
            ),
            flush=True,
        )

def summary(out):
    "All rows in a folder"
    keep = 'kid', 'kid_se', 'patch_kid', 'class_right', 'style_right', 'diversity'
    file = out/'mini_teacher.json'
    if file.is_file(): show('teacher', json.loads(file.read_text())['rows'], keep)
    found = {p.stem[5:]: json.loads(p.read_text()) for p in sorted(out.glob('mini_*_[0-9].json'))}
    if found:
        show(
            'row',
            {
                n: o['row'] | dict(updates=o['updates'], seconds=o['seconds'])
                for n, o in found.items()
            },
            (*keep, 'updates', 'seconds'),
        )
    for p in sorted(out.glob('mini_*.error.txt')):
        print(f'{p.stem}:', p.read_text().strip().splitlines()[-1])


def speed(loop, n):
    "Seconds a turn of the second half of 2n turns"
    for i, o in enumerate(loop):
        if i == n:
            o['loss'].item()
            t = time.time()
    o['loss'].item()
    return (time.time()-t)/(n-1)


def teacher(a):
    job = Job(a)
    m = mini_sdxl(job.train, NANO_UNET if a.tiny else MINI_UNET).to(a.device)
    x = torch.stack([m.latents(i) for i in (job.train.images, job.train.images.flip(-1))])
    ids, dtype, batch, n = (
        m.text.tokens(job.prompts),
        'bfloat16' if a.graph else 'float32',
        16 if a.tiny else a.batch,
        32 if a.tiny else a.n,
    )
    def loop(steps, rate):
        for o in train_mini(
            m,
            x,
            ids,
            steps,
            batch,
            rate,
            halflife=1000.0,
            dtype=dtype,
            graph=a.graph,
            warmup=10 if a.tiny else 500,
        ):
            loop.ema = o['ema']
            yield dict(loss=o['loss'])
    was, trial = {k: v.clone() for k, v in m.state_dict().items()}, 10 if a.tiny else 150
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
    facts = dict(
        updates=steps,
        batch=batch,
        px=m.px,
        ms=sec * 1e3,
        device=a.card,
        parameters=sum(p.numel() for p in m.unet.parameters()),
    )
    def look(last):
        now = {k: v.clone() for k, v in m.state_dict().items()}
        take_average(m, loop.ema)
        r = job.look(lambda p: draw_mini(m, p, 4 if a.tiny else 20), n//2)
        save_mini(m, job.out/'mini_teacher', **facts, guidance=2.)  # whatever comes next
        m.load_state_dict(now)
        m.train().requires_grad_(True)
        return r
    rows, _ = job.follow(
        'teacher',
        loop(steps, falling_rate(a.lr, steps)),
        ('loss',),
        look,
        lambda step, sec: step / steps,
        2 if a.tiny else 6,
    )
    take_average(m, loop.ema)
    facts['seconds'] = rows[-1]['seconds']
    real = job.train.subset(job.pick(n, 6))
    table = dict(
        real=job.judge(real.images, real), code=job.judge(m.images(m.latents(real.images)), real)
    )
    def row(name, steps, g):
        b = time.time()
        if job.left < 1.2*row.took: return job.say(f'{name}: no time left')
        table[name] = job.look(lambda p: draw_mini(m, p, steps, g), n//2)
        row.took = time.time()-b
        job.say(name, digits(table[name]))
        job.note('teacher', rows=table, guidance=best(), **facts)
    row.took = 0. if a.tiny else 10.
    def best():
        return float(
            min(
                (k for k in table if k.startswith('guidance')),
                key=lambda k: table[k]['kid'],
                default='guidance 2',
            ).split()[1]
        )
    job.note('teacher', rows=table, guidance=best(), **facts)
    for g in (1., 3.) if a.tiny else (2., 1.5, 1., 3., 4.):
        row(f'guidance {g:g}', 4 if a.tiny else 30, g)
    g = best()
    save_mini(m, job.out/'mini_teacher', **facts, guidance=g)
    save_sheet(draw_mini(m, SHEET*2, 4 if a.tiny else 30, g), job.out/'mini_teacher.png')
    for s in () if a.tiny else (10, 20, 50): row(f'{s} steps', s, g)
    summary(job.out)
    job.say(
        f'guidance {g:g}',
        'has the lowest kid'
        if any(k.startswith('guidance') for k in table)
        else 'is a guess: none was measured',
    )


def student(job, name, seed, folder, graph):
    "One row"
    a, (m, guidance), shared = job.a, job.model, name == 'shared'
    pick = name.removeprefix('sweep_') if name.startswith('sweep_') else job.choice
    cfg = replace(
        settle(
            replace(mini_lora_config if shared else mini_config, seed=seed, guidance=guidance),
            pick,
            shared,
        ),
        **ROWS.get(name, {}),
        **(dict(batch=8, warmup_fake=2) if a.tiny else {}),
    )
    cfg = replace(cfg, **config_changes(a.set))
    D = load_mini(folder, a.device).denoiser()
    if shared and a.graph: D.net.unet.to(torch.bfloat16)
    roles = (
        SharedBase(D, rank=4 if a.tiny else 64, checkpointing=False)
        if shared
        else FullCopies(D, checkpointing=False, teacher_dtype=torch.bfloat16 if graph else None)
    )
    dmd = sdxl_dmd2(
        roles,
        cfg,
        job.texts.cond,
        ema_device=None,
        make=GraphedDMD2 if graph and not shared else DMD2,
    )
    passes = roles.record() if shared else None
    def recorded():
        "Calls that were no replays so far"
        if passes: return sum(2*len(p.replays)+len(p.asked) for p in passes.passes.values())
        return sum(
            s['graph'].calls + (s['graph'].graph is not None)
            for s in getattr(dmd, '_slots', {}).values()
        )
    def draw(prompts):
        out = []
        for i in range(0, len(prompts), 256):
            c = m.cond(prompts[i:i+256])
            z = torch.randn(len(c.text), *m.shape, generator=rng(5, i)).to(a.device)
            out.append(
                m.images(few_step_sample(dmd.ema, z, dmd.sigmas, c, rng(6, i, device=a.device)))
            )
        return torch.cat(out)
    full, n = name if name.startswith('sweep_') else f'{name}_{seed}', 32 if a.tiny else a.n
    fall, groups = (
        falling_rate(1.0, a.seconds, a.decay),
        [(g, g['base_lr']) for o in (dmd.opt_g, dmd.opt_fake) for g in o.param_groups],
    )
    def share(step, sec):
        for g, lr in groups: g['base_lr'] = lr*fall(sec)
        return sec/a.seconds
    looks = 1 if name.startswith('sweep_') else 2 if a.tiny else 3
    rows, end = job.follow(
        full,
        distill_sdxl(dmd, job.texts, 10**7, job.pictures),
        LOSSES,
        lambda last: job.look(draw, n if last and looks > 1 else n // 2),
        share,
        looks,
        recorded,
    )
    save_sheet(draw(SHEET*2), job.out/f'mini_{full}.png')
    if seed == 0 and name in a.keep.split(','):
        steps = [int((sdxl_sigmas()-s).abs().argmin()) for s in cfg.levels]
        (export_lora if shared else export_unet)(dmd.ema.net.net, job.out/f'mini_{full}', steps)
    job.note(
        full,
        row=end,
        seconds=rows[-1]['seconds'],
        iterations=dmd.step,
        updates=dmd.g_updates,
        batch=cfg.batch,
        ttur=cfg.ttur,
        lr_g=cfg.lr_g,
        lr_fake=cfg.lr_fake,
        lr_head=cfg.lr_head,
        gan_g=cfg.gan_g,
        dm_bins=list(cfg.dm_bins),
        seed=seed,
        levels=list(cfg.levels),
        guidance=cfg.guidance,
        px=m.px,
        graph=graph,
        device=a.card,
        chosen=pick,
        decay=a.decay,
    )


def rows(a):
    job, folder, graph, took = Job(a), Path(a.teacher or Path(a.out)/'mini_teacher'), a.graph, 0.
    sweep = a.what == 'sweep'
    known = SWEEP if sweep else ROWS
    names = a.only.split(',') if a.only else list(known)
    for name in names:
        if name not in known: raise ValueError(f"'{name}' is none of {', '.join(known)}")
    job.choice = None if sweep else chosen(job)
    m = load_mini(folder, a.device)
    facts = json.loads((folder/'state.json').read_text())['facts']
    if m.px != job.train.shape[-1]:
        raise ValueError(
            f'{folder} draws {m.px} pixels, the images have {job.train.shape[-1]}: pass --px {m.px}'
        )
    job.model = m, facts['guidance']
    conds = m.cond(job.prompts)
    job.texts, job.pictures = MiniData(conds), MiniData(conds, m.latents(job.train.images))
    for seed in (int(s) for s in ('77' if sweep else a.seeds).split(',')):
        for name in names:
            full = name = f'sweep_{name}' if sweep else name
            if not sweep: full = f'{name}_{seed}'
            if (job.out/f'mini_{full}.json').is_file(): continue
            if job.left < a.seconds*1.1+(0 if a.tiny else 8):
                job.say(f'{full}: no time left')
                continue
            b = time.time()
            try:
                try: student(job, name, seed, folder, graph)
                except RuntimeError as e:
                    if not graph or name == 'shared' or 'out of memory' in str(e): raise
                    job.say(f'{full}: no CUDA graphs: {str(e).splitlines()[0]}')
                    graph = False
                    student(job, name, seed, folder, graph)
            except Exception:
                write_text(job.out/f'mini_{full}.error.txt', traceback.format_exc())
                job.say(f'{full} failed: {traceback.format_exc().strip().splitlines()[-1]}')
            took = time.time()-b
            job.say(f'{full} took {took:.0f} s')
            if a.device == 'cuda':
                gc.collect()
                torch.cuda.empty_cache()  # graphs hold their run and the run its graphs
    summary(job.out)
    if sweep: chosen(job)


class Curve:
    "Kernel distance to the style's held-out images while a generator changes"
    def __init__(self, job, name, judge, m, asked, rows):
        self.job, self.name, self.judge, self.m, self.rows = job, name, judge, m, rows
        self.c, self.updates, self.points, self.spent, self.began, self.sheets = (
            m.cond(asked),
            0,
            [],
            0.0,
            time.time(),
            [],
        )
    @property
    def seconds(self): return time.time()-self.began-self.spent  # of training
    def start(self):
        "Training begins now"
        self.began, self.spent = time.time(), 0.
        for p in self.points: p['seconds'] = 0.
    def draw(self, G):
        out, sigmas = [], sdxl_sigmas(few_step_timesteps(4)).float().to(self.job.device)
        for i in range(0, len(self.c.text), 256):
            c = cond_index(self.c, slice(i, i+256))
            z = torch.randn(len(c.text), *self.m.shape, generator=rng(5, i)).to(self.job.device)
            out.append(
                self.m.images(few_step_sample(G, z, sigmas, c, rng(6, i, device=self.job.device)))
            )
        return torch.cat(out)
    def __call__(self, G):
        if self.job.device == 'cuda': torch.cuda.synchronize()
        b, seconds = time.time(), self.seconds
        x = self.draw(G)
        r = self.judge(x, self.rows, 1)
        self.points.append(
            dict(
                updates=self.updates,
                seconds=round(seconds, 2),
                **{k: r[k] for k in ('kid', 'kid_se', 'patch_kid', 'patch_kid_se', 'class_right')},
            )
        )
        self.sheets.append(x[:8])
        self.job.say(self.name, digits(self.points[-1]), f'{self.updates} updates')
        self.spent += time.time()-b
        return Image.fromarray(tile(x[:16], ncols=8).numpy())


def adaptation(a):
    """A teacher fine-tuned until it draws one style whatever style is asked for, and three ways to
    a four-step generator of it"""
    job, folder = Job(a), Path(a.teacher or Path(a.out)/'mini_teacher')
    lora = job.out/'mini_shared_0'/'pytorch_lora_weights.safetensors'
    if not lora.is_file():
        raise FileNotFoundError(f'{lora} is missing: it comes from rows --only shared')
    m = load_mini(folder, a.device)
    guidance = json.loads((folder/'state.json').read_text())['facts']['guidance']
    s = list(job.train.style_names).index(a.style)
    of = lambda d: d.subset((d.cond[:,len(d.class_names):].argmax(1)==s).nonzero()[:,0])
    style, held = of(job.train), of(job.held)
    if a.tiny:
        style, held = (d.subset(torch.arange(0, len(d), k)) for d, k in ((style, 40), (held, 10)))
    sees = lite0(device=a.device, batch=256)
    judge = PromptJudge(lambda x: extract(x, sees), style, held)
    names = [p.split(': ', 1)[1] for p in emoji_prompts(style)]
    job.prompts = [f'{v}: {n}' for v in STYLES.values() for n in names]
    rows = torch.arange(len(style)).repeat(len(STYLES))
    x = torch.stack([m.latents(i) for i in (style.images, style.images.flip(-1))])[
        :, rows.to(a.device)
    ]
    ids = m.text.tokens(job.prompts)
    i = torch.randperm(len(rows), generator=rng(7))[:32 if a.tiny else a.n//2]
    asked, wanted = [job.prompts[j] for j in i.tolist()], style.subset(rows[i])
    job.say(f'{a.style}: {len(style)} images, {len(held)} held out')
    sheets, table = {}, {}
    def many(name):
        y = draw_mini(m, asked, 4 if a.tiny else 30, guidance)
        sheets[name], r = y[:8], judge(y, wanted)
        table[name] = {
            k: r[k] for k in ('kid', 'kid_se', 'patch_kid', 'patch_kid_se', 'class_right')
        }
        job.say(name, digits(r))
    many('teacher before, many steps')
    train = lambda graph: train_mini(
        m,
        x,
        ids,
        10 if a.tiny else a.tune,
        8 if a.tiny else a.batch,
        2e-4,
        warmup=50,
        dtype='bfloat16' if a.graph else 'float32',
        graph=graph,
    )
    try:
        for o in train(a.graph): pass
    except RuntimeError as e:
        if not a.graph: raise
        job.say(f'no CUDA graphs: {str(e).splitlines()[0]}')
        for o in train(False): pass
    take_average(m, o['ema'])
    many('teacher, many steps')
    save_mini(m, job.out/'mini_style', style=a.style)
    conds = m.cond(job.prompts)
    texts, pictures = MiniData(conds), MiniData(conds, x[0])
    cfg = replace(
        settle(replace(mini_lora_config, guidance=guidance), chosen(job), shared=True),
        **(dict(batch=8, warmup_fake=2) if a.tiny else {}),
    )
    cfg = replace(cfg, **config_changes(a.set))
    rank, curves = 4 if a.tiny else 64, {}
    def fresh():
        t = load_mini(job.out/'mini_style', a.device)
        if a.graph: t.unet.to(torch.bfloat16)
        return t.denoiser()
    def run(name, see, seconds):
        if name == 'denoising':
            roles = SharedBase(fresh(), rank=rank, checkpointing=False)
            G = roles.generator
            load_dmd2_lora(lora, G.net)
            roles.record()
            average = roles.average(cfg.ema_halflife)
            see(average)
            see.start()
            at = time.time()
            for see.updates, _ in enumerate(
                denoise_only(G, pictures, 10**7, cfg.batch, cfg.lr_g), 1
            ):
                average.update(G)
                if see.updates % 20 == 0 and a.device == 'cuda': torch.cuda.synchronize()
                if see.seconds > seconds: break
                if time.time()-at > seconds/8:
                    see(average)
                    at = time.time()
            see(average)
        else:
            with tempfile.TemporaryDirectory() as tmp:
                loop = adapt(
                    fresh(),
                    lora if name == 'warm' else None,
                    texts,
                    tmp,
                    pictures,
                    steps=10**7,
                    cfg=cfg,
                    rank=rank,
                    sheet=see,
                    minutes=seconds / 8 / 60,
                    checkpointing=False,
                    ema_device=None,
                    save_every=10**8,
                )
                for k, log in enumerate(loop):
                    if not k: see.start()
                    see.updates += 'dmd_loss' in log
                    if k % 20 == 0 and a.device == 'cuda': torch.cuda.synchronize()
                    if see.seconds > seconds: break
                loop.close()
    for k, name in enumerate(('warm', 'scratch', 'denoising')):
        seconds = min(a.seconds, job.left/(3-k)/1.2-15) if a.limit < 1e9 else a.seconds
        if seconds < a.seconds/4:
            job.say(f'{name}: no time left')
            continue
        b, see = time.time(), Curve(job, name, judge, m, asked, wanted)
        try: run(name, see, seconds)
        except Exception:
            write_text(job.out/f'mini_adapt_{name}.error.txt', traceback.format_exc())
            job.say(f'{name} failed: {traceback.format_exc().strip().splitlines()[-1]}')
        if see.points:
            curves[name] = {k: [p[k] for p in see.points] for k in see.points[0]}
            if name == 'warm': sheets['start, four steps'] = see.sheets[0]
            sheets[f'{name}, four steps'] = see.sheets[-1]
            finish_adapt(
                job,
                table,
                curves,
                sheets,
                dict(
                    style=a.style,
                    guidance=guidance,
                    batch=cfg.batch,
                    lr_g=cfg.lr_g,
                    px=m.px,
                    device=a.card,
                ),
            )
        job.say(f'{name} took {time.time()-b:.0f} s')
        if a.device == 'cuda':
            gc.collect()
            torch.cuda.empty_cache()  # graphs hold their run and the run its graphs
    summary(job.out)


def finish_adapt(job, table, curves, sheets, facts):
    "Table, curves and pictures of what has been run"
    target = None
    if 'warm' in curves:
        target = (curves['warm']['kid'][0]+min(v for c in curves.values() for v in c['kid']))/2
    first = lambda c, k: next((c[k][j] for j, v in enumerate(c['kid']) if v <= target), None)
    rows = dict(table)
    if 'warm' in curves:
        rows['start, four steps'] = {
            k: curves['warm'][k][0]
            for k in ('kid', 'kid_se', 'patch_kid', 'patch_kid_se', 'class_right')
        }
    for n, c in curves.items():
        rows[f'{n}, four steps'] = {
            k: c[k][-1]
            for k in (
                'kid',
                'kid_se',
                'patch_kid',
                'patch_kid_se',
                'class_right',
                'updates',
                'seconds',
            )
        } | (
            {}
            if target is None
            else dict(updates_to_target=first(c, 'updates'), seconds_to_target=first(c, 'seconds'))
        )
    job.note('adapt', table=rows, target=target, curves=curves, rows=list(sheets), **facts)
    Image.fromarray(tile(torch.cat(list(sheets.values())), ncols=8, pad=4).numpy()).save(
        job.out / 'mini_adapt.png'
    )
    show(
        'adapt',
        rows,
        ('kid', 'kid_se', 'patch_kid', 'class_right', 'updates', 'seconds', 'updates_to_target'),
    )


def grain(y):
    """Mean spread of bytes within the upper corners of pictures (n, h, w, 3), which most emoji
    leave white; the median over pictures"""
    return float(np.median([c.std(axis=(0, 1)).mean() for p in y for c in (p[:6,:6], p[:6,-6:])]))

def edges(y):
    "Mean difference of neighbouring pixels of pictures (n, h, w, 3), in bytes"
    return float(np.mean([np.abs(np.diff(y, axis=k)).mean() for k in (1, 2)]))

def cut(im, px, pad=4):
    "Pictures of a sheet, (rows, columns, px, px, 3)"
    x = np.asarray(im).astype(np.float32)
    return np.stack(
        [
            np.stack([x[i : i + px, j : j + px] for j in range(0, x.shape[1] - px + 1, px + pad)])
            for i in range(0, x.shape[0] - px + 1, px + pad)
        ]
    )

def collect(a):
    "The folder's logs as the files that the notebooks read, in data/runs"
    out, to = Path(a.out), Path(a.to)
    to.mkdir(parents=True, exist_ok=True)
    for f in ('mini_teacher.json', 'mini_teacher.csv'):
        if (out/f).is_file(): shutil.copy(out/f, to/f)
    found = {
        p.stem[5:]: json.loads(p.read_text())
        for name in ROWS
        for p in sorted(out.glob(f'mini_{name}_[0-9].json'))
    }
    if found:
        write_text(to/'mini_rows.json', json.dumps(found, indent=1)+'\n')
        (to/'mini_rows.csv').unlink(missing_ok=True)
        log = CsvLog(to/'mini_rows.csv', ('run', 'step', 'seconds', *LOSSES, *NUMBERS))
        for n in found:
            # judged rows and every sixth of the others, four digits
            for j, r in enumerate(read_log(out/f'mini_{n}.csv')):
                if 'kid' in r or j % 6 == 5:
                    log.add(
                        dict(run=n)
                        | {k: v if k in ('step', 'n') else float(f'{v:.4g}') for k, v in r.items()}
                    )
    swept = {p.stem[11:]: json.loads(p.read_text()) for p in sorted(out.glob('mini_sweep_*.json'))}
    if swept: write_text(to/'mini_sweep.json', json.dumps(swept, indent=1)+'\n')
    strips = [n for n in ('teacher', *(f'{k}_0' for k in ROWS)) if (out/f'mini_{n}.png').is_file()]
    if strips:
        shots = [Image.open(out/f'mini_{n}.png').convert('RGB') for n in strips]
        w, h = shots[0].size
        # a sheet is four rows of four; the second pictures of each prompt are left out
        h = (h+4)//4
        page = Image.new('RGB', (2*w+4, h*len(shots)), 'white')
        for j, im in enumerate(shots):
            for k in (0, 1): page.paste(im.crop((0, k*h, w, k*h+h)), (k*(w+4), j*h))
        page.save(to/'mini_strips.webp', quality=80, method=6)
        px = json.loads((out/'mini_teacher.json').read_text())['px']
        rows = [cut(im, px)[:2].reshape(-1, px, px, 3) for im in shots]
        write_text(
            to / 'mini_strips.json',
            json.dumps(
                dict(
                    rows=strips,
                    prompts=SHEET,
                    grain=[grain(y) for y in rows],
                    edges=[edges(y) for y in rows],
                )
            )
            + '\n',
        )
    if (out/'mini_adapt.json').is_file():
        o, im = (
            json.loads((out / 'mini_adapt.json').read_text()),
            Image.open(out / 'mini_adapt.png').convert('RGB'),
        )
        im.save(to/'mini_adapt.webp', quality=80, method=6)
        write_text(
            to / 'mini_adapt.json',
            json.dumps(o | dict(edges=[edges(y) for y in cut(im, o['px'])]), indent=1) + '\n',
        )
    files = sorted(to.glob('mini_*'))
    for f in files: print(f'{f.name:<20}{f.stat().st_size:>10,} bytes  sha256 {sha256(f)[:12]}')
    print(f'{"together":<20}{sum(f.stat().st_size for f in files):>10,} bytes')


def main():
    ap = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    ap.add_argument('what', choices=['teacher', 'sweep', 'rows', 'adapt', 'collect'])
    ap.add_argument('--out', default='.')
    ap.add_argument('--teacher', help='folder of the teacher')
    ap.add_argument(
        '--seconds', type=float, default=450, help='of training: the teacher, or each row'
    )
    ap.add_argument(
        '--limit', type=float, default=1e9, help='seconds from the start within which to end'
    )
    ap.add_argument('--seeds', default='0')
    ap.add_argument('--only', default='', help='rows, with commas between; all when absent')
    ap.add_argument('--n', type=int, default=2000, help='pictures of an evaluation')
    ap.add_argument('--px', type=int, choices=(32, 64))
    ap.add_argument('--batch', type=int, default=256)
    ap.add_argument('--lr', type=float, default=1e-3, help='of the teacher')
    ap.add_argument(
        '--decay', type=float, default=0.5, help='share of a row over which its rates fall'
    )
    ap.add_argument('--set', action='append', help='field=value of the rows\' config')
    ap.add_argument('--style', default='fxemoji', help='of the fine-tuned teacher')
    ap.add_argument('--tune', type=int, default=1500, help='updates of its fine-tuning')
    ap.add_argument('--keep', default='full,shared', help='rows whose weights of seed 0 are kept')
    ap.add_argument(
        '--to', default=str(Path(__file__).resolve().parent / 'runs'), help='folder for `collect`'
    )
    ap.add_argument('--tiny', action='store_true', help='a nano network and few images')
    ap.add_argument('--eager', action='store_true', help='no CUDA graphs, float32')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = ap.parse_args()
    a.graph, a.card = (
        a.device == 'cuda' and not a.eager,
        torch.cuda.get_device_name() if a.device == 'cuda' else a.device,
    )
    if a.device == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    dict(teacher=teacher, rows=rows, sweep=rows, adapt=adaptation, collect=collect)[a.what](a)


if __name__ == '__main__': main()
