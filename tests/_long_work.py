"""A long toy run as a command would make it, with log, guard and checkpoints: python
tests/_long_work.py ITERATIONS WARM FOLDER

Prints one line of JSON: memory and open files along the way, and what logging and watching cost."""
import gc, io, json, os, sys, time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))

import torch
from dmd2_nb.jobs import COLUMNS
from dmd2_nb.lab.health_runs import toy_run
from dmd2_nb.system.checkpoint import save_step, steps
from dmd2_nb.runs import Run, follow
from dmd2_nb.train import save_state, train

torch.set_num_threads(1)


class Clock:
    "Time of what is wrapped; CPU time by default: other people's processes don't count"
    def __init__(self, now=time.process_time): self.spent, self.now = Counter(), now
    def each(self, name, it):
        it = iter(it)
        while True:
            begun = self.now()
            try: o = next(it)
            except StopIteration: return
            finally: self.spent[name] += self.now()-begun
            yield o
    def call(self, name, f):
        def g(*args, **kwargs):
            begun = self.now()
            try: return f(*args, **kwargs)
            finally: self.spent[name] += self.now()-begun
        return g


def facts():
    gc.collect()
    rss = int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')
    return dict(mib=rss/2**20, files=len(os.listdir('/proc/self/fd')))


def main(n, warm, folder, **changes):
    clock, folder, seen = Clock(), Path(folder), {}
    dmd, guard, reals = toy_run(0, **changes)
    look = clock.call('facts', facts)
    guard_call, numbers = clock.call('guard', guard.__call__), clock.call('guard', guard.numbers)
    def logs():
        for log in clock.each('train', train(dmd, None, n, reals())):
            guard_call(log)
            yield log
            if dmd.step == warm or dmd.step % 1000 == 0: seen[dmd.step] = look()
    save = clock.call(
        'save',
        lambda step, **more: save_step(
            folder / 'state', step, lambda p: save_state(dmd, p, **more, guard=guard.state())
        ),
    )
    begun = time.process_time()
    with redirect_stdout(io.StringIO()):
        follow(
            logs(),
            Run(folder),
            COLUMNS,
            n,
            log_every=10,
            extra=lambda: dict(g_updates=dmd.g_updates) | numbers(),
            save=(500, save),
        )
    total = time.process_time()-begun-clock.spent.pop('facts')
    last = facts()
    return dict(
        iterations=n,
        warm=warm,
        seen=seen,
        growth=last['mib'] / seen[warm]['mib'] - 1,
        files=[seen[warm]['files'], last['files']],
        steps=[p.name for p in steps(folder / 'state')],
        seconds=total,
        logger=(total - sum(clock.spent.values())) / total,
        guard=clock.spent['guard'] / total,
        save=clock.spent['save'] / total,
        ms=1000 * clock.spent['train'] / n,
    )


if __name__ == '__main__':
    n, warm, folder, *changes = sys.argv[1:]
    print(
        json.dumps(main(int(n), int(warm), folder, **json.loads(changes[0] if changes else '{}')))
    )
