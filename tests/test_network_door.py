"Networks that do not fit are refused when they are opened, or mended; never a size error from inside"
import pytest
import torch
from safetensors.torch import save_file

from dmd2_nb.sdxl.adapter import (
    SDXL_UNET,
    TINY_SD15,
    TINY_SDXL,
    CondUNet,
    EpsDenoiser,
    FlowDenoiser,
    VDenoiser,
    make_unet,
    sdxl_sigmas,
)
from dmd2_nb.sdxl.conditioning import encode_prompts, tiny_text_encoders

REFINER = TINY_SDXL | dict(cross_attention_dim=32, projection_class_embeddings_input_dim=32+5*8)


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(in_channels=9), 'takes 9 channels and gives 4: it looks like an inpainting U-Net'),
        (dict(in_channels=8), 'given a picture'),
        (dict(in_channels=7), 'upscaling'),
        (dict(in_channels=5), 'depth'),
        (dict(out_channels=8), 'learned variance'),
        (dict(out_channels=3), 'takes 4 channels and gives 3'),
        (dict(time_cond_proj_dim=8), 'guidance scale'),
        (dict(class_embed_type='timestep'), 'class labels'),
        (REFINER, "SDXL's refiner"),
    ],
)
def test_config(kw, word):
    for make in (EpsDenoiser, VDenoiser, FlowDenoiser, CondUNet):
        with pytest.raises(ValueError, match=word) as e: make(make_unet(device='meta', **kw))
        assert len(str(e.value)) <= 600 and '\n' not in str(e.value)


def test_full_refiner_and_the_networks_that_fit():
    refiner = SDXL_UNET | dict(
        block_out_channels=(384, 768, 1536, 1536),
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=2560,
        attention_head_dim=(6, 12, 24, 24),
        transformer_layers_per_block=4,
        down_block_types=(
            'DownBlock2D',
            'CrossAttnDownBlock2D',
            'CrossAttnDownBlock2D',
            'DownBlock2D',
        ),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    )
    with pytest.raises(ValueError, match='refiner'): EpsDenoiser(make_unet(refiner, device='meta'))
    for config in (SDXL_UNET, TINY_SDXL, TINY_SD15): EpsDenoiser(make_unet(config, device='meta'))
    for c in (3, 16): EpsDenoiser(make_unet(device='meta', in_channels=c, out_channels=c))


@pytest.mark.parametrize(
    'change, word',
    [
        (lambda u: u.to(torch.float8_e4m3fn), '8 bits'),
        (
            lambda u: u.conv_in.to(torch.bfloat16),
            r'mixes precisions: .*2 in bfloat16 \(conv_in.weight, conv_in.bias\)',
        ),
        (lambda u: u.mid_block.half(), 'mixes precisions'),
    ],
)
def test_precision(change, word):
    u = make_unet()
    change(u)
    with pytest.raises(ValueError, match=word) as e: EpsDenoiser(u)
    assert len(str(e.value)) <= 600


def test_conditions_of_another_model():
    c = encode_prompts(tiny_text_encoders(), ['a cat'], 64)
    x, s = torch.randn(1, 4, 8, 8), sdxl_sigmas([999]).float()
    assert EpsDenoiser(make_unet(sample_size=8))(x, s, c).shape == x.shape
    for kw, word in (
        (
            dict(projection_class_embeddings_input_dim=72),
            r'numbers beside the timestep of 72, got 80 \(32 of the pooled text and 6 time ids of 8\).*refiner',
        ),
        (dict(cross_attention_dim=32), 'a text with a width of 32, got 64'),
        (dict(projection_class_embeddings_input_dim=96), 'of 96, got 80'),
    ):
        D = EpsDenoiser(make_unet(sample_size=8, **kw))
        for call in (D, D.encode):
            with pytest.raises(ValueError, match=word): call(x, s, c)
    D = EpsDenoiser(make_unet(sample_size=8))
    with pytest.raises(ValueError, match='samples with channels of 4, got 3'): D(x[:, :3], s, c)
    with pytest.raises(ValueError, match='wants text_embeds and time_ids'):
        D(x, s, torch.zeros(1, 7, 64))
    with pytest.raises(ValueError, match='width of 32, got 64'):
        EpsDenoiser(make_unet(TINY_SD15, sample_size=8))(x, s, torch.zeros(1, 7, 64))


