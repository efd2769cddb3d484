"""What holds for the adapters of all families."""

from itertools import pairwise

import numpy as np
import paddle
import pytest
from paddle import nn

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ADAPTERS, denoiser_for
from fast_diffusers.forward_ad import central_difference, jvp
from fast_diffusers.random import Generator, randn
from fast_diffusers.target_time import TargetTime

TIME = paddle.to_tensor([0.9, 0.3])


def call(denoiser, family, x=None, t=TIME, cond=None, guidance="given", **more):
    """With the family's own inputs wherever none are given."""
    return denoiser(
        family.x() if x is None else x,
        t,
        family.cond() if cond is None else cond,
        guidance=family.guidance if isinstance(guidance, str) else guidance,
        **more,
    )


def features(denoiser, family, taps=None, x=None, t=TIME, dtype="float32"):
    x = family.x(dtype) if x is None else x
    return denoiser.features(x, t, family.cond(dtype), taps, guidance=family.guidance)


def test_is_the_transformer(family, denoiser):
    velocity = call(denoiser, family)
    assert velocity.shape == list(family.shape) and velocity.dtype == paddle.float32
    expected = family.raw(denoiser.transformer, family.x(), TIME, family.cond(), family.guidance)
    np.testing.assert_allclose(family.tokens(velocity).numpy(), expected.numpy(), atol=1e-5)
    assert float(velocity.std()) > 0.1, "a model that predicts nothing would prove nothing"


def test_scalars_stand_for_the_whole_batch(family, denoiser):
    expected = call(denoiser, family, t=paddle.to_tensor([0.4, 0.4]))
    for scalar in (0.4, paddle.to_tensor(0.4), paddle.to_tensor([0.4])):
        assert paddle.equal_all(call(denoiser, family, t=scalar), expected)
    if family.embeds_guidance:
        expected = call(denoiser, family, guidance=paddle.to_tensor([2.0, 2.0]))
        for scalar in (2.0, paddle.to_tensor(2.0), paddle.to_tensor([2.0])):
            assert paddle.equal_all(call(denoiser, family, guidance=scalar), expected)
        assert not paddle.allclose(call(denoiser, family, guidance=4.0), expected, atol=1e-3)


def test_rows_do_not_depend_on_the_batch(family, double):
    x, cond, t = family.x("float64"), family.cond("float64"), TIME.astype("float64")
    together = double(x, t, cond, guidance=family.guidance)
    for row in (0, 1):
        guidance = None if family.guidance is None else family.guidance[row : row + 1]
        alone = double(x[row : row + 1], t[row : row + 1], cond.mask([row]), guidance=guidance)
        np.testing.assert_allclose(together[row : row + 1].numpy(), alone.numpy(), atol=1e-9)


def test_target_time_is_ignored(family, denoiser):
    assert paddle.equal_all(call(denoiser, family, target_t=TIME / 2), call(denoiser, family))


def test_negative_times_are_times_of_their_own(family, denoiser):
    positive, negative = call(denoiser, family), call(denoiser, family, t=-TIME)
    assert paddle.isfinite(negative).all()
    assert float((positive - negative).abs().max()) > 1e-3


def test_masked_text_is_not_read(family, denoiser):
    if family.mask is None:
        pytest.skip("the family takes no mask")
    cond = family.cond()
    changed = {**cond, "prompt_embeds": cond["prompt_embeds"] + 3.0 * (1 - cond[family.mask]).unsqueeze(-1)}
    np.testing.assert_allclose(
        call(denoiser, family, cond=Cond(changed)).numpy(), call(denoiser, family).numpy(), atol=1e-6
    )
    unmasked = Cond({name: value for name, value in cond.items() if name != family.mask})
    everything = Cond({**unmasked, family.mask: paddle.ones([2, 5], dtype="int64")})
    np.testing.assert_allclose(
        call(denoiser, family, cond=unmasked).numpy(), call(denoiser, family, cond=everything).numpy(), atol=1e-6
    )
    assert not paddle.allclose(call(denoiser, family, cond=unmasked), call(denoiser, family), atol=1e-4)


