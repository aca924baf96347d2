"Loading of weights that do not come along: right layouts with random numbers, and wrong ones"
import hashlib, json, sys

import pytest
import torch

from dmd2_nb.features import (
    clip,
    dinov2,
    feature_extractor,
    fetched,
    inception,
    InceptionNet,
    lite0,
    small_classifier,
)
from dmd2_nb.system.tensors import read_state_dict
from dmd2_nb.feature_nets import Lite0
from dmd2_nb.fid import clip_score


def pictures(n, size=16, channels=3):
    return torch.randint(
        0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(n)
    ).byte()


@pytest.fixture(scope='module')
def lite_file(tmp_path_factory):
    torch.manual_seed(0)
    p = tmp_path_factory.mktemp('w')/'lite.pth'
    torch.save(Lite0().state_dict(), p)
    return p


def test_lite0_layout(lite_file):
    f = lite0(lite_file, check=False)
    assert f(pictures(3)).shape == (3, 1280) and f.name == 'lite0'
    with pytest.raises(ValueError, match='sha256'): lite0(lite_file)


def test_any_split_gives_the_same(lite_file):
    net, x = lite0(lite_file, check=False, size=64), pictures(11)
    whole = net(x)
    for batch in (1, 4):
        net.batch = batch
        assert torch.allclose(net(x), whole, rtol=1e-4, atol=1e-5)


def test_state_dicts_that_do_not_fit(tmp_path, lite_file):
    sd = torch.load(lite_file, weights_only=True)
    for change, message in (
        (lambda d: d.pop('_fc.bias'), 'missing: _fc.bias'),
        (lambda d: d.update(extra=torch.zeros(1)), 'unexpected: extra'),
        (lambda d: d.update({'_fc.bias': torch.zeros(7)}), 'misshapen: _fc.bias'),
    ):
        d = dict(sd)
        change(d)
        torch.save(d, tmp_path/'x.pth')
        with pytest.raises(ValueError, match=message): lite0(tmp_path/'x.pth', check=False)


def test_files_that_are_not_weights(tmp_path, lite_file):
    (tmp_path/'cut.pth').write_bytes(lite_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cut.pth: not a readable state dict'):
        read_state_dict(tmp_path/'cut.pth')
    with pytest.raises(FileNotFoundError, match='gone.pth'): inception(tmp_path/'gone.pth')
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(ValueError, match='not a state dict'): read_state_dict(tmp_path/'list.pth')


class Bomb:
    def __reduce__(self): return (open, ('/nonexistent/ran', 'w'))


def test_pickles_are_not_run(tmp_path):
    torch.save(dict(a=Bomb()), tmp_path/'bomb.pth')
    with pytest.raises(ValueError, match="bomb.pth is refused: it asks for '.*open'"):
        inception(tmp_path/'bomb.pth')


@pytest.fixture(scope='module')
def inception_file(tmp_path_factory):
    "Random weights in the layout of the published file, which has no counters of batches"
    pytest.importorskip('torch_fidelity')
    torch.manual_seed(0)
    p = tmp_path_factory.mktemp('i')/'w.pth'
    torch.save(
        {
            k: v
            for k, v in InceptionNet(None).graph.state_dict().items()
            if 'num_batches_tracked' not in k
        },
        p,
    )
    return p


@pytest.mark.filterwarnings('ignore:.*not the published file')
def test_inception_layers(inception_file, tmp_path):
    x = pictures(2, 32)
    assert inception(inception_file)(x).shape == (2, 2048)
    f = inception(inception_file, layer='logits_unbiased')
    assert f(x).shape == (2, 1008) and f.name == 'inception:logits_unbiased'
    sd = torch.load(inception_file, weights_only=True)
    sd.pop('fc.weight')
    torch.save(sd, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='missing: fc.weight'): inception(tmp_path/'w.pth')


def test_inception_takes_pytorch_fids_layout(inception_file):
    "pytorch-fid loads its file into torchvision's network with 1,008 classes: the same names and shapes"
    torchvision = pytest.importorskip('torchvision')
    theirs = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    ).state_dict()
    ours = torch.load(inception_file, weights_only=True)
    assert {k: v.shape for k, v in theirs.items() if 'num_batches_tracked' not in k} == {
        k: v.shape for k, v in ours.items()
    }


def test_inception_is_found_where_other_packages_put_it(inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    (tmp_path / 'hub' / 'checkpoints' / 'pt_inception-2015-12-05-6726825d.pth').write_bytes(
        inception_file.read_bytes()
    )
    with pytest.warns(UserWarning, match='pt_inception.*not the published file .sha256 6726825d'):
        f = inception()
    assert f.name == 'inception'


def test_downloads(tmp_path, monkeypatch):
    "What comes must have the published checksum; nothing stays of what has not"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'hub'))
    (tmp_path/'w.bin').write_bytes(b'weights')
    url, right = f'file://{tmp_path}/w.bin', hashlib.sha256(b'weights').hexdigest()
    with pytest.raises(
        FileNotFoundError, match=r'it needs w.bin \(7 B\): give its path.*download=True'
    ):
        fetched(url, 'it', '7 B')
    with pytest.raises(OSError, match='w.bin .7 B. cannot be fetched .invalid hash'):
        fetched(url, 'it', '7 B', download=True, start='00')
    with pytest.raises(OSError, match='gone.bin .7 B. cannot be fetched'):
        fetched(f'file://{tmp_path}/gone.bin', 'it', '7 B', download=True)
    assert not any(p.is_file() for p in (tmp_path/'cache').rglob('*'))
    assert fetched(url, 'it', '7 B', download=True, start=right).read_bytes() == b'weights'
    (tmp_path/'w.bin').unlink()
    assert fetched(url, 'it', '7 B').read_bytes() == b'weights', 'from the cache'


