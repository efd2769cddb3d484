import json

import numpy as np
import paddle
import ppdiffusers
import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKL


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.fixture
def reference(fixtures_dir):
    return AutoencoderKL.from_pretrained(fixtures_dir / "vae_kl"), np.load(fixtures_dir / "vae_kl" / "io.npz")


def test_reproduces_the_reference_outputs(reference):
    model, recorded = reference
    with paddle.no_grad():
        latents = model.encode(paddle.to_tensor(recorded["in_image"])).latent_dist.mode()
        image = model.decode(paddle.to_tensor(recorded["in_latent"])).sample
    assert relative_error(latents, recorded["out_latent"]) < 1e-5
    assert relative_error(image, recorded["out_image"]) < 1e-5


def test_is_ppdiffusers_class_without_quant_convs_and_with_a_shift(reference):
    model, _ = reference
    assert isinstance(model, ppdiffusers.AutoencoderKL) and not model.training
    assert model.quant_conv is None and model.post_quant_conv is None
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.3611, 0.1159)


def test_samples_are_reproduced_by_a_seeded_generator(reference):
    model, recorded = reference
    posterior = model.encode(paddle.to_tensor(recorded["in_image"])).latent_dist
    first, again, other = (posterior.sample(paddle.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()
    spread = (first - posterior.mean).abs() / posterior.std
    assert 0 < spread.mean() < 2


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(reference, layout, tmp_path):
    model, _ = reference
    model.save_pretrained(tmp_path, layout=layout)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight, again.state_dict()[name], err_msg=name)


def test_diffusers_layout_keeps_convolutions_and_transposes_linear_layers(fixtures_dir, reference, tmp_path):
    from safetensors.numpy import load_file

    reference[0].save_pretrained(tmp_path, layout="diffusers")
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    original = load_file(fixtures_dir / "vae_kl" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)


def test_attention_free_middle_blocks_are_refused(fixtures_dir, tmp_path):
    config = json.loads((fixtures_dir / "vae_kl" / "config.json").read_text())
    with pytest.raises(UserError, match="without attention in its middle blocks"):
        AutoencoderKL.from_config(config | {"mid_block_add_attention": False})


def test_gradient_checkpointing_is_refused(reference):
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        reference[0].enable_gradient_checkpointing()
