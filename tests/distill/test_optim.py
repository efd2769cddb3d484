import math

import numpy as np
import paddle
import pytest

from distill.config import OptimizerConfig
from distill.optim import EMA, ema_decay, learning_rate, make_optimizer, state_values


def parameters() -> dict[str, paddle.Tensor]:
    rng = np.random.default_rng(0)
    shapes = {"block.lora_A.weight": [4, 2], "block.lora_B.weight": [2, 4], "bias": [3]}
    made = {name: paddle.create_parameter(shape, "float32") for name, shape in shapes.items()}
    for parameter in made.values():
        parameter.set_value(rng.standard_normal(parameter.shape).astype(np.float32))
    return made


def gradients(step: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + step)
    return {
        "block.lora_A.weight": (scale * rng.standard_normal([4, 2])).astype(np.float32),
        "block.lora_B.weight": (scale * rng.standard_normal([2, 4])).astype(np.float32),
        "bias": (scale * rng.standard_normal([3])).astype(np.float32),
    }


def train(optimizer, params, first: int, last: int, scale: float = 1.0):
    reports = []
    for step in range(first, last):
        for name, gradient in gradients(step, scale).items():
            params[name].grad = paddle.to_tensor(gradient)
        reports.append(optimizer.step())
        optimizer.clear_grad()
    return reports


CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip_norm=1.5, schedule="cosine", warmup_steps=3)


EPS = 1e-8  # where the recipe gives none
KINDS = ["adamw", "adafactor", "came"]


