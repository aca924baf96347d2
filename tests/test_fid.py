"Parity with other implementations on the same features, brute force, and files that must not be believed"
import math, warnings, weakref

import numpy as np
import pytest
import torch
from torch import nn

from dmd2_nb import fid as F
from dmd2_nb.features import Features, extract
from dmd2_nb.metrics import frechet, frechet_distance, kid as kid_features


def features(n, d=48, shift=0., seed=0):
    "Correlated, skewed, positive: like what a pooled network layer gives"
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)/d**.5
    return (torch.randn(n, d, generator=g, dtype=torch.float64)@mix + shift).exp()


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return self.w*torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def see(name='mean'): return Features(Mean(), name)
def pictures(n, seed=0, size=8):
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)
    ).byte()


def test_frechet_equals_scipy():
    linalg = pytest.importorskip('scipy.linalg')
    a, b = features(900), features(700, shift=0.1, seed=1)
    (m1, c1), (m2, c2) = ((f.mean(0).numpy(), np.cov(f.numpy(), rowvar=False)) for f in (a, b))
    root = linalg.sqrtm(c1@c2).real
    assert math.isclose(
        F.frechet_of(a, b), ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * root), rel_tol=1e-6
    )


def test_frechet_and_kid_equal_torch_fidelity():
    tf_fid, tf_kid = (
        pytest.importorskip('torch_fidelity.metric_fid'),
        pytest.importorskip('torch_fidelity.metric_kid'),
    )
    a, b = features(1500), features(1200, shift=0.05, seed=1)
    theirs = tf_fid.fid_statistics_to_metric(
        tf_fid.fid_features_to_statistics(a), tf_fid.fid_features_to_statistics(b), verbose=False
    )['frechet_inception_distance']
    assert math.isclose(F.frechet_of(a, b), theirs, rel_tol=1e-6)
    opts = dict(
        kid_subsets=20,
        kid_subset_size=500,
        rng_seed=2020,
        verbose=False,
        kid_kernel='poly',
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1.0,
    )
    o = tf_kid.kid_features_to_metric(a, b, **opts)
    mean, spread = F.kid_subsets(a, b, 20, 500)
    assert math.isclose(mean, o['kernel_inception_distance_mean'], rel_tol=1e-9)
    assert math.isclose(spread, o['kernel_inception_distance_std'], rel_tol=1e-9)
    value, error = F.kid(a, b)
    assert abs(value-mean) < 4*error, 'all pairs and subsets estimate the same thing'


