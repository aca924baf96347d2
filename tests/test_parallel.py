"Several gloo processes on a CPU: they compute what one process computes, resume from each other, and do not hang"
import os, pickle, re, shutil, socket, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from _nightly import nightly
import _parallel_work as work
from dmd2_nb.system.checkpoint import load_folder
from dmd2_nb.distill import DMD2
from dmd2_nb.launch import launch
from dmd2_nb.train import load_state, save_state
from dmd2_nb.weights import load_denoiser

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason='PyTorch was built without torch.distributed'
)
tol = 1e-6


def env(**kwargs):
    return (
        dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        | kwargs
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('parallel')


@pytest.fixture(scope='module')
def double():
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


@pytest.fixture(scope='module')
def two(folder): return launch(work.two_ranks, 2, str(folder), timeout=6000)


@pytest.fixture(scope='module')
def four(folder, two, double):
    dmd = work.make(DMD2)
    work.run(dmd, 3)
    save_state(dmd, folder/'one', position=3)
    return launch(work.four_ranks, 4, str(folder), timeout=6000)


def test_two_ranks_equal_one(two):
    for name, (logs, weights) in two[0]['equal'].items():
        assert logs < tol and weights < tol, f'{name}: {logs}, {weights}'


@nightly
def test_sdxl_two_ranks_equal_one(tmp_path):
    pytest.importorskip('diffusers')
    for name, (logs, weights) in launch(
        work.sdxl, 2, str(tmp_path), [['full', 'fsdp'], ['lora', 'ddp']], timeout=6000
    )[0].items():
        assert logs < tol and weights < tol, f'{name}: {logs}, {weights}'


def test_accumulation_equals_the_big_batch(two):
    for name, (logs, weights) in two[0]['accum'].items():
        assert logs < tol and weights < tol, f'{name}: {logs}, {weights}'


def test_channels_last_is_saved(two): assert two[0]['last'] == 0


def test_networks_born_on_meta(two): assert max(two[0]['empty']) < tol


def test_low_precision(two):
    for name, (off, scale) in two[0]['low'].items():
        assert off < 0.05 and scale in (1., 2.**16, 2.**15), f'{name}: {off}, {scale}'
    assert two[0]['low'] == two[1]['low']
    assert two[0]['low']['skipped'] == [0., 2.**15]


def test_unequal_data_ends_together(two): assert [o['steps'] for o in two] == [3, 3]


def test_what_must_differ_and_what_must_agree(two):
    for rank in two:
        assert 'real batch is the same on two ranks' in rank['same_reals']
        assert 'conditions were the same on all ranks' in rank['same_conds']
        assert 'weight head.' in rank['other_head']
        assert re.search('step, updates.* differs between ranks: rank 0 has', rank['other_step'])
        assert 'batch 15 cannot be cut into 2 ranks' in rank['uneven']
        assert re.search(r'lr_g 0\.001 instead of 1\.0', rank['other_config'])


def test_four_ranks_equal_one(four):
    for name, (logs, weights) in four[0]['equal'].items():
        assert logs < tol and weights < tol, f'{name}: {logs}, {weights}'


def test_resume_at_four(four):
    for name in ('ddp_fsdp', 'fsdp_ddp', 'fsdp_fsdp2', 'one_fsdp', 'one_ddp'):
        assert max(four[0][name]) < tol, f'{name}: {four[0][name]}'


@pytest.mark.parametrize('mode', ['ddp', 'fsdp', 'four'])
def test_resume_at_one(four, folder, double, mode):
    ref, dmd = work.make(DMD2), work.make(DMD2)
    logs = work.run(ref, 6)
    extra = load_state(dmd, folder/mode)
    assert extra == dict(position=3) and dmd.step == 3
    assert (
        work.gap(logs[3:], work.run(dmd, 3, start=extra['position'])) < tol
        and work.weights_gap(ref, dmd) < tol
    )


def test_four_resume_at_two_and_no_pickle_is_run(four, folder, tmp_path):
    "What the default storage of torch.distributed.checkpoint would read lies there and is left alone"
    shutil.copytree(folder/'four', tmp_path/'four')
    bomb = pickle.dumps(work.Bomb(str(tmp_path/'went off')))
    for part in [tmp_path/'four', *(p for p in (tmp_path/'four').iterdir() if p.is_dir())]:
        for name in ('.metadata', '__0_0.distcp', 'state.pt'): (part/name).write_bytes(bomb)
    for mode, gaps in launch(work.back_at_two, 2, str(tmp_path), timeout=6000)[0].items():
        assert max(gaps) < tol, f'{mode}: {gaps}'
    assert not (tmp_path/'went off').exists()
    pickle.loads(bomb).close()  # the bomb is one
    assert (tmp_path/'went off').exists()


def test_checkpoint_is_safetensors_and_json(two, folder):
    files = [p for p in (folder/'fsdp').rglob('*') if p.is_file()]
    assert {p.suffix for p in files} == {'.safetensors', '.json'} and len(files) > 6
    parts, state = load_folder(folder/'fsdp')
    assert state['ranks'] == 2 and set(parts) == {
        'generator',
        'ema',
        'fake',
        'head',
        'opt_g',
        'opt_fake',
        'ranks',
    }
    assert not list(folder.glob('.*'))


def test_global_generators_of_every_rank_come_back(two):
    for rank in two:
        for drawn, again in rank['global']: assert drawn == again
    assert two[0]['global'] != two[1]['global']


def test_export_to_one_file(four, folder, double):
    D, _ = load_denoiser(folder/'export.safetensors')
    parts, _ = load_folder(folder/'fsdp')
    for k, v in D.state_dict().items(): assert torch.equal(v, parts['ema'][k].float().to(v))


def test_damaged_checkpoints_are_named(four):
    for rank in four:
        assert 'fake' in rank['lost_shard'] and (
            'lacks pieces' in rank['lost_shard'] or 'does not fit' in rank['lost_shard']
        )
        assert 'export.safetensors' in rank['unwritable'] and 'rank 0' in rank['unwritable']


def test_command_line(tmp_path, double):
    "The same command in one process and in two with two pieces each writes the same log, and one run folder"
    torch.set_default_dtype(torch.float32)
    from dmd2_nb.recipes import RECIPES
    from dmd2_nb.runs import read_log
    from dmd2_nb.weights import build_denoiser, save_denoiser
    D = build_denoiser(RECIPES['fashion16'].net)
    for p in D.parameters(): p.data += 0.02*torch.randn_like(p)
    save_denoiser(D, tmp_path/'teacher.safetensors')
    args = (
        f'--teacher {tmp_path}/teacher.safetensors --out {tmp_path} --features pixels --batch 8 '
        '--iters 4 --eval-n 8 --save-every 2 --eval-every 0 --device cpu --set warmup_fake=1 '
        '--ttur 2'
    )
    assert launch(work.command, 1, f'fashion16 --name one {args}', timeout=6000) == [0]
    assert launch(work.command, 2, f'fashion16 --name two --accum 2 {args}', timeout=6000) == [0, 0]
    one, two = (read_log(tmp_path/n/'log.csv') for n in ('one', 'two'))
    assert len(one) == len(two) > 0 and {p.name for p in tmp_path.iterdir()} == {
        'one',
        'two',
        'teacher.safetensors',
    }
    whole = {'critic_lag', 'ema_dist'}  # looked at only where one process has the whole run
    for a, b in zip(one, two):
        a, b = ({k: v for k, v in o.items() if k not in whole} for o in (a, b))
        assert a.keys() == b.keys()
        for k in a.keys()-{'seconds'}: assert abs(a[k]-b[k]) < 1e-3*(1+abs(a[k])), k


def seconds_since_death(folder): return time.time()-float((folder/'died').read_text())


@nightly
def test_launch_stops_all(tmp_path):
    with pytest.raises(RuntimeError, match='rank 1: ValueError: image 7 is broken'):
        launch(work.dies, 2, 'error', str(tmp_path), timeout=600)
    assert seconds_since_death(tmp_path) < 60


@nightly
def test_torchrun_stops_all(tmp_path):
    script = tmp_path/'run.py'
    script.write_text(f"import _parallel_work as w; w.dies('killed', {str(tmp_path)!r})")
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            str(script),
        ],
        env=env(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert r.returncode and re.search(
        'Signal 9|exitcode *: -9|stopped because another', r.stderr
    ), r.stderr
    assert seconds_since_death(tmp_path) < 60


@pytest.mark.parametrize('how', ['killed', pytest.param('hangs', marks=nightly)])
def test_survivor_stops_by_itself(how, tmp_path):
    "Without an agent that watches, as between machines"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    e = env(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    code = f'import _parallel_work as w; w.dies({how!r}, {str(tmp_path)!r})'
    ps = [
        subprocess.Popen(
            [sys.executable, '-c', code],
            env=e | dict(RANK=str(r), LOCAL_RANK=str(r)),
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        err = ps[0].communicate(timeout=600)[1]
        assert seconds_since_death(tmp_path) < 60
        assert (
            ps[0].returncode
            and 'rank 0 stopped because another of the 2 processes died or hung' in err
        ), err
    finally:
        for p in ps:
            p.kill()
            p.wait()
