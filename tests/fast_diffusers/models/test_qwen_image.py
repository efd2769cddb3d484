import numpy as np
import paddle
import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.models import QwenImageTransformer2DModel
from fast_diffusers.models.layers import rope_tables

CONFIG = dict(
    in_channels=8,
    out_channels=2,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    axes_dims_rope=(2, 2, 4),
)


@pytest.fixture
def model():
    paddle.seed(0)
    model = QwenImageTransformer2DModel(**CONFIG)
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.2 * paddle.randn(weight.shape))
    return model


def inputs(tokens=15):
    paddle.seed(1)
    return dict(
        hidden_states=paddle.randn([2, tokens, 8]),
        encoder_hidden_states=paddle.randn([2, 4, 6]),
        encoder_hidden_states_mask=paddle.to_tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        timestep=paddle.to_tensor([0.25, 0.75]),
        img_shapes=[[(1, 3, 5)]] * 2,
    )


def test_positions_count_from_the_centre_and_text_lies_behind(model):
    text = [[3, 3, 3], [4, 4, 4]]  # behind the larger half of the widest image
    first = [[0, row, column] for row in (-2, -1, 0) for column in (-3, -2, -1, 0, 1, 2)]
    second = [[1, row, column] for row in (-1, 0) for column in (-1, 0)]
    expected = rope_tables(paddle.to_tensor(text + first + second).astype("float32"), (2, 2, 4))
    actual = model.embed_positions([(1, 3, 6), (1, 2, 2)], text_length=2)
    for table, truth in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(table, truth)


def test_masked_text_does_not_matter_and_the_mask_may_be_left_out(model):
    arguments = inputs()
    masked = model(**arguments).sample
    other = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][1, 2:] = 7.0
    np.testing.assert_allclose(model(**other).sample, masked, atol=1e-6)
    whole = model(**{**arguments, "encoder_hidden_states_mask": None}).sample
    np.testing.assert_allclose(whole[0], masked[0], atol=1e-6)
    assert (whole[1] - masked[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "shapes", [[[(1, 3, 5)]] * 2, [(1, 3, 5)] * 2, paddle.to_tensor([[1, 3, 5]] * 2)], ids=["images", "image", "tensor"]
)
def test_image_shapes_come_in_several_forms(model, shapes):
    assert (model(**{**inputs(), "img_shapes": shapes}).sample == model(**inputs()).sample).all()


def test_several_images_form_one_sequence(model):
    sample = model(**{**inputs(tokens=19), "img_shapes": [[(1, 3, 5), (1, 2, 2)]] * 2}).sample
    assert sample.shape == [2, 19, 8]


def test_controlnet_residuals_are_added_after_blocks(model):
    seen = []
    model.transformer_blocks[1].register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    model(**inputs())
    residuals = [paddle.ones([2, 15, 16]), paddle.zeros([2, 15, 16])]
    model(**inputs(), controlnet_block_samples=residuals)
    np.testing.assert_allclose(seen[1] - seen[0], np.ones([2, 15, 16]), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(img_shapes=[[(1, 3, 5)], [(1, 5, 3)]]), "the same for all samples"),
        (dict(img_shapes=[[(1, 3, 4)]] * 2), "are 12 tokens, but hidden_states has 15"),
        (dict(txt_seq_lens=[3, 2]), "must be the text's 4 tokens"),
        (dict(guidance=paddle.ones([2])), "neither `guidance`"),
        (dict(attention_kwargs={"scale": 0.5}), r"attention_kwargs \['scale'\] are not supported"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(), **change})


@pytest.mark.parametrize("name", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_other_variants_are_refused(name):
    with pytest.raises(UserError, match=f"with {name} are not supported"):
        QwenImageTransformer2DModel(**CONFIG, **{name: True})


def test_bad_rotary_axes_are_refused():
    with pytest.raises(ValueError, match="must be even and sum to the head size 8"):
        QwenImageTransformer2DModel(**CONFIG | dict(axes_dims_rope=(2, 2, 2)))
