"""Bands learnt from stored good runs of one recipe: each one, left out, is healthy; a sick one is
not; the rule for stopping"""

import pytest

from dmd2_nb.assets import data_path
from dmd2_nb.guards import health as promised
from dmd2_nb.health import SIGNALS, bands, good_logs, health, kind_of, signals, stop_rule
from dmd2_nb.logs import read_log

good = good_logs()


def test_there_are_good_runs():
    "Of more than one kind, and together they have every signal"
    assert {kind_of(n) for n in good} >= {'toy', 'fashion16', 'emoji32'}
    for k in {kind_of(n) for n in good}: assert len(good_logs(k)) >= 3, k
    assert set(bands()) == set(SIGNALS) and promised is health


@pytest.mark.parametrize('name', good)
def test_left_out(name):
    "Judged by the others of its recipe alone"
    h = health(
        good[name], bands([rows for n, rows in good_logs(kind_of(name)).items() if n != name])
    )
    assert h.ok, f'\n{h}'
    assert sum(s.value is not None for s in h) >= 5 and all(s.text for s in h)


def test_sick():
    "Ten times the learning rates: the GAN's gradient dies and the generator wanders, and the sentences say so"
    h = health(data_path('runs/sick_toy.csv'), kind='toy')
    off = {s.name: s.text for s in h if not s.ok}
    assert not h.ok and 'ema_dist' in off and 'lower lr_g' in off['ema_dist']
    assert sum(line.startswith('!') for line in str(h).splitlines()) == len(off)


def altered(change):
    "A good log whose second half was changed"
    rows = [dict(o) for o in good['toy_1']]
    for o in rows[len(rows)*6//10:]: change(o)
    return rows


@pytest.mark.parametrize(
    'name, change',
    dict(
        grad_ratio=lambda o: o.update(grad_gan=o.get('grad_gan', 1) * 1000),
        grad_cos=lambda o: o.update(grad_cos=-0.9),
        calibration=lambda o: o.update(gan_d_loss=0.1),
        critic_lag=lambda o: o.update(critic_lag=3.0),
        brightness=lambda o: o.update(x_mean=o['x_mean'] + 1),
        contrast=lambda o: o.update(x_std=o['x_std'] * 2),
        ema_dist=lambda o: o.update(ema_dist=0.9),
    ).items(),
)
def test_each_signal(name, change):
    "Each one alone is noticed, with its own sentence, and no other"
    h = {s.name: s for s in health(altered(change), kind='toy')}
    assert [n for n, s in h.items() if not s.ok] == [name]
    assert (
        h[name].text.rpartition(': ')[0] in SIGNALS[name][0] + ': ' + h[name].text
        and h[name].low < h[name].high
    )


def test_short_and_foreign_logs(tmp_path):
    "A log without a column says so; one that has just begun has no values; a run's folder will do"
    bare = [
        {k: v for k, v in o.items() if k not in ('critic_lag', 'ema_dist')} for o in good['toy_0']
    ]
    h = {s.name: s for s in health(bare)}
    assert (
        h['critic_lag'].value is None
        and 'not in this log' in h['critic_lag'].text
        and h['critic_lag'].ok
    )
    assert signals([]) == {} and signals(good['toy_0'][:2]) == {}
    (tmp_path/'log.csv').write_bytes(data_path('runs/good/toy_0.csv').read_bytes())
    assert [s.value for s in health(tmp_path)] == [s.value for s in health(good['toy_0'])]


def test_recipes_have_bands_of_their_own(tmp_path):
    "An emoji run is not judged by garments; what its logs lack comes from all; a run's folder tells which recipe it is"
    emoji = good['emoji32_p1']
    assert (
        not health(emoji, kind='fashion16').ok
        and health(emoji, kind='emoji32').ok
        and health(emoji).ok
    )
    assert health(emoji, kind='emoji32').kind == 'emoji32' and 'good runs of emoji32' in str(
        health(emoji, kind='emoji32')
    )
    own, every = bands(kind='emoji32'), bands()
    assert own['grad_ratio'] != every['grad_ratio'] and {
        k for k in SIGNALS if own[k] == every[k]
    } == {k for k in SIGNALS if not any(k in signals(o) for o in good_logs('emoji32').values())}
    assert bands(kind='never seen') == every and health(emoji, kind='never seen').kind == ''
    (tmp_path/'log.csv').write_bytes(data_path('runs/good/emoji32_p1.csv').read_bytes())
    (tmp_path/'config.json').write_text('{"data": "emoji32"}')
    assert health(tmp_path).kind == 'emoji32' and [s.low for s in health(tmp_path)] == [
        own[k][0] for k in own
    ]


def test_a_log_is_added(tmp_path):
    "As lab.health_runs does it: a folder, a file, a row of a table; too little is refused"
    from dmd2_nb.lab.health_runs import add
    (tmp_path/'run').mkdir()
    (tmp_path/'good').mkdir()
    (tmp_path/'run'/'log.csv').write_bytes(data_path('runs/fashion16_1step.csv').read_bytes())
    for source in (
        tmp_path / 'run',
        tmp_path / 'run' / 'log.csv',
        f"{data_path('runs/emoji32_sweep.csv')}:p2",
    ):
        add(tmp_path, 'x', source)
    assert sorted(p.name for p in (tmp_path/'good').iterdir()) == ['x_1.csv', 'x_2.csv', 'x_p2.csv']
    assert signals(read_log(tmp_path / 'good' / 'x_1.csv')) == signals(
        good['fashion16_1step']
    ) and signals(read_log(tmp_path / 'good' / 'x_p2.csv')) == signals(good['emoji32_p2'])
    (tmp_path/'short.csv').write_text('step,dmd_loss\n1,2\n')
    with pytest.raises(SystemExit, match='too few'): add(tmp_path, 'x', tmp_path/'short.csv')


def test_stop_rule():
    "Stops only after so many evaluations without progress beyond the error; the best is named"
    rows = [
        dict(step=i, kid=v, kid_se=0.01)
        for i, v in enumerate([1.0, 0.5, 0.3, 0.2, 0.195, 0.197, 0.193, 0.1], 1)
    ]
    assert [stop_rule(rows[:i])['stop'] for i in range(1, 9)] == [False]*6+[True, False]
    assert stop_rule(rows[:7]) == dict(stop=True, best=4, value=.2, since=3)
    assert stop_rule(rows, patience=9)['best'] == 8
    assert stop_rule([dict(step=i, fid=1.) for i in range(5)], 'fid')['since'] == 4
    assert stop_rule(data_path('runs/fashion16_1step.csv'))['best'] > 0
    with pytest.raises(ValueError, match="no 'fid'"): stop_rule(rows, 'fid')
