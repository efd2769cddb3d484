import numpy as np
import paddle
import pytest
from paddle.base import core
from safetensors.paddle import load_file, save_file

from distill.discriminators import (
    BatchNormLocal,
    LaddDiscriminator,
    LaddHead,
    PatchDiscriminator,
    PatchHead,
    SpectralConv1D,
)
from distill.trainer import frozen


def parameter_count(layer):
    return sum(p.size for p in layer.parameters())


def test_head_of_flux_has_the_published_size():
    """57 heads of 3072 channels are 1.077 B parameters; the count is quadratic in the channels."""

    def count(channels):
        return 2 * (channels**2 + 3 * channels) + channels + 1

    assert parameter_count(PatchHead(64)) == count(64)
    assert 57 * count(3072) == pytest.approx(1.077e9, rel=1e-3)


@pytest.mark.parametrize("kind", [PatchDiscriminator, LaddDiscriminator])
def test_heads_map_features_to_patch_logits(kind):
    heads = kind(48, 3)
    features = [paddle.randn([2, 48, 3, 5], dtype="float32") for _ in range(3)]
    assert [list(logits.shape) for logits in heads(features)] == [[2, 1, 3, 5]] * 3
    with pytest.raises(ValueError, match="3 discriminator heads got 2 feature maps"):
        heads(features[:2])


def test_head_is_two_blocks_the_second_residual():
    """Against the layers' own formulas in NumPy, float64."""
    assert [PatchHead(channels).groups for channels in (6, 48, 96)] == [2, 16, 32]
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


# ---------------------------------------------------------------------------------------------- heads of LADD
def singular_values(layer):
    """(the largest one, the one that the layer divides by)."""
    matrix = layer.weight.numpy().reshape(layer.weight.shape[0], -1).astype("float64")
    return np.linalg.svd(matrix, compute_uv=False)[0], layer.u.numpy() @ matrix @ layer.v.numpy()


def local_batch_norm(x, scale, shift):
    groups = np.array_split(x, -(-len(x) // 8))
    mean, variance = (lambda g: g.mean((0, 2), keepdims=True)), (lambda g: g.var((0, 2), keepdims=True))
    normalised = [(g - mean(g)) / np.sqrt(variance(g) + 1e-5) for g in groups]
    return np.concatenate(normalised) * scale[:, None] + shift[:, None]


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 20, 33])
def test_local_batch_norm_takes_any_number_of_rows(rows):
    layer, x = BatchNormLocal(3), np.random.default_rng(0).normal(2.0, 3.0, size=(rows, 3, 5))
    for p in layer.parameters():
        p.set_value(paddle.randn(p.shape))
    expected = local_batch_norm(x, layer.weight.numpy(), layer.bias.numpy())
    np.testing.assert_allclose(layer(paddle.to_tensor(x, "float32")).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_local_batch_norm_of_a_single_value_is_its_bias():
    layer, x = BatchNormLocal(3), paddle.randn([1, 3, 1])
    x.stop_gradient = False
    out = layer(x)
    out.sum().backward()
    assert (out == 0).all() and (x.grad == 0).all()


def wrapped_convolution(x, weight, bias):
    """[B, C, N] by the definition, every index modulo N."""
    length, reach = x.shape[2], weight.shape[2] // 2
    taps = np.stack([x[:, :, (np.arange(length) + k - reach) % length] for k in range(weight.shape[2])], -1)
    return np.einsum("oik,bink->bon", weight, taps) + bias[:, None]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16])
