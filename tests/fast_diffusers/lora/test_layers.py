import contextvars
import copy
import threading

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from ppdiffusers.models.lora import LoRACompatibleLinear

from fast_diffusers import lora
from fast_diffusers.errors import UserError


def equal(a: paddle.Tensor, b: paddle.Tensor) -> bool:
    return bool((a == b).all())


def test_gradients_match_finite_differences_in_float64():
    paddle.seed(3)
    model = nn.Sequential(nn.Linear(5, 4))
    model.to(dtype="float64")
    parameters = lora.inject(model, rank=2, alpha=3.0, targets=["0"])
    x, weight = paddle.randn([6, 5], "float64"), paddle.randn([6, 4], "float64")
    x.stop_gradient = False
    parameters[1].set_value(paddle.randn([2, 4], "float64"))

    def loss():
        with lora.active(model, "default", 0.7):
            return (paddle.tanh(model(x)) * weight).sum()

    loss().backward()
    for tensor in [*parameters, x, model[0].weight]:
        value, numeric = tensor.numpy().copy(), np.zeros(tensor.shape)
        for index in np.ndindex(*tensor.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = value.copy()
                moved[index] += step
                tensor.set_value(moved)
                sides.append(loss().item())
            numeric[index] = (sides[0] - sides[1]) / 2e-6
        tensor.set_value(value)
        assert tensor.grad.dtype == paddle.float64
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, rtol=1e-7, atol=1e-8)


def test_fresh_adapter_changes_nothing_and_keeps_the_model(toy, x):
    before, base, layer = toy(x), dict(toy.named_parameters()), toy.blocks[0].attn.to_q
    seen = []
    layer.register_forward_post_hook(lambda *_: seen.append(True))
    parameters = lora.inject(toy, 3, 2.0, ["attn.to_q", "proj_out"])
    assert equal(toy(x), before) and seen
    assert toy.blocks[0].attn.to_q is layer and isinstance(layer, nn.Linear)
    names = dict(toy.named_parameters())
    assert all(names[name] is parameter for name, parameter in base.items())
    added = [
        f"{path}.lora_{factor}.default.weight"
        for path in ("blocks.0.attn.to_q", "blocks.1.attn.to_q", "proj_out")
        for factor in "AB"
    ]
    assert [name for name in names if name not in base] == added
    assert all(names[name] is parameter for name, parameter in zip(added, parameters, strict=True))
    assert [list(parameter.shape) for parameter in parameters[:2]] == [[12, 3], [3, 24]]
    assert lora.adapters(toy) == {"default": lora.LoRAConfig(3, 2.0, ("attn.to_q", "proj_out"))}


def test_targets_match_whole_path_components(toy):
    lora.inject(toy, 2, 2, ["attn.to_out.0", "blocks.1.my_attn.to_q"])
    paths = [key.removesuffix(".lora_A.weight") for key in lora.state_dict(toy) if "lora_A" in key]
    assert paths == ["blocks.0.attn.to_out.0", "blocks.1.attn.to_out.0", "blocks.1.my_attn.to_q"]


def test_initialization(make_toy):
    def first_factor(seed, targets=("attn.to_q",)):
        model = make_toy()
        lora.inject(model, 512, 1, targets, seed=seed)
        return lora.state_dict(model)["blocks.1.attn.to_q.lora_A.weight"].numpy()

    value, bound = first_factor(0), 1 / np.sqrt(12)  # kaiming-uniform, a = sqrt(5)
    assert np.abs(value).max() <= bound
    np.testing.assert_allclose([value.mean(), value.std()], [0, bound / np.sqrt(3)], atol=0.01)
    np.testing.assert_array_equal(value, first_factor(0, ("proj_out", "to_q")))  # whatever else there is
    assert np.abs(value - first_factor(1)).max() > 0.1


def test_injection_leaves_the_global_generator_alone(toy):
    paddle.seed(5)
    expected = paddle.randn([4])
    paddle.seed(5)
    lora.inject(toy, 2, 2, ["to_q"])
    assert equal(paddle.randn([4]), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["attn.to_k"]}, r"'attn.to_k' matches no nn.Linear of the model; nearest: attn.to_q"),
        ({"targets": ["blocks.0.norm"]}, "'blocks.0.norm' matches no nn.Linear"),
        ({"targets": "to_q"}, "list of layer-name suffixes"),
        ({"targets": []}, "list of layer-name suffixes"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.0}, "rank must be a positive integer, got 2.0"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"name": "a.b"}, "name 'a.b' must consist of"),
        ({"name": "taken"}, "already has a LoRA adapter 'taken'"),
    ],
)
def test_injection_errors(toy, x, arguments, message):
    lora.inject(toy, 2, 2, ["to_q"], "taken")
    with pytest.raises(UserError, match=message):
        lora.inject(toy, **({"rank": 2, "alpha": 2, "targets": ["to_q"], "name": "new"} | arguments))
    assert list(lora.adapters(toy)) == ["taken"]
    assert not any(".new." in name for name, _ in toy.named_parameters())