@pytest.mark.parametrize(
    'bad',
    [
        (-1,),
        (999.5,),
        (1000,),
        (float('nan'),),
        (float('inf'),),
        (999, 249.001),
        [-0.5],
        torch.tensor([1000]),
        'all',
        [None],
        -1,
    ],
)
def test_timesteps(bad):
    with pytest.raises(ValueError, match='timesteps are whole numbers') as e: sdxl_sigmas(bad)
    assert len(str(e.value)) <= 600


def test_timesteps_that_are_right():
    full = sdxl_sigmas()
    for good in ([999, 0], (999., 0.), torch.tensor([999, 0]), torch.tensor([999., 0.])):
        assert torch.equal(sdxl_sigmas(good), full[[999, 0]])
    assert sdxl_sigmas(399) == full[399]


def test_v_prediction_is_noticed(tmp_path):
    "A U-Net that lies in the folder of a v-prediction pipeline, however it is opened"
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from dmd2_nb.sdxl.adapt import check_start
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet, tiny_pipeline
    for kind in ('v_prediction', 'epsilon'):
        p = tiny_pipeline()
        p.scheduler = EulerDiscreteScheduler.from_config(p.scheduler.config, prediction_type=kind)
        p.save_pretrained(tmp_path/kind)
        at = tmp_path/kind
        opened = [
            UNet2DConditionModel.from_pretrained(at / 'unet'),
            UNet2DConditionModel.from_pretrained(at, subfolder='unet'),
            load_dmd2_unet(at / 'unet', TINY_SDXL),
            load_dmd2_unet(at / 'unet' / 'diffusion_pytorch_model.safetensors', TINY_SDXL),
        ]
        right, wrong = (
            (VDenoiser, EpsDenoiser) if kind == 'v_prediction' else (EpsDenoiser, VDenoiser)
        )
        for u in opened:
            right(u)
            with pytest.raises(ValueError, match=f'predicts {kind}: take {right.__name__}'):
                wrong(u)
        for source in (at, at/'unet'):
            check_start(right(make_unet()), source)
            with pytest.raises(ValueError, match='cannot be mixed'):
                check_start(wrong(make_unet()), source)


@pytest.mark.parametrize(
    'mark, metadata, told',
    [
        ('v_pred', None, 'v_prediction'),
        (None, {'modelspec.prediction_type': 'v'}, 'v_prediction'),
        ('edm_vpred.sigma_max', None, 'what EDM does'),
        (None, {'modelspec.prediction_type': 'epsilon'}, 'epsilon'),
        (None, None, None),
    ],
)
@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_files_that_mark_their_prediction(tmp_path, mark, metadata, told, ending):
    "One file with no pipeline around it: a tensor without numbers, or a line of its metadata"
    from dmd2_nb.sdxl.adapt import check_start
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet
    if metadata and ending == 'bin': pytest.skip('such files have no metadata')
    file = tmp_path/f'u.{ending}'
    sd = make_unet().state_dict() | ({mark: torch.zeros(0)} if mark else {})
    if ending == 'bin': torch.save(sd, file)
    else: save_file(sd, file, metadata=metadata)
    u = load_dmd2_unet(file, TINY_SDXL)
    kinds = dict(epsilon=EpsDenoiser, v_prediction=VDenoiser)
    for name, kind in kinds.items():
        if told in (name, None):
            kind(u)
            check_start(kind(make_unet()), file)
            continue
        word = f'take {kinds[told].__name__}' if told in kinds else 'no denoiser here does'
        with pytest.raises(ValueError, match=f'predicts {told}: {word}'): kind(u)
        with pytest.raises(ValueError, match='cannot be mixed'): check_start(kind(make_unet()), file)


@pytest.mark.parametrize(
    'change',
    [
        dict(rescale_betas_zero_snr=True),
        dict(beta_schedule='linear'),
        dict(beta_end=0.02),
        dict(trained_betas=[0.1] * 1000),
    ],
)
def test_another_noise_schedule_is_noticed(tmp_path, change):
    "The schedule of a pipeline is not the one that is taken where none is given"
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from dmd2_nb.sdxl.adapter import alphas_cumprod
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet, tiny_pipeline
    p = tiny_pipeline()
    p.scheduler = EulerDiscreteScheduler.from_config(p.scheduler.config, **change)
    p.save_pretrained(tmp_path/'p')
    at = tmp_path/'p'/'unet'
    for u in (UNet2DConditionModel.from_pretrained(at), load_dmd2_unet(at, TINY_SDXL)):
        with pytest.raises(ValueError, match=f'another noise schedule .*{next(iter(change))}.*abar=') as e:
            EpsDenoiser(u)
        assert len(str(e.value)) <= 600
        EpsDenoiser(u, alphas_cumprod(beta_end=0.02))
        FlowDenoiser(make_unet())


