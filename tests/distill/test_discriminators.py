import numpy as np
import paddle
import pytest
from paddle.base import core

from distill.discriminators import PatchDiscriminator, PatchHead
from distill.trainer import frozen


def parameter_count(layer):
    return sum(p.size for p in layer.parameters())


def test_head_of_flux_has_the_published_size():
    """57 heads of 3072 channels are 1.077 B parameters; the count is quadratic in the channels."""

    def count(channels):
        return 2 * (channels**2 + 3 * channels) + channels + 1

    assert parameter_count(PatchHead(64)) == count(64)
    assert 57 * count(3072) == pytest.approx(1.077e9, rel=1e-3)


def test_heads_map_features_to_patch_logits():
    heads = PatchDiscriminator(48, 3)
    features = [paddle.randn([2, 48, 3, 5], dtype="float32") for _ in range(3)]
    assert [list(logits.shape) for logits in heads(features)] == [[2, 1, 3, 5]] * 3
    assert heads.heads[0].groups == 16
    with pytest.raises(ValueError, match="3 discriminator heads got 2 feature maps"):
        heads(features[:2])


def test_head_is_two_blocks_the_second_residual():
    """Against the layers' own formulas in NumPy, float64."""
    head, x = PatchHead(6), np.random.default_rng(0).normal(size=(2, 6, 3, 4))
    for p in head.parameters():
        p.set_value(paddle.randn(p.shape))

    def convolution(layer, x):
        weight, bias = (p.numpy().astype("float64") for p in (layer.weight, layer.bias))
        return np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]

    def block(layers, x):
        x = convolution(layers[0], x)
        grouped = x.reshape(2, 2, -1)  # six channels: two groups
        grouped = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
        scale, shift = (p.numpy()[:, None, None] for p in (layers[1].weight, layers[1].bias))
        x = grouped.reshape(x.shape) * scale + shift
        return np.where(x > 0, x, 0.2 * x)

    hidden = block(head.entry, x)
    expected = convolution(head.readout, hidden + block(head.residual, hidden))
    np.testing.assert_allclose(head(paddle.to_tensor(x, "float32")).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["heads", "features", "both"])
def test_checkpointing_does_not_change_a_bit(side, dtype):
    """Two passes of one discriminator in one loss, as on fake and real samples, and two losses accumulated."""
    paddle.seed(0)
    plain, checkpointed = PatchDiscriminator(12, 2), PatchDiscriminator(12, 2, checkpointing=True)
    checkpointed.set_state_dict(plain.state_dict())
    values = [paddle.randn([2, 12, 3, 5]).astype(dtype) for _ in range(4)]
    outcome = []
    for heads in (plain, checkpointed):
        features = [value.detach() for value in values]
        for x in features:
            x.stop_gradient = side == "heads"
        for target in (1.0, -0.5):
            with frozen(heads if side == "features" else None):
                logits = heads(features[:2]) + heads(features[2:])
            sum((x - target).square().mean() for x in logits).backward()
        gradients = [x.grad for x in (*heads.parameters(), *features) if x.grad is not None]
        outcome.append([x.astype("float32").numpy() for x in (*logits, *gradients)])
    assert len(outcome[0]) == 4 + {"heads": 20, "features": 4, "both": 24}[side]
    for expected, actual in zip(*outcome, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_checkpointed_heads_work_within_partial_gradients():
    heads, x = PatchDiscriminator(12, 1, checkpointing=True), paddle.randn([1, 12, 2, 2])
    x.stop_gradient = False
    with frozen(heads):
        (actual,) = paddle.grad(heads([2 * x])[0].sum(), [x])
        heads.heads[0].checkpointing = False
        (expected,) = paddle.grad(heads([2 * x])[0].sum(), [x])
    np.testing.assert_array_equal(actual.numpy(), expected.numpy())


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="measures tensors in host memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_checkpointed_heads(dtype):
    """In feature maps of float32: without checkpointing six a tap and pass stay, with it one head at a time."""
    features = [paddle.randn([2, 64, 32, 32]).astype(dtype) for _ in range(8)]

    def peak(checkpointing: bool) -> float:
        heads = PatchDiscriminator(64, 8, checkpointing)
        start = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        sum(logits.mean() for _ in range(2) for logits in heads(features)).backward()
        return (core.host_memory_stat_peak_value("Allocated", 0) - start) / (4 * features[0].size)

    assert peak(False) > 6 * 16
    assert peak(True) < 10