def test_precision_recall_equals_torch_fidelity_and_brute_force():
    prc = pytest.importorskip('torch_fidelity.metric_prc')
    a, b = features(180, 6), features(150, 6, shift=0.3, seed=1)
    p, r = F.precision_recall(a, b, k=3, block=32)
    o = prc.prc_features_to_metric(
        a, b, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert math.isclose(p, o['precision'], abs_tol=1e-6) and math.isclose(
        r, o['recall'], abs_tol=1e-6
    )
    def brute(x, ref):
        radii = [sorted(math.dist(u, v) for v in ref.tolist())[3] for u in ref.tolist()]
        return np.mean(
            [any(math.dist(u, v) <= rad for v, rad in zip(ref.tolist(), radii)) for u in x.tolist()]
        )
    assert math.isclose(p, brute(a, b), abs_tol=1e-9) and math.isclose(r, brute(b, a), abs_tol=1e-9)


def test_kid_of_all_pairs_equals_torch_fidelity():
    "One subset with everybody in it"
    tf = pytest.importorskip('torch_fidelity.metric_kid')
    a, b = features(400, 64), features(400, 64, shift=0.1, seed=1)
    theirs = tf.kid_features_to_metric(
        a, b, kid_subsets=1, kid_subset_size=400, rng_seed=2020, verbose=False
    )['kernel_inception_distance_mean']
    assert math.isclose(F.kid(a, b)[0], theirs, rel_tol=1e-9)
    assert math.isclose(F.kid(a.float(), b.float())[0], theirs, rel_tol=1e-3)


def test_parity_with_many_features():
    "1,024 of them: both distances within 1e-3 of torch-fidelity's"
    tf_kid = pytest.importorskip('torch_fidelity.metric_kid')
    linalg = pytest.importorskip('scipy.linalg')
    a, b = (
        torch.randn(
            1100, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(s)
        ).relu()
        * (1 + s)
        for s in (0, 1)
    )
    theirs = tf_kid.kid_features_to_metric(
        a, b, kid_subsets=2, kid_subset_size=500, rng_seed=2020, verbose=False
    )
    assert math.isclose(
        F.kid_subsets(a, b, 2, 500)[0], theirs['kernel_inception_distance_mean'], rel_tol=1e-3
    )
    (m1, c1), (m2, c2) = ((f.mean(0).numpy(), np.cov(f.numpy(), rowvar=False)) for f in (a, b))
    # tr sqrt(c1 c2) is the sum of the singular values of l1' l2
    l1, l2 = (linalg.cholesky(c, lower=True) for c in (c1, c2))
    want = ((m1-m2)**2).sum()+np.trace(c1)+np.trace(c2)-2*linalg.svdvals(l1.T@l2).sum()
    assert math.isclose(F.frechet_of(a, b), want, rel_tol=1e-3)


def test_precision_recall_error_equals_deleting_blocks_for_real():
    from dmd2_nb.core import rng
    from dmd2_nb.metrics import knn_precision_recall
    a, b = features(60, 5), features(83, 5, seed=1)
    got = knn_precision_recall(a, b, 3, 5, block=16)
    assert got[::2] == F.precision_recall(a, b)
    pa, pb = (f[torch.randperm(len(f), generator=rng(0, len(f)))].tensor_split(5) for f in (a, b))
    left = torch.tensor(
        [
            F.precision_recall(torch.cat(pa[:i] + pa[i + 1 :]), torch.cat(pb[:i] + pb[i + 1 :]))
            for i in range(5)
        ],
        dtype=torch.float64,
    )
    error = (4/5*((left-left.mean(0))**2).sum(0)).sqrt()
    assert got[1] > 0 and torch.allclose(torch.tensor(got[1::2], dtype=torch.float64), error)
    assert all(math.isnan(e) for e in knn_precision_recall(a[:4], b)[1::2]), (
        'four samples cannot lose a block and keep a third neighbour'
    )


def test_copies_are_within_their_own_balls():
    "Twenty pictures by heart: distances of 0 against radii of 0, in float32 features far from the origin"
    x = 100+features(20, 32).float()
    assert F.precision_recall(x.repeat(5, 1), x.repeat(9, 1)[torch.randperm(180)]) == (1., 1.)


def test_inception_score_by_hand(tmp_path):
    pytest.importorskip('torch_fidelity')
    logits = 3*torch.randn(40, 12, dtype=torch.float64)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(40))
    scores = []
    for part in logits[order].softmax(1).split(10):
        mean = part.mean(0).tolist()
        scores.append(
            math.exp(
                np.mean(
                    [sum(p * math.log(p / q) for p, q in zip(row, mean)) for row in part.tolist()]
                )
            )
        )
    got = F.inception_score(logits, 4)
    assert math.isclose(got[0], np.mean(scores), rel_tol=1e-9) and math.isclose(
        got[1], np.std(scores), rel_tol=1e-9
    )
    sure = torch.eye(4).repeat(100, 1)*100
    assert math.isclose(F.inception_score(sure, 1)[0], 4.0, rel_tol=1e-6), (
        'four classes, no doubt: exp(log 4)'
    )
    a = pictures(20)
    assert F.inception_score(a, 2, features=see()) == F.inception_score(extract(a, see()), 2)
    with pytest.raises(ValueError, match='20 images cannot be cut into 30 splits'):
        F.inception_score(a, 30, features=see())


