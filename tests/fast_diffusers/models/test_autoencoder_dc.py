import math

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from ppdiffusers import ModelMixin
from safetensors.numpy import load_file

from fast_diffusers.models import AutoencoderDC

BLOCKS = ["ResBlock", "ResBlock", "EfficientViTBlock"]
CONFIG = dict(
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=BLOCKS,
    decoder_block_types=BLOCKS,
    encoder_block_out_channels=[8, 8, 16],
    decoder_block_out_channels=[8, 8, 16],
    encoder_layers_per_block=[1, 1, 1],
    decoder_layers_per_block=[1, 1, 1],
    encoder_qkv_multiscales=[[], [], [5]],
    decoder_qkv_multiscales=[[], [], [5]],
)
VARIANTS = {
    "sana": dict(downsample_block_type="Conv", upsample_block_type="interpolate"),
    "shuffled": {},
    "skipped first stage": dict(
        encoder_layers_per_block=[0, 1, 1],
        decoder_layers_per_block=[0, 1, 1],
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_act_fns=["relu", "silu", "silu"],
    ),
}


def build(seed=0, **overrides):
    paddle.seed(seed)
    return AutoencoderDC(**{**CONFIG, **overrides}).eval()


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(**VARIANTS[request.param])


@pytest.fixture
def reference(fixtures_dir):
    return AutoencoderDC.from_pretrained(fixtures_dir / "dc_ae"), np.load(fixtures_dir / "dc_ae" / "io.npz")


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


def test_reproduces_the_reference_outputs(reference):
    model, recorded = reference
    assert isinstance(model, ModelMixin) and not model.training and model.config.scaling_factor == 0.41407
    with paddle.no_grad():
        assert (
            relative_error(model.encode(paddle.to_tensor(recorded["in_image"])).latent, recorded["out_latent"]) < 1e-5
        )
        assert (
            relative_error(model.decode(paddle.to_tensor(recorded["in_latent"])).sample, recorded["out_image"]) < 1e-5
        )


def test_saving_reproduces_the_reference_file(fixtures_dir, reference, tmp_path):
    file = "diffusion_pytorch_model.safetensors"
    reference[0].save_pretrained(tmp_path, layout="diffusers")
    written, original = load_file(tmp_path / file), load_file(fixtures_dir / "dc_ae" / file)
    assert written.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)


def test_published_size():
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    with paddle.LazyGuard():  # nothing is allocated
        model = AutoencoderDC(encoder_block_types=blocks, decoder_block_types=blocks, **VARIANTS["sana"])
    assert sum(math.prod(weight.shape) for weight in model.parameters()) == 312_250_275
    assert model.spatial_compression_ratio == 32


def test_shapes_and_return_values(model):
    image = paddle.randn([2, 3, 16, 24])
    [latent] = model.encode(image, return_dict=False)
    assert latent.shape == [2, 4, 4, 6] and (latent == model.encode(image).latent).all()
    [decoded] = model.decode(latent, return_dict=False)
    assert decoded.shape == image.shape and (decoded == model.decode(latent).sample).all()
    assert (model(image).sample == decoded).all()


def test_float64_agrees_with_float32(model):
    image = paddle.randn([1, 3, 16, 24])
    single = model(image).sample
    model.to(dtype="float64")
    double = model(image.astype("float64")).sample
    assert double.dtype == paddle.float64 and relative_error(single, double) < 1e-4


def test_every_weight_gets_a_gradient(model):
    model(paddle.randn([1, 3, 16, 24])).sample.square().mean().backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0]
    assert not still


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(model, layout, tmp_path):
    model.save_pretrained(tmp_path, layout=layout)
    again, image = AutoencoderDC.from_pretrained(tmp_path), paddle.randn([1, 3, 16, 24])
    assert (again(image).sample == model(image).sample).all()


def test_slicing_changes_nothing_but_the_batch():
    model = build()
    image = paddle.randn([3, 3, 16, 24])
    whole, batches = model(image).sample, []
    model.enable_slicing()
    for network in (model.encoder, model.decoder):
        network.register_forward_pre_hook(lambda _layer, inputs: batches.append(inputs[0].shape[0]))
    np.testing.assert_allclose(model(image).sample, whole, atol=1e-5)
    assert batches == [1] * 6
    model.disable_slicing()
    model.encode(image)
    assert batches[6:] == [3]


