import numpy as np
import paddle
import pytest
from paddle.static import InputSpec
from safetensors.numpy import load_file

from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel

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
SPRINT = dict(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=0.5)
FAMILIES = {"sana": {}, "sprint": SPRINT}


def randomise(model, seed=0):
    paddle.seed(seed)
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + 0.2 * paddle.randn(weight.shape))
    return model


@pytest.fixture(params=FAMILIES)
def transformer(request):
    return randomise(SanaTransformer2DModel(**CONFIG, **FAMILIES[request.param]))


def inputs(model, control=False):
    paddle.seed(1)
    arguments = dict(
        hidden_states=paddle.randn([2, 3, 4, 6]),
        encoder_hidden_states=paddle.randn([2, 5, 6]),
        timestep=paddle.to_tensor([0.25, 0.75]),
        encoder_attention_mask=paddle.to_tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )
    if model.config.guidance_embeds:
        arguments["guidance"] = paddle.to_tensor([0.2, 0.45])
    return arguments | ({"controlnet_cond": paddle.randn([2, 3, 4, 6])} if control else {})


def samples(model, **changes):
    return model(**{**inputs(model, control=True), **changes}).controlnet_block_samples


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def test_reproduces_the_reference_outputs(fixtures_dir):
    folder = fixtures_dir / "sana_controlnet"
    recorded = np.load(folder / "io.npz")
    model = SanaControlNetModel.from_pretrained(folder)
    with paddle.no_grad():
        found = model(**{name[3:]: paddle.to_tensor(recorded[name]) for name in recorded if name.startswith("in_")})
    assert len(found.controlnet_block_samples) == 2
    for i, sample in enumerate(found.controlnet_block_samples):
        assert relative_error(sample, recorded[f"out_block_{i}"]) < 1e-5


def test_saving_reproduces_the_reference_file(fixtures_dir, tmp_path):
    folder, file = fixtures_dir / "sana_controlnet", "diffusion_pytorch_model.safetensors"
    SanaControlNetModel.from_pretrained(folder).save_pretrained(tmp_path, layout="diffusers")
    written, original = load_file(tmp_path / file), load_file(folder / file)
    assert written.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)


def test_a_new_controlnet_leaves_its_transformer_unchanged(transformer):
    controlnet = SanaControlNetModel.from_transformer(transformer, num_layers=2)
    controls = samples(controlnet)
    assert [x.shape for x in controls] == [[2, 24, 16]] * 2 and all((x == 0).all() for x in controls)
    base = transformer(**inputs(transformer)).sample
    assert (transformer(**inputs(transformer), controlnet_block_samples=controls).sample == base).all()


def test_a_new_controlnet_is_a_trainable_float32_copy_of_the_first_blocks(transformer):
    weights = {name: value.numpy() for name, value in transformer.state_dict().items()}
    transformer.to(dtype="bfloat16")
    controlnet = SanaControlNetModel.from_transformer(transformer, num_layers=2)
    zeros = {name for name, _ in controlnet.named_parameters() if name.startswith(("input_block", "controlnet_blocks"))}
    assert len(zeros) == 6
    for name, weight in controlnet.named_parameters():
        assert weight.dtype == paddle.float32 and not weight.stop_gradient
        np.testing.assert_allclose(weight, 0 if name in zeros else weights[name], rtol=2**-8, err_msg=name)
    for name in ("guidance_embeds", "qk_norm", "timestep_scale"):
        assert controlnet.config[name] == transformer.config[name]


def test_training_reaches_every_weight_once_the_projections_move(transformer):
    """In the first step only the zero projections at the output learn, then all."""
    controlnet = SanaControlNetModel.from_transformer(transformer, num_layers=2)
    optimizer = paddle.optimizer.SGD(1e-3, parameters=controlnet.parameters())
    reached = []
    for _ in range(2):
        sample = transformer(**inputs(transformer), controlnet_block_samples=samples(controlnet)).sample
        sample.square().mean().backward()
        reached.append({n for n, w in controlnet.named_parameters() if w.grad is not None and w.grad.abs().max() > 0})
        optimizer.step()
        optimizer.clear_grad()
    assert reached[0] == {name for name, _ in controlnet.named_parameters() if name.startswith("controlnet_blocks")}
    assert reached[1] == {name for name, _ in controlnet.named_parameters()}


