"Prompt files, resumable generation, grids and presets on a tiny random SDXL"
import json, pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dmd2_nb import coco_eval as C
from dmd2_nb.assets import data_path
from dmd2_nb.features import Features
from dmd2_nb.grids import ComparisonGrid, gallery, pil
from dmd2_nb.presets import PRESETS, apply_preset, open_pipeline, sample


def draw(prompts, seeds):
    return torch.stack(
        [
            torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(s)).byte()
            for s in seeds
        ]
    )


class Colour(nn.Module):
    def forward(self, x): return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.mark.parametrize('name,text,want', [
    ('a.txt', 'one\n two  words \n', ['one', 'two words']),
    ('a.json', '["x", "y"]', ['x', 'y']),
    ('a.csv', 'id,caption\n1,"a, b"\n2,c\n', ['a, b', 'c']),
    ('a.tsv', 'Prompt\tCategory\nA fox\tx\n', ['A fox']),
    ('a.json', (
        '{"annotations": [{"id": 2, "image_id": 7, "caption": "late"}, {"id": 1, "image_id": 7, '
        '"caption": "early"}]}'
    ), ['early']),
])
def test_prompt_files(tmp_path, name, text, want):
    (tmp_path/name).write_text(text)
    assert C.read_prompts(tmp_path/name) == want


@pytest.mark.parametrize('name,data,message', [
    ('a.txt', b'one\n\ntwo', 'line 2: empty prompt'),
    ('a.txt', b'caf\xe9', 'not UTF-8'),
    ('a.txt', b'', 'has no prompts'),
    ('a.json', b'{"x": 1}', "no column caption, prompt or text; there are: 'x'"),
    ('a.json', b'[1, 2]', 'item 1: 1 is no text'),
    ('a.csv', b'id,words\n1,x\n', 'no column caption, prompt or text'),
    ('a.pkl', b'not a pickle', 'a.pkl'),
])
def test_bad_prompt_files(tmp_path, name, data, message):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(ValueError, match=message): C.read_prompts(tmp_path/name)
    with pytest.raises(FileNotFoundError, match='gone.txt'): C.read_prompts(tmp_path/'gone.txt')


def test_pickled_prompts(tmp_path):
    "DMD2's captions are a pickled list: read as data, never run"
    (tmp_path/'ok.pkl').write_bytes(pickle.dumps(['a fox', 'an owl'], protocol=4))
    assert C.read_prompts(tmp_path/'ok.pkl') == ['a fox', 'an owl']
    class Bomb:
        def __reduce__(self): return (Path.mkdir, (tmp_path/'ran',))
    (tmp_path/'bad.pkl').write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(ValueError, match='bad.pkl'): C.read_prompts(tmp_path/'bad.pkl')
    assert not (tmp_path/'ran').exists()


def test_coco_subset(tmp_path):
    p = tmp_path/'captions.json'
    p.write_text(
        json.dumps(
            dict(annotations=[dict(id=i, image_id=i % 40, caption=f'c{i}') for i in range(200)])
        )
    )
    a, b = C.coco_captions(p, 10), C.coco_captions(p, 10)
    assert a == b and len({o['image_id'] for o in a}) == 10 and a != C.coco_captions(p, 10, seed=1)
    assert (
        a[0]['file_name'] == f"COCO_val2014_{a[0]['image_id']:012d}.jpg"
        and a[0]['caption'] == f"c{a[0]['image_id']}"
    )


def test_generation_is_resumed_and_guarded(tmp_path):
    prompts = [f'p{i}' for i in range(7)]
    calls = []
    def counting(p, s):
        calls.extend(s)
        return draw(p, s)
    def stops(p, s):
        if 2_000_004 in s: raise KeyboardInterrupt
        return counting(p, s)
    with pytest.raises(KeyboardInterrupt): C.generate(stops, prompts, tmp_path/'a', seed=2, batch=2)
    C.generate(counting, prompts, tmp_path/'a', seed=2, batch=3)
    assert calls == [2_000_000+i for i in range(7)], 'each picture once, each from its own seed'
    C.generate(draw, prompts, tmp_path/'b', seed=2, batch=7)
    assert [p.read_bytes() for p in sorted((tmp_path / 'a').glob('*.png'))] == [
        p.read_bytes() for p in sorted((tmp_path / 'b').glob('*.png'))
    ]
    for change in (dict(seed=3), dict(each=2), dict(model='other')):
        with pytest.raises(ValueError, match=f'was made with another .*{next(iter(change))}'):
            C.generate(draw, prompts, tmp_path/'a', **(dict(seed=2) | change))
    with pytest.raises(ValueError, match='another prompts'):
        C.generate(draw, prompts[::-1], tmp_path/'a', seed=2)
    (tmp_path/'c').mkdir()
    pil(draw([''], [0])[0]).save(tmp_path/'c'/'x.png')
    with pytest.raises(ValueError, match='unknown origin'): C.generate(draw, prompts, tmp_path/'c')


