"""What SANA does beyond test_contract.py: sizes, guidance, masks, copies, original checkpoints."""

import json
import math

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaTransformer2DModel
from fast_diffusers.models.sana import sincos_table
from fast_diffusers.models.sana_original import is_original, to_diffusers

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
SIZE_600M = dict(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)


def build(seed=0, **overrides):
    """A tiny model in which no weight is zero."""
    paddle.seed(seed)
    model = SanaTransformer2DModel(**{**CONFIG, **overrides})
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.2 * paddle.randn(weight.shape))
    return model


def inputs(**more):
    paddle.seed(1)
    return dict(
        hidden_states=paddle.randn([2, 3, 4, 6]),
        encoder_hidden_states=paddle.randn([2, 5, 6]),
        timestep=paddle.to_tensor([0.25, 0.75]),
        **more,
    )


GUIDANCE = paddle.to_tensor([0.2, 0.45])


def difference(actual, expected):
    return float((actual - expected).abs().max())


@pytest.mark.parametrize(
    "config, count",
    [
        (SPRINT, 1_610_237_472),
        (SIZE_600M | SPRINT, 593_501_216),
        ({}, 1_604_462_752),
        (SIZE_600M, 591_747_872),
    ],
)
def test_published_sizes(config, count):
    with paddle.LazyGuard():  # nothing is allocated
        model = SanaTransformer2DModel(**config)
    assert sum(math.prod(weight.shape) for weight in model.parameters()) == count


def test_a_new_guidance_embedder_adds_nothing_and_learns():
    model = SanaTransformer2DModel(**CONFIG, **SPRINT)
    modulation, temb = model.embed_conditioning(paddle.to_tensor([0.25, 0.75]), GUIDANCE)
    other_modulation, other = model.embed_conditioning(paddle.to_tensor([0.25, 0.75]), 2 * GUIDANCE)
    assert (temb == other).all() and (modulation == other_modulation).all()
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    for step in range(2):
        model.embed_conditioning(paddle.to_tensor([0.25, 0.75]), GUIDANCE)[1].square().sum().backward()
        embedder = model.time_embed.guidance_embedder
        assert embedder.linear_2.weight.grad.abs().max() > 0
        assert (embedder.linear_1.weight.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
        optimizer.clear_grad()


def test_guidance_matters_and_must_match_the_model():
    model = build(**SPRINT)
    base = model(**inputs(guidance=GUIDANCE)).sample
    assert difference(model(**inputs(guidance=2 * GUIDANCE)).sample, base) > 1e-4
    with pytest.raises(ValueError, match=r"needs `guidance` \(guidance_embeds=True\)"):
        model(**inputs())
    with pytest.raises(ValueError, match="does not take `guidance`"):
        build()(**inputs(guidance=GUIDANCE))


def test_hooks_reach_the_embedded_conditions():
    for config, more in (({}, {}), (SPRINT, {"guidance": GUIDANCE})):
        model, seen = build(**config), []
        hook = model.time_embed.embedded.register_forward_post_hook(lambda _l, _i, out, seen=seen: seen.append(out))
        base = model(**inputs(**more)).sample
        hook.remove()
        assert (seen[0] == model.embed_conditioning(inputs()["timestep"], *more.values())[1]).all()
        model.time_embed.embedded.register_forward_post_hook(lambda _l, _i, out: out + 0.5)
        assert difference(model(**inputs(**more)).sample, base) > 1e-3


def test_masked_text_has_no_influence():
    model = build()
    mask = paddle.to_tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    arguments = inputs(encoder_attention_mask=mask)
    base = model(**arguments).sample
    noise = paddle.randn([2, 5, 6]) * (1 - mask).astype("float32").unsqueeze(-1)
    changed = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"] + noise}
    assert difference(model(**changed).sample, base) < 1e-6
    bias = (1 - mask.astype("float32")).unsqueeze(1) * -10000
    assert (model(**{**arguments, "encoder_attention_mask": bias}).sample == base).all()
    assert difference(model(**inputs()).sample, base) > 1e-4
    short = {name: x[1:] for name, x in inputs().items()}
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :2]
    assert difference(model(**short).sample, base[1:]) < 1e-5


def test_positions_are_sines_and_cosines_of_column_then_row():
    table = sincos_table(2, 3, 8, spacing=6.0).numpy().reshape(2, 3, 2, 2, 2)
    frequency = np.array([1.0, 0.01])
    for row in range(2):
        for column in range(3):
            for axis, position in enumerate((2.0 * column, 3.0 * row)):
                expected = [np.sin(position * frequency), np.cos(position * frequency)]
                np.testing.assert_allclose(table[row, column, axis], expected, atol=1e-7)


def test_positions_scale_with_the_image():
    model = build(interpolation_scale=2.0, sample_size=8)
    plain = build()
    image = paddle.randn([1, 3, 4, 4])
    added = model.patch_embed(image) - plain.patch_embed(image)
    np.testing.assert_allclose(added[0], sincos_table(4, 4, 16, spacing=4.0), atol=1e-6)


def test_a_student_with_guidance_starts_as_its_teacher():
    teacher = build(qk_norm="rms_norm_across_heads")
    student = SanaTransformer2DModel.from_transformer(teacher, guidance_embeds=True)
    assert student.config.guidance_embeds and not teacher.config.guidance_embeds
    expected = teacher(**inputs()).sample
    assert difference(student(**inputs(guidance=GUIDANCE)).sample, expected) == 0
    with paddle.no_grad():
        student.proj_out.weight.zero_()
    assert difference(teacher(**inputs()).sample, expected) == 0