def test_every_condition_matters(transformer):
    controlnet = randomise(SanaControlNetModel.from_transformer(transformer, num_layers=2))
    base = samples(controlnet)
    changes = {name: 0.5 * x for name, x in inputs(controlnet, control=True).items() if not name.endswith("mask")}
    for name, value in changes.items():
        moved = samples(controlnet, **{name: value})
        assert all((x - y).abs().max() > 1e-4 for x, y in zip(moved, base, strict=True)), name
    halved = samples(controlnet, conditioning_scale=0.5)
    assert all((2 * x == y).all() for x, y in zip(halved, base, strict=True))


def test_arguments_that_do_not_fit_are_refused(transformer):
    with pytest.raises(ValueError, match=r"num_layers must lie in 1\.\.2 for a transformer of 3 blocks, not 3"):
        SanaControlNetModel.from_transformer(transformer, num_layers=3)
    controlnet = SanaControlNetModel.from_transformer(transformer, num_layers=2)
    arguments = inputs(controlnet, control=True)
    guided = arguments.pop("guidance", None) is not None
    with pytest.raises(ValueError, match="needs `guidance`" if guided else "does not take `guidance`"):
        controlnet(**arguments, guidance=None if guided else paddle.to_tensor([0.2, 0.3]))
    with pytest.raises(ValueError, match="linear attention has no mask"):
        samples(controlnet, attention_mask=paddle.ones([2, 24]))


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(transformer, layout, tmp_path):
    controlnet = randomise(SanaControlNetModel.from_transformer(transformer, num_layers=2))
    controlnet.save_pretrained(tmp_path, layout=layout)
    again = SanaControlNetModel.from_pretrained(tmp_path)
    for x, y in zip(samples(again), samples(controlnet), strict=True):
        assert (x == y).all()


def test_gradient_checkpointing_gives_identical_gradients(transformer):
    found = []
    for checkpointed in (False, True):
        controlnet = randomise(SanaControlNetModel.from_transformer(transformer, num_layers=2))
        if checkpointed:
            controlnet.enable_gradient_checkpointing()
        sum(x.square().mean() for x in samples(controlnet)).backward()
        found.append({name: weight.grad.numpy() for name, weight in controlnet.named_parameters()})
    for name, gradient in found[0].items():
        np.testing.assert_array_equal(gradient, found[1][name], err_msg=name)


def test_traced_model_equals_dygraph_at_any_size(transformer):
    controlnet = randomise(SanaControlNetModel.from_transformer(transformer, num_layers=2))
    arguments = inputs(controlnet, control=True)
    larger = {n: paddle.concat([x, x], axis=2) if x.ndim == 4 else x for n, x in arguments.items()}
    names = list(arguments)

    def run(tensors):
        return controlnet(**dict(list(zip(names, tensors))), return_dict=False)[0]  # noqa: B905

    shapes = {2: [None, None], 3: [None, None, 6], 4: [None, 3, None, None], 1: [None]}
    specs = [InputSpec(shapes[x.ndim], dtype=x.dtype, name=name) for name, x in arguments.items()]
    with paddle.no_grad():
        expected = [controlnet(**case, return_dict=False)[0] for case in (arguments, larger)]
        traced = paddle.jit.to_static(run, full_graph=True, input_spec=[specs])
        for case, truth in zip((arguments, larger), expected, strict=True):
            for x, y in zip(traced([case[name] for name in names]), truth, strict=True):
                assert relative_error(x, y.numpy()) < 1e-5