def test_fid_of_images_equals_torch_fidelity_with_random_inception(tmp_path):
    "From pixels to the number, through the same random weights in the published layout"
    tf = pytest.importorskip('torch_fidelity.metric_fid')
    from dmd2_nb.features import InceptionNet, inception
    torch.manual_seed(0)
    torch.save(InceptionNet(None).graph.state_dict(), tmp_path/'w.pth')
    with pytest.warns(UserWarning, match='not the published file'):
        net = inception(tmp_path/'w.pth', batch=4)
    a, b = pictures(6), pictures(6, 1)//2
    with torch.no_grad(): fa, fb = (net.net.graph(x)[0].double() for x in (a, b))
    theirs = tf.fid_statistics_to_metric(
        tf.fid_features_to_statistics(fa), tf.fid_features_to_statistics(fb), verbose=False
    )['frechet_inception_distance']
    with pytest.warns(UserWarning, match='6 images for 2048 features'): ours = F.fid(a, b, net)
    assert math.isclose(ours, theirs, rel_tol=1e-3)


@pytest.mark.parametrize('blocks', [5, 10])
def test_kid_error_equals_deleting_blocks_for_real(blocks):
    "The block sums give what recomputing without each block gives"
    from dmd2_nb.core import rng
    a, b = features(60, 5), features(83, 5, seed=1)
    value, error = kid_features(a, b, blocks)
    pa, pb = (
        f[torch.randperm(len(f), generator=rng(0, len(f)))].tensor_split(blocks) for f in (a, b)
    )
    left = torch.tensor(
        [
            kid_features(torch.cat(pa[:i] + pa[i + 1 :]), torch.cat(pb[:i] + pb[i + 1 :]), 2)[0]
            for i in range(blocks)
        ],
        dtype=torch.float64,
    )
    assert math.isclose(
        error,
        ((blocks - 1) / blocks * ((left - left.mean()) ** 2).sum()).sqrt().item(),
        rel_tol=1e-9,
    )


def test_frechet_error_equals_deleting_blocks_for_real():
    a, b = features(300, 5), features(200, 5, seed=1)
    value, error = F.frechet_jackknife(a, b, 5)
    assert math.isclose(value, frechet(a, b), rel_tol=1e-9)
    pa, pb = (
        f[torch.randperm(len(f), generator=torch.Generator().manual_seed(len(f)))].tensor_split(5)
        for f in (a, b)
    )
    left = torch.tensor(
        [
            frechet(torch.cat(pa[:i] + pa[i + 1 :]), torch.cat(pb[:i] + pb[i + 1 :]))
            for i in range(5)
        ],
        dtype=torch.float64,
    )
    assert math.isclose(error, (4/5*((left-left.mean())**2).sum()).sqrt().item(), rel_tol=1e-6)
    fixed = F.frechet_jackknife(a, F.Stats.of_features(b), 5)
    assert math.isclose(fixed[0], value, rel_tol=1e-9) and fixed[1] != error


def test_streaming_keeps_digits():
    "Large mean, small spread: sums of squares of the raw numbers would lose it in float32"
    f = (1e4 + torch.randn(4000, 3, dtype=torch.float64)).float()
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
            self.i = 0
        def forward(self, x):
            self.i += len(x)
            return f[self.i-len(x):self.i]
    s = F.Stats.of(pictures(4000, size=1), Features(Given(), 'given'))
    assert torch.allclose(
        s.cov, torch.from_numpy(np.cov(f.double().numpy(), rowvar=False)), rtol=1e-9, atol=1e-9
    )


def test_statistics_of_a_long_run_keep_no_features():
    "50,000 images pass through; of their features no more than the last batches are ever alive"
    alive, most = weakref.WeakSet(), []
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
        def forward(self, x):
            most.append(len(alive))
            f = x.flatten(1)@torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
            alive.add(f)
            return f
    s = F.Stats.of(
        (torch.full((500, 3, 1, 1), i, dtype=torch.uint8) for i in range(100)),
        Features(Watched(), 'watched', batch=500),
    )
    assert (
        s.n == 50_000
        and len(most) == 100
        and max(most) <= 2
        and (s.mu.dtype, s.cov.dtype) == (torch.float64,) * 2
    )