def test_off_is_bitwise_the_base(toy, x, add_adapter):
    before = toy(x)
    with lora.active(toy, None):  # no adapters at all yet
        assert equal(toy(x), before)
    add_adapter(toy)
    assert (toy(x) - before).abs().max() > 0.1
    with lora.active(toy, None):
        assert equal(toy(x), before)


def test_adapters_add_up_with_their_scales(add_adapter):
    paddle.seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), paddle.randn([4, 6])
    base, expected = model(x), 0.0
    for seed, (name, rank, alpha, scale) in enumerate([("a", 2, 3.0, 0.5), ("b", 4, 1.0, -2.0)]):
        a, b = add_adapter(model, name, rank, alpha, ["0"], seed)
        expected = expected + scale * alpha / rank * (x @ a @ b)
    with lora.active(model, {"a": 0.5, "b": -2.0}):
        np.testing.assert_allclose(model(x), base + expected, atol=2e-6)
    with lora.active(model, {"a": 0.25, "b": -1.0}, scale=2):
        np.testing.assert_allclose(model(x), base + expected, atol=2e-6)
    with lora.active(model, ["a", "b"], 0.5):
        both = model(x)
    with lora.active(model, "a", 0.5):
        first = model(x)
    with lora.active(model, "b", 0.5):
        np.testing.assert_allclose(both - base, first + model(x) - 2 * base, atol=2e-6)


def test_defaults_nesting_and_exceptions(toy, x, add_adapter):
    outputs = {None: toy(x)}
    for seed, name in enumerate("ab"):
        add_adapter(toy, name, seed=seed)
        outputs[name] = toy(x)  # the newest is the default
    assert not equal(outputs["a"], outputs["b"])
    with lora.active(toy, "a"):
        assert equal(toy(x), outputs["a"])
        with pytest.raises(RuntimeError, match="inside"), lora.active(toy, None):
            assert equal(toy(x), outputs[None])
            with lora.active(toy, "b"):
                assert equal(toy(x), outputs["b"])
            raise RuntimeError("inside")
        assert equal(toy(x), outputs["a"])
    assert equal(toy(x), outputs["b"])
    lora.set_default(toy, "a")
    assert equal(toy(x), outputs["a"])
    lora.set_default(toy, None)
    assert equal(toy(x), outputs[None])


def test_unknown_adapter_is_named(toy, add_adapter):
    with pytest.raises(UserError, match="no LoRA adapter 'student'; it has: none"), lora.active(toy, "student"):
        pass
    add_adapter(toy, "teacher")
    for call in (lora.set_default, lora.remove, lora.fuse, lora.parameters):
        with pytest.raises(UserError, match="no LoRA adapter 'student'; it has: teacher"):
            call(toy, "student")


def test_models_and_threads_do_not_see_each_others_switch(make_toy, toy, x, add_adapter):
    other, base = make_toy(), toy(x)
    add_adapter(toy)
    add_adapter(other)
    full, inside, outside, results = toy(x), threading.Event(), threading.Event(), {}

    def worker():
        inside.wait(10)
        results["default"] = toy(x)
        with lora.active(toy, "default", 0.5):
            results["half"] = toy(x)
            outside.set()

    thread = threading.Thread(target=worker)
    thread.start()
    with lora.active(toy, None):
        inside.set()
        outside.wait(10)
        assert equal(toy(x), base)
        assert equal(other(x), full)
    thread.join()
    assert equal(results["default"], full)
    with lora.active(toy, "default", 0.5):
        assert equal(toy(x), results["half"])


def test_recomputation_in_a_copied_context_sees_the_forwards_state(toy, x, add_adapter):
    lora.freeze(toy)
    add_adapter(toy, "student")
    add_adapter(toy, "other", seed=8)
    x.stop_gradient = False

    def gradients(checkpoint):
        with lora.active(toy, "student", 0.5):
            context = contextvars.copy_context()
            out = recompute(lambda value: context.run(toy, value), x) if checkpoint else toy(x)
        toy.clear_gradients()
        with lora.active(toy, None):
            out.square().sum().backward()
        return [parameter.grad.clone() for parameter in lora.parameters(toy, "student")]

    for expected, got in zip(gradients(False), gradients(True), strict=True):
        assert expected.abs().max() > 0
        assert equal(expected, got)


