"""Thousands of broken pickles through the restricted reader, in a process that watches itself:
python tests/_fuzz_work.py FOLDER N

Nothing may be executed, imported or written, no error may be other than one ValueError of one
line, and the memory must stay small.
Prints one line of JSON."""
import collections, json, os, pickle, pickletools, random, resource, struct, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.system.safe_pickle import RefusedPickle, read_pickle, write_edm_pickle
from dmd2_nb.teacher import load_edm
from dmd2_nb.unet import ADMUNet

def most():
    """Most memory of this process so far, KiB; Linux's getrusage also counts what the parent had
    when it started this one"""
    try:
        return int(
            next(
                l
                for l in Path('/proc/self/status').read_text().splitlines()
                if l.startswith('VmHWM')
            ).split()[1]
        )
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

HARM = (
    'os.',
    'subprocess.',
    'socket.',
    'shutil.',
    'exec',
    'compile',
    'ctypes.',
    'import',
    'pickle.find_class',
    'code.',
    'builtins.input',
    'webbrowser.',
    'signal.',
    'urllib.',
)
QUIET = ('os.listdir', 'os.scandir', 'os.fspath')


def seeds(folder):
    "Whole files to break: a teacher as it is published, containers, tensors, NumPy numbers, by all protocols"
    torch.manual_seed(0)
    D = EDMPrecond(
        ADMUNet(
            4,
            model_channels=4,
            channel_mult=[1],
            num_blocks=0,
            attn_resolutions=[],
            channel_mult_emb=1,
            label_dim=2,
            dropout=0.0,
        )
    )
    for m in D.modules():
        m.skip_scale, m.names = (
            np.sqrt(0.5),
            collections.OrderedDict(a=np.float32(2), c=torch.Size([2])),
        )
    args = dict(
        img_channels=3,
        use_fp16=False,
        sigma_min=0,
        sigma_max=float('inf'),
        sigma_data=0.5,
        model_type='DhariwalUNet',
    ) | {k: v for k, v in D.model.config.items() if k not in ('in_channels', 'out_channels')}
    out = []
    for p in (2, 4):
        write_edm_pickle(dict(ema=D), folder/'seed.pkl', args, dict(ADMUNet='DhariwalUNet'), p)
        out.append((folder/'seed.pkl').read_bytes())
    data = dict(
        a=[1, 2.5, None, True, -(2**70)],
        b=('x', b'y' * 40, {3, 4}, frozenset({5})),
        c={'d': {'e': ()}},
        f=collections.OrderedDict(g=1),
        h=['tekst', 'ü'],
    )
    t = torch.arange(12.).reshape(3, 4)
    for p in range(6):
        out += [
            pickle.dumps(data, p),
            pickle.dumps(dict(t=t, v=t[1:, ::2].T, h=t.half()), max(p, 2)),
            pickle.dumps(['a prompt', 'another one'], p),
        ]
    return out


class Calls:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


def poison(dice):
    "A piece of a pickle that an ordinary reader would execute"
    f, *args = dice.choice(
        [
            (os.system, 'touch owned'),
            (os.mkdir, 'owned'),
            (eval, 'open("owned","w")'),
            (exec, 'import os'),
            (getattr, 'x', 'upper'),
            (__import__, 'os'),
            (open, 'owned', 'w'),
            (torch.load, 'owned'),
            (print, 'owned'),
            (os.kill, 0, 9),
            (tempfile.mkdtemp,),
        ]
    )
    return pickle.dumps(Calls(f, *args), dice.choice((0, 1, 2, 4)))


def mutate(data, dice, others):
    "One to four changes: bits, bytes, cuts, doubled parts, lengths, instructions, code from elsewhere"
    b = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        i, n = dice.randrange(len(b)+1), dice.randrange(1, 60)
        kind = dice.randrange(11)
        if kind == 0 and i < len(b): b[i] ^= 1 << dice.randrange(8)
        elif kind == 1 and i < len(b): b[i] = dice.randrange(256)
        elif kind == 2: del b[i:i+n]
        elif kind == 3: b[i:i] = b[i:i+n]*dice.randint(1, 50)
        elif kind == 4:
            b[i:i+4] = struct.pack('<I', dice.choice((0, 1, 2**31-1, 2**31, 2**32-1, 2**24)))
        elif kind == 5: b[i:i+8] = struct.pack('<Q', dice.choice((2**63-1, 2**63, 2**40, 2**64-1)))
        elif kind == 6:
            b[i:i] = dice.choice(pickletools.opcodes).code.encode('latin1')*dice.randint(1, 300)
        elif kind == 7: b[i:i] = poison(dice)[:-1]
        elif kind == 8: b[i:i] = poison(dice)
        elif kind == 9:
            o = dice.choice(others)
            j = dice.randrange(len(o))
            b[i:i] = o[j:j+dice.randrange(1, 400)]
        elif kind == 10: b[i:] = b''
        if len(b) > 10**6: del b[10**6:]
    return bytes(b)


def main(folder, n, seed=0):
    folder, dice = Path(folder), random.Random(seed)
    os.chdir(folder)
    whole = seeds(folder)
    for o in whole: read_pickle(o)
    load_edm(folder/'seed.pkl')
    seen, on = collections.Counter(), [False]
    def hook(event, args):
        nonlocal seen
        if on[0] and event.startswith(HARM) and event not in QUIET:
            seen[f'{event} {str(args)[:80]}'] += 1
        if on[0] and event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+'):
            seen[f'open {args[0]} {args[1]}'] += 1
    sys.addaudithook(hook)
    on[0] = True  # a watch that sees nothing proves nothing
    os.mkdir('control')
    os.rmdir('control')
    compile('1', '', 'eval')
    open('control', 'w').close()
    os.remove('control')
    on[0], control, seen = False, len(seen), collections.Counter()
    warm, modules, ends, wrong, slow = 0, set(sys.modules), collections.Counter(), [], 0.
    broken = folder/'broken.pkl'
    for i in range(n):
        data = mutate(dice.choice(whole), dice, whole)
        through_file = i % 10 == 0
        if through_file: broken.write_bytes(data)
        begun, on[0] = time.perf_counter(), True
        try:
            if through_file: load_edm(broken)
            else: read_pickle(data)
            ends['read'] += 1
        except RefusedPickle as e:
            ends['refused'] += 1
            err = str(e)
        except ValueError as e:
            ends['damaged'] += 1
            err = str(e)
        except BaseException as e: wrong.append(f'{i}: {type(e).__name__}: {e}'[:300])
        else: err = ''
        on[0] = False
        slow = max(slow, time.perf_counter()-begun)
        if '\n' in err or len(err) > 500: wrong.append(f'{i}: {err[:300]}')
        if i == n//20: warm = most()
    peak = most()
    return dict(
        n=n,
        control=control,
        ends=ends,
        wrong=wrong[:5],
        n_wrong=len(wrong),
        harm=dict(seen),
        new_modules=sorted(set(sys.modules) - modules),
        files=sorted(p.name for p in folder.iterdir()),
        slowest=round(slow, 3),
        peak_mib=round(peak / 1024),
        growth_mib=round((peak - warm) / 1024),
    )


if __name__ == '__main__': print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