def test_one_pass(tmp_path):
    prompts = [f'p{i}' for i in range(24)]
    C.generate(draw, prompts*2, tmp_path/'real', seed=5)
    real = C.Photographs.of(tmp_path/'real', Features(Colour(), 'colour'), size=8, patch_size=9)
    rmse = lambda x, y: (x-y).square().mean((1, 2, 3)).sqrt()
    dark = lambda p, s: draw(p, s)//2
    rows = C.evaluate_prompts(
        dict(same=draw, dark=dark),
        prompts,
        tmp_path / 'out',
        real,
        lpips=rmse,
        diverse=prompts[:3],
        timed=1,
    )
    assert (
        rows['dark']['kid'] > 10 * abs(rows['same']['kid'])
        and rows['same']['n'] == 24
        and rows['same']['seconds'] > 0
    )
    assert all(
        f'{k}_se' in rows['same']
        for k in ('kid', 'frechet', 'patch_frechet', 'precision', 'recall', 'lpips')
    )
    assert {k: rows['same'][k] for k in ('seed', 'n', 'n_real', 'lpips_n', 'seconds_se')} == dict(
        seed=0, n=24, n_real=48, lpips_n=3, seconds_se=0.0
    ) and 'fid' not in rows['same']
    assert json.loads((tmp_path/'out'/'table.json').read_text()) == rows
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {
        'same',
        'dark',
        'table.json',
        'table.txt',
        'comparison.html',
        'comparison.png',
    }
    assert ' ± ' in (tmp_path/'out'/'table.txt').read_text()
    assert (
        'dark' in (tmp_path / 'out' / 'table.txt').read_text()
        and 'data:image/png' in (tmp_path / 'out' / 'comparison.html').read_text()
    )


def test_latency(monkeypatch):
    "Warm-up left out, the median of the rest, one picture at a time"
    clock, calls = iter([0, 9, 9, 18, 20, 21, 30, 32, 40, 49]), []
    monkeypatch.setattr(C.time, 'perf_counter', lambda: next(clock))
    seconds, error = C.latency(lambda p, s: calls.append((p, s)), ['a', 'b'], n=3, warmup=2)
    assert (
        seconds == 2
        and abs(error - 1.25 * 19**0.5 / 3**0.5) < 1e-9
        and calls == [([p], [i]) for i, p in enumerate('ababa')]
    )


def test_photographs_of_the_chosen_captions(tmp_path):
    "The 10K protocol compares with those photographs alone, of whatever size; a missing one is named"
    from PIL import Image
    (tmp_path/'val').mkdir()
    shades = {f'COCO_val2014_{i:012d}.jpg': 20*i for i in range(12)}
    for i, (n, v) in enumerate(shades.items()):
        Image.new('RGB', (30+i, 40-i), (v,)*3).save(tmp_path/'val'/n)
    see, some = Features(Colour(), 'colour'), [n for i, n in enumerate(shades) if i % 3 == 1]
    got = C.Photographs.of(tmp_path/'val', see, size=8, patch_size=9, names=some)
    for f in (got.whole, got.patch):
        assert f.shape == (4, 6) and [round(v/20) for v in f[:, 0].tolist()] == [1, 4, 7, 10]
    assert len(C.Photographs.of(tmp_path/'val', see, size=8, patch_size=0).whole) == 12
    with pytest.raises(FileNotFoundError, match='val: 1 of 2 photographs are missing: gone.jpg'):
        C.Photographs.of(tmp_path/'val', see, names=[some[0], 'gone.jpg'])


