"""Teacher and students on emoji32 side by side: kernel and Fréchet distance to training and held-out images on 10,000 samples of three
seeds, precision, recall, diversity, share of near copies, speed; before that the teacher's samplers on another seed.

    python data/make_emoji_table.py --teacher emoji32_teacher.safetensors --out DIR one=emoji32_1step.safetensors four=emoji32_4step.safetensors

`--only students` leaves the teacher's part out, `--only teacher` the students', `--only speed` all but how long sampling takes,
`--only rows` all but the picture; `--join FILE ...` puts tables of such parts into one. Speeds stand under the device's name.
Writes DIR/emoji32_table.json as it goes, and DIR/emoji32_rows.png: the same eight noises down the rows (teacher at 1, 4 and 18 steps, then
the students)."""
import argparse, json, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from einops import rearrange
from PIL import Image

from dmd2_nb.system.atomic import write_text
from dmd2_nb.core import cond_to, rng
from dmd2_nb.evaluate import draw, eval_conds, student_sampler, teacher_sampler
from dmd2_nb.fid import precision_recall
from dmd2_nb.jobs import open_data, open_judge, open_teacher
from dmd2_nb.recipes import recipe
from dmd2_nb.weights import load_denoiser
from emoji_rows import spread

FIRST = 100  # seed of the first sheet; no choice was made on it and those after it
CHURN = dict(S_min=0.05, S_max=50., S_noise=1.003)

def near(x, real, rmse=20, block=1000):
    "Share of images with another within so many grey levels"
    b,hit = real.flatten(1).float(),[]
    for a in x.to(b.device).flatten(1).float().split(block):
        hit.append(torch.cdist(a, b).amin(1)<rmse*b.shape[1]**0.5)
    return torch.cat(hit).float().mean().item()

class Table:
    def __init__(self, a):
        self.a,self.device,r = a,torch.device(a.device),recipe('emoji32')
        self.data,self.held = open_data(r)
        self.T,_ = open_teacher(r, self.data, a.teacher, self.device)
        self.judge = open_judge(r, self.data, self.held, self.device)
        self.refs = self.judge.refs
        self.groups = self.data.cond.unique(dim=0).repeat_interleave(4, 0)
        self.images = self.data.images.to(self.device)
        self.res = dict(
            n=a.n,
            seeds=a.seeds,
            sampler_seed=5,
            sampler_n=a.sweep,
            card=torch.cuda.get_device_name() if self.device.type == 'cuda' else 'cpu',
            teacher=[],
            models={},
        )
    def save(self): write_text(self.a.out/'emoji32_table.json', json.dumps(self.res, indent=1)+'\n')

    def real(self):
        half = self.judge.floor(len(self.data)//2)
        self.res['real'] = dict(
            floor=half,
            held_near=near(self.held.images, self.images),
            held_kid=self.judge(self.held.images, fast=True)['kid'],
            held_pr=precision_recall(self.refs['held'], next(iter(self.refs.values())))
            if 'held' in self.refs
            else None,
            diversity=self.spread(None),
        )
        self.save()

    def spread(self, sampler):
        "Mean distance between features of 4 images of the same class and style"
        if sampler is None:
            x = torch.cat(
                [
                    self.data.images[((self.data.cond == c).all(1)).nonzero()[:, 0]][:4]
                    for c in self.data.cond.unique(dim=0)
                    if (self.data.cond == c).all(1).sum() >= 4
                ]
            )
        else: x = draw(sampler, self.data.shape, self.groups, 4, device=self.device)
        return spread(self.judge.extract, x)

    def samplers(self):
        "On a seed that no table uses, in bfloat16"
        for steps, churn in [(s, 0.0) for s in (1, 2, 3, 4, 6, 9, 12, 18, 32, 64)] + [
            (18, 10.0),
            (32, 10.0),
            (32, 20.0),
            (32, 40.0),
            (64, 40.0),
        ]:
            s = teacher_sampler(self.T, steps, **(dict(CHURN, S_churn=churn) if churn else {}))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type=='cuda'):
                x = draw(
                    s,
                    self.data.shape,
                    eval_conds(self.data, self.a.sweep, 5),
                    5,
                    device=self.device,
                )
            self.res['teacher'].append(
                dict(steps=steps, churn=churn, nfe=2 * steps - 1, seed=5) | self.judge(x, fast=True)
            )
            print(
                {
                    k: round(v, 4)
                    for k, v in self.res['teacher'][-1].items()
                    if k in ('steps', 'churn', 'kid', 'kid_held')
                },
                flush=True,
            )
            self.save()
        best = lambda o: min(
            (r for r in self.res['teacher'] if bool(r['churn']) == o), key=lambda r: r['kid']
        )
        return best(False),best(True)

    def model(self, name, sampler, nfe, **facts):
        t,rows = time.time(),[]
        for seed in range(FIRST, FIRST+self.a.seeds):
            x = draw(
                sampler,
                self.data.shape,
                eval_conds(self.data, self.a.n, seed),
                seed,
                device=self.device,
            )
            row = self.judge(x)
            if seed==FIRST:
                p,r = precision_recall(self.judge.extract(x), next(iter(self.refs.values())))
                row |= dict(
                    precision=p,
                    recall=r,
                    near=near(x[:2000], self.images),
                    near_held=near(x[:2000], self.held.images.to(self.device)),
                )
            rows.append(row)
        mean = lambda k: sum(o[k] for o in rows)/len(rows)
        res = {
            k: mean(k) for k in rows[0] if not k.endswith('_se') and k in rows[-1] and k != 'n'
        } | {k: rows[0][k] for k in ('precision', 'recall', 'near', 'near_held')}
        for k in ('kid', 'kid_held'):
            if k in res: res[f'{k}_se'],res[f'{k}_seeds'] = mean(f'{k}_se'),[o[k] for o in rows]
        self.res['models'][name] = (
            facts
            | dict(
                nfe=nfe,
                n=self.a.n,
                first_seed=FIRST,
                card=self.res['card'],
                diversity=self.spread(sampler),
            )
            | res
            | (self.speed(sampler) if self.device.type == 'cuda' else {})
        )
        print(
            name,
            {k: round(v, 4) for k, v in self.res['models'][name].items() if isinstance(v, float)},
            f'{time.time() - t:.0f} s',
            flush=True,
        )
        self.save()

    def speed(self, sampler):
        "Seconds of a batch, bfloat16 inside on a GPU, the best of three after a first call"
        res = {}
        for b in (1, 16, 256) if self.device.type=='cuda' else (1, 16):
            z = torch.randn(b, *self.data.shape, generator=rng(0, b)).to(self.device)
            c,times = cond_to(eval_conds(self.data, b), self.device),[]
            for _ in range(4):
                if self.device.type=='cuda': torch.cuda.synchronize()
                t = time.perf_counter()
                with (
                    torch.no_grad(),
                    torch.autocast(
                        self.device.type, torch.bfloat16, enabled=self.device.type == 'cuda'
                    ),
                ):
                    sampler(z, c, rng(0, 1, device=self.device))
                if self.device.type=='cuda': torch.cuda.synchronize()
                times.append(time.perf_counter()-t)
            res[f'seconds_{b}'] = min(times[1:])
        where = (
            self.res['card']
            if self.device.type == 'cuda'
            else f'{torch.get_num_threads()} CPU cores'
        )
        return dict(speed={where: res | dict(images_s=b/res[f'seconds_{b}'])})

