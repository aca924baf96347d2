"The ImageNet-64 recipes from the shell: bundled layout, tiny network, what is refused"
import json

import pytest
import torch

from dmd2_nb import cli
from dmd2_nb.assets import data_path
from dmd2_nb.core import rng
from dmd2_nb.denoiser import EDMPrecond
from dmd2_nb.features import lite0
from dmd2_nb.fid import Stats
from dmd2_nb.imagenet64 import RECIPES, FastGenScore, balanced_conds, imagenet64_config
from dmd2_nb.images import ImageData, in_memory, open_images
from dmd2_nb.jobs import first_networks
from dmd2_nb.recipes import recipe
from dmd2_nb.unet import ADMUNet
from dmd2_nb.weights import save_denoiser

demo = str(data_path('imagenet64_layout_demo.zip'))


def tiny():
    torch.manual_seed(0)
    return EDMPrecond(
        ADMUNet(
            img_resolution=64,
            label_dim=1000,
            model_channels=8,
            num_blocks=1,
            channel_mult=(1, 1, 1, 1),
            channel_mult_emb=2,
            attn_resolutions=(),
            dropout=0.0,
        )
    )


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('imagenet64')
    save_denoiser(tiny(), folder/'teacher.safetensors')
    torch.save(
        {f'real_unet.{k}': v for k, v in tiny().state_dict().items()}
        | {f'fake_unet.{k}': v for k, v in tiny().state_dict().items()},
        folder / 'pytorch_model_1.bin',
    )
    torch.manual_seed(1)
    f = torch.randn(3000, 1280)
    Stats.of_features(f, lite0().name).save(folder/'stats.npz')
    return folder


def run(files, *args):
    return cli.distill_main(
        [
            'imagenet64',
            '--teacher',
            str(files / 'teacher.safetensors'),
            '--data',
            demo,
            '--features',
            'lite0',
            '--reference',
            str(files / 'stats.npz'),
            '--out',
            str(files / 'runs'),
            '--batch',
            '2',
            '--iters',
            '2',
            '--eval-n',
            '8',
            '--device',
            'cpu',
            '--set',
            'dtype=float32',
            *args,
        ]
    )


@pytest.mark.filterwarnings('ignore:8 images for 1280 features')
def test_from_the_shell(files, monkeypatch, capsys):
    "The whole command: a run, and a second one that begins with the first one's networks"
    monkeypatch.setattr(cli, 'PICTURES', {})
    assert run(files, '--name', 'one', '--keep-state') == 0, capsys.readouterr().err
    m = json.loads((files/'runs/one/metrics.json').read_text())
    assert (
        list(m['rows']) == ['real', 'start', 'generator', 'best of 1, chosen by frechet']
        and m['rows']['generator']['n'] == 8
        and m['g_updates'] == 1
    )
    assert 'generator' in capsys.readouterr().out
    config = json.loads((files/'runs/one/config.json').read_text())['config']
    assert (config['lr_g'], config['ttur'], config['gan_g'], config['levels']) == (
        2e-6,
        5,
        3e-3,
        [80.0],
    )
    assert (
        cli.distill_main(
            [
                'imagenet64-resume',
                '--teacher',
                str(files / 'teacher.safetensors'),
                '--data',
                demo,
                '--device',
                'cpu',
                '--features',
                'lite0',
            ]
        )
        == 2
    )
    assert '--begin' in capsys.readouterr().err


def test_first_networks_come_from_the_earlier_run(files, tmp_path):
    from dmd2_nb.system.checkpoint import save_folder
    other, T = tiny(), tiny()
    with torch.no_grad():
        for p in other.parameters(): p.add_(torch.randn(p.shape, generator=rng(3)))
    save_folder(tmp_path/'run'/'state', dict(generator=other.state_dict(), fake=T.state_dict()), {})
    G, fake = first_networks(recipe('imagenet64-resume'), T, tmp_path/'run')
    assert all(torch.equal(a, b) for a, b in zip(G.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(fake.parameters(), T.parameters())) and all(
        p.requires_grad for p in fake.parameters()
    )
    with pytest.raises(FileNotFoundError): first_networks(recipe('imagenet64-resume'), T, tmp_path)


@pytest.mark.parametrize('args, words', [
    ((), '--data'),
    (('--data', demo), '--teacher'),
    (('--data', str(data_path('fashion16_6k.npz')), '--teacher', 'x'), '16x16'),
    (('--data', demo, '--teacher', 'nowhere.pkl'), 'nowhere.pkl'),
    (('--data', demo, '--teacher', 'T', '--features', 'lite0', '--reference', 'nowhere.npz'), 'nowhere.npz'),
    (('--data', demo, '--teacher', 'T', '--features', 'small_classifier'), 'small_classifier'),
])
def test_refusals(files, tmp_path, capsys, args, words):
    "One line, exit code 2, and nothing left behind"
    args = [str(files/'teacher.safetensors') if a == 'T' else a for a in args]
    assert (
        cli.distill_main(['imagenet64', *args, '--out', str(tmp_path / 'runs'), '--device', 'cpu'])
        == 2
    )
    err = capsys.readouterr().err.strip()
    assert words in err and '\n' not in err and not (tmp_path/'runs').exists()


def test_reference_is_for_statistics(tmp_path, capsys):
    assert cli.distill_main(['fashion16', '--reference', 'x.npz', '--out', str(tmp_path)]) == 2
    assert 'not with statistics' in capsys.readouterr().err


def test_labels_outside_the_classes():
    from dataclasses import replace
    data = in_memory(open_images(demo))
    with pytest.raises(ValueError, match='outside the 1000 classes'):
        replace(
            data,
            labels=data.labels + 1000 - data.labels.max(),
            class_names=recipe('imagenet64').classes,
        )


def test_every_class_equally_often():
    data = ImageData(
        torch.zeros(10, 3, 2, 2, dtype=torch.uint8),
        torch.arange(10),
        class_names=tuple('abcdefghij'),
    )
    assert balanced_conds(data, 25).bincount().tolist() == [3]*5 + [2]*5


def test_configs():
    "The published numbers, once more and apart from the lesson"
    assert set(RECIPES) == {
        'imagenet64',
        'imagenet64-pretrain',
        'imagenet64-resume',
        'imagenet64-fastgen',
    }
    assert [r.iters for r in RECIPES.values()] == [200_000, 410_000, 140_000, 480_000]
    with pytest.raises(ValueError, match='one run'): imagenet64_config('resume', 'fastgen')
    with pytest.raises(ValueError, match='scratch, pretrain, resume'): imagenet64_config('long')


def test_fastgen_score_keeps_the_teachers_names():
    T = tiny()
    fake = FastGenScore.of(T)
    assert list(fake.state_dict()) == list(T.state_dict()) and not {
        id(p) for p in fake.parameters()
    } & {id(p) for p in T.parameters()}
