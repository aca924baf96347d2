"""Runs on emoji32 or emoji64 sized by time: what `dmd2_train_teacher emoji32 --graph` and `dmd2_distill emoji32 --graph` do, with as many
updates as the seconds allow. Logs, pictures and float16 weights go to OUT.

    python data/make_emoji_runs.py teacher --seconds 450 --out DIR [--begin FILE.safetensors --name emoji32_teacher_2 --teacher-set lr=1e-4 ...]
    python data/make_emoji_runs.py distill --seconds 400 --teacher DIR/emoji32_teacher.safetensors --out DIR --name one
        [--set gan_g=0 ...] [--levels 80,5,1.2,0.35] [--recipe emoji64]
    python data/make_emoji_runs.py join one.csv two.csv --out DIR"""
import argparse, csv, json, shutil, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dmd2_nb.cli import PICTURES
from dmd2_nb.jobs import distill_job, train_teacher_job
from dmd2_nb.recipes import config_changes, config_levels, recipe
from dmd2_nb.runs import read_log

def per_step(job, steps):
    "Seconds of one update, from a short run that is thrown away"
    with tempfile.TemporaryDirectory() as tmp:
        run = job(tmp, steps)
        a,b = [o for o in read_log(run/'log.csv')][-2:]
        return (b['seconds']-a['seconds'])/(b['step']-a['step'])

def keep(run, out, name, weights):
    for f in ('log.csv', 'metrics.json', 'samples.png', 'curves.png'):
        shutil.copy(run/f, out/f'{name}{"_"+f if "log" not in f else ".csv"}')
    shutil.copy(run/weights, out/f'{name}.safetensors')

def quiet(*text): print(*text, flush=True)

def teacher(a):
    r,out = recipe(a.recipe),Path(a.out)
    short = replace(r, teacher_every=dict(log=max(a.probe//4, 1), show=0, save=0, eval=0))
    kw = dict(device=a.device, graph=a.graph, begin=a.begin) | {
        k: float(v) for k, v in (o.split('=') for o in a.teacher_set or ())
    }
    t = time.time()
    sec = per_step(
        lambda tmp, n: train_teacher_job(short, tmp, 'probe', n_eval=8, stop=n, say=None, **kw),
        a.probe,
    )
    steps = max(int((a.seconds-(time.time()-t)-a.reserve)/sec), 20)
    print(
        f'{sec * 1e3:.2f} ms an update of {r.teacher["batch"]}, {r.teacher["batch"] / sec:.0f} '
        f'images/s; {steps} updates',
        flush=True,
    )
    every = dict(log=max(steps//200, 1), show=0, save=0, eval=max(steps//a.evals, 1))
    run = train_teacher_job(
        replace(r, teacher_every=every, n_watch=a.watch),
        tempfile.mkdtemp(),
        f'{a.recipe}-teacher',
        n_eval=a.n,
        pictures=PICTURES,
        say=quiet,
        steps=steps,
        **kw,
    )
    print(
        [
            (int(o['step']), round(o['kid'], 4), round(o['kid_held'], 4))
            for o in read_log(run / 'log.csv')
            if 'kid' in o
        ],
        flush=True,
    )
    print(json.loads((run/'metrics.json').read_text())['rows']['teacher'], flush=True)
    keep(run, out, a.name or f'{a.recipe}_teacher', 'teacher.safetensors')

def join(a):
    "Logs of trainings that went on from one another, as one: updates and seconds of all"
    rows,step,sec = [],0,0.
    for part,f in enumerate(a.logs, 1):
        log = read_log(f)
        rows += [
            dict(part=part)
            | o
            | dict(step=int(step + o['step']), seconds=round(sec + o['seconds'], 2))
            for o in log
        ]
        step,sec = step+log[-1]['step'],sec+log[-1]['seconds']
    cols = list(dict.fromkeys(k for o in rows for k in o))
    with open(Path(a.out)/'emoji32_teacher.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, cols, lineterminator='\n')
        w.writeheader()
        w.writerows(rows)

def distill(a):
    r,out = recipe(a.recipe),Path(a.out)
    changes = config_changes(a.set)
    if a.levels: changes['levels'] = config_levels(a.levels)
    short = replace(r, every=dict(log=20, show=0, save=0, eval=0))
    t = time.time()
    sec = per_step(
        lambda tmp, n: distill_job(
            short,
            a.teacher,
            tmp,
            'probe',
            device=a.device,
            graph=a.graph,
            iters=10**6,
            n_eval=8,
            stop=n,
            say=None,
            **(changes | dict(warmup_fake=20, gan_start=0)),
        ),
        a.probe,
    )
    iters = max(int((a.seconds-(time.time()-t)-a.reserve)/sec), 20)
    print(f'{a.name}: {sec*1e3:.2f} ms an iteration, {iters} iterations', flush=True)
    every = dict(log=max(iters//200, 1), show=0, save=0, eval=max(iters//10, 1))
    run = distill_job(
        replace(r, every=every),
        a.teacher,
        tempfile.mkdtemp(),
        a.name,
        device=a.device,
        graph=a.graph,
        iters=iters,
        n_eval=a.n,
        pictures=PICTURES,
        say=quiet,
        **changes,
    )
    print(
        [
            (int(o['step']), round(o['kid'], 4), round(o['kid_held'], 4), round(o['raw_kid'], 4))
            for o in read_log(run / 'log.csv')
            if 'kid' in o
        ],
        flush=True,
    )
    print(
        {
            k: {n: round(x, 4) for n, x in v.items()}
            for k, v in json.loads((run / 'metrics.json').read_text())['rows'].items()
        },
        flush=True,
    )
    keep(run, out, f'{a.recipe}_{a.name}', 'generator.safetensors')

def main():
    ap = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    ap.add_argument('what', choices=['teacher', 'distill', 'join'])
    ap.add_argument('logs', nargs='*', help='of join')
    ap.add_argument('--recipe', default='emoji32')
    ap.add_argument('--seconds', type=float, default=450)
    ap.add_argument('--out', default='.')
    ap.add_argument('--reserve', type=float, default=60., help='seconds kept for evaluation')
    ap.add_argument('--n', type=int, default=10_000, help='samples of the final evaluation')
    ap.add_argument('--probe', type=int, default=400, help='updates of the short run')
    ap.add_argument('--teacher')
    ap.add_argument('--name')
    ap.add_argument('--begin', help='weights that the training of the teacher goes on from')
    ap.add_argument('--teacher-set', action='append', help='lr, decay ... of the teacher')
    ap.add_argument('--evals', type=int, default=9, help='evaluations on the way')
    ap.add_argument('--watch', type=int, default=2000, help='samples of each')
    ap.add_argument('--set', action='append')
    ap.add_argument('--levels')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = ap.parse_args()
    a.graph = a.device=='cuda'
    if a.what=='join': join(a)
    else: dict(teacher=teacher, distill=distill)[a.what](a)

if __name__=='__main__': main()
