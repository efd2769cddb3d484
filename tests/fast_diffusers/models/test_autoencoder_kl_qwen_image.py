import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.static import InputSpec
from safetensors.numpy import load_file

from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKLQwenImage
from fast_diffusers.models.autoencoder_kl_qwen_image import FrameConv

CONFIG = dict(
    base_dim=4,
    z_dim=2,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[False, True],
    latents_mean=[0.0, 1.0],
    latents_std=[1.0, 2.0],
)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.fixture
def reference(fixtures_dir):
    folder = fixtures_dir / "vae_qwen_image"
    return AutoencoderKLQwenImage.from_pretrained(folder), np.load(folder / "io.npz")


@pytest.fixture
def tiny():
    paddle.seed(0)
    model = AutoencoderKLQwenImage(**CONFIG)
    model.eval()
    return model


def test_reproduces_the_reference_outputs(reference):
    model, recorded = reference
    with paddle.no_grad():
        latents = model.encode(paddle.to_tensor(recorded["in_image"])).latent_dist.mode()
        image = model.decode(paddle.to_tensor(recorded["in_latent"])).sample
    assert relative_error(latents, recorded["out_latent"]) < 1e-5
    assert relative_error(image, recorded["out_image"]) < 1e-5


def test_saving_reproduces_the_reference_file(fixtures_dir, reference, tmp_path):
    reference[0].save_pretrained(tmp_path, layout="diffusers")
    file = "diffusion_pytorch_model.safetensors"
    written, original = load_file(tmp_path / file), load_file(fixtures_dir / "vae_qwen_image" / file)
    assert written.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)


@pytest.mark.parametrize("size", [1, 3])
def test_a_frame_convolution_is_the_causal_one_of_a_single_frame(size):
    paddle.seed(0)
    conv = FrameConv(2, 3, size)
    x = paddle.randn([2, 2, 5, 4])
    pad = size // 2
    padded = F.pad(x.unsqueeze(2), [pad, pad, pad, pad, 2 * pad, 0], data_format="NCDHW")
    causal = F.conv3d(padded, conv.weight, conv.bias)
    assert causal.shape == [2, 3, 1, 5, 4]
    np.testing.assert_allclose(conv(x), causal.squeeze(2), atol=1e-6)


def test_shapes_and_defaults(tiny):
    posterior = tiny.encode(paddle.randn([2, 3, 1, 8, 12])).latent_dist
    assert tiny.spatial_compression_ratio == 4
    assert posterior.mode().shape == posterior.sample().shape == [2, 2, 1, 2, 3]
    image = tiny.decode(100 * posterior.mode()).sample
    assert image.shape == [2, 3, 1, 8, 12]
    assert image.abs().max() <= 1


def test_forward_encodes_and_decodes(tiny):
    x = paddle.randn([1, 3, 1, 8, 8])
    latents = tiny.encode(x, return_dict=False)[0]
    assert (tiny(x).sample == tiny.decode(latents.mode(), return_dict=False)[0]).all()
    drawn = latents.sample(paddle.Generator().manual_seed(3))
    sampled = tiny(x, sample_posterior=True, return_dict=False, generator=paddle.Generator().manual_seed(3))[0]
    assert (sampled == tiny.decode(drawn).sample).all()


def test_gradients_reach_the_image_and_every_weight_that_acts_on_one_frame(tiny):
    x = paddle.randn([1, 3, 1, 8, 8])
    x.stop_gradient = False
    latents = tiny.encode(x).latent_dist.sample()
    tiny.decode(latents).sample.sum().backward()
    assert x.grad.abs().max() > 0
    idle = {name for name, weight in tiny.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0}
    assert idle == {name for name, _ in tiny.named_parameters() if "time_conv" in name}


def test_traced_encoder_and_decoder_equal_dygraph_at_any_size(tiny):
    images, latents = InputSpec([None, 3, 1, None, None]), InputSpec([None, 2, 1, None, None])

    def moments(x):
        return tiny.encode(x, return_dict=False)[0].parameters

    def image(z):
        return tiny.decode(z, return_dict=False)[0]

    encode = paddle.jit.to_static(moments, full_graph=True, input_spec=[images])
    decode = paddle.jit.to_static(image, full_graph=True, input_spec=[latents])
    with paddle.no_grad():
        for shape in ([1, 3, 1, 8, 12], [2, 3, 1, 4, 8]):
            x = paddle.randn(shape)
            z = tiny.encode(x).latent_dist.mode()
            np.testing.assert_allclose(encode(x)[:, :2], z, atol=1e-5)
            np.testing.assert_allclose(decode(z), tiny.decode(z).sample, atol=1e-5)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(tiny, layout, tmp_path):
    tiny.save_pretrained(tmp_path, layout=layout)
    again = AutoencoderKLQwenImage.from_pretrained(tmp_path)
    assert again.config.latents_std == [1.0, 2.0]
    for name, weight in tiny.state_dict().items():
        np.testing.assert_array_equal(weight, again.state_dict()[name], err_msg=name)


@pytest.mark.parametrize("shape", [[1, 3, 8, 8], [1, 3, 2, 8, 8]])
def test_videos_are_refused(tiny, shape):
    with pytest.raises(UserError, match="one frame each"):
        tiny.encode(paddle.zeros(shape))
    with pytest.raises(UserError, match="one frame each"):
        tiny.decode(paddle.zeros(shape))


def test_sizes_and_configs_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match="10 x 8 are not multiples of 4"):
        tiny.encode(paddle.zeros([1, 3, 1, 10, 8]))
    with pytest.raises(UserError, match="attn_scales"):
        AutoencoderKLQwenImage(**CONFIG | dict(attn_scales=[1.0]))
    with pytest.raises(ValueError, match="2 temperal_downsample"):
        AutoencoderKLQwenImage(**CONFIG | dict(temperal_downsample=[True]))
    with pytest.raises(ValueError, match="z_dim = 2 entries"):
        AutoencoderKLQwenImage(**CONFIG | dict(latents_std=[1.0]))
