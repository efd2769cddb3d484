import logging
from contextvars import ContextVar

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from ppdiffusers import ModelMixin

from fast_diffusers.models import FluxTransformer2DModel

MODE = ContextVar("mode", default="outside")


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def gradients(model):
    return {name: weight.grad.numpy() for name, weight in model.named_parameters() if weight.grad is not None}


def test_reproduces_the_reference_outputs(fixtures_dir):
    folder = fixtures_dir / "flux"
    recorded = np.load(folder / "io.npz")
    inputs = {name[3:]: paddle.to_tensor(recorded[name]) for name in recorded if name.startswith("in_")}
    model = FluxTransformer2DModel.from_pretrained(folder)
    assert isinstance(model, ModelMixin) and not model.training and model.config.num_layers == 2
    with paddle.no_grad():
        assert relative_error(model(**inputs).sample, recorded["out_sample"]) < 1e-5
        assert relative_error(model(**inputs, return_dict=False)[0], recorded["out_sample"]) < 1e-5


def test_float64_agrees_with_float32(tiny_flux, flux_inputs):
    single = tiny_flux(guidance_embeds=True)
    double = tiny_flux(guidance_embeds=True)
    double.to(dtype="float64")
    inputs = flux_inputs(guidance=True)
    inputs["timestep"] = paddle.to_tensor([0.25, 0.875])  # exact in both types
    wide = {name: x if name.endswith("ids") else x.astype("float64") for name, x in inputs.items()}
    with paddle.no_grad():
        expected = double(**wide).sample
        assert expected.dtype == paddle.float64
        assert relative_error(single(**inputs).sample, expected.numpy()) < 1e-4


@pytest.mark.parametrize("argument", ["hidden_states", "encoder_hidden_states", "pooled_projections"])
def test_input_gradient_against_finite_differences(tiny_flux, flux_inputs, argument):
    model = tiny_flux(guidance_embeds=True)
    model.to(dtype="float64")
    inputs = flux_inputs(guidance=True, dtype="float64")
    x = inputs[argument]
    x.stop_gradient = False
    direction, weights = paddle.randn(x.shape, "float64"), paddle.randn([2, 12, 4], "float64")

    def loss(value):
        return (model(**{**inputs, argument: value}).sample * weights).sum()

    slope = (paddle.grad(loss(x), x)[0] * direction).sum().item()
    with paddle.no_grad():
        step = 1e-6
        numeric = (loss(x + step * direction) - loss(x - step * direction)).item() / (2 * step)
    assert abs(slope) > 1e-3
    assert slope == pytest.approx(numeric, rel=1e-6)


def test_every_weight_gets_a_gradient(tiny_flux, flux_inputs):
    model = tiny_flux(guidance_embeds=True)
    model(**flux_inputs(guidance=True)).sample.square().mean().backward()
    grads = gradients(model)
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    assert not [name for name, gradient in grads.items() if np.abs(gradient).max() == 0]


def test_new_model_predicts_zero_and_its_blocks_are_identities(flux_inputs):
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    inputs = flux_inputs()
    assert (model(**inputs).sample == 0).all()
    temb = model.embed_conditioning(inputs["timestep"], None, inputs["pooled_projections"])
    rope = model.embed_positions(inputs["txt_ids"], inputs["img_ids"])
    joint = paddle.randn([2, 15, 16])
    text, image = model.run_double_blocks(joint[:, 3:], joint[:, :3], temb, rope)
    assert (paddle.concat([text, image], axis=1) == joint).all()
    assert (model.run_single_blocks(joint, temb, rope) == joint).all()


def test_the_named_steps_compose_to_the_forward(tiny_flux, flux_inputs):
    model, inputs = tiny_flux(), flux_inputs()
    temb = model.embed_conditioning(inputs["timestep"], None, inputs["pooled_projections"])
    rope = model.embed_positions(inputs["txt_ids"], inputs["img_ids"])
    text, image = model.run_double_blocks(
        model.x_embedder(inputs["hidden_states"]), model.context_embedder(inputs["encoder_hidden_states"]), temb, rope
    )
    joint = model.run_single_blocks(paddle.concat([text, image], axis=1), temb, rope)
    assert (model.project_out(joint[:, 3:], temb) == model(**inputs).sample).all()


def test_samples_of_a_batch_do_not_mix(tiny_flux, flux_inputs):
    model, inputs = tiny_flux(), flux_inputs()
    whole = model(**inputs).sample
    second = {name: x if name.endswith("ids") else x[1:] for name, x in inputs.items()}
    np.testing.assert_allclose(model(**second).sample, whole[1:], atol=1e-5)


def test_positions_and_guidance_matter(tiny_flux, flux_inputs):
    model, inputs = tiny_flux(guidance_embeds=True), flux_inputs(guidance=True)
    base = model(**inputs).sample
    for name in ("img_ids", "guidance", "timestep"):
        changed = model(**{**inputs, name: inputs[name] * 0.5}).sample
        assert (changed - base).abs().max() > 1e-4, name