def test_double_precision_is_kept(family, denoiser, double):
    x, cond, t = family.x("float64"), family.cond("float64"), TIME.astype("float64")
    velocity = call(double, family, x=x, t=t, cond=cond)
    assert velocity.dtype == paddle.float64
    np.testing.assert_allclose(velocity.numpy(), call(denoiser, family).numpy(), atol=1e-3)
    later = call(double, family, x=x, t=t + 1e-10, cond=cond)
    assert float((later - velocity).abs().max()) > 1e-11, "float32 has no such time"
    number, tensor = (call(double, family, x=x, t=t, cond=cond) for t in (0.3, paddle.to_tensor(0.3, dtype="float64")))
    assert paddle.equal_all(number, tensor)


def test_half_precision_models_get_half_states_and_full_times(family):
    """Recorded without running the model: Paddle has no bfloat16 matrix product on CPU."""
    denoiser, seen = family.build("bfloat16"), {}

    def forward(**inputs):
        seen.update(inputs)
        return (list(inputs["x"]) if "x" in inputs else inputs["hidden_states"],)

    denoiser.transformer.forward = forward
    velocity = call(denoiser, family)
    assert velocity.dtype == paddle.float32
    sign = -1 if "x" in seen else 1
    np.testing.assert_array_equal(velocity.numpy(), sign * family.x().astype("bfloat16").astype("float32").numpy())
    halves = {"x", "hidden_states", "encoder_hidden_states", "pooled_projections", "cap_feats"}
    for name, value in seen.items():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, paddle.Tensor) and paddle.is_floating_point(tensor):
                assert tensor.dtype == (paddle.bfloat16 if name in halves else paddle.float32), name


@pytest.mark.parametrize("primal", ["x", "t", "both"])
def test_forward_mode_through_the_adapter(family, double, primal):
    """Exact derivatives in float64, against central differences of order 6."""
    cond = family.cond("float64")
    primals = [family.x("float64"), TIME.astype("float64")]
    time_change = family.time_change * paddle.to_tensor([1.0, -2.0], dtype="float64")
    tangents = [randn(family.shape, Generator(7), "float64"), time_change]
    tangents = [each if primal in (name, "both") else None for name, each in zip("xt", tangents, strict=True)]

    def fn(x, t):
        return double(x, t, cond, guidance=family.guidance)

    out, slope = jvp(fn, primals, tangents)
    with paddle.no_grad():
        assert paddle.equal_all(out, fn(*primals))
        numeric = central_difference(fn, primals, tangents, 1e-6, order=6)  # a small step: SANA has ReLUs
    assert float(numeric.abs().max()) > 1e-4
    assert float((slope - numeric).abs().max()) < 1e-7 * float(numeric.abs().max())


def test_feature_maps(family, denoiser):
    assert (denoiser.num_taps, denoiser.feature_channels) == (family.taps, family.width)
    maps = features(denoiser, family)
    assert [each.shape for each in maps] == [[2, family.width, *family.grid]] * family.taps
    assert all(not paddle.allclose(a, b) for a, b in pairwise(maps))
    picked = features(denoiser, family, [1, 0, 1])
    assert [bool(paddle.equal_all(p, maps[i])) for p, i in zip(picked, [1, 0, 1], strict=True)] == [True] * 3
    assert not any(layer._forward_post_hooks for layer in denoiser.transformer.sublayers()), "hooks left behind"