def test_reference_files(tmp_path):
    a, b = pictures(40), pictures(40, 1)
    path = F.Stats.of(b, see()).save(tmp_path/'ref.npz')
    assert math.isclose(F.frechet_of(a, path, see()), F.frechet_of(a, b, see()), rel_tol=1e-9)
    z = np.load(path, allow_pickle=False)
    assert (z['mu'].dtype, z['sigma'].dtype, z['mu'].shape, z['sigma'].shape) == (
        np.float64,
        np.float64,
        (6,),
        (6, 6),
    ), 'what EDM reads'
    np.savez(tmp_path/'edm.npz', mu=z['mu'], sigma=z['sigma'])  # as EDM writes them
    assert math.isclose(
        F.frechet_of(a, tmp_path / 'edm.npz', see()), F.frechet_of(a, b, see()), rel_tol=1e-9
    )
    with pytest.raises(ValueError, match="are of 'mean' features, not of 'other'"):
        F.frechet_of(a, path, see('other'))
    np.savez(tmp_path/'wide.npz', mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(ValueError, match='statistics of 6 and 9 features'):
        F.frechet_of(a, tmp_path/'wide.npz', see())
    for name, arrays, message in (
        ('mu', dict(mu=z['mu']), 'has no sigma'),
        ('shape', dict(mu=z['mu'], sigma=np.eye(5)), 'do not go together'),
        ('nan', dict(mu=z['mu'] * np.nan, sigma=z['sigma']), 'not finite'),
    ):
        np.savez(tmp_path/f'{name}.npz', **arrays)
        with pytest.raises(ValueError, match=message):
            F.frechet_of(a, tmp_path/f'{name}.npz', see())
    (tmp_path/'cut.npz').write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='cut.npz: not a readable npz'):
        F.frechet_of(a, tmp_path/'cut.npz', see())
    with pytest.raises(FileNotFoundError, match='gone.npz'):
        F.frechet_of(a, tmp_path/'gone.npz', see())


def test_images_in_npz_are_images(tmp_path):
    a, b = pictures(30), pictures(30, 1)
    np.savez(tmp_path/'x.npz', arr_0=b.permute(0, 2, 3, 1).numpy())
    assert math.isclose(
        F.frechet_of(a, tmp_path / 'x.npz', see()), F.frechet_of(a, b, see()), rel_tol=1e-9
    )


def test_folders(tmp_path):
    from PIL import Image
    (tmp_path/'a').mkdir()
    with pytest.raises(ValueError, match='no images'): F.kid(tmp_path/'a', pictures(9), see())
    x = pictures(12)
    for i, p in enumerate(x):
        Image.fromarray(p.permute(1, 2, 0).numpy()).save(tmp_path/'a'/f'{i:02d}.png')
    assert torch.equal(extract(tmp_path/'a', see()), extract(x, see()))
    Image.new('RGB', (9, 8)).save(tmp_path/'a'/'zz.png')
    with pytest.raises(ValueError, match='zz.png'): F.kid(tmp_path/'a', x, see())
    assert len(extract(F.patches(tmp_path / 'a', 5), see())) == 13, (
        'patches may come from images of any size'
    )
    (tmp_path/'g').mkdir()
    for i in range(3): Image.new('L', (8, 8)).save(tmp_path/'g'/f'{i}.png')
    with pytest.raises(ValueError, match='grey images'): F.kid(tmp_path/'g', x, see())


def test_bad_input():
    a = pictures(20)
    with pytest.raises(ValueError, match='have no 3-th neighbour'):
        F.precision_recall(a[:3], a, see())
    with pytest.raises(ValueError, match='NaN'):
        F.kid(torch.full((20, 3, 8, 8), math.nan), a, see())
    with pytest.raises(ValueError, match='images need `features`'): F.kid(a, a)
    with pytest.raises(ValueError, match='means and covariances are not enough'):
        F.kid(F.Stats.of(a, see()), a, see())
    with pytest.raises(ValueError, match='FID is defined on Inception'): F.fid(a, a, see())
    with pytest.raises(ValueError, match='cannot be compared'):
        F.frechet_of(F.Stats.of(a, see('x')), F.Stats.of(a, see('y')))
    with pytest.raises(ValueError, match='too few'):
        F.frechet_jackknife(features(10), features(100))
    with pytest.raises(ValueError, match='subsets of 1000'):
        F.kid_subsets(features(100), features(100))


def test_few_images_warn():
    with pytest.warns(UserWarning, match='4 images for 6 features'):
        F.frechet_of(pictures(4), pictures(40), see())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        F.frechet_of(pictures(30), pictures(40), see())