def smooth_image(height, width):
    """Waves, as a test image that a tile sees as the whole does: [1, 3, H, W] in [-1, 1]."""
    y, x = paddle.meshgrid(paddle.arange(height) / 16.0, paddle.arange(width) / 16.0)
    return paddle.stack([(x + y).sin(), (x - y).cos(), (2 * x).sin()]).unsqueeze(0)


def root_mean_square_error(actual, expected):
    return float((actual - expected).square().mean() / expected.square().mean()) ** 0.5


CONVOLUTIONS = dict(
    encoder_block_types="ResBlock",
    decoder_block_types="ResBlock",
    encoder_qkv_multiscales=[[]] * 3,
    decoder_qkv_multiscales=[[]] * 3,
)


@pytest.mark.parametrize("config, tolerance", [(CONVOLUTIONS, 0.05), ({}, 0.12)])
def test_blended_tiles_are_close_to_the_whole_image(config, tolerance):
    """A random network; tiles miss what lies beyond their edges, and attention sees a tile instead of the image."""
    model, image = build(**config), smooth_image(96, 128)
    with paddle.no_grad():
        latent = model.encode(image).latent
        decoded = model.decode(latent).sample
        sizes, errors = [], []
        for network in (model.encoder, model.decoder):
            network.register_forward_pre_hook(lambda _layer, inputs: sizes.append(inputs[0].shape[2:]))
        for stride in (48, 64):
            model.enable_tiling(64, 64, stride, stride)
            tiled, tiled_image = model.encode(image).latent, model.decode(latent).sample
            assert tiled.shape == latent.shape and tiled_image.shape == decoded.shape
            errors.append((root_mean_square_error(tiled, latent), root_mean_square_error(tiled_image, decoded)))
    assert sizes[:12] == [[64, 64]] * 6 + [[16, 16]] * 6
    for blended, cut in zip(*errors, strict=True):
        assert 0 < blended < min(tolerance, cut / 2)


def test_images_of_one_tile_are_not_tiled():
    model = build()
    image = paddle.randn([1, 3, 16, 24])
    whole = model(image).sample
    model.enable_tiling(16, 32, 16, 16)
    assert model.use_tiling and (model(image).sample == whole).all()
    wide = paddle.randn([1, 3, 16, 48])
    tiled = model.encode(wide).latent
    model.disable_tiling()
    assert not model.use_tiling and (model.encode(wide).latent != tiled).any()


@pytest.mark.parametrize("sizes", [(63, 64, 32, 32), (64, 64, 64, 68), (64, 64, 0, 32), (64, 64, 32, 30)])
def test_bad_tiles_are_refused(sizes):
    with pytest.raises(ValueError, match="must be positive multiples of 4, and no stride longer than its tile"):
        build().enable_tiling(*sizes)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="images of 16 x 22 pixels: both sizes must be multiples of 4"):
        build().encode(paddle.randn([1, 3, 16, 22]))


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"decoder_norm_types": ["batch_norm", "rms_norm", "rms_norm"]},
            "decoder_norm_types 'batch_norm' is not supported",
        ),
        ({"decoder_act_fns": "relu6"}, "decoder_act_fns 'relu6' is not supported: choose relu or silu"),
        ({"encoder_block_types": "UNetBlock"}, "block types 'UNetBlock' is not supported"),
        ({"encoder_layers_per_block": [1, 1]}, "one entry for each stage"),
        ({"upsample_block_type": "deconv"}, "upsample_block_type 'deconv' is not supported"),
    ],
)
def test_unknown_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


def test_traced_networks_equal_dygraph_at_any_size(model):
    images = [paddle.randn([2, 3, 16, 24]), paddle.randn([1, 3, 32, 8])]
    with paddle.no_grad():
        latents = [model.encode(image).latent for image in images]
        decoded = [model.decode(latent).sample for latent in latents]
        encode, decode = (
            paddle.jit.to_static(network, full_graph=True, input_spec=[InputSpec([None, channels, None, None])])
            for network, channels in ((model.encoder, 3), (model.decoder, 4))
        )
        for image, latent, truth in zip(images, latents, decoded, strict=True):
            assert relative_error(encode(image), latent) < 1e-5
            assert relative_error(decode(latent), truth) < 1e-5