def test_feature_maps_lie_as_the_image_does(family, double):
    """A change of one corner of the latents changes the first block's map most in that corner."""
    x = family.x("float64")
    changed = x.clone()
    size = 4 // min(family.grid)
    changed[:, :, :size, -size:] += 3.0
    before, after = (features(double, family, [0], each, dtype="float64")[0] for each in (x, changed))
    difference = (after - before).abs().sum(axis=[0, 1])
    assert int(difference.argmax()) == family.grid[1] - 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_state_from_every_tap(family, checkpointing):
    denoiser = family.build("float64")
    for weight in denoiser.transformer.parameters():
        weight.stop_gradient = True
    if checkpointing:
        denoiser.transformer.enable_gradient_checkpointing()
    weights = [randn([2, family.width, *family.grid], Generator(20 + tap), "float64") for tap in range(family.taps)]
    step = 1e-7 * randn(family.shape, Generator(30), "float64")
    x = family.x("float64")
    x.stop_gradient = False

    def loss(x, taps):
        maps = features(denoiser, family, taps, x, dtype="float64")
        return sum((each * weights[tap]).sum() for each, tap in zip(maps, taps, strict=True))

    for taps in ([0], [family.taps - 1], range(family.taps)):
        (gradient,) = paddle.grad(loss(x, taps), x)
        with paddle.no_grad():
            difference = float(loss(x + step, taps) - loss(x - step, taps)) / 2
        assert float((gradient * step).sum()) == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("mode", ["shortcut", "auxiliary"])
def test_target_times_of_both_kinds(family, mode):
    """A new way to tell the target time leaves the model as it is; a trained one changes it."""
    plain = family.build()
    way = TargetTime.new(mode, plain.transformer)
    told = way.wrap(plain)
    assert told.takes_target_time and told.embeds_guidance == family.embeds_guidance
    expected = call(plain, family, t=TIME - TIME / 4) if mode == "shortcut" else call(plain, family)
    assert paddle.equal_all(call(told, family, target_t=TIME / 2), expected)
    if mode == "auxiliary":
        linear = way.embedding.embedder.linear_2
        linear.weight.set_value(randn(linear.weight.shape, Generator(5)))
        difference = (call(told, family, target_t=TIME / 2) - expected).abs()
        assert float(difference.max()) > 1e-3
        assert paddle.equal_all(call(told, family, target_t=TIME), expected)
        assert paddle.equal_all(call(plain, family), expected)


def test_bad_input(family, denoiser):
    fits = rf"do not fit this {denoiser.family} model: it takes \[B, 3, H, W\]"
    with pytest.raises(ValueError, match=fits):
        call(denoiser, family, x=family.x()[:, :2])
    if family.packs:
        with pytest.raises(ValueError, match="even H and W"):
            call(denoiser, family, x=family.x()[..., :3])
    with pytest.raises(ValueError, match=r"each of 2 samples, got shape \[3\]"):
        call(denoiser, family, t=paddle.zeros([3]))
    with pytest.raises(ValueError, match="2 latents, but the conditioning has 1 rows"):
        call(denoiser, family, cond=family.cond().mask([0]))
    with pytest.raises(ValueError, match=rf"taps must lie in 0..{family.taps - 1}, got \[0, {family.taps}\]"):
        features(denoiser, family, [0, family.taps])


def test_guidance_is_given_exactly_where_it_is_embedded(family, denoiser):
    assert denoiser.embeds_guidance == family.embeds_guidance
    wrong, message = (None, "needs `guidance`") if family.embeds_guidance else (3.5, "does not take `guidance`")
    with pytest.raises(ValueError, match=message):
        call(denoiser, family, guidance=wrong)
    with pytest.raises(ValueError, match=message):
        denoiser.features(family.x(), TIME, family.cond(), guidance=wrong)
    assert not any(layer._forward_post_hooks for layer in denoiser.transformer.sublayers())


def test_adapters_are_found_by_class(family, denoiser):
    assert type(denoiser) is ADAPTERS[family.model]
    derived = type("Derived", (type(denoiser.transformer),), {})(**family.config)
    assert type(denoiser_for(derived)) is ADAPTERS[family.model]


def test_models_without_an_adapter():
    with pytest.raises(TypeError, match=r"no denoiser adapter for Linear; .*FluxTransformer2DModel"):
        denoiser_for(nn.Linear(2, 2))
