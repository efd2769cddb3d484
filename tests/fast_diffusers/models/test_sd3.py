import numpy as np
import paddle
import pytest

from fast_diffusers.models import SD3Transformer2DModel
from fast_diffusers.models.sd3 import position_table

CONFIG = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    caption_projection_dim=16,
    pooled_projection_dim=7,
    pos_embed_max_size=6,
    dual_attention_layers=[0],
    qk_norm="rms_norm",
)


@pytest.fixture
def model():
    paddle.seed(0)
    model = SD3Transformer2DModel(**CONFIG)
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.2 * paddle.randn(weight.shape))
    return model


def inputs(height=8, width=6):
    paddle.seed(1)
    return dict(
        hidden_states=paddle.randn([2, 3, height, width]),
        encoder_hidden_states=paddle.randn([2, 4, 6]),
        pooled_projections=paddle.randn([2, 7]),
        timestep=paddle.to_tensor([250.0, 750.0]),
    )


def test_position_table_is_sines_and_cosines_of_columns_then_rows():
    table = position_table(size=6, channels=8, base_size=3).reshape(6, 6, 8)
    row, column = 2, 5
    angles = [np.array([1.0, 0.01]) * position / 2 for position in (column, row)]
    expected = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))])
    np.testing.assert_allclose(table[row, column], expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of four"):
        position_table(6, 10, 3)


@pytest.mark.parametrize("rows, columns", [(6, 6), (2, 4), (3, 5), (1, 6)])
def test_positions_are_the_middle_of_the_table(model, rows, columns):
    table = model.pos_embed.pos_embed.numpy().reshape(6, 6, 16)
    top, left = (6 - rows) // 2, (6 - columns) // 2
    expected = table[top : top + rows, left : left + columns].reshape(1, -1, 16)
    np.testing.assert_array_equal(model.pos_embed.positions(rows, columns), expected)


def test_positions_are_those_of_the_file(model, tmp_path):
    model.pos_embed.pos_embed.set_value(paddle.randn([1, 36, 16]))
    model.save_pretrained(tmp_path, layout="diffusers")
    again = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert (again.pos_embed.pos_embed == model.pos_embed.pos_embed).all()
    assert "pos_embed.pos_embed" not in dict(again.named_parameters())  # nothing trains them


@pytest.mark.parametrize("height, width", [(7, 8), (8, 5), (14, 8)])
def test_sizes_that_do_not_fit_are_refused(model, height, width):
    with pytest.raises(ValueError, match=f"{height} x {width} do not fit .* multiples of 2 up to 12"):
        model(**inputs(height, width))


def test_skipped_layers_do_not_run(model):
    runs = []
    for number, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda _layer, _args, number=number: runs.append(number))
    skipped = model(**inputs(), skip_layers=[1]).sample
    assert runs == [0, 2]
    assert (skipped - model(**inputs()).sample).abs().max() > 1e-3


def test_controlnet_residuals_are_spread_over_all_blocks_but_the_last(model):
    seen = []
    for block in model.transformer_blocks[1:]:
        block.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    left = []
    for block in model.transformer_blocks[:-1]:
        block.register_forward_post_hook(lambda _layer, _args, out: left.append(out[1]))
    residuals = [paddle.full([2, 12, 16], value) for value in (1.0, 2.0)]
    model(**inputs(), block_controlnet_hidden_states=residuals)
    for after, before in zip(seen, left, strict=True):  # two residuals for three blocks: the second is for the last
        np.testing.assert_allclose(after - before, np.ones([2, 12, 16]), atol=1e-4)


def test_whole_number_timesteps_are_taken(model):
    whole = {**inputs(), "timestep": paddle.to_tensor([250, 750])}
    assert (model(**whole).sample == model(**inputs()).sample).all()


def test_unknown_settings_are_refused(model):
    with pytest.raises(ValueError, match=r"joint_attention_kwargs \['scale'\] are not supported"):
        model(**inputs(), joint_attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="unknown qk_norm 'layer_norm'"):
        SD3Transformer2DModel(**CONFIG | dict(qk_norm="layer_norm"))
    with pytest.raises(ValueError, match="caption_projection_dim 8 must be"):
        SD3Transformer2DModel(**CONFIG | dict(caption_projection_dim=8))