def reference(config: OptimizerConfig, total_steps: int, steps: int) -> dict[str, np.ndarray]:
    """AdamW as in the paper (Algorithm 2), float64."""
    b1, b2 = config.betas
    values = {name: p.numpy().astype(np.float64) for name, p in parameters().items()}
    m = {name: np.zeros_like(value) for name, value in values.items()}
    v = {name: np.zeros_like(value) for name, value in values.items()}
    for step in range(steps):
        grads = {name: g.astype(np.float64) for name, g in gradients(step).items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = 1.0 if config.grad_clip_norm is None else min(1.0, config.grad_clip_norm / norm)
        lr = learning_rate(config, step, total_steps)
        for name, g in grads.items():
            m[name] = b1 * m[name] + (1 - b1) * clip * g
            v[name] = b2 * v[name] + (1 - b2) * (clip * g) ** 2
            m_hat, v_hat = m[name] / (1 - b1 ** (step + 1)), v[name] / (1 - b2 ** (step + 1))
            values[name] -= lr * (m_hat / (np.sqrt(v_hat) + EPS) + config.weight_decay * values[name])
    return values


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_adamw_equals_the_paper(betas, clip):
    config = OptimizerConfig(**{**vars(CONFIG), "betas": betas, "grad_clip_norm": clip})
    params = parameters()
    train(make_optimizer(params, config, 20), params, 0, 10)
    for name, expected in reference(config, 20, 10).items():
        np.testing.assert_allclose(params[name].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_equals_the_paper(beta1):
    """Algorithm 2 with sums over rows and columns, float64; a vector's second moment stays whole."""
    config, (steps, total) = OptimizerConfig(**{**vars(CONFIG), "kind": "adafactor", "betas": (beta1, 0.99)}), (10, 20)
    params = {**parameters(), "kernel": paddle.create_parameter([3, 2, 2, 1], "float32")}
    values = {name: p.numpy().astype(np.float64) for name, p in params.items()}
    optimizer = make_optimizer(params, config, total)
    rows, columns, first, rng = {}, {}, {}, np.random.default_rng(1)
    for step in range(steps):
        grads = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in values.items()}
        for name, gradient in grads.items():
            params[name].grad = paddle.to_tensor(gradient)
        optimizer.step()
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        clip = min(1.0, config.grad_clip_norm / norm)
        for name, gradient in grads.items():
            g = clip * gradient.astype(np.float64)
            squared = (g**2).reshape(len(g), -1)
            rows[name] = 0.99 * rows.get(name, 0) + 0.01 * squared.sum(1)
            columns[name] = 0.99 * columns.get(name, 0) + 0.01 * squared.sum(0)
            v = rows[name] if g.ndim == 1 else np.outer(rows[name], columns[name]) / rows[name].sum()
            first[name] = beta1 * first.get(name, 0) + (1 - beta1) * g
            m_hat, v_hat = first[name] / (1 - beta1 ** (step + 1)), v.reshape(g.shape) / (1 - 0.99 ** (step + 1))
            rate = learning_rate(config, step, total)
            values[name] -= rate * (m_hat / (np.sqrt(v_hat) + EPS) + config.weight_decay * values[name])
    for name, expected in values.items():
        np.testing.assert_allclose(params[name].numpy(), expected, atol=5e-6)


def over_root(values, mean):
    """values / √mean, the mean of a matrix being that of its rows times that of its columns over that of all."""
    if isinstance(mean, np.ndarray):
        return values / np.sqrt(mean)
    rows, columns = mean
    return values / np.sqrt(np.outer(rows, columns) / rows.mean()).reshape(values.shape)


def running(mean, values, beta):
    """A running mean: a vector's whole, else of rows and of columns."""
    if values.ndim < 2:
        return beta * (0 if mean is None else mean) + (1 - beta) * values
    matrix = values.reshape(len(values), -1)
    rows, columns = mean or (0, 0)
    return beta * rows + (1 - beta) * matrix.mean(1), beta * columns + (1 - beta) * matrix.mean(0)


@pytest.mark.parametrize("clip", [None, 1.5])
def test_came_equals_the_paper(clip):
    """Algorithm 2 in float64, with a threshold of 1 and its ε; vectors have no confidence."""
    config = OptimizerConfig(**{**vars(CONFIG), "kind": "came", "confidence_decay": 0.99, "grad_clip_norm": clip})
    (beta1, beta2), beta3, total = config.betas, config.confidence_decay, 20
    params = {**parameters(), "kernel": paddle.create_parameter([3, 2, 2, 1], "float32")}
    values = {name: p.numpy().astype(np.float64) for name, p in params.items()}
    optimizer, rng = make_optimizer(params, config, total), np.random.default_rng(1)
    second, first, instability = {}, dict.fromkeys(params, 0), {}
    for step in range(12):
        grads = {
            name: (rng.standard_normal(v.shape) * 2 ** (step % 3)).astype(np.float32) for name, v in values.items()
        }
        for name, gradient in grads.items():
            params[name].grad = paddle.to_tensor(gradient)
        optimizer.step()
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        scale, rate = 1.0 if clip is None else min(1.0, clip / norm), learning_rate(config, step, total)
        for name, gradient in grads.items():
            g = scale * gradient.astype(np.float64)
            second[name] = running(second.get(name), g**2 + 1e-30, beta2)
            update = over_root(g, second[name])
            update = update / max(1.0, np.sqrt((update**2).mean()))
            first[name] = beta1 * first[name] + (1 - beta1) * update
            step_taken = first[name]
            if g.ndim > 1:
                instability[name] = running(instability.get(name), (update - first[name]) ** 2 + 1e-16, beta3)
                step_taken = over_root(first[name], instability[name])
            values[name] -= rate * (step_taken + config.weight_decay * values[name])
    for name, expected in values.items():
        np.testing.assert_allclose(params[name].numpy(), expected, rtol=2e-5, atol=2e-5)


def test_came_takes_the_smallest_gradients_for_what_they_are():
    """Factors of 1e-27 each: their product is below what float32 holds; an ε of a recipe is added to the squares."""
    steps = []
    for scale, eps in ((1.0, None), (1e-12, None), (1e-12, 1.0)):
        params = parameters()
        before = {name: parameter.numpy() for name, parameter in params.items()}
        config = OptimizerConfig(kind="came", lr=0.1, weight_decay=0.0, grad_clip_norm=None, eps=eps)
        train(make_optimizer(params, config, 1), params, 0, 1, scale)
        steps.append({name: before[name] - parameter.numpy() for name, parameter in params.items()})
    for name in before:
        np.testing.assert_allclose(steps[1][name], steps[0][name], rtol=1e-3)
    assert np.abs(steps[2]["bias"]).max() < 1e-10 < np.abs(steps[1]["bias"]).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_is_a_factor_on_the_learning_rate_of_one_parameter(kind):
    """Of its weight decay, too. The other parameters move as without it, but for the clipping they share."""
    config = OptimizerConfig(**{**vars(CONFIG), "kind": kind})
    moved = []
    for rates in (None, {"bias": 0.25}, {"bias": 0.0}):
        params = parameters()
        before = {name: parameter.numpy() for name, parameter in params.items()}
        train(make_optimizer(params, config, 10, rates), params, 0, 1)
        moved.append({name: parameter.numpy() - before[name] for name, parameter in params.items()})
    plain, slow, still = moved
    for name in ("block.lora_A.weight", "block.lora_B.weight"):
        np.testing.assert_array_equal(slow[name], plain[name])
    np.testing.assert_allclose(slow["bias"], 0.25 * plain["bias"], rtol=1e-4, atol=2e-7)
    np.testing.assert_array_equal(still["bias"], 0 * still["bias"])


def test_a_rate_of_no_parameter_is_an_error():
    with pytest.raises(ValueError, match="rates names bais, which is not among the parameters"):
        make_optimizer(parameters(), CONFIG, 10, {"bais": 2.0})


def test_a_rank_one_second_moment_is_not_approximated():
    """One row, or one column: the factored state says all, and Adafactor is AdamW."""
    outcome = []
    for kind in ("adamw", "adafactor"):
        shapes = {"row": [1, 5, 1, 1], "column": [5, 1]}
        params = {name: paddle.create_parameter(shape, "float32") for name, shape in shapes.items()}
        for parameter in params.values():
            parameter.set_value(paddle.ones(parameter.shape))
        optimizer = make_optimizer(params, OptimizerConfig(**{**vars(CONFIG), "kind": kind}), 10)
        for step in range(5):
            for i, parameter in enumerate(params.values()):
                values = np.random.default_rng(10 * step + i).standard_normal(parameter.shape)
                parameter.grad = paddle.to_tensor(values, "float32")
            optimizer.step()
        outcome.append([parameter.numpy() for parameter in params.values()])
    for expected, actual in zip(*outcome, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["adafactor", "came"])
def test_zero_gradients_only_decay_the_weights(kind):
    params = parameters()
    before = {name: p.numpy() for name, p in params.items()}
    config = OptimizerConfig(kind=kind, lr=0.1, weight_decay=0.5)
    for parameter in params.values():
        parameter.grad = paddle.zeros(parameter.shape)
    make_optimizer(params, config, 10).step()
    for name, parameter in params.items():
        np.testing.assert_allclose(parameter.numpy(), 0.95 * before[name], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_five_saved_and_five_more_steps_equal_ten_bitwise(kind, schedule):
    config = OptimizerConfig(**{**vars(CONFIG), "kind": kind, "schedule": schedule})
    whole = parameters()
    reports = train(make_optimizer(whole, config, 10), whole, 0, 10)

    half = parameters()
    optimizer = make_optimizer(half, config, 10)
    first = train(optimizer, half, 0, 5)
    tensors, scalars = optimizer.state_dict()
    saved = {key: tensor.numpy().copy() for key, tensor in tensors.items()}
    weights = {name: p.numpy().copy() for name, p in half.items()}

    resumed = parameters()  # other Paddle names than those of the run that saved
    for name, value in weights.items():
        resumed[name].set_value(paddle.to_tensor(value))
    optimizer = make_optimizer(resumed, config, 10)
    optimizer.load_state_dict({key: paddle.to_tensor(value) for key, value in saved.items()}, scalars)
    assert first + train(optimizer, resumed, 5, 10) == reports
    for name in whole:
        np.testing.assert_array_equal(resumed[name].numpy(), whole[name].numpy())


def test_state_is_keyed_by_path():
    params = parameters()
    tensors, scalars = make_optimizer(params, CONFIG, 10).state_dict()
    keys = ("moment1", "moment2", "beta1_pow", "beta2_pow")
    assert set(tensors) == {f"{name}.{key}" for name in params for key in keys}
    assert scalars == {"steps": 0}


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_size_of_the_state(kind, beta1):
    params, config = parameters(), OptimizerConfig(kind=kind, betas=(beta1, 0.999))
    tensors = make_optimizer(params, config, 10).tensors()
    counted = sum(tensor.size for key, tensor in tensors.items() if "_pow" not in key)
    assert sum(state_values(parameter.shape, config) for parameter in params.values()) == counted
    if (kind, beta1) == ("adafactor", 0.0):
        assert counted == (4 + 2 + 1) + (2 + 4 + 1) + (3 + 1)
    if kind == "came":
        assert counted == (2 * (4 + 2) + 8) + (2 * (2 + 4) + 8) + (3 + 3)


def test_state_of_another_kind_is_an_error():
    params = parameters()
    tensors, scalars = make_optimizer(params, CONFIG, 10).state_dict()
    other = make_optimizer(params, OptimizerConfig(kind="adafactor"), 10)
    with pytest.raises(ValueError, match=r"optimiser state does not fit .*missing .*unexpected"):
        other.load_state_dict(tensors, scalars)


def test_norm_is_reported_before_clipping_and_gradients_are_clipped():
    params = parameters()
    optimizer = make_optimizer(params, CONFIG, 10)
    for name, gradient in gradients(0, 100.0).items():
        params[name].grad = paddle.to_tensor(gradient)
    report = optimizer.step()
    assert report.grad_norm == pytest.approx(
        math.sqrt(sum((g**2).sum() for g in gradients(0, 100.0).values())), rel=1e-5
    )
    clipped = math.sqrt(sum((p.grad.numpy() ** 2).sum() for p in params.values()))
    assert clipped == pytest.approx(CONFIG.grad_clip_norm, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_changes_nothing(bad, kind):
    params = parameters()
    optimizer = make_optimizer(params, OptimizerConfig(**{**vars(CONFIG), "kind": kind}), 10)
    train(optimizer, params, 0, 2)
    weights = {name: p.numpy().copy() for name, p in params.items()}
    state = {key: tensor.numpy().copy() for key, tensor in optimizer.tensors().items()}
    for name, gradient in gradients(2).items():
        params[name].grad = paddle.to_tensor(gradient)
    params["bias"].grad = paddle.to_tensor(np.array([1.0, bad, 0.0], np.float32))
    assert not optimizer.step().finite
    for name, value in weights.items():
        np.testing.assert_array_equal(params[name].numpy(), value)
    for key, value in state.items():
        np.testing.assert_array_equal(optimizer.tensors()[key].numpy(), value)
    assert optimizer.steps == 3


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_without_gradient_is_left_alone(kind):
    params = parameters()
    optimizer = make_optimizer(params, OptimizerConfig(**{**vars(CONFIG), "kind": kind}), 10)
    params["bias"].grad = paddle.ones([3])
    before = params["block.lora_A.weight"].numpy().copy()
    optimizer.step()
    np.testing.assert_array_equal(params["block.lora_A.weight"].numpy(), before)


def test_schedules():
    cosine = OptimizerConfig(lr=2.0, schedule="cosine", warmup_steps=4)
    assert [learning_rate(cosine, step, 104) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(cosine, 4, 104) == 2.0
    assert learning_rate(cosine, 54, 104) == pytest.approx(1.0)
    assert learning_rate(cosine, 104, 104) == pytest.approx(0.0)
    assert learning_rate(cosine, 500, 104) == pytest.approx(0.0)
    linear = OptimizerConfig(lr=2.0, schedule="linear")
    assert learning_rate(linear, 25, 100) == pytest.approx(1.5)
    constant = OptimizerConfig(lr=2.0)
    assert {learning_rate(constant, step, 10) for step in range(20)} == {2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bias.moment1"), r"1 missing \(bias\.moment1"),
        (lambda state: state.update(other=paddle.ones([1])), r"1 unexpected \(other"),
        (
            lambda state: state.update({"bias.moment2": paddle.ones([4])}),
            r"bias\.moment2 has shape \[4\], expected \[3\]",
        ),
    ],
)
def test_unfitting_state_is_named_and_changes_nothing(change, message):
    params = parameters()
    optimizer = make_optimizer(params, CONFIG, 10)
    train(optimizer, params, 0, 1)
    state = {key: paddle.zeros_like(tensor) for key, tensor in optimizer.tensors().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state, {"steps": 7})
    assert optimizer.steps == 1
    assert float(optimizer.tensors()["bias.moment1"].abs().sum()) > 0


def test_unusable_parameters_are_errors():
    with pytest.raises(ValueError, match="no parameters to optimise"):
        make_optimizer({}, CONFIG, 10)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        make_optimizer(parameters(), CONFIG, 10).step()
    bias = parameters()["bias"]
    with pytest.raises(ValueError, match="share a Paddle name"):
        make_optimizer({"a": bias, "b": bias}, CONFIG, 10)
    with pytest.raises(ValueError, match="half is bfloat16; trained weights must be float32"):
        make_optimizer({"half": bias.astype("bfloat16")}, CONFIG, 10)


def test_ema_is_the_recurrence_and_its_decay_a_function_of_the_step():
    assert [ema_decay(step, 0.9, 0) for step in range(3)] == [0.9] * 3
    assert ema_decay(0, 0.99, 9) == pytest.approx(0.1)
    assert ema_decay(10**6, 0.99, 9) == 0.99
    params = parameters()
    ema, expected = EMA(params, 0.9, warmup=5), params["bias"].numpy().astype(np.float64)
    for step in range(6):
        params["bias"].set_value(np.full([3], step, np.float32))
        ema.update()
        decay = ema_decay(step, 0.9, 5)
        expected = decay * expected + (1 - decay) * step
    np.testing.assert_allclose(ema.averages["bias"].numpy(), expected, rtol=1e-5)


def test_ema_swaps_in_and_out_exactly_also_on_errors():
    params = parameters()
    ema = EMA(params, 0.5, warmup=0)
    start = params["bias"].numpy().copy()
    params["bias"].set_value(start + 1)
    ema.update()
    with pytest.raises(KeyError), ema.swapped():
        np.testing.assert_allclose(params["bias"].numpy(), start + 0.5, rtol=1e-6)
        raise KeyError
    np.testing.assert_array_equal(params["bias"].numpy(), start + 1)
    assert not params["bias"].stop_gradient


def test_ema_resumes_exactly():
    def run(ema, params, first, last):
        for step in range(first, last):
            params["bias"].set_value(np.full([3], math.sin(step), np.float32))
            ema.update()

    params = parameters()
    whole, half = EMA(params, 0.99), EMA(params, 0.99)
    run(whole, params, 0, 10)
    run(half, params, 0, 5)
    tensors, scalars = half.state_dict()
    resumed = EMA(parameters(), 0.99)
    resumed.load_state_dict({key: tensor.clone() for key, tensor in tensors.items()}, scalars)
    run(resumed, resumed.parameters, 5, 10)
    np.testing.assert_array_equal(resumed.averages["bias"].numpy(), whole.averages["bias"].numpy())


def test_cleared_gradients_are_gone_not_zero():
    params = parameters()
    optimizer = make_optimizer(params, CONFIG, 10)
    sum(parameter.sum() for parameter in params.values()).backward()
    optimizer.clear_grad()
    assert all(parameter.grad is None for parameter in params.values())
