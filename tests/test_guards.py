"""Guards: what is planted is named within 50 iterations, healthy runs raise nothing, and an alarm
ends the run or takes it back"""
import json, math, re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from _nightly import nightly
from dmd2_nb.lab.health_runs import toy_net, toy_run
from dmd2_nb.system.checkpoint import load_folder, save_step, steps
from dmd2_nb.system.tensors import read_tensors
from dmd2_nb.distill import DMD2
from dmd2_nb.guards import Alarm, Guard, Limits, guarded
from dmd2_nb.metrics import sliced_wasserstein
from dmd2_nb.toy import ring
from dmd2_nb.train import load_state, save_state, train

BEFORE = 220  # iterations of health; then something is planted


# -- what can go wrong --

def nan_loss(dmd):
    "A real image that is none"
    critic = dmd._critic
    dmd._critic = lambda x, c, real: critic(x, c, (real[0]*math.nan, real[1]))


def inf_gradient(dmd):
    "A gradient that overflows"
    for p in dmd.fake.parameters(): p.register_hook(lambda g: g*math.inf)


def bad_weight(net):
    def plant(dmd):
        m = dict(G=dmd.G, fake=dmd.fake, head=dmd.head, ema=dmd.ema)[net]
        with torch.no_grad(): next(m.parameters()).view(-1)[0] = math.nan
    return plant


def stale(dmd):
    "The critic is given the same few samples again and again"
    step, few = dmd.fake_step, dmd.generate()[:8].repeat(32, 1)
    dmd.fake_step = lambda x, cond, real: step(few, cond, real)


def one_mode(dmd):
    "The critic is given the samples on one side only, and their noise never changes"
    step = dmd.fake_step
    dmd.fake_step = lambda x, cond, real: step(
        x[x[:, 0] > x[:, 0].median()].repeat(2, 1) * 0.3, cond, real
    )


def reveal(dmd):
    "Real images of another range than the samples"
    critic = dmd._critic
    dmd._critic = lambda x, c, real: critic(x, c, (real[0]*20, real[1]))


def big_head(dmd):
    "A head that learns a hundred times too fast, on images that are far off"
    reveal(dmd)
    dmd.opt_fake.param_groups[1]['base_lr'] *= 10


def dazzle(dmd):
    "A learning rate with two zeros too many"
    for g in dmd.opt_g.param_groups: g['base_lr'] *= 100


def brighter(dmd):
    "A constant push at the image"
    grads = dmd.image_grads
    def pushed(x, cond=None):
        g, log = grads(x, cond)
        return {k: v-0.05 for k, v in g.items()}, log
    dmd.image_grads = pushed


plants = dict(
    nan_loss=(nan_loss, 'non-finite'),
    inf_gradient=(inf_gradient, 'non-finite'),
    **{f'weight_{n}': (bad_weight(n), 'non-finite') for n in ('G', 'fake', 'head', 'ema')},
    stale=(stale, 'critic'),
    one_mode=(one_mode, 'critic'),
    reveal=(reveal, 'discriminator'),
    big_head=(big_head, 'discriminator'),
    dazzle=(dazzle, 'brightness'),
    brighter=(brighter, 'brightness'),
)


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name', plants)
def test_planted(name, seed):
    plant, want = plants[name]
    dmd, guard, reals = toy_run(seed, gan_start=0)
    for _log in guard.watch(train(dmd, None, BEFORE, reals())): pass
    plant(dmd)
    with pytest.raises(Alarm) as e:
        for _log in guard.watch(train(dmd, None, 50, reals(BEFORE))): pass
    assert e.value.name == want and BEFORE < e.value.step <= dmd.step <= BEFORE+50, str(e.value)
    assert (
        str(e.value).startswith(f'{want} alarm at iteration {e.value.step}: ')
        and len(str(e.value).splitlines()) == 1
    )


@pytest.mark.parametrize('seed', [11, pytest.param(12, marks=nightly), pytest.param(13, marks=nightly)])
def test_healthy(seed):
    "2,000 iterations with matching and GAN, without an alarm; the samples are much nearer to the ring at the end"
    dmd, guard, reals = toy_run(seed)
    def far(): return float(sliced_wasserstein(dmd.generate(), ring().sample(256, seed=1), 64))
    start = far()
    for _log in guard.watch(train(dmd, None, 2000, reals())): pass
    assert dmd.step == 2000 and dmd.gan_on and guard.probes[-1][0] == 2000 and far() < start/2


def test_watching_changes_nothing():
    "With and without a guard: the same weights, also over several steps of the generator"
    runs = [toy_run(3, levels=(2.5, 0.8)) for _ in range(2)]
    for (dmd, guard, reals), watch in zip(runs, (True, False)):
        if not watch: del dmd.__dict__['fake_step']
        logs = train(dmd, None, 160, reals())
        for _log in guard.watch(logs) if watch else logs: pass
    for n in ('G', 'fake', 'head', 'ema'):
        for a, b in zip(*(getattr(r[0], n).parameters() for r in runs)): assert torch.equal(a, b)
    assert [p[0] for p in runs[0][1].probes] == [20, 50, 80, 110, 140]