def test_a_file_marks_a_schedule_without_signal(tmp_path):
    from dmd2_nb.sdxl.adapter import alphas_cumprod
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet
    save_file(make_unet().state_dict() | dict(v_pred=torch.zeros(0), ztsnr=torch.zeros(0)), tmp_path/'u.safetensors')
    u = load_dmd2_unet(tmp_path/'u.safetensors', TINY_SDXL)
    with pytest.raises(ValueError, match='rescale_betas_zero_snr True'): VDenoiser(u)
    VDenoiser(u, alphas_cumprod())


def test_a_pipeline_of_edm_is_refused(tmp_path):
    "Its scheduler says epsilon, and means another network around it"
    from diffusers import EDMEulerScheduler
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet, tiny_pipeline
    p = tiny_pipeline()
    p.scheduler = EDMEulerScheduler()
    p.save_pretrained(tmp_path/'p')
    u = load_dmd2_unet(tmp_path/'p'/'unet', TINY_SDXL)
    for kind in (EpsDenoiser, VDenoiser, FlowDenoiser):
        with pytest.raises(ValueError, match='predicts what EDM does: no denoiser here does'): kind(u)


def test_files_are_mended_when_they_are_opened(tmp_path):
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet
    unet = make_unet(sample_size=8)
    c = encode_prompts(tiny_text_encoders(), ['a cat'], 64)
    x, s = torch.randn(1, 4, 8, 8), sdxl_sigmas([999]).float()
    for name, cast, dtype in (
        ('eight', lambda k, v: v.to(torch.float8_e4m3fn), torch.bfloat16),
        ('mixed', lambda k, v: v if 'conv_in' in k else v.bfloat16(), torch.float32),
    ):
        tensors = {k: cast(k, v) for k, v in unet.state_dict().items()}
        save_file(tensors, tmp_path/f'{name}.safetensors')
        torch.save(tensors, tmp_path/f'{name}.bin', _use_new_zipfile_serialization=False)
        for f in (tmp_path/f'{name}.safetensors', tmp_path/f'{name}.bin'):
            u = load_dmd2_unet(f, TINY_SDXL | dict(sample_size=8))
            assert {p.dtype for p in u.parameters()} == {dtype}
            for k, v in u.state_dict().items(): assert torch.equal(v.float(), tensors[k].float())
            assert EpsDenoiser(u)(x, s, c).isfinite().all()
        assert {
            p.dtype
            for p in load_dmd2_unet(f, TINY_SDXL | dict(sample_size=8), torch.float16).parameters()
        } == {torch.float16}


@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_are_no_weights(tmp_path, dtype):
    "Quantised without a mark that says so"
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet
    sd = {k: (v*100).to(dtype) if v.ndim == 2 else v for k, v in make_unet().state_dict().items()}
    save_file(sd, tmp_path/'u.safetensors')
    with pytest.raises(ValueError, match='quantised .*time_embedding.linear_1.weight') as e:
        load_dmd2_unet(tmp_path/'u.safetensors', TINY_SDXL)
    assert len(str(e.value)) <= 600


def test_a_part_of_a_checkpoint(tmp_path):
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet
    sd = make_unet().state_dict()
    torch.save(dict(model=sd, ema={k: v+1 for k, v in sd.items()}), tmp_path/'u.pth')
    with pytest.raises(ValueError, match='say part= one of model, ema'):
        load_dmd2_unet(tmp_path/'u.pth', TINY_SDXL)
    u = load_dmd2_unet(tmp_path/'u.pth', TINY_SDXL, part='ema')
    assert torch.equal(u.conv_in.weight, sd['conv_in.weight']+1)


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(in_channels=9), 'inpainting'),
        (dict(block_out_channels=(64, 128, 128)), 'another width: 2 times'),
        (dict(cross_attention_dim=32), 'misshapen'),
    ],
)
def test_files_of_other_networks(kw, word, tmp_path):
    from dmd2_nb.sdxl.adapt import check_start
    from dmd2_nb.sdxl.checkpoints import load_dmd2_unet
    make_unet(**kw).save_pretrained(tmp_path/'u', max_shard_size='500KB')
    for call in (
        lambda: load_dmd2_unet(tmp_path / 'u', TINY_SDXL),
        lambda: check_start(EpsDenoiser(make_unet()), tmp_path / 'u'),
    ):
        with pytest.raises(ValueError, match=word) as e: call()
        assert len(str(e.value)) <= 600
