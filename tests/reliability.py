"""Measure the figures of RELIABILITY.md and write them to data/runs/reliability.json:

    python tests/reliability.py [kills] [fuzz] [bombs] [long] [guards] [cost]

It runs what the tests run, the long ones at their full length; parts that are not named keep their
figures. Takes a quarter of an hour."""
import json, os, subprocess, sys, tempfile, time
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parent/'data'), str(here)]
out = here.parent/'data'/'runs'/'reliability.json'
env = os.environ | dict(OMP_NUM_THREADS='1')


def work(script, *args):
    "What a script of this folder prints, and how long it took"
    with tempfile.TemporaryDirectory() as d:
        begun = time.perf_counter()
        r = subprocess.run(
            [sys.executable, str(here / script), *[str(a).replace('FOLDER', d) for a in args]],
            capture_output=True,
            text=True,
            env=env,
        )
        if r.returncode: sys.exit(r.stderr[-3000:])
        return json.loads(r.stdout.splitlines()[-1]), time.perf_counter()-begun


def kills():
    "Runs killed, and how many ended like the unbroken one"
    res, seconds = work('_survive_work.py', 'FOLDER')
    all_ = [
        (job, kind, t)
        for job in ('distill', 'train_teacher')
        for kind in ('inside', 'others', 'times', 'storm')
        for t in res[job][kind]
    ]
    same = sum(t['digest'] == res[job]['unbroken'] for job, _, t in all_)
    return dict(
        kills=sum(len(t.get('codes', [0])) for _, _, t in all_),
        runs=len(all_),
        same=same,
        inside_a_write=sum(k == 'inside' for _, k, _ in all_),
        events_of_a_run=len(res['distill']['events']),
        signals=sum(
            t['digest'] == res[job]['unbroken']
            for job in ('distill', 'train_teacher')
            for t in res[job]['signals'].values()
        ),
        damaged=sum(t['digest'] == res['distill']['unbroken'] for t in res['damaged'].values()),
        full_disk=res['full'] and res['full']['digest'] == res['distill']['unbroken'],
        seconds=round(seconds),
    )


def fuzz():
    res, seconds = work('_fuzz_work.py', 'FOLDER', 3000)
    return {
        k: res[k]
        for k in (
            'n',
            'ends',
            'n_wrong',
            'harm',
            'new_modules',
            'peak_mib',
            'growth_mib',
            'slowest',
        )
    } | dict(seconds=round(seconds))


def bombs():
    res, seconds = work('_bombs_work.py', 'FOLDER', 8000)
    return res | dict(seconds=round(seconds))


def long():
    a, b = (
        work('_long_work.py', 10_000, 2000, 'FOLDER')[0],
        work('_long_work.py', 300, 100, 'FOLDER', '{"batch": 2048}')[0],
    )
    pick = lambda o, *ks: {k: round(o[k], 5) if isinstance(o[k], float) else o[k] for k in ks}
    return dict(
        pick(a, 'iterations', 'warm', 'growth', 'files', 'logger', 'guard', 'ms'),
        seen={k: round(v['mib'], 1) for k, v in a['seen'].items()},
        wide=pick(b, 'logger', 'guard', 'ms'),
    )


def guards():
    "Iterations from planting to the alarm, and alarms of healthy runs"
    import torch
    torch.set_num_threads(1)
    import test_guards as t
    late, alarms = {}, 0
    for name, (plant, want) in t.plants.items():
        for seed in (0, 1):
            dmd, guard, reals = t.toy_run(seed, gan_start=0)
            for _log in guard.watch(t.train(dmd, None, t.BEFORE, reals())): pass
            plant(dmd)
            try:
                for _log in guard.watch(t.train(dmd, None, 50, reals(t.BEFORE))): pass
            except t.Alarm as a:
                if a.name == want: late.setdefault(name, []).append(dmd.step-t.BEFORE)
    phases = []  # the slowest kind of failure, planted at other iterations
    for seed in (0, 1, 2):
        for before in (210, 215, 221, 229, 234, 239):
            dmd, guard, reals = t.toy_run(seed, gan_start=0)
            for _log in guard.watch(t.train(dmd, None, before, reals())): pass
            t.stale(dmd)
            try:
                for _log in guard.watch(t.train(dmd, None, 60, reals(before))): pass
                phases.append(None)
            except t.Alarm: phases.append(dmd.step-before)
    for seed in (11, 12, 13):
        dmd, guard, reals = t.toy_run(seed)
        try:
            for _log in guard.watch(t.train(dmd, None, 2000, reals())): pass
        except t.Alarm: alarms += 1
    return dict(
        late=late,
        planted=2 * len(t.plants),
        named=sum(map(len, late.values())),
        latest=max(max(v) for v in late.values()),
        healthy_runs=3,
        healthy_iterations=2000,
        healthy_alarms=alarms,
        stale=phases,
        stale_planted=len(phases),
        stale_in_time=sum(o is not None and o <= 50 for o in phases),
    )


def cost():
    "What log, dashboard and guard take of two recipes on a CPU"
    with tempfile.TemporaryDirectory() as d:
        for r, length, rounds in (('toy', 1000, 10), ('fashion16', 120, 5)):
            p = subprocess.run(
                [
                    sys.executable,
                    str(here / 'gpu_guard_cost.py'),
                    '--recipe',
                    r,
                    '--device',
                    'cpu',
                    '--length',
                    str(length),
                    '--rounds',
                    str(rounds),
                    '--check',
                    '32',
                    '--out',
                    d,
                ],
                capture_output=True,
                text=True,
                env=env,
            )
            if p.returncode: sys.exit(p.stderr[-3000:])
        got = json.loads((Path(d)/'guard_cost.json').read_text())
    return {
        n.split()[0]: dict(
            ms=round(o['ms']['bare'], 3),
            batch=o['batch'],
            iterations=o['iterations'],
            same_weights=o['same_weights'],
            parts={k: round(v, 5) for k, v in o['parts'].items()},
            **{
                k: round(o['share'][n], 5)
                for k, n in dict(log='log', guard='guard alone', all='guard').items()
            },
        )
        for n, o in got.items()
    }


def gpu():
    "What `gpu_resume.py` and `gpu_guard_cost.py` stored in data/runs"
    read = lambda n: json.loads((out.parent/f'{n}.json').read_text())
    again, cost = read('resume_gpu'), read('guard_cost')
    cost = next(o for n, o in cost.items() if n.startswith('emoji32'))
    killed = [k for o in again['runs'].values() for k in o['killed']]
    return dict(
        device=again['device'],
        killed=len(killed),
        same=sum(k['same'] for k in killed),
        unbroken_agree=all(o['unbroken_agree'] for o in again['runs'].values()),
        cost_device=cost['device'],
        ms=round(cost['ms']['bare'], 2),
        same_weights=cost['same_weights'],
        **{
            k: round(cost['share'][n], 5)
            for k, n in dict(log='log', guard='guard alone', all='guard').items()
        },
    )


if __name__ == '__main__':
    parts = dict(kills=kills, fuzz=fuzz, bombs=bombs, long=long, guards=guards, cost=cost, gpu=gpu)
    for n in sys.argv[1:] or parts:
        res = parts[n]()
        was = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(was | {n: res}, indent=1)+'\n')
        print(n, json.dumps(res), flush=True)