def test_small_classifier_files(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(1)}, tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match='no classifier in its metadata'):
        small_classifier(tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match=r'must be \(n, 1, h, w\)'): small_classifier()(pictures(3))


def test_fixed_means_fixed():
    f = small_classifier()
    f.train()
    assert not f.net.training and not any(p.requires_grad for p in f.parameters())
    assert not f(pictures(2, 16, 1)).requires_grad


def test_names():
    with pytest.raises(ValueError, match="features 'vgg' are none of"): feature_extractor('vgg')
    assert feature_extractor('small_classifier').name == 'small_classifier'
    with pytest.raises(FileNotFoundError, match='mine.pth'):
        feature_extractor('inception', weights='mine.pth')
    with pytest.raises(ValueError, match='cannot be loaded'):
        feature_extractor('dinov2', weights='.')


@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    "A CLIP of the right layout with random numbers and a small vocabulary"
    T = pytest.importorskip('transformers')
    p = tmp_path_factory.mktemp('clip')
    letters = [chr(c) for c in range(97, 123)]
    vocab = {
        t: i
        for i, t in enumerate(
            letters + [c + '</w>' for c in letters] + ['<|startoftext|>', '<|endoftext|>']
        )
    }
    (p/'vocab.json').write_text(json.dumps(vocab))
    (p/'merges.txt').write_text('#version: 0.2\n')
    (p / 'tokenizer_config.json').write_text(
        json.dumps(dict(tokenizer_class='CLIPTokenizer', model_max_length=77))
    )
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    cfg = T.CLIPConfig(
        text_config=dict(
            **small,
            vocab_size=len(vocab),
            max_position_embeddings=20,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        ),
        vision_config=dict(**small, image_size=32, patch_size=8),
        projection_dim=12,
    )
    torch.manual_seed(0)
    T.CLIPModel(cfg).save_pretrained(p)
    return p


def test_clip(clip_folder):
    f = clip(clip_folder)
    fi, ft = f(pictures(5, 40)), f.text(['red', 'blue dog', 'x', 'a', 'b'])
    assert fi.shape == ft.shape == (5, 12) and f.name.startswith('clip:')
    f.batch = 2
    assert torch.allclose(f(pictures(5, 40)), fi, atol=1e-5) and torch.allclose(
        f.text(['red', 'blue dog', 'x', 'a', 'b']), ft, atol=1e-5
    )
    c = torch.nn.functional.cosine_similarity(fi, f.text([f'A photo depicts {p}' for p in 'abcde']))
    mean, error = clip_score(pictures(5, 40), list('abcde'), f)
    assert abs(mean-c.mean().item()) < 1e-6 and error > 0
    with pytest.raises(ValueError, match='5 images for 4 prompts'):
        clip_score(pictures(5, 40), list('abcd'), f)


def test_clip_preprocessing_equals_transformers(clip_folder):
    "Resize, crop and normalisation on tensors against the library's own on PIL images"
    T = pytest.importorskip('transformers')
    from PIL import Image
    f = clip(clip_folder)
    own = T.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    y, x = torch.meshgrid(torch.arange(80.), torch.arange(100.), indexing='ij')
    im = torch.stack([x*2, y*3, 128+60*torch.sin(x/9)]).byte()
    theirs = own(Image.fromarray(im.permute(1, 2, 0).numpy()), return_tensors='pt')['pixel_values']
    # they round to bytes after resizing
    assert (f.net.prepare(im[None].float())-theirs).abs().max() < 0.03


def test_dinov2(tmp_path):
    T = pytest.importorskip('transformers')
    torch.manual_seed(0)
    T.Dinov2Model(
        T.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
        )
    ).save_pretrained(tmp_path)
    f = dinov2(tmp_path)
    assert f(pictures(2, 40)).shape == (2, 16) and f.name == f'dinov2:{tmp_path.name}'


def test_a_package_that_is_missing(monkeypatch):
    for name in ('transformers', 'torch_fidelity', 'torch_fidelity.feature_extractor_inceptionv3'):
        monkeypatch.setitem(sys.modules, name, None)
    for f in (clip, dinov2):
        with pytest.raises(ImportError, match=r'pip install .dmd2_nb\[eval\]'): f('x')
    with pytest.raises(ImportError, match=r'pip install .dmd2_nb\[eval\]'): InceptionNet(None)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    from dmd2_nb.fid import lpips
    with pytest.raises(
        FileNotFoundError, match=r'weights-inception-2015-12-05-6726825d.pth \(96 MB\)'
    ):
        inception()
    with pytest.raises(FileNotFoundError, match=r'vgg16-397923af.pth \(553 MB\)'): lpips()
    for f in (clip, dinov2):
        with pytest.raises(
            FileNotFoundError,
            match=r'no/such-model.*model.safetensors \(the default.s has .* GB\) with download=True',
        ):
            f('no/such-model')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='cannot be loaded'): clip(tmp_path/'empty')