def test_fusing_equals_running_and_unfusing_is_exact(toy, x, add_adapter):
    base, weights = toy(x), {name: value.clone() for name, value in toy.named_parameters()}
    add_adapter(toy, "a")
    add_adapter(toy, "b", seed=8, targets=["attn.to_q"])
    with lora.active(toy, {"a": 0.5, "b": 2.0}):
        expected = toy(x)
    lora.fuse(toy, {"a": 0.5, "b": 2.0})
    np.testing.assert_allclose(toy(x), expected, atol=1e-6)
    assert (expected - base).abs().max() > 0.1
    for action in (
        lambda: lora.fuse(toy, "a"),
        lambda: lora.remove(toy, "a"),
        lambda: lora.set_default(toy, "a"),
        lambda: lora.active(toy, None).__enter__(),
        lambda: add_adapter(toy, "c"),
    ):
        with pytest.raises(UserError, match="while a, b is fused into the weights: unfuse first"):
            action()
    lora.unfuse(toy)
    names = dict(toy.named_parameters())
    assert all(equal(names[name], value) for name, value in weights.items())
    with lora.active(toy, {"a": 0.5, "b": 2.0}):
        assert equal(toy(x), expected)
    with pytest.raises(UserError, match="no LoRA adapter is fused"):
        lora.unfuse(toy)
    with pytest.raises(UserError, match="name the LoRA adapters to fuse"):
        lora.fuse(toy, None)


def test_fusing_one_keeps_the_others_running(toy, x, add_adapter):
    add_adapter(toy, "a")
    add_adapter(toy, "b", seed=8)
    lora.set_default(toy, ["a", "b"])
    expected = toy(x)
    lora.fuse(toy, "a")
    np.testing.assert_allclose(toy(x), expected, atol=1e-6)


def test_fusing_for_good(toy, x, add_adapter):
    add_adapter(toy)
    expected = toy(x)
    lora.fuse(toy, keep_base=False)
    np.testing.assert_allclose(toy(x), expected, atol=1e-6)
    assert lora.adapters(toy) == {}
    assert {type(layer) for _, layer in toy.named_sublayers() if isinstance(layer, nn.Linear)} == {nn.Linear}


def test_bfloat16_base_keeps_float32_adapters_and_fuses_in_float32(toy, add_adapter):
    toy.to(dtype="bfloat16")
    a, b = add_adapter(toy, rank=3, alpha=2.0, targets=["proj_out"])
    assert a.dtype == b.dtype == paddle.float32
    weight = toy.proj_out.weight
    original = weight.clone()
    expected = (original.astype("float32") + 2.0 / 3 * (a @ b)).astype("bfloat16")
    lora.fuse(toy)
    assert toy.proj_out.weight is weight and weight.dtype == paddle.bfloat16
    assert equal(weight.astype("float32"), expected.astype("float32"))
    lora.unfuse(toy)
    assert equal(weight.astype("float32"), original.astype("float32"))


def test_remove(toy, x, add_adapter):
    base = toy(x)
    add_adapter(toy, "a")
    only_a = toy(x)
    add_adapter(toy, "b", targets=["to_q"])
    lora.remove(toy, "b")
    assert type(toy.blocks[0].my_attn.to_q) is nn.Linear
    assert equal(toy(x), base)  # b was the default
    lora.set_default(toy, "a")
    assert equal(toy(x), only_a)
    lora.remove(toy, "a")
    assert equal(toy(x), base)
    assert not any("lora" in name for name in toy.state_dict())
    assert lora.inject(toy, 2, 2, ["to_q"], "a")


def test_freeze(toy, x, add_adapter):
    trainable = {id(parameter) for parameter in add_adapter(toy, "a") + add_adapter(toy, "b")}
    lora.freeze(toy)
    assert {id(parameter) for parameter in toy.parameters() if not parameter.stop_gradient} == trainable
    with lora.active(toy, "a"):
        toy(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters(toy, "a"))
    assert all(parameter.grad is None for parameter in lora.parameters(toy, "b"))


def test_a_deep_copy_is_switched_on_its_own(toy, x, add_adapter):
    add_adapter(toy)
    twin, full = copy.deepcopy(toy), toy(x)
    with lora.active(toy, None):
        assert equal(twin(x), full)
    lora.remove(twin, "default")
    assert equal(toy(x), full)


def test_a_traced_model_keeps_the_adapter(toy, x, add_adapter):
    add_adapter(toy)
    toy.eval()
    expected = toy(x)
    static = paddle.jit.to_static(toy, full_graph=True)
    np.testing.assert_allclose(static(x), expected, atol=1e-6)


def test_linear_layers_of_ppdiffusers_carry_adapters_and_are_given_back(x):
    layer = LoRACompatibleLinear(12, 5)
    model = nn.Sequential(layer)
    base = layer(x)
    lora.inject(model, 2, 2, ["0"])
    lora.parameters(model, "default")[1].set_value(paddle.ones([2, 5]))
    assert not equal(layer(x), base)
    assert equal(layer(x, 1.0), layer(x))
    lora.remove(model, "default")
    assert type(layer) is LoRACompatibleLinear and equal(layer(x), base)
    layer.set_lora_layer(nn.Linear(12, 5))  # one of ppdiffusers' own
    with pytest.raises(UserError, match=r"matches no nn\.Linear"):
        lora.inject(model, 2, 2, ["0"])
