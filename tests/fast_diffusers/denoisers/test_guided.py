"""Classifier-free guidance on all families that do not embed it."""

import numpy as np
import paddle
import pytest

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ClassifierFree
from fast_diffusers.forward_ad import jvp
from fast_diffusers.random import Generator, randn
from fast_diffusers.target_time import TargetTime

TIME = paddle.to_tensor([0.9, 0.3])
STRENGTHS = paddle.to_tensor([4.5, 0.0])


class Recorder:
    """A denoiser that sums up what it is given and keeps it."""

    def __init__(self):
        self.calls = []
        self.transformer = "the transformer"

    def __call__(self, x, t, cond, *, target_t=None, guidance=None):
        self.calls.append((x, t, cond, target_t, guidance))
        return x + cond["prompt_embeds"].sum(axis=[1, 2]).reshape([-1, 1, 1, 1])

    def features(self, *arguments, **settings):
        return arguments, settings


@pytest.fixture
def inputs():
    return randn([2, 3, 4, 4], Generator(0)), Cond(prompt_embeds=randn([2, 5, 6], Generator(1)))


@pytest.fixture
def null():
    return Cond(prompt_embeds=randn([1, 5, 6], Generator(2)))


@pytest.mark.parametrize("guidance", [STRENGTHS, 3.0, paddle.to_tensor(3.0), 0, paddle.to_tensor([1.0])], ids=str)
def test_one_batched_call(inputs, null, guidance):
    x, cond = inputs
    denoiser = Recorder()
    made = ClassifierFree(denoiser, null)(x, TIME, cond, target_t=0.0, guidance=guidance)
    ((seen, t, given, target_t, inner),) = denoiser.calls
    assert paddle.equal_all(seen, paddle.concat([x, x])) and paddle.equal_all(t, paddle.concat([TIME, TIME]))
    assert paddle.equal_all(
        given["prompt_embeds"], paddle.concat([cond["prompt_embeds"], *[null["prompt_embeds"]] * 2])
    )
    assert (target_t, inner) == (0.0, None)
    w = np.broadcast_to(np.asarray(guidance, dtype=np.float32), [2]).reshape(-1, 1, 1, 1)
    c, u = (np.asarray(each["prompt_embeds"]).sum((1, 2)).reshape(-1, 1, 1, 1) for each in (cond, null))
    np.testing.assert_allclose(made.numpy(), x.numpy() + u + w * (c - u), atol=1e-4)


@pytest.mark.parametrize("guidance", [None, 1, 1.0], ids=str)
def test_the_condition_alone_where_nothing_else_counts(inputs, null, guidance):
    x, cond = inputs
    denoiser = Recorder()
    ClassifierFree(denoiser, null)(x, 0.5, cond, guidance=guidance)
    ((seen, t, given, _, inner),) = denoiser.calls
    assert seen is x and t == 0.5 and given is cond and inner is None


def test_passes_the_rest_through(inputs, null):
    x, cond = inputs
    guided = ClassifierFree(Recorder(), null)
    assert guided.transformer == "the transformer"
    assert guided.features(x, 0.5, cond, [1]) == ((x, 0.5, cond, [1]), {})
    assert not getattr(guided, "takes_target_time", False)


def test_conditions_must_match(inputs):
    x, cond = inputs
    guided = ClassifierFree(Recorder(), Cond(prompt_embeds=paddle.zeros([1, 4, 6])))
    with pytest.raises(ValueError, match="same sequence length"):
        guided(x, TIME, cond, guidance=2.0)
    masked = Cond({**cond, "prompt_attention_mask": paddle.ones([2, 5])})
    with pytest.raises(ValueError, match="names differ"):
        ClassifierFree(Recorder(), cond)(x, TIME, masked, guidance=2.0)
    with pytest.raises(ValueError, match=r"\[2\], got shape \[3\]"):
        ClassifierFree(Recorder(), cond)(x, TIME, cond, guidance=paddle.ones([3]))


def test_on_every_family(family, double):
    if family.embeds_guidance:
        pytest.skip("the family embeds its guidance")
    x, cond, t = family.x("float64"), family.cond("float64"), TIME.astype("float64")
    null = Cond({name: value if name == family.mask else value.roll(1, 0) for name, value in cond.items()})
    guided = ClassifierFree(double, null)
    assert not guided.embeds_guidance and guided.num_taps == double.num_taps

    def separately(x, t):
        v_cond, v_null = double(x, t, cond), double(x, t, null)
        return v_null + STRENGTHS.astype("float64").reshape([-1, 1, 1, 1]) * (v_cond - v_null)

    def together(x, t):
        return guided(x, t, cond, guidance=STRENGTHS)

    assert together(x, t).dtype == paddle.float64
    np.testing.assert_allclose(together(x, t).numpy(), separately(x, t).numpy(), atol=1e-9)
    tangents = [randn(family.shape, Generator(3), "float64"), family.time_change * paddle.ones([2], "float64")]
    slopes = [jvp(fn, [x, t], tangents)[1].numpy() for fn in (together, separately)]
    np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-8 * np.abs(slopes[1]).max())


def test_with_target_times(family):
    if family.embeds_guidance:
        pytest.skip("the family embeds its guidance")
    plain, cond = family.build(), family.cond()
    way = TargetTime.new("auxiliary", plain.transformer)
    linear = way.embedding.embedder.linear_2
    linear.weight.set_value(randn(linear.weight.shape, Generator(5)))
    told = way.wrap(plain)
    guided = ClassifierFree(told, cond.roll())
    assert guided.takes_target_time
    v_cond, v_null = (told(family.x(), TIME, each, target_t=TIME / 2) for each in (cond, cond.roll()))
    made = guided(family.x(), TIME, cond, target_t=TIME / 2, guidance=2.0)
    np.testing.assert_allclose(made.numpy(), (2 * v_cond - v_null).numpy(), atol=1e-3)
