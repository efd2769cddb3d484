"""What every transformer must do, one row a family; test_flux.py has the same for FLUX and more."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from ppdiffusers import ModelMixin
from safetensors.numpy import load_file

from fast_diffusers import models
from fast_diffusers.models.layers import sinusoid


@dataclass(frozen=True)
class Family:
    """A model class, a tiny config, inputs(batch, dtype) -> forward arguments, and folders of reference files.

    `timestep` is the name of the time argument, `time_scale` what it counts from data to noise, `time_mlp` the path of
    the first layer that sees the embedded time, `idle` a pattern of names of weights that do not reach the output.
    `dynamic` names tensor arguments with the shapes to trace them with.
    """

    model: str
    config: dict
    inputs: Callable[[int, str], dict]
    fixtures: Sequence[str]
    timestep: str = "timestep"
    time_scale: float = 1.0
    time_mlp: str = "time_text_embed.timestep_embedder.linear_1"
    idle: str | None = None
    noise: float = 0.2
    dynamic: dict = field(default_factory=dict)
    resized: Callable[[dict], dict] = dict

    @property
    def cls(self):
        return getattr(models, self.model)

    def build(self, seed=0, **overrides):
        """A tiny model in which no weight is zero."""
        paddle.seed(seed)
        model = self.cls(**{**self.config, **overrides})
        with paddle.no_grad():
            for weight in model.parameters():
                weight.set_value(weight + self.noise * paddle.randn(weight.shape, dtype=weight.dtype))
        return model


def sd3_inputs(batch, dtype):
    return dict(
        hidden_states=paddle.randn([batch, 3, 4, 6], dtype),
        encoder_hidden_states=paddle.randn([batch, 5, 6], dtype),
        pooled_projections=paddle.randn([batch, 7], dtype),
        timestep=paddle.linspace(250.0, 750.0, batch).astype(dtype),
    )


SD3 = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    caption_projection_dim=16,
    pooled_projection_dim=7,
    pos_embed_max_size=5,
)
SD3_DYNAMIC = dict(
    hidden_states=[None, 3, None, None],
    encoder_hidden_states=[None, None, 6],
    pooled_projections=[None, 7],
    timestep=[None],
)


def larger_image(inputs):
    """The same inputs with two more rows and one row of text less."""
    x = inputs["hidden_states"]
    return {
        **inputs,
        "hidden_states": paddle.concat([x, x[:, :, :2] * 0.5], axis=2),
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, 1:],
    }


def sana_inputs(batch, dtype):
    return dict(
        hidden_states=paddle.randn([batch, 3, 4, 6], dtype),
        encoder_hidden_states=paddle.randn([batch, 5, 6], dtype),
        timestep=paddle.linspace(250.0, 750.0, batch).astype(dtype),
        encoder_attention_mask=(paddle.arange(5).unsqueeze(0) < paddle.arange(5, 5 - batch, -1).unsqueeze(1)).astype(
            "int64"
        ),
    )


def sana_sprint_inputs(batch, dtype):
    inputs = sana_inputs(batch, dtype)
    return {**inputs, "timestep": inputs["timestep"] / 1000, "guidance": paddle.linspace(0.2, 0.5, batch).astype(dtype)}


SANA = dict(
    in_channels=3,
    out_channels=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=4,
    cross_attention_dim=16,
    caption_channels=6,
)
SANA_DYNAMIC = dict(
    hidden_states=[None, 3, None, None],
    encoder_hidden_states=[None, None, 6],
    timestep=[None],
    encoder_attention_mask=[None, None],
)


def larger_masked_image(inputs):
    return larger_image(inputs) | {"encoder_attention_mask": inputs["encoder_attention_mask"][:, 1:]}


def qwen_image_inputs(batch, dtype):
    mask = paddle.ones([batch, 4], "int64")
    mask[-1, 2:] = 0
    return dict(
        hidden_states=paddle.randn([batch, 15, 8], dtype),
        encoder_hidden_states=paddle.randn([batch, 4, 6], dtype),
        encoder_hidden_states_mask=mask,
        timestep=paddle.linspace(0.25, 0.75, batch).astype(dtype),
        img_shapes=[[(1, 3, 5)]] * batch,
    )


def longer_text(inputs):
    """The same inputs with the text and its mask twice in a row."""
    names = ("encoder_hidden_states", "encoder_hidden_states_mask")
    return inputs | {name: paddle.concat([inputs[name]] * 2, axis=1) for name in names}


def z_image_inputs(batch, dtype):
    """Captions that fill up to 32 and to 64 tokens, images of two sizes if there are three samples."""
    heights = [4, 4, 6][:batch] if batch > 2 else [4] * batch
    return dict(
        x=[paddle.randn([3, 1, height, 6], dtype) for height in heights],
        t=paddle.linspace(0.25, 0.75, batch).astype(dtype),
        cap_feats=[paddle.randn([length, 6], dtype) for length in [5, 33, 32][:batch]],
    )


FAMILIES = {
    "sd3": Family(
        "SD3Transformer2DModel",
        SD3,
        sd3_inputs,
        fixtures=["sd3"],
        time_scale=1000.0,
        idle=r"blocks\.1\.attn\.add_q_proj",  # text of the last block is read only
        dynamic=SD3_DYNAMIC,
        resized=larger_image,
    ),
    "sd35": Family(
        "SD3Transformer2DModel",
        SD3 | dict(num_layers=3, qk_norm="rms_norm", dual_attention_layers=[0]),
        sd3_inputs,
        fixtures=["sd35"],
        time_scale=1000.0,
        idle=r"blocks\.2\.attn\.(add_q_proj|norm_added_q)",
        dynamic=SD3_DYNAMIC,
        resized=larger_image,
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        SANA,
        sana_inputs,
        fixtures=["sana"],
        time_scale=1000.0,
        time_mlp="time_embed.emb.timestep_embedder.linear_1",
        dynamic=SANA_DYNAMIC,
        resized=larger_masked_image,
    ),
    "sana_positions": Family(
        "SanaTransformer2DModel",
        SANA | dict(patch_size=2, interpolation_scale=1.0, sample_size=8, attention_bias=True),
        sana_inputs,
        fixtures=[],
        time_scale=1000.0,
        time_mlp="time_embed.emb.timestep_embedder.linear_1",
        dynamic=SANA_DYNAMIC,
        resized=larger_masked_image,
    ),
    "sana_sprint": Family(
        "SanaTransformer2DModel",
        SANA | dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        sana_sprint_inputs,
        fixtures=["sana_sprint"],
        time_scale=1000.0,
        time_mlp="time_embed.timestep_embedder.linear_1",
        dynamic=SANA_DYNAMIC | dict(guidance=[None]),
        resized=larger_masked_image,
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        dict(
            in_channels=8,
            out_channels=2,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=6,
            axes_dims_rope=(2, 2, 4),
        ),
        qwen_image_inputs,
        fixtures=["qwen_image"],
        idle=r"blocks\.1\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)",  # text that nothing reads
        dynamic=dict(
            hidden_states=[None, 15, 8],
            encoder_hidden_states=[None, None, 6],
            encoder_hidden_states_mask=[None, None],
            timestep=[None],
        ),
        resized=longer_text,
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        dict(
            in_channels=3,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=6,
            axes_dims=(2, 2, 4),
            axes_lens=(80, 8, 8),
        ),
        z_image_inputs,
        fixtures=["z_image"],
        timestep="t",
        time_mlp="t_embedder.mlp.0",
        noise=0.1,  # its time embedding is a thousand wide
    ),
}
REFERENCES = [(name, folder) for name, family in FAMILIES.items() for folder in family.fixtures]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def inputs(family):
    """Factory of forward arguments for the tiny model."""

    def build(batch=2, dtype="float32", seed=1):
        paddle.seed(seed)
        return family.inputs(batch, dtype)

    return build


def predict(model, inputs):
    """The prediction as one tensor; some models take and give lists, one entry a sample."""
    sample = model(**inputs).sample
    return sample if isinstance(sample, paddle.Tensor) else paddle.stack(sample)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()


def gradients(model):
    return {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}


def recorded_inputs(recorded):
    """Arguments by name; "in_<name>_<number>" are the entries of the list <name>."""
    inputs = {}
    for key in recorded:
        name, _, number = key.removeprefix("in_").rpartition("_")
        if number.isdigit():
            inputs.setdefault(name, []).append(paddle.to_tensor(recorded[key]))
        elif key.startswith("in_"):
            inputs[key.removeprefix("in_")] = paddle.to_tensor(recorded[key])
    return inputs


@pytest.mark.parametrize("name, folder", REFERENCES)
def test_reproduces_the_reference_outputs(fixtures_dir, name, folder):
    recorded = np.load(fixtures_dir / folder / "io.npz")
    inputs = recorded_inputs(recorded)
    if "cap" in inputs:
        inputs["cap_feats"] = inputs.pop("cap")
    model = FAMILIES[name].cls.from_pretrained(fixtures_dir / folder)
    assert isinstance(model, ModelMixin) and not model.training
    with paddle.no_grad():
        sample = predict(model, inputs)
        assert relative_error(sample, recorded["out_sample"]) < 1e-5
        again = model(**inputs, return_dict=False)[0]
    assert (paddle.stack(list(again)) == sample).all()


@pytest.mark.parametrize("name, folder", REFERENCES)
def test_saving_reproduces_the_reference_file(fixtures_dir, tmp_path, name, folder):
    FAMILIES[name].cls.from_pretrained(fixtures_dir / folder).save_pretrained(tmp_path, layout="diffusers")
    file = "diffusion_pytorch_model.safetensors"
    written, original = load_file(tmp_path / file), load_file(fixtures_dir / folder / file)
    assert written.keys() == original.keys()
    for weight in original:
        np.testing.assert_array_equal(written[weight], original[weight], err_msg=weight)


def test_float64_agrees_with_float32(family, inputs):
    single, double = family.build(), family.build()
    double.to(dtype="float64")
    with paddle.no_grad():
        expected = predict(double, cast(inputs(), "float64"))
        assert expected.dtype == paddle.float64
        assert relative_error(predict(single, inputs()), expected) < 1e-4


def cast(value, dtype):
    """Float tensors in another type, in dicts and lists too."""
    if isinstance(value, dict):
        return {name: cast(entry, dtype) for name, entry in value.items()}
    if isinstance(value, list):
        return [cast(entry, dtype) for entry in value]
    return value.astype(dtype) if getattr(value, "dtype", None) == paddle.float32 else value


def test_negative_times_are_times_of_their_own(family, inputs):
    """The twin branch of TwinFlow runs at negative times."""
    model, forward = family.build(), inputs()
    backward = {**forward, family.timestep: -forward[family.timestep]}
    wide = family.build()
    wide.to(dtype="float64")
    with paddle.no_grad():
        there = predict(model, backward)
        assert relative_error(there, predict(wide, cast(backward, "float64"))) < 1e-4
        assert relative_error(predict(model, forward), there) > 1e-3


class Seen(Exception):
    """Ends a forward pass where there is nothing more to see."""


def test_time_is_embedded_in_float32(family, inputs):
    """bfloat16 has 8 bits: it would move a time by up to 1 / 256 of its value."""
    model = family.build()
    model.to(dtype="bfloat16")
    t = paddle.to_tensor([0.3333, -0.7071]) * family.time_scale

    def stop(_layer, args):
        raise Seen(args[0])  # Paddle has no bfloat16 matrix products on CPU

    dict(model.named_sublayers())[family.time_mlp].register_forward_pre_hook(stop)
    with pytest.raises(Seen) as seen:
        model(**{**cast(inputs(), "bfloat16"), family.timestep: t})
    assert (seen.value.args[0] == sinusoid(t * (1000.0 / family.time_scale)).astype("bfloat16")).all()


def test_every_weight_gets_a_gradient(family, inputs):
    model = family.build()
    predict(model, inputs()).square().mean().backward()
    moved = {name for name, gradient in gradients(model).items() if np.abs(gradient).max() > 0}
    names = {name for name, _ in model.named_parameters()}
    assert moved == {name for name in names if not (family.idle and re.search(family.idle, name))}


def test_new_model_predicts_zero(family, inputs):
    assert (predict(family.cls(**family.config), inputs()) == 0).all()


def test_samples_of_a_batch_do_not_mix(family, inputs):
    model, arguments = family.build(), inputs()
    second = {name: value[1:] if per_sample(value) else value for name, value in arguments.items()}
    with paddle.no_grad():
        np.testing.assert_allclose(predict(model, second), predict(model, arguments)[1:], atol=1e-5)


def per_sample(value):
    return isinstance(value, list) or (isinstance(value, paddle.Tensor) and value.shape[0] == 2)


@pytest.mark.parametrize("trained", ["all", "one", "input"])
def test_gradient_checkpointing_gives_identical_gradients(family, inputs, trained):
    results = []
    for checkpointed in (False, True):
        model, arguments = family.build(), inputs()
        chosen = [name for name, _ in model.named_parameters() if name.endswith("to_q.weight")][-1]
        for name, weight in model.named_parameters():
            weight.stop_gradient = not (trained == "all" or (trained == "one" and name == chosen))
        first = next(iter(arguments.values()))
        leaves = first if isinstance(first, list) else [first]
        for leaf in leaves:
            leaf.stop_gradient = trained != "input"
        if checkpointed:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointed
        predict(model, arguments).square().mean().backward()
        found = gradients(model)
        if trained == "input":
            found |= {f"input {i}": leaf.grad.numpy() for i, leaf in enumerate(leaves)}
        results.append(found)
    assert results[0].keys() == results[1].keys() and results[0]
    for name, gradient in results[0].items():
        np.testing.assert_array_equal(gradient, results[1][name], err_msg=name)


def test_checkpointing_runs_every_block_twice(family, inputs):
    model = family.build()
    model.enable_gradient_checkpointing()
    blocks = [layer for layer in model.sublayers() if type(layer).__name__.endswith("TransformerBlock")]
    runs = []
    for block in blocks:
        block.register_forward_pre_hook(lambda layer, _args: runs.append(id(layer)))
    predict(model, inputs()).sum().backward()
    assert blocks and sorted(runs) == sorted(2 * [id(block) for block in blocks])


def test_traced_model_equals_dygraph(family, inputs):
    model = family.build()
    cases = [inputs(), family.resized(inputs()), inputs(batch=3)]
    cases = cases if family.dynamic else cases[:1]
    fixed = {name: value for name, value in cases[0].items() if not has_tensors(value)}
    names = [name for name in cases[0] if name not in fixed]

    def velocity(tensors):
        return model(**dict(list(zip(names, tensors))), **fixed, return_dict=False)[0]  # noqa: B905

    specs = [InputSpec(family.dynamic[name], dtype=cases[0][name].dtype, name=name) for name in names if family.dynamic]
    with paddle.no_grad():
        expected = [predict(model, case) for case in cases]
        traced = paddle.jit.to_static(velocity, full_graph=True, input_spec=[specs] if specs else None)
        for case, truth in zip(cases, expected, strict=True):
            np.testing.assert_allclose(traced([case[name] for name in names]), truth, atol=1e-5)


def has_tensors(value):
    return isinstance(value, paddle.Tensor) or (isinstance(value, list) and has_tensors(value[0]))


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(family, layout, tmp_path):
    model = family.build()
    model.save_pretrained(tmp_path, layout=layout)
    again = family.cls.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight, again.state_dict()[name], err_msg=name)
