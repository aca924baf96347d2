"`DMD2`'s three parts can be exchanged, alone and together, and change no bit of what is computed"
from dataclasses import replace

import pytest
import torch

import _parallel_work as work
from _echo import EchoRunner, Seen, SeenByMany, Shifted
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.distill import DMD2, toy_config
from dmd2_nb.graphs import GraphedDMD2, GraphRunner
from dmd2_nb.launch import launch
from dmd2_nb.nets import ToyNet
from dmd2_nb.parallel_run import ParallelDMD2, load_parallel, save_parallel
from dmd2_nb.parts import Draws, OneProcess, PlainRunner
from dmd2_nb.toy import ring
from dmd2_nb.train import load_state, save_state, train

mixed = replace(work.cfg, rollout='mix', ttur=1, gan_start=2, warmup_fake=2)
pairs = replace(work.cfg, w_reg=0.5, guidance=1.)


@pytest.fixture(scope='module', autouse=True)
def double():
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


def equal(a, b):
    "Logs and weights of two runs, to the bit"
    assert work.gap(a[1], b[1]) == 0
    assert work.weights_gap(a[0], b[0]) == 0


def run(cls, cfg=work.cfg, steps=24, **kwargs):
    dmd = work.make(cls, cfg, **kwargs)
    return dmd, work.run(dmd, steps)


def test_plain_parts():
    dmd = work.make(DMD2)
    assert [type(o) for o in (dmd.draws, dmd.world, dmd.runner)] == [Draws, OneProcess, PlainRunner]
    assert isinstance(ParallelDMD2.from_teacher(work.net(1), work.cfg).world, OneProcess)
    assert dmd.world.rows(5) == slice(0, 5) and dmd.batch == work.cfg.batch


@pytest.mark.parametrize('cfg', [work.cfg, mixed, pairs], ids=['two levels', 'mixed rollout, late GAN', 'regression'])
def test_replayed_equals_plain(cfg):
    "What is replayed reads fixed places only, and takes the plain run's path to the bit"
    one, two = run(DMD2, cfg, 30), run(DMD2, cfg, 30, runner=EchoRunner())
    equal(one, two)
    assert min(two[0].runner.replays(k) for k in ('generator', 'critic')) > 2


def test_pieces_are_replayed_with_their_own_draws():
    "Two pieces ask for draws by the same name: each has its own rows"
    equal(run(ParallelDMD2, accum=4), run(ParallelDMD2, accum=4, runner=EchoRunner()))
    equal(run(ParallelDMD2, pairs, accum=2), run(ParallelDMD2, pairs, accum=2, runner=EchoRunner()))


@pytest.mark.parametrize('parts', [dict(), dict(runner=EchoRunner)], ids=['plain', 'replayed'])
def test_other_draws_reach_every_turn(parts):
    new = lambda **kwargs: run(
        DMD2, draws=Shifted(), **{k: v() for k, v in parts.items()}, **kwargs
    )
    class Overridden(DMD2):
        def randn(self, stream, n): return super().randn(stream, n)+0.1
    equal(run(Overridden), new())
    assert work.gap(run(DMD2, steps=4)[1], new(steps=4)[1]) > 0


def test_a_number_read_inside_a_recording_is_refused():
    "The test of equality rests on this"
    class Reads(DMD2):
        def view(self, x, n, stream): return x*float(x.detach().mean())
    with pytest.raises(RuntimeError, match='_local_scalar_dense inside a recording'):
        run(Reads, runner=EchoRunner())


def test_view_in_both_turns():
    "Generated samples before noise in the generator's turn; real and generated ones together in the critic's"
    dmd = work.make(Seen)
    cond, real = next(work.data(dmd.cfg, dmd.shape)), None
    cond, real = cond
    x, _ = dmd.generator_step(cond, real)
    dmd.fake_step(x, cond, real)
    (first, n, generated), (second, parts, both) = dmd.seen
    assert (first, n, second, parts) == (100, 16, 110, (16, 16))
    assert torch.equal(generated, x) and torch.equal(both, torch.cat((real[0], x)))


def test_view_decides_what_the_critic_learns_from():
    """What is hidden from the discriminator pulls neither at the generator nor at the head; the
    denoising loss is untouched"""
    class Blind(DMD2):
        def view(self, x, n, stream): return x*0
    cfg = replace(work.cfg, warmup_fake=0)
    seeing, blind = work.make(DMD2, cfg), work.make(Blind, cfg)
    cond, real = next(work.data(cfg, seeing.shape))
    x = seeing.generate(cond)
    grads = [dmd.image_grads(x, cond)[0] for dmd in (seeing, blind)]
    assert torch.equal(grads[0]['dm'], grads[1]['dm'])
    assert grads[0]['gan'].abs().max() > 0 and grads[1]['gan'].abs().max() == 0
    logs = [dmd.fake_step(x, cond, real) for dmd in (seeing, blind)]
    assert (
        logs[0]['fake_loss'] == logs[1]['fake_loss']
        and logs[0]['gan_d_loss'] != logs[1]['gan_d_loss']
    )
    assert blind.step == 1