def test_convolution_wraps_around_and_has_norm_one(length):
    layer = SpectralConv1D(3, 5, 9)
    layer.eval()
    x = np.random.default_rng(0).normal(size=(2, 3, length))
    weight = layer.weight.numpy() / singular_values(layer)[1]
    expected = wrapped_convolution(x, weight, layer.bias.numpy())
    np.testing.assert_allclose(layer(paddle.to_tensor(x, "float32")).numpy(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        SpectralConv1D(3, 5, 4)


@pytest.mark.parametrize("size", [(2, 6, 3, 4), (1, 6, 1, 2), (9, 6, 2, 2), (17, 6, 4, 4)])
def test_ladd_head_is_three_convolutions_the_second_residual(size):
    head, x = LaddHead(6), np.random.default_rng(0).normal(size=size)
    head.eval()
    for p in head.parameters():
        p.set_value(paddle.randn(p.shape))

    def convolution(layer, x):
        return wrapped_convolution(x, layer.weight.numpy() / singular_values(layer)[1], layer.bias.numpy())

    def block(layers, x):
        x = local_batch_norm(convolution(layers[0], x), *(p.numpy() for p in (layers[1].weight, layers[1].bias)))
        return np.where(x > 0, x, 0.2 * x)

    hidden = block(head.entry, x.reshape(*size[:2], -1))
    expected = convolution(head.readout, (hidden + block(head.residual, hidden)) / np.sqrt(2))
    actual = head(paddle.to_tensor(x, "float32")).numpy()
    np.testing.assert_allclose(actual, expected.reshape(size[0], 1, *size[2:]), rtol=1e-3, atol=1e-3)


def test_ladd_heads_cast_features():
    heads, x = LaddDiscriminator(8, 1), paddle.randn([3, 8, 2, 2])
    heads.eval()
    half = x.astype("bfloat16")
    np.testing.assert_array_equal(heads([half])[0].numpy(), heads([half.astype("float32")])[0].numpy())


def test_largest_singular_value_is_one_and_stays_one_while_weights_move():
    layer, x = SpectralConv1D(6, 7, 9), paddle.randn([2, 6, 9])
    largest, found = singular_values(layer)
    assert found == pytest.approx(largest, rel=0.05)
    for _ in range(100):
        layer(x)
    largest, found = singular_values(layer)
    assert found == pytest.approx(largest, rel=1e-4)
    for _ in range(100):
        with paddle.no_grad():
            layer.weight.set_value(layer.weight + 0.01 * paddle.randn(layer.weight.shape))
        layer(x)
    largest, found = singular_values(layer)
    assert found == pytest.approx(largest, rel=0.05)


def test_spectral_vectors_move_only_where_the_heads_learn():
    heads, x = LaddDiscriminator(6, 2), [paddle.randn([2, 6, 3, 3])] * 2
    x[0].stop_gradient = False

    def moved():
        before = [each.numpy() for each in heads.buffers()]
        logits = heads(x)
        moves = {bool((each.numpy() != old).any()) for each, old in zip(heads.buffers(), before, strict=True)}
        return moves, logits

    with paddle.no_grad():
        assert moved()[0] == {False}
    with frozen(heads):
        moves, logits = moved()
        sum(each.sum() for each in logits).backward()
    assert moves == {False} and x[0].grad is not None
    assert all(p.grad is None for p in heads.parameters())
    heads.eval()
    assert moved()[0] == {False}
    heads.train()
    assert True in moved()[0]


def test_spectral_gradient_treats_the_vectors_as_constants():
    """Also when several passes, which move the vectors, are in one loss."""
    layer = SpectralConv1D(3, 4, 3)
    x, theta = [paddle.randn([2, 3, 5]) for _ in range(2)], layer.weight.numpy()
    vectors, loss = [], 0
    for each in x:
        loss = loss + (layer(each) * 0.3).sin().sum()
        vectors.append((layer.u.numpy(), layer.v.numpy()))
    loss.backward()

    def at(weight):
        sigma = [u @ weight.reshape(4, -1) @ v for u, v in vectors]
        outputs = [
            wrapped_convolution(each.numpy(), weight / s, layer.bias.numpy()) for each, s in zip(x, sigma, strict=True)
        ]
        return sum(np.sin(0.3 * out).sum() for out in outputs)

    theta = theta.astype("float64")
    for index in np.ndindex(*theta.shape):
        step = np.zeros_like(theta)
        step[index] = 1e-5
        numeric = (at(theta + step) - at(theta - step)) / 2e-5
        assert layer.weight.grad.numpy()[index] == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_ladd_heads_continue_from_their_saved_state_bit_by_bit(tmp_path):
    features = [paddle.randn([9, 6, 3, 3]) for _ in range(2)]

    def trained(heads, steps):
        optimizer = paddle.optimizer.SGD(0.1, parameters=heads.parameters())
        for _ in range(steps):
            sum(each.square().mean() for each in heads(features)).backward()
            optimizer.step()
            optimizer.clear_grad()
        return heads

    paddle.seed(0)
    first = trained(LaddDiscriminator(6, 2), 3)
    save_file(dict(first.state_dict()), str(tmp_path / "heads.safetensors"))
    second = LaddDiscriminator(6, 2)
    second.set_state_dict(load_file(str(tmp_path / "heads.safetensors")))
    states = [trained(heads, 3).state_dict() for heads in (first, second)]
    assert len(states[0]) == 2 * (10 + 6)
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name].numpy(), value.numpy())