def test_the_cut_of_the_paper(tmp_path):
    "Centred square and Lanczos to 256 or 512; patches are 299 pixels of the middle, untouched"
    from PIL import Image
    from dmd2_nb.fid import patches
    from dmd2_nb.image_files import folder_images
    (tmp_path/'v').mkdir()
    im = Image.effect_noise((640, 480), 60).convert('RGB')
    im.save(tmp_path/'v'/'a.png')
    want = im.crop((80, 0, 560, 480)).resize((256, 256), Image.Resampling.LANCZOS)
    assert torch.equal(
        folder_images(tmp_path / 'v', 256).one(0),
        torch.tensor(list(want.getdata()), dtype=torch.uint8).reshape(256, 256, 3).permute(2, 0, 1),
    )
    middle = im.crop((170, 90, 469, 389))
    assert torch.equal(
        patches(tmp_path / 'v').one(0),
        torch.tensor(list(middle.getdata()), dtype=torch.uint8)
        .reshape(299, 299, 3)
        .permute(2, 0, 1),
    )


def test_papers_rows_are_labelled():
    shown = C.with_paper({'dmd2 4': dict(fid=30.)})
    assert shown['dmd2 4'] == dict(fid=30.) and shown['dmd2 4 (paper)']['fid'] == 19.32


def test_grids(tmp_path):
    g = ComparisonGrid(['a', 'b']).add('x', draw('ab', [1, 2]))
    with pytest.raises(ValueError, match="already"): g.add('x', draw('ab', [1, 2]))
    with pytest.raises(ValueError, match='at least one row'): ComparisonGrid([])
    with pytest.raises(ValueError, match='no columns'): ComparisonGrid(['a']).image()
    with pytest.raises(ValueError, match='a picture is uint8'):
        ComparisonGrid(['a']).add('x', torch.zeros(1, 3, 4, 4))
    sheet = gallery(draw, ['a', 'b'], [0, 1, 2])
    assert sheet.save(tmp_path/'s.html').read_text().count('<img') == 6
    from PIL import Image
    im = Image.open(ComparisonGrid(['a']).add('x', draw('a', [3])).save(tmp_path/'s.png', cell=16))
    assert torch.equal(
        torch.tensor(list(im.crop((80, 24, 96, 40)).getdata()), dtype=torch.uint8)
        .reshape(16, 16, 3)
        .permute(2, 0, 1),
        draw('a', [3])[0],
    )


@pytest.fixture(scope='module')
def pipe():
    D = pytest.importorskip('diffusers')
    from dmd2_nb.sdxl.adapter import TINY_SDXL, make_unet
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    torch.manual_seed(0)
    enc = tiny_text_encoders()
    vae = D.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = D.EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        steps_offset=1,
    )
    return D.StableDiffusionXLPipeline(
        vae, *enc.models, *enc.tokenizers, make_unet(TINY_SDXL), scheduler
    )


@pytest.mark.parametrize(
    'name,timesteps',
    [
        ('dmd2 4', [999, 749, 499, 249]),
        ('dmd2 1', [399]),
        ('dmd2 4 lora', [999, 749, 499, 249]),
        ('sdxl-lightning 4', [999, 749, 499, 249]),
        ('sdxl-lightning 1', [999]),
        ('sdxl-turbo 1', [999]),
        ('sdxl-turbo 4', [999, 749, 499, 249]),
        ('lcm-sdxl 4', [999, 759, 499, 259]),
        ('lcm-sdxl 1', [999]),
    ],
)
def test_timesteps(pipe, name, timesteps):
    "What the network is really asked for"
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(round(float(args[1]))))
    try: x = sample(apply_preset(pipe, PRESETS[name]), PRESETS[name], ['a fox'], [0], 32)
    finally: hook.remove()
    assert seen == timesteps and x.shape == (1, 3, 32, 32) and x.dtype == torch.uint8


def test_guided_teacher(pipe):
    p = replace(PRESETS['sdxl cfg 8'], steps=3)
    batch = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: batch.append(len(args[0])))
    try: sample(apply_preset(pipe, p), p, ['a', 'b'], [0, 1], 32)
    finally: hook.remove()
    assert batch == [4, 4, 4] and p.evaluations == 6


