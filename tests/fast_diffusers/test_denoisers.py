from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import FluxDenoiser, denoiser_for
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.random import Generator, randn

TINY = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
SHAPE = [2, 3, 6, 4]
TIME = paddle.to_tensor([0.9, 0.3])


def build(**changes) -> FluxDenoiser:
    """A tiny FLUX whose every weight is random (a fresh model predicts zero)."""
    transformer = FluxTransformer2DModel(**{**TINY, **changes})
    for seed, weight in enumerate(transformer.parameters()):
        weight.set_value(0.2 * randn(weight.shape, Generator(seed)))
    return FluxDenoiser(transformer)


@pytest.fixture(scope="module")
def flux() -> FluxDenoiser:
    return build()


@pytest.fixture(scope="module")
def cond() -> Cond:
    return Cond(prompt_embeds=randn([2, 5, 10], Generator(100)), pooled_prompt_embeds=randn([2, 6], Generator(101)))


@pytest.fixture
def x() -> paddle.Tensor:
    return randn(SHAPE, Generator(102))


def packed_by_hand(x: np.ndarray) -> np.ndarray:
    """Token (i, j) holds channel c, row p and column q of its patch at 4 c + 2 p + q."""
    batch, channels, height, width = x.shape
    tokens = np.zeros([batch, height // 2 * (width // 2), 4 * channels], x.dtype)
    for i in range(height // 2):
        for j in range(width // 2):
            for c in range(channels):
                for p in range(2):
                    for q in range(2):
                        tokens[:, i * (width // 2) + j, 4 * c + 2 * p + q] = x[:, c, 2 * i + p, 2 * j + q]
    return tokens


def test_is_the_transformer_on_packed_patches(flux, cond, x):
    ids = np.array([[0, i, j] for i in range(3) for j in range(2)], dtype=np.float32)
    expected = flux.transformer(
        hidden_states=paddle.to_tensor(packed_by_hand(x.numpy())),
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        timestep=TIME,
        img_ids=paddle.to_tensor(ids),
        txt_ids=paddle.zeros([5, 3]),
        guidance=paddle.to_tensor([3.5, 3.5]),
    ).sample
    velocity = flux(x, TIME, cond, guidance=3.5)
    assert velocity.shape == SHAPE and velocity.dtype == paddle.float32
    np.testing.assert_allclose(packed_by_hand(velocity.numpy()), expected.numpy(), atol=1e-6)
    assert float(velocity.std()) > 0.1, "a model that predicts nothing would prove nothing"


def test_reproduces_the_reference_outputs(fixtures_dir):
    io = np.load(fixtures_dir / "flux" / "io.npz")
    rows, columns = (io["in_img_ids"][-1, 1:] + 1).astype(int)
    batch, tokens, features = io["in_hidden_states"].shape
    assert tokens == rows * columns

    def spatial(x):
        patches = x.reshape(batch, rows, columns, features // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
        return patches.reshape(batch, features // 4, 2 * rows, 2 * columns)

    denoiser = denoiser_for(FluxTransformer2DModel.from_pretrained(str(fixtures_dir / "flux")))
    velocity = denoiser(
        paddle.to_tensor(spatial(io["in_hidden_states"])),
        paddle.to_tensor(io["in_timestep"]),
        Cond(
            prompt_embeds=paddle.to_tensor(io["in_encoder_hidden_states"]),
            pooled_prompt_embeds=paddle.to_tensor(io["in_pooled_projections"]),
        ),
        guidance=paddle.to_tensor(io["in_guidance"]),
    )
    expected = spatial(io["out_sample"])
    assert np.abs(velocity.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_scalars_stand_for_the_whole_batch(flux, cond, x):
    expected = flux(x, paddle.to_tensor([0.4, 0.4]), cond, guidance=paddle.to_tensor([2.0, 2.0]))
    assert paddle.equal_all(flux(x, 0.4, cond, guidance=2.0), expected)
    assert paddle.equal_all(flux(x, paddle.to_tensor(0.4), cond, guidance=paddle.to_tensor([2.0])), expected)
    assert not paddle.equal_all(flux(x, 0.4, cond, guidance=3.0), expected)


def test_target_time_is_ignored(flux, cond, x):
    assert paddle.equal_all(flux(x, TIME, cond, guidance=1.0), flux(x, TIME, cond, target_t=TIME * 0.5, guidance=1.0))


def test_rows_do_not_depend_on_the_batch(flux, cond, x):
    alone = flux(x[1:], TIME[1:], cond.mask([1]), guidance=3.5)
    np.testing.assert_allclose(flux(x, TIME, cond, guidance=3.5)[1:].numpy(), alone.numpy(), atol=1e-4)


def test_half_precision_models_get_half_states_and_full_times(cond, x):
    seen = {}

    class HalfPrecision(nn.Layer):
        """Records what it is given (Paddle has no bfloat16 matrix product on CPU) and predicts its own input."""

        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(in_channels=12)
            self.x_embedder = nn.Linear(12, 32).to(dtype="bfloat16")

        def forward(self, hidden_states, return_dict, **inputs):
            seen.update(inputs, hidden_states=hidden_states)
            return (hidden_states,)

    velocity = FluxDenoiser(HalfPrecision())(x, TIME, cond, guidance=3.5)
    assert velocity.dtype == paddle.float32
    np.testing.assert_array_equal(velocity.numpy(), x.astype("bfloat16").astype("float32").numpy())
    half = {name for name, value in seen.items() if value.dtype == paddle.bfloat16}
    assert half == {"hidden_states", "encoder_hidden_states", "pooled_projections"}
    assert all(seen[name].dtype == paddle.float32 for name in seen.keys() - half)


def test_double_precision_model_stays_double(flux, cond, x):
    double = build()
    double.transformer.to(dtype="float64")
    velocity = double(x, TIME, cond, guidance=3.5)
    assert velocity.dtype == paddle.float64
    np.testing.assert_allclose(velocity.numpy(), flux(x, TIME, cond, guidance=3.5).numpy(), atol=1e-4)


def test_last_feature_map_leads_to_the_velocity(flux, cond, x):
    *_, last = flux.features(x, TIME, cond, guidance=3.5)
    model = flux.transformer
    temb = model.embed_conditioning(TIME, paddle.to_tensor([3.5, 3.5]), cond["pooled_prompt_embeds"])
    tokens = model.project_out(last.flatten(2).transpose([0, 2, 1]), temb)
    velocity = flux(x, TIME, cond, guidance=3.5)
    np.testing.assert_allclose(tokens.numpy(), packed_by_hand(velocity.numpy()), atol=1e-5)


def test_feature_maps(flux, cond, x):
    assert flux.num_taps == 5 and flux.feature_channels == 32
    maps = flux.features(x, TIME, cond, guidance=3.5)
    assert [m.shape for m in maps] == [[2, 32, 3, 2]] * 5
    assert all(not paddle.allclose(a, b) for a, b in pairwise(maps))
    picked = flux.features(x, TIME, cond, [3, 0, 3], guidance=3.5)
    assert [bool(paddle.equal_all(p, maps[i])) for p, i in zip(picked, [3, 0, 3], strict=True)] == [True] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_state_from_every_tap(cond, x, checkpointing):
    flux = build()
    for weight in flux.transformer.parameters():
        weight.stop_gradient = True
    if checkpointing:
        flux.transformer.enable_gradient_checkpointing()
    x.stop_gradient = False
    weights = [randn([2, 32, 3, 2], Generator(200 + tap)) for tap in range(flux.num_taps)]

    def loss(x, taps):
        maps = flux.features(x, TIME, cond, taps, guidance=3.5)
        return sum((m * weights[tap]).sum() for m, tap in zip(maps, taps, strict=True))

    step = 1e-2 * randn(SHAPE, Generator(300))
    for taps in ([0], [4], range(5)):
        (gradient,) = paddle.grad(loss(x, taps), x)
        with paddle.no_grad():
            difference = float(loss(x + step, taps) - loss(x - step, taps)) / 2
        assert float((gradient * step).sum()) == pytest.approx(difference, rel=0.02)


def test_features_leave_no_hooks_behind(flux, cond, x):
    with pytest.raises(ValueError, match="guidance"):
        flux.features(x, TIME, cond)
    flux.features(x, TIME, cond, guidance=3.5)
    assert not any(layer._forward_post_hooks for layer in flux.transformer.sublayers())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x, c: f(x[:, :2], TIME, c, guidance=3.5), r"\[2, 2, 6, 4\] do not fit .* takes \[B, 3, H, W\]"),
        (lambda f, x, c: f(x[..., :3], TIME, c, guidance=3.5), "even H and W"),
        (lambda f, x, c: f(x, paddle.zeros([3]), c, guidance=3.5), r"each of 2 samples, got shape \[3\]"),
        (lambda f, x, c: f(x, TIME, c.mask([0]), guidance=3.5), "2 latents, but the conditioning has 1 rows"),
        (lambda f, x, c: f(x, TIME, c), "needs `guidance`"),
        (lambda f, x, c: f.features(x, TIME, c, [0, 5], guidance=3.5), r"taps must lie in 0..4, got \[0, 5\]"),
    ],
)
def test_bad_input(flux, cond, x, call, message):
    with pytest.raises(ValueError, match=message):
        call(flux, x, cond)


def test_guidance_for_a_model_without_guidance_embedding(cond, x):
    schnell = build(guidance_embeds=False)
    assert schnell(x, TIME, cond).shape == SHAPE
    with pytest.raises(ValueError, match="does not take `guidance`"):
        schnell(x, TIME, cond, guidance=3.5)


def test_adapter_is_found_by_class():
    class Derived(FluxTransformer2DModel):
        pass

    assert isinstance(denoiser_for(Derived(**TINY)), FluxDenoiser)
    with pytest.raises(TypeError, match=r"no denoiser adapter for Linear; .*FluxTransformer2DModel"):
        denoiser_for(nn.Linear(2, 2))
