from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from fast_diffusers.text_encoders import CLIPTextModel, CLIPTokenizer
from fast_diffusers.text_encoders.clip_projection import PROJECTION, CLIPTextModelWithProjection

CLIP = Path(__file__).parents[2] / "assets" / "text_encoders" / "clip"
TEXTS = ["a photo of a small red cat", ""]


@pytest.fixture
def plain():
    return CLIPTextModel.from_pretrained(CLIP)


@pytest.fixture
def model(plain):
    """The model without projection, and a random one."""
    paddle.seed(0)
    config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    model = CLIPTextModelWithProjection.from_config(config | {"projection_dim": 5})
    for name, value in plain.state_dict().items():
        model.state_dict()[name].set_value(value)
    model.eval()
    return model


@pytest.fixture
def ids():
    return CLIPTokenizer.from_pretrained(CLIP / "tokenizer")(TEXTS)


def test_projects_the_pooled_output(model, plain, ids):
    output, truth = model(ids), plain(ids)
    np.testing.assert_array_equal(output.last_hidden_state, truth.last_hidden_state)
    weight = model.text_projection.weight.numpy()
    np.testing.assert_allclose(output.text_embeds, truth.pooler_output.numpy() @ weight, atol=1e-5)


def test_hidden_states_are_those_of_the_layers(model, ids):
    states = model(ids).hidden_states
    assert len(states) == model.config.num_hidden_layers == 2
    last = model.text_model.final_layer_norm(states[-1])
    np.testing.assert_allclose(last, model(ids).last_hidden_state, atol=1e-6)
    layer = model.text_model.encoder.layers[1]
    mask = paddle.triu(paddle.full([77, 77], float("-inf")), diagonal=1)
    np.testing.assert_allclose(layer(states[0], mask), states[1], atol=1e-5)
    assert not any(each._forward_post_hooks for each in model.text_model.encoder.layers)


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(model, ids, layout, tmp_path):
    model.save_pretrained(tmp_path, layout=layout)
    again = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert again.config.projection_dim == 5
    np.testing.assert_array_equal(again(ids).text_embeds, model(ids).text_embeds)


def test_files_whose_names_have_no_prefix(model, ids, tmp_path):
    model.save_pretrained(tmp_path, layout="diffusers")
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert PROJECTION in tensors
    save_file({name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    again = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(ids).text_embeds, model(ids).text_embeds)