def test_copies_change_only_what_is_asked_for():
    teacher = build()
    copy = SanaTransformer2DModel.from_transformer(teacher, qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    assert (copy.config.qk_norm, copy.config.timestep_scale) == ("rms_norm_across_heads", 0.001)
    weights = teacher.state_dict()
    for name, weight in copy.state_dict().items():
        assert (weight == (1 if ".norm_" in name else weights[name])).all(), name


def test_samples_are_added_after_all_blocks_but_the_first():
    model, controls = build(), [paddle.randn([2, 24, 16]) for _ in range(2)]
    base = model(**inputs()).sample
    zeros = [paddle.zeros_like(x) for x in controls]
    assert (model(**inputs(controlnet_block_samples=zeros)).sample == base).all()
    hooks = [
        block.register_forward_post_hook(lambda _l, _i, out, x=x: out + x)
        for block, x in zip(model.transformer_blocks[1:], controls, strict=True)
    ]
    expected = model(**inputs()).sample
    for hook in hooks:
        hook.remove()
    assert (model(**inputs(controlnet_block_samples=controls)).sample == expected).all()
    with pytest.raises(ValueError, match="3 control samples for 3 blocks"):
        model(**inputs(controlnet_block_samples=[*controls, controls[0]]))


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"attention_mask": paddle.ones([2, 24])}, "linear attention has no mask"),
        ({"attention_kwargs": {"scale": 0.5}}, r"\['scale'\] are not supported.*lora.active"),
    ],
)
def test_unsupported_arguments_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        build()(**inputs(**argument))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"qk_norm": "layer_norm"}, "unknown qk_norm 'layer_norm'"),
        ({"cross_attention_dim": 20}, "cross_attention_dim 20 must be .* 16"),
        ({"dropout": 0.1}, "dropout=0.1 is not supported"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True is not supported"),
    ],
)
def test_unknown_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SanaTransformer2DModel(**{**CONFIG, **config})


# ---------------------------------------------------------------------------------------------- original checkpoints
INVERSE = {
    "patch_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "time_embed.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    "attn1.to_out.0": "attn.proj",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
}


def original_name(name):
    if name == "scale_shift_table":
        return "final_layer.scale_shift_table"
    name = name.replace("time_embed.emb.", "time_embed.")
    for scalar, ours in (("t", "timestep"), ("cfg", "guidance")):
        for number, layer in ((0, 1), (2, 2)):
            name = name.replace(f"time_embed.{ours}_embedder.linear_{layer}.", f"{scalar}_embedder.mlp.{number}.")
    for ours, theirs in INVERSE.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name.replace("transformer_blocks.", "blocks.")


def to_original(state):
    """The state dict under the authors' names: projections stacked, and what diffusers drops added."""
    original = {}
    for name, value in state.items():
        if ".attn1.to_q." in name:
            parts = [state[name.replace("to_q", layer)] for layer in ("to_q", "to_k", "to_v")]
            original[original_name(name.replace("attn1.to_q", "attn.qkv"))] = np.concatenate(parts)
        elif ".attn2.to_k." in name:
            parts = [value, state[name.replace("to_k", "to_v")]]
            original[original_name(name.replace("attn2.to_k", "cross_attn.kv_linear"))] = np.concatenate(parts)
        elif not (".attn1.to_k." in name or ".to_v." in name):
            original[original_name(name)] = value
    zeros = np.zeros([4, 4], np.float32)
    dropped = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")
    return original | dict.fromkeys(dropped, zeros)


@pytest.fixture(params=[{}, SPRINT], ids=["sana", "sprint"])
def saved(request, tmp_path):
    """A folder in diffusers' layout and its arrays."""
    build(**request.param).save_pretrained(tmp_path, layout="diffusers")
    return tmp_path, load_file(tmp_path / "diffusion_pytorch_model.safetensors")


def test_original_names_are_translated_back(saved):
    _, state = saved
    original = to_original(state)
    assert is_original(original) and not is_original(state)
    assert "blocks.2.attn.qkv.weight" in original and "blocks.0.cross_attn.kv_linear.bias" in original
    again = to_diffusers(original)
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_original_checkpoints_load(saved, dtype):
    folder, state = saved
    original = {name: value.astype(dtype) for name, value in to_original(state).items()}
    save_file(original, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    model = SanaTransformer2DModel.from_pretrained(folder)
    model.save_pretrained(folder / "again", layout="diffusers")
    again = load_file(folder / "again" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value.astype(dtype).astype("float32"), err_msg=name)


def test_unknown_original_names_are_named(saved):
    folder, state = saved
    original = to_original(state) | {"blocks.0.surplus.weight": np.zeros([2], np.float32)}
    save_file(original, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected: transformer_blocks\.0\.surplus\.weight$"):
        SanaTransformer2DModel.from_pretrained(folder)


def test_the_reference_file_survives_the_original_names(fixtures_dir):
    for name in ("sana", "sana_sprint"):
        state = load_file(fixtures_dir / name / "diffusion_pytorch_model.safetensors")
        again = to_diffusers(to_original(state))
        assert again.keys() == state.keys()
        assert all((again[key] == state[key]).all() for key in state)


def test_config_keeps_the_scales(fixtures_dir):
    config = json.loads((fixtures_dir / "sana_sprint" / "config.json").read_text())
    model = SanaTransformer2DModel.from_pretrained(fixtures_dir / "sana_sprint")
    assert model.config.guidance_embeds_scale == config["guidance_embeds_scale"] == 0.1
    assert model.config.timestep_scale == config["timestep_scale"]
