"Images of one's own, from a folder to a generator with three commands, and what the commands say on the way"
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2_nb import cli
from dmd2_nb.images import ImageData, fashion16
from dmd2_nb.recipes import recipe_for


def call(line): return cli.main(line.split())


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder of pictures in two classes, of several sizes and modes, and what three commands make of it"
    here = tmp_path_factory.mktemp('own')
    data = fashion16()
    for kind, name in enumerate(data.class_names[:2]):
        to = here/'pics'/name.replace('/', '-').title()
        to.mkdir(parents=True)
        for j, x in enumerate(data.images[data.labels == kind][:20]):
            im = Image.fromarray(x[0].numpy()).resize((20+j, 24+j % 5))
            im.convert(['L', 'RGB', 'RGBA', 'P'][j % 4]).save(to/f'{j}.png')
    with pytest.MonkeyPatch.context() as m:
        m.chdir(here)
        m.setattr(cli, 'PICTURES', {})
        assert call('prepare pics pets.zip --size 8') == 0
        assert call('train_teacher pets.zip --steps 4 --eval-n 12 --device cpu') == 0
        assert call(
            'distill pets.zip --iters 64 --batch 8 --eval-n 12 --device cpu --keep-state '
            '--dashboard page.html'
        ) == 0
    return here


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(cli, 'PICTURES', {})
    return place


def test_three_commands(inside):
    "The runs are called after the file, classes and colours are the data's, and a card explains the folder"
    run = inside/'runs'/'pets-1'
    config = json.loads((run/'config.json').read_text())
    assert config['images']['shape'] == [3, 8, 8] and config['images']['classes'] == 2
    assert set(json.loads((run/'metrics.json').read_text())['rows']) == {
        'real', 'teacher', 'start', 'generator'
    }
    card = (run/'README.md').read_text()
    assert '# pets-1' in card and 'dmd2_distill pets.zip --iters 64' in card and 'generator' in card
    assert (inside/'page.html').stat().st_size > 1000


def test_a_run_by_its_name(inside, capsys):
    assert call('sample pets-1 --label TROUSER --n 4 --out a.npz') == 0
    assert np.load('a.npz')['images'].shape == (4, 3, 8, 8)
    assert call('sample --list') == 0
    out = capsys.readouterr().out
    assert 'pets-1' in out and 'pets-teacher-1' in out and 'fashion16_1step' in out
    for line, word in (
        ('sample pets-1 --label trowser', 'did you mean Trouser?'),
        ('sample pest-1', 'did you mean pets-1?'),
        ('distill pets.zip --itres 3', 'did you mean --iters?'),
        ('distill pets.zip --set ttru=3', 'did you mean ttur?'),
        ('distill pest.zip', 'neither a file nor a folder'),
        ('distill pets.zip --data pets.zip', '--data'),
        ('distill pets.zip --out elsewhere', 'dmd2_train_teacher pets.zip'),
        ('distill pets.zip --name pets-1 --ttur 3', 'go on with its own settings'),
    ):
        assert call(line) == 2
        err = capsys.readouterr().err.strip()
        assert len(err.splitlines()) == 1 and word in err, err


def test_evaluated_with_its_own_images(inside, capsys):
    assert call('evaluate pets-1 --n 12 --out e.json') == 0
    assert 'against pets.zip' in capsys.readouterr().out
    assert json.loads((inside/'e.json').read_text())['settings']['against'] == 'pets.zip'


def test_longer(inside, capsys):
    "More iterations than before go on with the finished run that has kept its state"
    assert call('distill pets.zip --iters 66 --batch 8 --eval-n 12 --device cpu') == 0
    assert 'runs/pets-1: goes on at iteration 64' in capsys.readouterr().out


def test_dry_run_and_help(inside, capsys):
    before = sorted(inside.rglob('*'))
    assert call('distill pets.zip --dry-run') == 0 and call('train_teacher pets.zip --dry-run') == 0
    assert sorted(inside.rglob('*')) == before
    assert 'nothing was done' in capsys.readouterr().out
    for line in ('distill --help', 'sample --version', 'evaluate --help'):
        with pytest.raises(SystemExit) as e: call(line)
        assert not e.value.code
    out = capsys.readouterr().out
    assert 'lr_fake=0.002' in out and 'examples:' in out and 'below zero' in out
    assert call('--version') == 0


@pytest.mark.parametrize('side, n, net', [(8, 9, 'UNet'), (32, 300, 'UNet'), (64, 10, 'UNet'), (64, 3000, 'ADMUNet')])
@pytest.mark.parametrize('labels', [True, False])
def test_chosen(side, n, net, labels):
    "A network can be built for every size, with and without classes"
    from dmd2_nb.weights import build_denoiser
    x = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    x[::2] = 255
    r = recipe_for(ImageData(x, torch.arange(n) % 3 if labels else None, name='mine'))
    with torch.device('meta'): D = build_denoiser(r.net)
    assert r.net['net'] == net and tuple(D.shape) == (1, side, side)
    assert bool(r.teacher['label_dropout']) == labels
