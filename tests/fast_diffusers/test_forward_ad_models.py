import json

import numpy as np
import paddle
import pytest

from fast_diffusers import lora, models
from fast_diffusers.denoisers import denoiser_for
from fast_diffusers.forward_ad import central_difference, jvp
from fast_diffusers.pipelines.shipped import open_pipeline

LATENTS_TIME = ("hidden_states", "timestep")
TRANSFORMERS = {
    # reference files: (names of the latents and the time, change of time that moves embedded angles by about one)
    "flux": (LATENTS_TIME, 1e-3),
    "sd3": (LATENTS_TIME, 1.0),
    "sd35": (LATENTS_TIME, 1.0),
    "sana": (LATENTS_TIME, 1.0),
    "sana_sprint": (LATENTS_TIME, 1.0),
    "sana_controlnet": (LATENTS_TIME, 1.0),
    "qwen_image": (LATENTS_TIME, 1e-3),
    "z_image": (("x", "t"), 1e-3),
}
AUTOENCODERS = {
    # reference files: step of the differences, small enough that no ReLU crosses zero within it
    "vae_kl": 1e-5,
    "dc_ae": 1e-7,
}


def open_double(folder):
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    model = getattr(models, name).from_pretrained(folder)
    model.to(dtype="float64")
    for layer in model.sublayers():
        if getattr(layer, "upcast_softmax", False):  # to float32, whose rounding would show in the differences
            layer.upcast_softmax = False
    return model


def recorded_inputs(folder):
    """Arguments by name, in float64; "in_<name>_<number>" are the entries of the list <name>."""
    inputs, recorded = {}, np.load(folder / "io.npz")
    for key in recorded:
        value = recorded[key].astype("float64") if recorded[key].dtype == np.float32 else recorded[key]
        name, _, number = key.removeprefix("in_").rpartition("_")
        if key.startswith("in_") and number.isdigit():
            inputs.setdefault({"cap": "cap_feats"}.get(name, name), []).append(paddle.to_tensor(value))
        elif key.startswith("in_"):
            inputs[key.removeprefix("in_")] = paddle.to_tensor(value)
    return inputs


def sample(result):
    """The tensors of a model's result as a list."""
    return [leaf for item in result for leaf in sample(item)] if isinstance(result, list | tuple) else [result]


def assert_exact(fn, primals, tangents, eps=1e-5):
    """jvp against differences of order 6, in every argument by itself; its values against a plain call, bit by bit."""
    with paddle.no_grad():
        plain = sample(fn(*primals))
    for given in [[v if i == j else None for j, v in enumerate(tangents)] for i in range(len(primals))] + [tangents]:
        outputs, slopes = jvp(fn, primals, given)
        with paddle.no_grad():
            expected = sample(central_difference(fn, primals, given, eps, order=6))
        for x, out, slope, numeric in zip(plain, sample(outputs), sample(slopes), expected, strict=True):
            assert out.dtype == paddle.float64 and (out == x).all()
            assert out.stop_gradient and slope.stop_gradient and out.grad_fn is None and slope.grad_fn is None
            assert numeric.abs().max() > 1e-6
            assert (slope - numeric).abs().max().item() < 1e-7 * numeric.abs().max().item()


def directions(primals, time_change=1e-3):
    """Random tangents of latents and time."""
    x, t = (paddle.randn(primal.shape).astype("float64") for primal in primals)
    return [x, t * time_change]


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_in_x_and_t(fixtures_dir, family):
    paddle.seed(0)
    model, inputs = open_double(fixtures_dir / family), recorded_inputs(fixtures_dir / family)
    names, time_change = TRANSFORMERS[family]
    primals = [inputs[name] for name in names]

    def fn(x, t):
        given = inputs | dict(zip(names, (x, t), strict=True))
        return model(**given, return_dict=False)

    assert_exact(fn, primals, directions(primals, time_change))


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoders(fixtures_dir, family):
    paddle.seed(0)
    model, inputs = open_double(fixtures_dir / family), recorded_inputs(fixtures_dir / family)

    def encode(x):
        encoded = model.encode(x)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent

    for fn, x in ((encode, inputs["image"]), (lambda z: model.decode(z).sample, inputs["latent"])):
        assert_exact(fn, [x], [paddle.randn(x.shape).astype("float64")], AUTOENCODERS[family])


@pytest.fixture
def teacher():
    """The shipped digits teacher in float64 as a function of packed latents [2, 16, 4] and time, and a point."""
    paddle.seed(0)
    pipe = open_pipeline("digits")
    model, config = pipe.transformer, pipe.transformer.config
    model.to(dtype="float64")
    rows, columns = paddle.meshgrid(paddle.arange(4), paddle.arange(4))
    given = dict(
        encoder_hidden_states=paddle.randn([2, 1, config.joint_attention_dim]).astype("float64"),
        pooled_projections=paddle.randn([2, config.pooled_projection_dim]).astype("float64"),
        img_ids=paddle.stack([paddle.zeros_like(rows), rows, columns], axis=-1).reshape([16, 3]).astype("float32"),
        txt_ids=paddle.zeros([1, 3]),
        guidance=paddle.full([2], 2.0, "float64") if config.guidance_embeds else None,
        return_dict=False,
    )
    primals = [paddle.randn([2, 16, config.in_channels]).astype("float64"), paddle.to_tensor([0.3, 0.8], "float64")]
    return model, lambda x, t: model(hidden_states=x, timestep=t, **given), primals


def test_the_digits_teacher(teacher):
    _, fn, primals = teacher
    assert_exact(fn, primals, directions(primals))


def test_lora_layers(teacher):
    model, fn, primals = teacher
    lora.inject(model, 2, 4.0, ["attn.to_q", "proj_mlp", "linear"], name="student")
    model.to(dtype="float64")
    with paddle.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.set_value(paddle.randn(parameter.shape).astype("float64") * 0.1)
    assert_exact(fn, primals, directions(primals))
    tangents = directions(primals)
    adapted = jvp(fn, primals, tangents)[1][0]
    with lora.active(model, None):
        plain = jvp(fn, primals, tangents)[1][0]
    assert (adapted - plain).abs().max() > 1e-3


def test_a_denoiser_in_float32():
    """Through an adapter, in the precision of training: float32 rounding of time times 1000 limits both."""
    paddle.seed(0)
    pipe = open_pipeline("digits")
    denoiser, config = denoiser_for(pipe.transformer), pipe.transformer.config
    cond = {
        "prompt_embeds": paddle.randn([2, 1, config.joint_attention_dim]),
        "pooled_prompt_embeds": paddle.randn([2, config.pooled_projection_dim]),
    }
    guidance = 2.0 if config.guidance_embeds else None
    primals = [paddle.randn([2, config.in_channels // 4, 8, 8]), paddle.to_tensor([0.25, 0.75])]
    tangents = [paddle.randn(primals[0].shape), paddle.ones([2])]

    def fn(x, t):
        return denoiser(x, t, cond, guidance=guidance)

    out, slope = jvp(fn, primals, tangents)
    with paddle.no_grad():
        assert (out == fn(*primals)).all()
    _, rough = jvp(fn, primals, tangents, mode="finite_difference", eps=3e-4)
    assert (slope - rough).abs().max() < 2e-2 * slope.abs().max()
