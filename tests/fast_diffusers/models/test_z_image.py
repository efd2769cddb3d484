import numpy as np
import paddle
import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.models import ZImageTransformer2DModel
from fast_diffusers.models.z_image import _ids, _patchify, _unpatchify

CONFIG = dict(
    in_channels=3,
    dim=16,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=6,
    axes_dims=(2, 2, 4),
    axes_lens=(80, 8, 8),
)


@pytest.fixture
def model():
    paddle.seed(0)
    model = ZImageTransformer2DModel(**CONFIG)
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.1 * paddle.randn(weight.shape))
    return model


def inputs(sizes=((4, 6), (8, 10)), lengths=(5, 40)):
    paddle.seed(1)
    return dict(
        x=[paddle.randn([3, 1, *size]) for size in sizes],
        t=paddle.linspace(0.25, 0.75, len(sizes)),
        cap_feats=[paddle.randn([length, 6]) for length in lengths],
    )


def test_samples_of_different_sizes_do_not_mix(model):
    arguments = inputs()
    together = model(**arguments).sample
    assert [sample.shape for sample in together] == [[3, 1, 4, 6], [3, 1, 8, 10]]
    for i, sample in enumerate(together):
        alone = model(arguments["x"][i : i + 1], arguments["t"][i : i + 1], arguments["cap_feats"][i : i + 1])
        np.testing.assert_allclose(sample, alone.sample[0], atol=1e-4)


def test_a_batch_may_come_as_tensors(model):
    arguments = inputs(sizes=[(4, 6)] * 2, lengths=[5, 5])
    listed = model(**arguments).sample
    stacked = model(paddle.stack(arguments["x"]), arguments["t"], paddle.stack(arguments["cap_feats"])).sample
    for one, other in zip(listed, stacked, strict=True):
        assert (one == other).all()


def test_captions_may_be_padded_with_their_lengths_given(model):
    lengths = [5, 40, 64]
    arguments = inputs(sizes=[(4, 6)] * 3, lengths=lengths)
    listed = paddle.stack(model(**arguments).sample)
    captions = paddle.randn([3, 96, 6])  # what is beyond a length has no effect
    for row, caption in enumerate(arguments["cap_feats"]):
        captions[row, : len(caption)] = caption
    given = {"x": paddle.stack(arguments["x"]), "cap_feats": captions, "cap_lengths": paddle.to_tensor(lengths)}
    np.testing.assert_allclose(model(**arguments | given).sample, listed, atol=1e-5)


def test_patches_are_undone_and_ordered_by_frame_row_column_channel():
    latent = paddle.arange(2 * 2 * 4 * 6, dtype="float32").reshape([2, 2, 4, 6])
    patches = _patchify(latent, (1, 2, 3))
    assert patches.shape == [6, 16]
    expected = [latent[c, f, y, 2 + x].item() for f in (0, 1) for y in (0, 1) for x in (0, 1) for c in (0, 1)]
    assert patches[1].tolist() == expected
    assert (_unpatchify(patches, (1, 2, 3), [2, 2, 4, 6]) == latent).all()


def test_positions_are_filled_up_to_a_multiple_of_32_with_zeros():
    ids = _ids((1, 2, 3), start=33)
    assert ids.shape == (32, 3)
    assert ids[:6].tolist() == [[33, row, column] for row in (0, 1) for column in (0, 1, 2)]
    assert not ids[6:].any()


def test_filled_tokens_are_the_learned_ones_and_take_part(model):
    arguments = inputs()
    before = model(**arguments).sample[0]
    for token in (model.x_pad_token, model.cap_pad_token):
        token.set_value(token + 1.0)
        after = model(**arguments).sample[0]
        assert (after - before).abs().max() > 1e-4
        before = after


def test_controlnet_residuals_are_added_after_a_layer(model):
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    model(**inputs())
    model(**inputs(), controlnet_block_samples={0: paddle.ones([2, 96, 16])})
    np.testing.assert_allclose(seen[1] - seen[0], np.ones([2, 96, 16]), atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(t=paddle.ones([3])), "2 latents, 2 captions and 3 times do not match"),
        (dict(patch_size=4), "has patch sizes .*'2-1'.*, not 4-1"),
        (dict(x=[paddle.ones([3, 1, 5, 6])] * 2), "1 x 5 x 6 are not whole patches of 1 x 2 x 2"),
        (dict(x=[paddle.ones([3, 1, 4, 18])] * 2), r"need \[34, 2, 9\] positions"),
        (dict(cap_feats=[paddle.ones([90, 6])] * 2), r"need \[98, 2, 3\] positions"),
        (dict(siglip_feats=[]), "neither `siglip_feats`"),
        (dict(joint_attention_kwargs={"scale": 0.5}), r"joint_attention_kwargs \['scale'\] are not supported"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(), **change})


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="siglip_feat_dim are not supported"):
        ZImageTransformer2DModel(**CONFIG, siglip_feat_dim=8)
    with pytest.raises(ValueError, match="n_kv_heads 1 must equal"):
        ZImageTransformer2DModel(**CONFIG | dict(n_kv_heads=1))
    with pytest.raises(ValueError, match="sum to the head size 8"):
        ZImageTransformer2DModel(**CONFIG | dict(axes_dims=(2, 2, 2)))
