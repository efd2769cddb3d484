"""What SANA's adapter has beyond test_contract.py: dense time and a ControlNet."""

import paddle
import pytest

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ClassifierFree, SanaDenoiser
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.random import Generator, randn

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=3,
    num_cross_attention_heads=4,
    cross_attention_head_dim=4,
    cross_attention_dim=16,
    caption_channels=6,
)
SPRINT = dict(guidance_embeds=True, qk_norm="rms_norm_across_heads")
TIME = paddle.to_tensor([0.9, 0.3])


def randomised(model):
    with paddle.no_grad():
        for seed, weight in enumerate(model.parameters()):
            weight.set_value(weight + 0.2 * randn(weight.shape, Generator(seed)))
    return model


def build(**changes):
    paddle.seed(0)
    return randomised(SanaTransformer2DModel(**{**CONFIG, **changes}))


@pytest.fixture
def x():
    return randn([2, 3, 4, 6], Generator(50))


@pytest.fixture
def cond():
    return Cond(prompt_embeds=randn([2, 5, 6], Generator(51)), control=randn([2, 3, 4, 6], Generator(52)))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({}, 1000 * TIME), ({"timestep_scale": 0.001}, TIME), (SPRINT, TIME), (SPRINT | {"timestep_scale": 0.5}, TIME)],
    ids=["teacher", "dense teacher", "sprint", "sprint ignores the scale"],
)
def test_time_as_the_model_reads_it(x, cond, changes, shown):
    model, seen = build(**changes), []
    model.time_embed.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs))
    SanaDenoiser(model)(x, TIME, cond, guidance=4.0 if "guidance_embeds" in changes else None)
    timestep, guidance = seen[0]
    assert paddle.allclose(timestep, shown, rtol=1e-7)
    assert guidance is None if "guidance_embeds" not in changes else guidance.tolist() == pytest.approx([0.4, 0.4])


def test_a_copy_with_dense_time_and_guidance_is_the_same_function(x, cond):
    """A prepared teacher, scale 0.001, and the student that starts from it."""
    teacher = build(timestep_scale=0.001, qk_norm="rms_norm_across_heads")
    student = SanaTransformer2DModel.from_transformer(teacher, guidance_embeds=True)
    expected = SanaDenoiser(teacher)(x, TIME, cond)
    assert paddle.allclose(SanaDenoiser(student)(x, TIME, cond, guidance=4.5), expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, SPRINT], ids=["sana", "sprint"])
def test_controlnet(x, cond, changes):
    model, guidance = build(**changes), 4.0 if changes else None
    plain = SanaDenoiser(model)
    before = plain(x, TIME, cond, guidance=guidance)
    new = SanaControlNetModel.from_transformer(model, num_layers=2)
    assert paddle.equal_all(SanaDenoiser(model, new)(x, TIME, cond, guidance=guidance), before), "a new one adds zero"

    net = randomised(new)
    controlled = SanaDenoiser(model, net, conditioning_scale=0.7)
    t = TIME if changes else 1000 * TIME
    inputs = dict(encoder_hidden_states=cond["prompt_embeds"], timestep=t)
    inputs["guidance"] = 0.1 * paddle.full([2], guidance) if changes else None
    samples = net(x, controlnet_cond=cond["control"], conditioning_scale=0.7, **inputs, return_dict=False)[0]
    expected = model(x, controlnet_block_samples=samples, **inputs).sample
    velocity = controlled(x, TIME, cond, guidance=guidance)
    assert paddle.allclose(velocity, expected, atol=1e-6) and not paddle.allclose(velocity, before, atol=1e-2)
    assert not paddle.allclose(
        controlled.features(x, TIME, cond, [2], guidance=guidance)[0],
        plain.features(x, TIME, cond, [2], guidance=guidance)[0],
        atol=1e-2,
    )
    with pytest.raises(ValueError, match="the conditioning must hold `control`"):
        controlled(x, TIME, Cond(prompt_embeds=cond["prompt_embeds"]), guidance=guidance)


def test_both_halves_of_guidance_see_the_control_image(x, cond):
    net = randomised(SanaControlNetModel.from_transformer(build(), num_layers=2))
    controlled = SanaDenoiser(build(), net)
    null = Cond(prompt_embeds=paddle.zeros([1, 5, 6]))
    v_null = controlled(x, TIME, {**null.expand(2), "control": cond["control"]})
    v_cond = controlled(x, TIME, cond)
    guided = ClassifierFree(controlled, null)(x, TIME, cond, guidance=3.0)
    assert paddle.allclose(guided, v_null + 3.0 * (v_cond - v_null), atol=1e-4)
