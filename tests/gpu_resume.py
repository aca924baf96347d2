"""Killed runs on a GPU, with deterministic algorithms: python tests/gpu_resume.py --out DIR writes DIR/resume_gpu.json

Each run is the bundled fashion16 recipe, shortened, in a process of its own. It is killed at a random moment after its first checkpoint,
and the same command goes on; its tensors and its log are compared with those of an unbroken run, bit by bit."""
import argparse, hashlib, json, os, random, signal, subprocess, sys, tempfile, time, warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch
from dmd2_nb.checkpoint import load_folder, steps
from dmd2_nb.jobs import distill_job
from dmd2_nb.recipes import recipe

ITERS, SAVE = 300, 40


def child(folder, device, graph):
    "One run, or the rest of it"
    torch.use_deterministic_algorithms(True, warn_only=True)
    r = recipe('fashion16')
    every = dict(log=15, show=0, save=SAVE, eval=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        distill_job(replace(r, every=every), out=folder, name='run', device=device, iters=ITERS, n_eval=64, graph=graph, keep_state=True)
    print(json.dumps(sorted({str(w.message).split('.')[0][:100] for w in told if 'determinis' in str(w.message)})))


def digest(folder):
    "All tensors and counters of the last checkpoint, and the log without its seconds"
    tensors, state = load_folder(steps(folder/'run'/'state')[0])
    h = hashlib.sha256(json.dumps({k: v for k, v in state.items() if k != 'extra'}, sort_keys=True).encode())
    for n in sorted(tensors):
        if n == 'random': continue
        for k, v in sorted(tensors[n].items()): h.update(k.encode()); h.update(v.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for line in (folder/'run'/'log.csv').read_text().splitlines(): cells = line.split(','); h.update(','.join(cells[:1]+cells[2:]).encode())
    return h.hexdigest()


def run(folder, device, graph, kill=None):
    "Start a run; with `kill`, end it so many seconds after its first checkpoint"
    args = [sys.executable, __file__, '--child', str(folder), '--device', device] + ['--graph']*graph
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if kill is not None:
        before = {s.name for s in steps(folder/'run'/'state')}
        while p.poll() is None and {s.name for s in steps(folder/'run'/'state')} <= before: time.sleep(0.005)
        time.sleep(kill)
        p.send_signal(signal.SIGKILL)
    out, err = p.communicate()
    if kill is None and p.returncode: sys.exit(err[-3000:])
    return p.returncode, out.strip().splitlines()[-1:] if out else []


def main(a):
    device = torch.cuda.get_device_name() if a.device == 'cuda' else 'cpu'
    res = dict(device=device, torch=torch.__version__, iterations=ITERS, save_every=SAVE, runs={})
    dice = random.Random(0)
    for graph in (False, True)[:1+(a.device == 'cuda')]:
        with tempfile.TemporaryDirectory() as d:
            begun = time.perf_counter()
            _, told = run(Path(d)/'one', a.device, graph)
            took = time.perf_counter()-begun
            run(Path(d)/'two', a.device, graph)
            want, again, rows = digest(Path(d)/'one'), digest(Path(d)/'two'), []
            for i in range(a.kills):
                folder = Path(d)/f'k{i}'
                code, _ = run(folder, a.device, graph, dice.uniform(0, 1.))
                at = [s.name for s in steps(folder/'run'/'state')]
                run(folder, a.device, graph)
                rows.append(dict(code=code, at=at[0] if at else None, same=digest(folder) == want))
                print(graph, rows[-1], flush=True)
        res['runs']['graphs' if graph else 'plain'] = dict(sha256=want, unbroken_agree=want == again, seconds=round(took, 1), not_deterministic=told, killed=rows)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    (Path(a.out)/'resume_gpu.json').write_text(json.dumps(res, indent=1))
    print(json.dumps(res, indent=1))


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--out', default='.'); p.add_argument('--device', default='cuda'); p.add_argument('--kills', type=int, default=5)
    p.add_argument('--child'); p.add_argument('--graph', action='store_true')
    a = p.parse_args()
    child(a.child, a.device, a.graph) if a.child else main(a)
