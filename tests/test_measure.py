"Everything measured alike: what is written, what is not measured twice, and sets that cannot be measured"
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmd2_nb import measure as M
from dmd2_nb import recipes
from dmd2_nb.fid import Stats, compare_features, frechet_of
from dmd2_nb.features import Features, extract
from dmd2_nb.images import ImageData, drawn_rows
from dmd2_nb.weights import build_denoiser, save_denoiser

pytestmark = pytest.mark.filterwarnings('ignore:.*the covariance is singular')
quiet = dict(say=None, features='pixels')


def pictures(n, seed=0, size=6, channels=3):
    return torch.randint(
        0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed)
    ).byte()


def folder(path, images):
    path.mkdir()
    for i, x in enumerate(images):
        Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()).save(path/f'{i:03d}.png')
    return path


def pack(path, images):
    np.savez(path, images=images.permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = pictures(130, 1, 4), pictures(150, 2, 4)//2
    return folder(tmp_path/'a', a), pack(tmp_path/'b.npz', b), a, b


def test_a_folder_against_another(sets):
    "The same numbers from files as from tensors, at most n of them, and in metrics.json with what they were made with"
    a, b, xa, xb = sets
    got = M.measure([a], b, n=120, **quiet)
    see = Features(M.Pixels(), 'pixels')
    rows = drawn_rows(130, 120)
    want = compare_features(extract(xa[rows], see), extract(xb, see), 'pixels')
    row = got['rows'][str(a)]
    assert (
        row == {k: v for k, v in want.items() if k not in ('n_real', 'features')}
        and row['n'] == 120
    )
    assert got['settings'] | dict(version='') == dict(
        version='', against=str(b), features='pixels', n=120, n_real=150, steps=None
    )
    assert json.loads((sets[0].parent/'metrics.json').read_text()) == got
    assert M.measure([b], a, out='there/it.json', n=120, **quiet)['rows'][str(b)][
        'kid'
    ] == pytest.approx(M.Real.of(a, 'pixels').row(xb[drawn_rows(150, 120)])['kid'])


def test_files_are_read_in_batches(sets, monkeypatch):
    "No more than a batch of a folder's images is decoded at a time"
    asked, pixels = [], M.Drawn.pixels
    monkeypatch.setattr(
        M.Drawn, 'pixels', lambda self, rows: asked.append(len(rows)) or pixels(self, rows)
    )
    M.Real.of(sets[0], 'pixels')
    assert asked == [64, 64, 2]


def test_held_out_images_are_a_second_reference(monkeypatch, tmp_path):
    x, y = pictures(60, 3, 8, 1), torch.arange(60) % 10
    data = ImageData(x, y, class_names=tuple('abcdefghij'), concepts=torch.arange(60))
    r = replace(recipes.RECIPES['fashion16'], features='pixels', holdout=0.3)
    monkeypatch.setitem(recipes.RECIPES, 'fashion16', r)
    monkeypatch.setattr(M, 'open_data', lambda r: data.holdout(0.3))
    row = M.Real.of('fashion16').row(x[:20])
    assert {'kid', 'kid_se', 'kid_held', 'kid_held_se'} <= set(row) and row['kid'] != row[
        'kid_held'
    ]


def weights(path, seed, **meta):
    torch.manual_seed(seed)
    net = dict(
        net='UNet',
        args=dict(img_resolution=8, in_channels=1, label_dim=10, channels=[4], emb=8),
        sigma_data=0.6,
    )
    return save_denoiser(
        build_denoiser(net), path, levels=[2.0], classes=[str(i) for i in range(10)], **meta
    )


def test_imagenets_classes_in_turn(tmp_path, monkeypatch):
    """Against statistics there are no labels to copy: a model of ImageNet-64 is asked for each
    class equally often, another one for random classes"""
    pack(tmp_path/'real.npz', pictures(40, 5, 8, 1))
    ref, asked, draw = M.Real.of(tmp_path/'real.npz', 'pixels'), [], M.draw
    monkeypatch.setattr(
        M,
        'draw',
        lambda sampler, shape, conds, *a, **k: (
            asked.append(conds) or draw(sampler, shape, conds, *a, **k)
        ),
    )
    for data in ('imagenet64', 'fashion16', None):
        M._model_row(
            ref,
            weights(tmp_path / 'g.safetensors', 0, **(dict(data=data) if data else {})),
            25,
            0,
            None,
            device='cpu',
            old={},
        )
    assert (
        asked[0].tolist() == [i % 10 for i in range(25)]
        and torch.equal(asked[1], asked[2])
        and sorted(asked[1].tolist()) != sorted(asked[0].tolist())
    )


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [weights(tmp_path/'run'/'checkpoints'/f'{i}.safetensors', i) for i in (2, 10, 1)]
    assert [f.stem for f in M.checkpoints('run')] == ['1', '2', '10'], 'by number, not by letter'
    pack(tmp_path/'real.npz', pictures(40, 5, 8, 1))
    drawn, draw = [], M.draw
    monkeypatch.setattr(M, 'draw', lambda *a, **k: drawn.append(a[3]) or draw(*a, **k))
    def go(**kw):
        drawn.clear()
        return M.measure(['run'], 'real.npz', sweep=True, **(dict(n=16) | quiet | kw))
    first = go()
    assert drawn[:3] == [0, 0, 0] and set(drawn[3:]) == {1}, (
        'the choice is made with seed 0, the winner and the last are measured with seed 1'
    )
    total = len(drawn)
    assert go() == first and not drawn
    weights(files[0], 7)
    go()
    assert 1 <= len(drawn) <= 3, (
        'the file that has changed, and whatever is measured again because of it'
    )
    go(n=20)
    assert len(drawn) >= 3
    (tmp_path/'metrics.json').write_text('{"rows": 3')
    go()
    assert len(drawn) >= 3 and total in (4, 5)


def test_an_interrupted_sweep_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3): weights(tmp_path/'run'/f'{i}.safetensors', i)
    pack(tmp_path/'real.npz', pictures(40, 5, 8, 1))
    calls, draw = [], M.draw
    def tired(*a, **k):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return draw(*a, **k)
    monkeypatch.setattr(M, 'draw', tired)
    with pytest.raises(KeyboardInterrupt): M.measure(['run'], 'real.npz', sweep=True, n=16, **quiet)
    assert len(json.loads((tmp_path/'metrics.json').read_text())['rows']) == 3  # with the floor
    M.measure(['run'], 'real.npz', sweep=True, n=16, **quiet)
    assert len(calls) in (5, 6), 'the third, the winner and perhaps the last'
    whole = json.loads((tmp_path/'metrics.json').read_text())
    monkeypatch.setattr(M, '_model_row', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): M.measure(['run'], 'real.npz', sweep=True, n=16, **quiet)
    assert json.loads((tmp_path / 'metrics.json').read_text()) == whole, (
        'stopped again, nothing is lost'
    )