@pytest.fixture(scope='module')
def sd15():
    D = pytest.importorskip('diffusers')
    from dmd2_nb.sdxl.adapter import TINY_SD15, TINY_VAE, make_unet
    from dmd2_nb.sdxl.conditioning import tiny_text_encoders
    torch.manual_seed(0)
    enc = tiny_text_encoders(two=False)
    scheduler = D.PNDMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
    )
    return D.StableDiffusionPipeline(
        D.AutoencoderKL(**TINY_VAE),
        enc.models[0],
        enc.tokenizers[0],
        make_unet(TINY_SD15),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize('name,batch,first,calls', [('sd15 dmd2 1', 2, 999, 1), ('sd15 cfg 3', 4, 751, 5)])
def test_stable_diffusion_15(sd15, name, batch, first, calls):
    "One step from pure noise at 999, without guidance; the teacher guided, by PNDM with one evaluation more than steps"
    p = PRESETS[name] if calls == 1 else replace(PRESETS[name], steps=4)
    seen = []
    hook = sd15.unet.register_forward_pre_hook(
        lambda m, args: seen.append((len(args[0]), int(args[1])))
    )
    try: x = sample(apply_preset(sd15, p), p, ['a', 'b'], [0, 1], 64)
    finally: hook.remove()
    assert (
        {b for b, _ in seen} == {batch}
        and seen[0][1] == first
        and len(seen) == calls
        and x.shape == (2, 3, 64, 64)
    )


def test_the_papers_rows_are_all_there():
    "Each preset's file and numbers, against the tables typed a second time"
    fid = {
        'sdxl cfg 6': 19.36,
        'sdxl cfg 8': 20.39,
        'lcm-sdxl 1': 81.62,
        'lcm-sdxl 4': 22.16,
        'sdxl-turbo 1': 24.57,
        'sdxl-turbo 4': 23.19,
        'sdxl-lightning 1': 23.92,
        'sdxl-lightning 4': 24.46,
        'dmd2 1': 19.01,
        'dmd2 4': 19.32,
        'dmd2 4 lora': 19.68,
        'sd15 cfg 3': 8.59,
        'sd15 dmd2 1': 8.35,
    }
    assert {k: p.paper['fid'] for k, p in PRESETS.items()} == fid
    assert [PRESETS[k].scheduler for k in ('sdxl cfg 6', 'sd15 cfg 3')] == [
        'EulerDiscreteScheduler',
        'PNDMScheduler',
    ]
    assert PRESETS['sd15 dmd2 1'].file.startswith('model/sdv1.5/') and PRESETS[
        'sd15 dmd2 1'
    ].file.endswith('fid8.35_checkpoint_model_041000/pytorch_model.bin')


def test_seed_is_a_picture(pipe):
    p = PRESETS['dmd2 4']
    apply_preset(pipe, p)
    pair, alone = sample(pipe, p, ['a', 'b'], [5, 6], 32), sample(pipe, p, ['b'], [6], 32)
    assert (pair[1:].int()-alone.int()).abs().max() <= 1
    assert not torch.equal(alone, sample(pipe, p, ['b'], [7], 32))
    with pytest.raises(ValueError, match='2 prompts for 1 seeds'): sample(pipe, p, ['a', 'b'], [1])


def test_second_tokenizer(pipe):
    "The official evaluator used the first tokenizer twice"
    right = pipe.tokenizer_2
    try:
        pipe.tokenizer_2 = pipe.tokenizer
        with pytest.raises(ValueError, match='both tokenizers pad'):
            apply_preset(pipe, PRESETS['dmd2 4'])
    finally: pipe.tokenizer_2 = right


def test_whole_pipeline_from_local_files(pipe, tmp_path):
    "Base from a folder, distilled network from a state dict"
    from dmd2_nb.sdxl.adapter import TINY_SDXL, make_unet
    pipe.save_pretrained(tmp_path/'base')
    other = make_unet(TINY_SDXL, seed=7)
    torch.save(other.state_dict(), tmp_path/'unet.bin')
    p = open_pipeline(PRESETS['dmd2 4'], tmp_path/'base', tmp_path/'unet.bin', dtype=torch.float32)
    assert torch.equal(p.unet.state_dict()['conv_in.weight'], other.state_dict()['conv_in.weight'])
    assert type(p.scheduler).__name__ == 'LCMScheduler'
    with pytest.raises(ValueError, match='missing'):
        torch.save({'conv_in.weight': torch.zeros(1)}, tmp_path/'bad.bin')
        open_pipeline(PRESETS['dmd2 4'], tmp_path/'base', tmp_path/'bad.bin', dtype=torch.float32)


def test_nothing_is_fetched_unasked(monkeypatch, tmp_path):
    pytest.importorskip('diffusers')
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(FileNotFoundError, match='download=True'): open_pipeline(PRESETS['dmd2 4'])


def test_own_prompts(): assert len(C.read_prompts(data_path('prompts.txt'))) == 20