def test_view_draws_by_name_with_every_part():
    equal(run(Seen), run(Seen, runner=EchoRunner()))
    one, cut = run(Seen, steps=6), run(SeenByMany, steps=6, accum=4)
    assert work.gap(one[1], cut[1]) < 1e-9 and work.weights_gap(one[0], cut[0]) < 1e-9


def test_guide_is_what_the_matching_loss_leads_to():
    class Zero(DMD2):
        def guide(self, noisy, sigma, cond): return super().guide(noisy, sigma, cond)*0
    cfg = replace(work.cfg, guidance=1.)
    dmd, zero = work.make(DMD2, cfg), work.make(Zero, cfg)
    x = dmd.generate()
    a, b = (d.image_grads(x)[0] for d in (dmd, zero))
    assert torch.equal(a['gan'], b['gan']) and not torch.equal(a['dm'], b['dm'])


def test_another_iteration_for_a_moment():
    dmd = work.make(DMD2)
    z = dmd.randn(2, 3)
    with dmd.at(5) as d: assert d.step == 5 and not torch.equal(d.randn(2, 3), z)
    with pytest.raises(KeyError):
        with dmd.at(7): raise KeyError
    assert dmd.step == 0 and torch.equal(dmd.randn(2, 3), z)


def test_rate_as_a_part_of_the_run():
    dmd = work.make(DMD2, replace(work.cfg, gan_g=0., gan_d=0.), rate=lambda step: 1/(1+step))
    seen = []
    for _ in train(dmd, None, 4): seen.append(dmd.opt_fake.param_groups[0]['lr'])
    assert seen == pytest.approx([1e-3/(1+i) for i in range(4)])


def test_graphs_say_what_they_need():
    torch.set_default_dtype(torch.float32)
    try:
        net, mix = EDMPrecond(ToyNet(width=16)), ring(8)
        with pytest.raises(ValueError, match='need a CUDA device, the generator is on cpu'):
            GraphedDMD2.from_teacher(mix, toy_config, init=net)
        with pytest.raises(ValueError, match='need a CUDA device'):
            ParallelDMD2.from_teacher(mix, toy_config, init=net, runner=GraphRunner())
    finally: torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    'first, then',
    [({}, dict(runner=EchoRunner)), (dict(runner=EchoRunner), {})],
    ids=['plain, then replayed', 'replayed, then plain'],
)
def test_a_checkpoint_knows_no_runner(first, then, tmp_path):
    new = lambda parts, cls=DMD2: work.make(cls, **{k: v() for k, v in parts.items()})
    whole = run(DMD2, steps=20)
    a, b = new(first), new(then)
    logs = work.run(a, 10)
    save_state(a, tmp_path/'run')
    load_state(b, tmp_path/'run')
    equal(whole, (b, logs+work.run(b, 10, start=10)))
    c = new(then, ParallelDMD2)  # the writer of many processes reads it as well
    load_parallel(c, tmp_path/'run')
    assert work.weights_gap(a, c) == 0


def test_back_to_a_checkpoint_in_the_middle(tmp_path):
    "A recording reads the same places after a checkpoint was loaded"
    dmd, logs = run(DMD2, steps=12, runner=EchoRunner())
    save_parallel(dmd, tmp_path/'run')
    first = work.run(dmd, 8, start=12)
    load_parallel(dmd, tmp_path/'run')
    assert work.gap(first, work.run(dmd, 8, start=12)) == 0 and dmd.runner.replays('critic') > 8


def test_how_an_optimiser_computes_stays(tmp_path):
    "A run begun plain goes on with graphs: the file's `capturable` and `fused` are not taken over"
    from dmd2_nb.system.checkpoint import load_optim, optim_tensors
    def opt(**kwargs):
        p = torch.nn.Parameter(torch.ones(3))
        o = torch.optim.AdamW([p], lr=0.5, **kwargs)
        p.grad = torch.ones(3)
        o.step()
        return o
    plain, fused = opt(weight_decay=0.25), opt(fused=True)
    load_optim(fused, *optim_tensors(plain))
    assert fused.param_groups[0]['fused'] is True and fused.param_groups[0]['weight_decay'] == 0.25
    fused.step()
    load_optim(plain, *optim_tensors(fused))
    assert not plain.param_groups[0]['fused']
    plain.step()


def test_two_processes_replay(tmp_path):
    "Graphs of several processes: the same bits as plain, and every rank meets the others in the same order"
    ranks = launch(work.replayed, 2, str(tmp_path), timeout=1500)
    for r in ranks:
        for name, gaps in r['equal'].items(): assert gaps == [0, 0], f'{name}: {gaps}'
        for name, gaps in r['alone'].items(): assert max(gaps) < 1e-6, f'{name}: {gaps}'
        assert r['resumed'] == [0, 0] and min(r['replays']) > 0
    assert (
        ranks[0]['plain'] == ranks[0]['replayed'] == ranks[1]['replayed']
        and len(ranks[0]['plain']) > 30
    )
    assert {o[0] for o in ranks[0]['replayed']} == {'all_reduce', 'all_gather'}