def test_the_winner_is_named_by_its_first_numbers(tmp_path, monkeypatch):
    "Planted rows: the lowest is chosen over all seeds, and measured again with a seed that was not used"
    plan = [('r: 1', 'f1'), ('r: 2', 'f2'), ('r: 3', 'f3')]
    rows = {
        f'r: {i}, seed {s}': dict(kid=v)
        for i, vs in ((1, (0.1, 0.9)), (2, (0.3, 0.3)), (3, (0.5, 0.5)))
        for s, v in enumerate(vs)
    }
    said = []
    M._choose(
        'r', [(n, M.Path(f)) for n, f in plan], rows, 'kid', (0, 1), add=lambda *a: said.append(a)
    )
    assert said == [
        ('r: best of 3 by kid (f2), again with seed 2', M.Path('f2'), 2),
        ('r: last (f3), with seed 2', M.Path('f3'), 2),
    ]


def test_statistics_as_reference(tmp_path, monkeypatch):
    """EDM's way for ImageNet-64: samples against means and covariances, through Inception when
    nothing else is said, called FID"""
    monkeypatch.chdir(tmp_path)
    class Colours(torch.nn.Module):
        def forward(self, x): return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)
    asked = []
    monkeypatch.setattr(
        M, 'feature_extractor', lambda *a, **k: asked.append((a, k)) or Features(Colours(), a[0])
    )
    a, b = pictures(40, 1, 8), pictures(90, 2, 8)
    s = Stats.of(b, Features(Colours(), ''))
    np.savez('edm.npz', mu=s.mu.numpy(), sigma=s.cov.numpy())
    pack(tmp_path/'a.npz', a)
    got = M.measure(['a.npz'], 'edm.npz', weights='w.pth', download=True, say=None)
    assert asked == [(('inception', 'cpu', 'w.pth'), dict(download=True))]
    assert (
        set(got['rows']) == {'a.npz'}
        and set(got['rows']['a.npz']) == {'fid', 'fid_se', 'n'}
        and got['settings']['n_real'] == 0
    )
    assert got['rows']['a.npz']['fid'] == pytest.approx(
        frechet_of(Stats.of(a, Features(Colours(), '')), s), rel=1e-6
    )


def test_sets_that_cannot_be_measured(sets, tmp_path):
    "One clear error each, and no metrics.json"
    a, b, xa, xb = sets
    (tmp_path/'empty').mkdir()
    mixed = folder(tmp_path/'mixed', pictures(20))
    Image.new('RGB', (9, 6)).save(mixed/'zz.png')
    folder(tmp_path/'grey', pictures(20, channels=1))
    few, eight = (
        folder(tmp_path / 'few', pictures(3, size=4)),
        folder(tmp_path / 'eight', pictures(8, size=4)),
    )
    np.savez(tmp_path/'nan.npz', images=np.full((20, 4, 4, 3), np.nan))
    Stats.of(xb, Features(M.Pixels(), 'other')).save(tmp_path/'other.npz')
    np.savez(tmp_path/'half.npz', mu=np.zeros(48))
    (tmp_path/'notes.txt').write_text('x')
    for call, words in (
        ((['empty'], b), 'empty: no images'),
        ((['mixed'], b), r'zz.png is \(3, 6, 9\), but 000.png is \(3, 6, 6\)'),
        ((['grey'], b), 'grey: pixels: .*grey images'),
        (([a], few), 'few: 3 images are too few to compare with, at least 8'),
        ((['few'], eight), 'few: 3 images have no third neighbour'),
        ((['nan.npz'], b), 'nan.npz: images must be uint8'),
        (
            ([a], 'other.npz'),
            "other.npz: reference statistics are of 'other' features, not of 'pixels'",
        ),
        (([a], 'half.npz'), 'half.npz: has no sigma'),
        (([a], 'gone'), 'gone: neither a recipe .*nor images'),
        ((['notes.txt'], b), 'notes.txt'),
        (([a], 'notes.txt'), 'notes.txt'),
    ):
        with pytest.raises((ValueError, TypeError, OSError), match=words) as e:
            M.measure(*call, **quiet)
        assert len(str(e.value).splitlines()) == 1
    with pytest.raises(ValueError, match='grey images'):
        M.measure(['grey'], b, say=None, features='pixels')
    assert not (tmp_path/'metrics.json').exists()