def join(files, out):
    "Parts of one table; of two rows of the same name the later counts"
    parts = [json.loads(Path(f).read_text()) for f in files]
    for f,p in zip(files, parts):
        for k in ('n', 'seeds'):
            if p[k]!=parts[0][k]:
                raise ValueError(f'{f}: {k} is {p[k]}, {files[0]} has {parts[0][k]}')
    res = parts[0] | {
        k: next((p[k] for p in reversed(parts) if p.get(k)), None) for k in ('real', 'teacher')
    }
    res |= (
        {
            k: next(p[k] for p in reversed(parts) if p['teacher'])
            for k in ('sampler_seed', 'sampler_n')
        }
        if res['teacher']
        else {}
    )
    models = {}
    for p in parts:
        for k,o in p['models'].items():
            models[k] = (
                models.get(k, {})
                | o
                | dict(speed=models.get(k, {}).get('speed', {}) | o.get('speed', {}))
            )
    write_text(out/'emoji32_table.json', json.dumps(res | dict(models=models), indent=1)+'\n')

def main():
    ap = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    ap.add_argument('models', nargs='*', help='NAME=FILE')
    ap.add_argument('--teacher')
    ap.add_argument('--out', type=Path, default=Path('.'))
    ap.add_argument('--n', type=int, default=10_000)
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--sweep', type=int, default=5000, help='samples for the choice of the sampler')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    ap.add_argument('--steps', type=int, default=32, help="the teacher's, for its speed")
    ap.add_argument(
        '--only', choices=('students', 'teacher', 'speed', 'rows'), help='one part of the table'
    )
    ap.add_argument('--join', nargs='+', metavar='FILE', help='tables to put together')
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.join: return join(a.join, a.out)
    t = Table(a)
    if a.only not in ('speed', 'rows'): t.real()
    students = {}
    for o in a.models if a.only!='teacher' else ():
        name,_,file = o.partition('=')
        D,facts = load_denoiser(file)
        students[name] = student_sampler(D.to(a.device).eval(), facts['levels']),facts['levels']
        if a.only=='speed':
            t.res['models'][name] = t.speed(students[name][0])
            t.save()
        elif a.only!='rows':
            t.model(name, students[name][0], len(facts['levels']), levels=list(facts['levels']))
    if a.only=='speed':
        t.res['models']['teacher'] = t.speed(teacher_sampler(t.T, a.steps))
        t.save()
        return print(json.dumps(t.res['models']))
    for name, o in (
        zip(('teacher', 'teacher_stochastic'), t.samplers())
        if a.only not in ('students', 'rows')
        else ()
    ):
        t.model(
            name,
            teacher_sampler(
                t.T, o['steps'], **(dict(CHURN, S_churn=o['churn']) if o['churn'] else {})
            ),
            o['nfe'],
            steps=o['steps'],
            churn=o['churn'],
        )
    if a.only=='teacher': return
    rows = [teacher_sampler(t.T, s) for s in (1, 4, 18)]+[s for s,_ in students.values()]
    x = torch.stack(
        [draw(s, t.data.shape, eval_conds(t.data, 12, seed=3), 3, device=t.device) for s in rows]
    )
    sheet = rearrange(x, 'row n c h w -> (row h) (n w) c')
    Image.fromarray(sheet.numpy()).save(a.out/'emoji32_rows.png')

if __name__=='__main__': main()