def test_resumed_guard_sees_the_same(tmp_path):
    "A guard that travels through a checkpoint raises the same alarm in the same iteration"
    alarms = []
    for stop in (None, BEFORE+17):
        dmd, guard, reals = toy_run(0, gan_start=0)
        for _log in guard.watch(train(dmd, None, BEFORE, reals())): pass
        reveal(dmd)
        with pytest.raises(Alarm) as e:
            if stop:
                for _log in guard.watch(train(dmd, None, 17, reals(BEFORE))): pass
                save_state(dmd, tmp_path/'s', guard=guard.state())
                dmd, guard, reals = toy_run(0, gan_start=0)
                guard.load(json.loads(json.dumps(load_state(dmd, tmp_path/'s')['guard'])))
                reveal(dmd)
            for _log in guard.watch(train(dmd, None, 60, reals(dmd.step))): pass
        alarms.append(str(e.value))
    assert alarms[0] == alarms[1]


def test_loss_scaling_is_no_alarm():
    "Under float16 an infinite norm is how the scale is found; one that stays infinite is an alarm"
    dmd, guard, reals = toy_run(0)
    class Scaler:
        def is_enabled(self): return True
    dmd.scaler_fake, good = (
        Scaler(),
        dict(fake_loss=torch.tensor(1.0), x_mean=torch.tensor(0.0), x_std=torch.tensor(1.0)),
    )
    for i in range(20):
        dmd.step += 1
        guard.given = None
        guard(good | dict(norm_fake=torch.tensor(math.inf if i % 7 == 3 else 1.)))
    with pytest.raises(Alarm, match='norm_fake is inf'):
        for i in range(60):
            dmd.step += 1
            guard(good | dict(norm_fake=torch.tensor(math.inf)))


def test_what_is_written_shows_it_again(tmp_path):
    "From the record alone: config, seed, checkpoint and batch give the same alarm in the same iteration"
    dmd, guard, reals = toy_run(1, gan_start=0)
    def go():
        for _log in guard.watch(train(dmd, None, 400, wrong(reals, 0))):
            if dmd.step % 100 == 0:
                save_step(
                    tmp_path / 'state', dmd.step, lambda p: save_state(dmd, p, guard=guard.state())
                )
    with pytest.raises(Alarm) as first:
        guarded(
            go,
            guard,
            tmp_path,
            found=lambda: steps(tmp_path / 'state'),
            batch=lambda i: next(wrong(reals, i)),
        )
    assert f'written to {tmp_path}/alarm-{first.value.step}.json' in str(first.value)
    out = json.loads((tmp_path/f'alarm-{first.value.step}.json').read_text())
    assert (
        out['alarm'] == 'discriminator'
        and out['step'] == first.value.step
        and out['checkpoint'] == 'step-200'
        and out['seed'] == 1
    )
    from dmd2_nb.distill import DMD2Config
    again = DMD2.from_teacher(ring(), DMD2Config.from_dict(out['config']), init=toy_net(ring(), 1))
    watcher = Guard(again, (0., ring().std), Limits(**out['limits']))
    watcher.load(load_state(again, tmp_path/'state'/out['checkpoint'])['guard'])
    with pytest.raises(Alarm) as second:
        for _log in watcher.watch(train(again, None, 200, wrong(reals, again.step))): pass
    assert second.value.step == out['step'] and second.value.text in first.value.text
    kept, _ = read_tensors(tmp_path/out['batch'])
    assert torch.equal(kept['0'], next(wrong(reals, out['step']-1))[0])
    assert [o['step'] for o in out['rows']] == list(range(out['step']-49, out['step']+1))


def wrong(reals, start, at=250):
    "Real batches that leave the range from an iteration on"
    for i, (x, c) in enumerate(reals(start), start): yield (x*20 if i >= at else x), c