@pytest.mark.parametrize("checkpointed_first", [False, True])
def test_gradient_checkpointing_gives_identical_gradients(tiny_flux, flux_inputs, checkpointed_first):
    results = []
    for checkpointed in (checkpointed_first, not checkpointed_first):
        model, inputs = tiny_flux(), flux_inputs()
        inputs["hidden_states"].stop_gradient = False
        if checkpointed:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointed
        model(**inputs).sample.square().mean().backward()
        results.append(gradients(model) | {"input": inputs["hidden_states"].grad.numpy()})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 50
    for name, gradient in results[0].items():
        np.testing.assert_array_equal(gradient, results[1][name], err_msg=name)


def test_checkpointing_trains_one_layer_of_a_frozen_model_without_warnings(tiny_flux, flux_inputs, caplog):
    grads = []
    for checkpointed in (False, True):
        model = tiny_flux()
        for name, weight in model.named_parameters():
            weight.stop_gradient = name != "transformer_blocks.1.attn.to_q.weight"
        if checkpointed:
            model.enable_gradient_checkpointing()
        with caplog.at_level(logging.WARNING):
            model(**flux_inputs()).sample.sum().backward()
        grads.append(gradients(model))
    assert list(grads[0]) == ["transformer_blocks.1.attn.to_q.weight"]
    np.testing.assert_array_equal(*(g["transformer_blocks.1.attn.to_q.weight"] for g in grads))
    assert not caplog.records


def test_recomputation_sees_the_context_of_the_forward(tiny_flux, flux_inputs):
    model = tiny_flux()
    model.enable_gradient_checkpointing()
    seen = []
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.register_forward_pre_hook(lambda *_: seen.append(MODE.get()))
    token = MODE.set("inside")
    loss = model(**flux_inputs()).sample.sum()
    MODE.reset(token)
    assert len(seen) == 4
    loss.backward()
    assert len(seen) == 8 and set(seen) == {"inside"}


def test_hooks_take_differentiable_features_under_checkpointing(tiny_flux, flux_inputs):
    grads = []
    for checkpointed in (False, True):
        model, inputs = tiny_flux(), flux_inputs()
        for weight in model.parameters():
            weight.stop_gradient = True
        if checkpointed:
            model.enable_gradient_checkpointing()
        inputs["hidden_states"].stop_gradient = False
        features = []
        handles = [
            block.register_forward_post_hook(lambda _layer, _args, out, features=features: features.append(out))
            for block in model.single_transformer_blocks
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        sum(feature.square().mean() for feature in features).backward()
        grads.append(inputs["hidden_states"].grad.numpy())
    assert np.abs(grads[0]).max() > 0
    np.testing.assert_array_equal(*grads)


def test_traced_model_equals_dygraph_at_any_length(tiny_flux, flux_inputs):
    model, inputs = tiny_flux(guidance_embeds=True), flux_inputs(guidance=True)
    names = list(inputs)
    specs = [InputSpec([None] if x.ndim == 1 else [None] * (x.ndim - 1) + x.shape[-1:]) for x in inputs.values()]

    def velocity(hidden, text, pooled, timestep, img_ids, txt_ids, guidance):
        return model(hidden, text, pooled, timestep, img_ids, txt_ids, guidance, return_dict=False)[0]

    short = {name: x[:, :2] if name == "encoder_hidden_states" else x for name, x in inputs.items()}
    short["txt_ids"] = short["txt_ids"][:2]
    cases = [inputs, short, flux_inputs(guidance=True, batch=3)]
    with paddle.no_grad():
        expected = [model(**case).sample.numpy() for case in cases]
        traced = paddle.jit.to_static(velocity, full_graph=True, input_spec=specs)
        for case, truth in zip(cases, expected, strict=True):
            np.testing.assert_allclose(traced(*[case[name] for name in names]), truth, atol=1e-5)


def test_guidance_must_match_the_model(tiny_flux, flux_inputs):
    with pytest.raises(ValueError, match=r"needs `guidance` \(guidance_embeds=True\)"):
        tiny_flux(guidance_embeds=True)(**flux_inputs())
    with pytest.raises(ValueError, match="does not take `guidance`"):
        tiny_flux()(**flux_inputs(guidance=True))


def test_unknown_attention_arguments_are_refused(tiny_flux, flux_inputs):
    with pytest.raises(ValueError, match=r"\['scale'\] are not supported.*lora.active"):
        tiny_flux()(**flux_inputs(), joint_attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 3, 4)])
def test_bad_rotary_axes_are_refused(tiny_flux, axes):
    with pytest.raises(ValueError, match="must be even and sum to the head size 8"):
        tiny_flux(axes_dims_rope=axes)