def test_few_images_warn_with_errors_too():
    a, b = features(24, 30), features(100, 30)
    with pytest.warns(UserWarning, match='24 images for 30 features'): F.frechet_jackknife(a, b)
    with pytest.warns(UserWarning, match='24 images for 30 features'): F.frechet_jackknife(b, a)
    with pytest.warns(UserWarning, match='24 images for 30 features'): F.compare_features(a, b, 'x')


def test_compare_names_what_it_measured():
    row = F.compare(pictures(60), pictures(50, 1), see())
    assert {
        'kid',
        'kid_se',
        'frechet',
        'frechet_se',
        'precision',
        'precision_se',
        'recall',
        'recall_se',
    } < set(row) and 'fid' not in row
    assert row['features'] == 'mean' and (row['n'], row['n_real']) == (60, 50)
    assert 'fid' in F.compare(pictures(60), pictures(50, 1), see('inception'))


def test_equal_sets_are_equal():
    a = features(400, 10)
    assert (
        F.frechet_of(a, a.clone()) < 1e-9
        and frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2)) < 1e-12
    )
    v, e = F.kid(features(600, 10), features(600, 10, seed=1))
    assert abs(v) < 4*e
    assert F.precision_recall(a, a) == (1., 1.)


def test_patches_of_tensors():
    x = pictures(2, size=20)
    assert torch.equal(next(iter(F.patches(x, 10))), x[..., 5:15, 5:15])
    assert next(iter(F.patches(x, 32))).shape == (2, 3, 32, 32)
    wide = pictures(3, size=20)[..., :14]
    assert torch.equal(next(iter(F.patches(wide, 10))), wide[..., 5:15, 2:12])


def test_diversity_pairs():
    "Over all pairs within a prompt, in whatever batches the images come"
    x = torch.rand(12, 3, 6, 6)*2-1
    distance = lambda a, b: (a-b).abs().mean((1, 2, 3))
    slow = torch.stack(
        [
            torch.stack(
                [
                    (x[4 * p + i] - x[4 * p + j]).abs().mean()
                    for i in range(4)
                    for j in range(i + 1, 4)
                ]
            ).mean()
            for p in range(3)
        ]
    )
    for source in (x, x.split(5), [x]):
        mean, error = F.lpips_diversity(source, distance, size=None)
        assert math.isclose(mean, slow.mean().item(), rel_tol=1e-5) and math.isclose(
            error, (slow.std() / 3**0.5).item(), rel_tol=1e-4
        )


def test_lpips_layout(tmp_path):
    "Random weights in torchvision's layout: the distance is zero on equal images, and equals torchmetrics' own"
    torchvision, M = (
        pytest.importorskip('torchvision'),
        pytest.importorskip('torchmetrics.functional.image.lpips'),
    )
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    torch.save(
        vgg.features.state_dict()
        and {f'features.{k}': v for k, v in vgg.features.state_dict().items()},
        tmp_path / 'vgg.pth',
    )
    d = F.lpips(tmp_path/'vgg.pth')
    x, y = torch.rand(2, 2, 3, 64, 64)*2-1
    assert d(x, x).abs().max() < 1e-6 and (d(x, y) > 0).all()
    net = M._LPIPS(pretrained=True, net='vgg', pnet_rand=True).eval()
    for k in range(1, 6):
        for n, p in getattr(net.net, f'slice{k}').named_parameters():
            p.data.copy_(vgg.features.state_dict()[n])
    assert torch.allclose(d(x, y), net(x, y).flatten(), rtol=1e-5)
    torch.save({'features.0.weight': torch.zeros(3)}, tmp_path/'bad.pth')
    with pytest.raises(ValueError, match='not the weights of VGG-16'): F.lpips(tmp_path/'bad.pth')


def test_frechet_where_eigh_gives_up(monkeypatch):
    "LAPACK may not converge on the covariance of a few samples; singular values then give the same distance"
    a, b = torch.randn(8, 40), torch.randn(60, 40)+1
    want = frechet(a, b)
    def gives_up(c): raise torch.linalg.LinAlgError('no convergence')
    for name in ('eigh', 'eigvalsh'): monkeypatch.setattr(torch.linalg, name, gives_up)
    assert abs(frechet(a, b)-want) < 1e-6*want