# -- a whole command --

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The fashion16 command with a network for a second, in an empty folder; `spoil(step, f)`
    plants `f(dmd)` before an iteration"""
    import _survive_work as work
    from dmd2_nb import cli, jobs, recipes
    work.prepare(tmp_path)
    r = work.tiny
    monkeypatch.setattr(cli, 'PICTURES', {})
    monkeypatch.setitem(
        recipes.RECIPES,
        'fashion16',
        replace(
            r,
            config=replace(r.config, warmup_fake=10),
            iters=300,
            every=dict(log=10, show=0, save=40, eval=0),
        ),
    )
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    def spoil(step, f, times=1):
        left, plain = [times], jobs.train
        def train(dmd, *args):
            for log in plain(dmd, *args):
                yield log
                if dmd.step == step and left[0]:
                    left[0] -= 1
                    f(dmd)
        monkeypatch.setattr(jobs, 'train', train)
    yield spoil, lambda more='': cli.main((work.commands['distill'].format(tmp_path)+more).split())


def poison(dmd):
    with torch.no_grad(): next(dmd.G.parameters()).view(-1)[0] = math.nan


def test_command_stops(tiny, capsys):
    "One line, exit code 2, the record beside the run, no checkpoint that is broken, and the same command goes on"
    spoil, command = tiny
    spoil(133, poison)
    assert command() == 2
    err = capsys.readouterr().err.strip()
    assert re.fullmatch(
        r'dmd2_distill: non-finite alarm at iteration 13\d: .* written to runs/fashion16-1/alarm-13\d\.json',
        err,
    ), err
    run = Path('runs/fashion16-1')
    assert [p.name for p in steps(run/'state')] == ['step-120', 'step-80']
    for p in steps(run/'state'):
        assert all(
            t.isfinite().all()
            for n, d in load_folder(p)[0].items()
            if n != 'random'
            for t in d.values()
        )
    out = json.loads(next(run.glob('alarm-*.json')).read_text())
    assert (
        out['checkpoint'] == 'step-80'
        and out['rollbacks'] == 0
        and set(read_tensors(run / out['batch'])[0]) == {'0', '1', '2'}
    )  # conditions, images, their labels
    assert command() == 0 and (run/'metrics.json').exists()


def test_command_goes_back(tiny, capsys):
    "The last good checkpoint, half of the rates, to the end; the log has no seam"
    spoil, command = tiny
    spoil(133, poison)
    assert command(' --guard rollback') == 0
    run = Path('runs/fashion16-1')
    out = json.loads(next(run.glob('alarm-*.json')).read_text())
    assert out['alarm'] == 'non-finite' and out['checkpoint'] == 'step-80'
    state = load_folder(steps(run/'state')[0])[1]
    assert state['extra']['rollbacks'] == 1
    base = json.loads((run/'config.json').read_text())['config']
    assert [g['base_lr'] for g in state['groups']['opt_g'] + state['groups']['opt_fake']] == [
        base['lr_g'] / 2,
        base['lr_fake'] / 2,
        base['lr_head'] / 2,
    ]
    rows = [int(o.split(',')[0]) for o in (run/'log.csv').read_text().splitlines()[1:]]
    assert rows == list(range(10, 301, 10))


def test_command_gives_up(tiny, capsys):
    "What comes again and again ends the run after three tries; without a look it goes on until a row is not finite"
    spoil, command = tiny
    spoil(133, poison, times=9)
    assert command(' --guard rollback') == 2
    assert 'gone back 3 times already' in capsys.readouterr().err
    assert command(' --guard off --name off') == 2
    assert 'the run has diverged at step 1' in capsys.readouterr().err
    assert command(' --guard never') == 2
    assert "guard must be stop, rollback or off, got 'never'" in capsys.readouterr().err


def test_nothing_broken_is_saved(tiny, capsys):
    """The last update before a checkpoint breaks a weight, which no loss has shown yet, between two
    looks: it is not written"""
    spoil, command = tiny
    def plant(dmd):
        step = dmd.fake_step
        def broken(*args):
            log = step(*args)
            with torch.no_grad(): next(dmd.head.parameters()).view(-1)[0] = math.nan
            return log
        dmd.fake_step = broken
    spoil(137, plant)
    assert command(' --save-every 6') == 2
    assert (
        'non-finite alarm at iteration 138: weights of head are not finite'
        in capsys.readouterr().err
    )
    kept = steps(Path('runs/fashion16-1/state'))
    assert [p.name for p in kept] == ['step-132', 'step-126']
    for p in kept:
        assert all(
            t.isfinite().all()
            for n, d in load_folder(p)[0].items()
            if n != 'random'
            for t in d.values()
        )


def test_teacher_does_not_save_what_is_broken(tmp_path):
    from dmd2_nb.guards import check_weights
    net = toy_net(ring(), 0, steps=0)
    check_weights(dict(net=net), 1)
    for bad in (math.nan, math.inf, -math.inf):
        with torch.no_grad(): list(net.parameters())[-1].view(-1)[-1] = bad
        with pytest.raises(Alarm, match='weights of net are not finite'):
            check_weights(dict(net=net), 1)


def test_nothing_hides_a_nan(root):
    "No `nan_to_num`, no skipped check, in any module"
    for p in (root/'dmd2_nb').rglob('*.py'):
        assert not re.search(
            r'nan_to_num|nanmean|nansum|isnan\([^)]*\)\] *=', p.read_text(encoding='utf-8')
        ), p.name
