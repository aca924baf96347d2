"""What this version writes, kept for later ones: `python tests/make_stored.py`, once a release

A folder `stored_VERSION` gets a teacher's file and images, a run of twelve iterations with its
checkpoints, the generator's folder of `save_pretrained`, and what became of both: the networks of
the checkpoint after ten more iterations, four samples. tests/test_stored.py opens every such folder."""
import contextlib, io, os, shutil, sys, tempfile
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import _survive_work as work
from dmd2_nb import __version__, cli, load_generator, recipes

command = 'distill --teacher teacher.safetensors --data good.npz --device cpu --keep-state --iters {}'
first, later = 12, 22
networks = 'generator', 'fake', 'ema', 'head'


def give(iters):
    "The command, in the folder where we are; its exit code"
    was = recipes.RECIPES['fashion16'], cli.PICTURES
    recipes.RECIPES['fashion16'], cli.PICTURES = work.tiny, {}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            return cli.main(command.format(iters).split()), out.getvalue()
    finally: recipes.RECIPES['fashion16'], cli.PICTURES = was


def main(target):
    torch.set_num_threads(1)
    target, home = Path(target).resolve(), os.getcwd()
    target.mkdir()
    with tempfile.TemporaryDirectory() as d:
        work.prepare(Path(d))
        os.chdir(d)
        assert give(first)[0] == 0
        shutil.copytree(d, target/'begun')
        load_generator('fashion16-1').save_pretrained(target/'generator')
        x = load_generator(target/'generator').sample(4, seed=5)
        np.savez_compressed(target/'samples.npz', x=x.numpy())
        assert give(later)[0] == 0
        (target/'later').mkdir()
        for n in networks:
            shutil.copy(Path(f'runs/fashion16-1/state/step-{later}/{n}.safetensors'), target/'later')
        os.chdir(home)


if __name__ == '__main__':
    main(sys.argv[1] if sys.argv[1:] else Path(__file__).parent/f"stored_{__version__.replace('.', '_')}")
