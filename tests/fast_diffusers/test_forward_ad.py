import contextlib
import gc
import threading
import weakref
from types import SimpleNamespace

import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn
from paddle.autograd import PyLayer

from fast_diffusers import compat
from fast_diffusers.errors import UserError
from fast_diffusers.forward_ad import Call, jvp, register_rule, tape
from fast_diffusers.forward_ad.norms import attention, rms_norm

POINT = paddle.to_tensor([[0.3, -1.2, 0.7], [2.0, 0.1, -0.4]], dtype="float64")
DIRECTION = paddle.to_tensor([[1.0, 0.5, -2.0], [0.2, -0.3, 0.6]], dtype="float64")


@contextlib.contextmanager
def rule_restored(name):
    """The rule of an operator is put back afterwards."""
    old = tape._rules.get(name)
    try:
        yield
    finally:
        tape._rules.pop(name, None)
        if old is not None:
            tape._rules[name] = old


@contextlib.contextmanager
def without_rule(name):
    with rule_restored(name):
        tape._rules.pop(name)
        yield


def operators():
    tensor = {name: value for name, value in vars(paddle.Tensor).items()}
    return dict(vars(paddle._C_ops)), dict(vars(paddle._legacy_C_ops)), dict(vars(paddle.tensor.math)), tensor


@pytest.fixture(autouse=True)
def nothing_stays_replaced():
    before = operators()
    yield
    for namespace, old in zip(operators(), before, strict=True):
        assert namespace.keys() == old.keys()
        assert all(namespace[name] is old[name] for name in old)


def test_a_single_tensor_stands_for_a_sequence():
    out, slope = jvp(lambda x: (x**3).sum(), POINT, DIRECTION)
    assert (out == (POINT**3).sum()).all()
    assert (slope - (3 * POINT**2 * DIRECTION).sum()).abs() < 1e-12


def test_structure_of_the_outputs():
    def fn(x):
        return {"a": [x * 2, paddle.ones([2])], "b": (x.argmax(), 3, None)}

    out, slope = jvp(fn, [POINT], [DIRECTION])
    assert out["b"][1:] == (3, None) and slope["b"] == (None, None, None)
    assert (slope["a"][0] == 2 * DIRECTION).all() and (slope["a"][1] == 0).all()


def test_none_is_a_zero_tangent():
    _, slope = jvp(lambda x, y: x * y, (POINT, POINT), (None, DIRECTION))
    assert (slope == POINT * DIRECTION).all()
    assert (jvp(paddle.exp, POINT, [None])[1] == 0).all()


def test_what_the_function_reads_otherwise_is_constant():
    assert (jvp(lambda x: x * POINT, POINT, DIRECTION)[1] == DIRECTION * POINT).all()
    layer = nn.Linear(3, 3)
    x, v = POINT.astype("float32"), DIRECTION.astype("float32")
    assert (jvp(lambda x: layer(x), x, v)[1] == v @ layer.weight).all()


def test_flat_and_detached_values_end_a_tangent():
    for fn in (
        paddle.floor,
        paddle.round,
        paddle.sign,
        paddle.zeros_like,
        lambda x: x.detach() * 2,
        lambda x: x // 0.3,
    ):
        assert (jvp(fn, POINT, DIRECTION)[1] == 0).all()


@pytest.mark.parametrize(
    "primals, tangents, message",
    [
        ([POINT], [], "1 primals, but 0 tangents"),
        ([POINT], [DIRECTION[0]], r"\[3\]"),
        ([POINT], [DIRECTION.astype("float32")], "float32"),
        ([paddle.to_tensor([1])], [paddle.to_tensor([1])], "floating-point"),
        ([2.0], [DIRECTION], "floating-point"),
    ],
)
def test_mismatches_are_explained(primals, tangents, message):
    with pytest.raises(UserError, match=message):
        jvp(lambda x: x, primals, tangents)


def test_unknown_mode():
    with pytest.raises(UserError, match="mode"):
        jvp(paddle.exp, POINT, DIRECTION, mode="reverse")


@pytest.mark.parametrize(
    "fn, name",
    [(paddle.digamma, "digamma"), (lambda x: x._share_buffer_to(paddle.zeros_like(x)), "Tensor._share_buffer_to")],
)
def test_an_operator_without_a_rule_is_named(fn, name):
    with pytest.raises(UserError, match=rf"'{name}'.*register_rule"):
        jvp(fn, POINT, DIRECTION)
    assert (jvp(lambda x: (fn(POINT), x)[1], POINT, DIRECTION)[1] == DIRECTION).all()  # a constant needs none


def test_a_user_adds_a_rule():
    with rule_restored("digamma"):

        @register_rule("digamma")
        def rule(call, x):
            return call.tangent(x) * paddle.polygamma(x, 1)

        slope = jvp(paddle.digamma, POINT.abs(), DIRECTION)[1]
    assert (slope - DIRECTION * paddle.polygamma(POINT.abs(), 1)).abs().max() < 1e-12


def test_a_rule_with_a_wrong_shape_is_reported():
    with rule_restored("exp"):
        register_rule("exp")(lambda call, x: paddle.zeros([5, 2, 3], "float64"))
        with pytest.raises(UserError, match="'exp'"):
            jvp(paddle.exp, POINT, DIRECTION)


@pytest.mark.parametrize("take", [lambda x: x.numpy(), float, lambda x: x.item(), lambda x: x.tolist()])
def test_values_that_leave_paddle_are_refused(take):
    with pytest.raises(UserError, match="detach"):
        jvp(lambda x: x * take(x.sum()), POINT, DIRECTION)
    assert (jvp(lambda x: x * float(x.sum().detach()), POINT, DIRECTION)[1] == DIRECTION * float(POINT.sum())).all()


def test_a_decision_on_a_value_is_allowed():
    assert (jvp(lambda x: x * 2 if x.sum() > 0 else x, POINT, DIRECTION)[1] == 2 * DIRECTION).all()


def test_writing_into_shared_memory_is_refused():
    def through_a_view(x):
        out = paddle.zeros([2, 3], "float64")
        row = out[0]
        row.add_(x[0])
        return out

    with pytest.raises(UserError, match="shares its memory"):
        jvp(through_a_view, POINT, DIRECTION)

    def of_a_dual(x):
        y = x * 1.0
        view = y.reshape([6])
        y.multiply_(x)
        return view

    with pytest.raises(UserError, match="shares its memory"):
        jvp(of_a_dual, POINT, DIRECTION)


def test_a_primal_written_in_place_keeps_its_value():
    x = POINT.clone()
    out, slope = jvp(lambda x: x.multiply_(x), x, DIRECTION)
    assert (out == POINT * POINT).all() and (slope - 2 * POINT * DIRECTION).abs().max() < 1e-12
    assert (x == POINT).all()


def test_methods_that_pass_through_return_no_tensor():
    """A method that is not intercepted must not hand out a tensor, whose tangent would be missing."""

    def fn(x):
        x = x * 1.0
        for name in compat._METADATA_METHODS:
            if not any(word in name for word in ("grad", "hook", "shared", "same_shape")):  # these need arguments
                with contextlib.suppress(TypeError, ValueError, RuntimeError):
                    assert not isinstance(getattr(x, name)(), paddle.Tensor), name
        return x

    jvp(fn, POINT, DIRECTION)


def test_functions_beside_the_operators_are_followed_or_refused():
    def copied(x):
        out = paddle.zeros_like(x)
        paddle.base.core.eager.tensor_copy(x, out, x.place, True)
        return out

    with pytest.raises(UserError, match=r"eager\.tensor_copy"):
        jvp(copied, POINT, DIRECTION)
    parameter = paddle.create_parameter([2, 3], "float64")
    assert (jvp(lambda x: parameter.copy_(x, True) * 2, POINT, DIRECTION)[1] == 2 * DIRECTION).all()


def test_python_layers_and_their_operators():
    class Double(PyLayer):
        @staticmethod
        def forward(ctx, x):
            return x * x, x.sin()

    _, (square, sine) = jvp(Double.apply, POINT, DIRECTION)
    assert (square - 2 * POINT * DIRECTION).abs().max() < 1e-12
    assert (sine - POINT.cos() * DIRECTION).abs().max() < 1e-12


def test_nested_calls():
    def slope(x):
        return jvp(lambda y: (y**3 * x).sum(), x, DIRECTION)[1]  # x is a constant of the inner call

    _, second = jvp(slope, POINT, DIRECTION)
    assert (second - (9 * POINT**2 * DIRECTION**2).sum()).abs() < 1e-10
    with pytest.raises(UserError, match="gelu_grad"):
        jvp(lambda x: jvp(F.gelu, x, DIRECTION)[1], POINT, DIRECTION)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_exceptions_leave_nothing_behind(failure):
    def fn(x):
        y = x.exp()
        jvp(lambda z: z * 2, x, x)
        raise failure(str(y.shape))

    with pytest.raises(failure):
        jvp(fn, POINT, DIRECTION)
    assert compat._handlers.get() is None and paddle.is_grad_enabled()


def test_other_threads_are_not_affected():
    entered, done, results = threading.Event(), threading.Event(), []

    def other():
        entered.wait(30)
        results.append(paddle.digamma(POINT.abs() + 1.0) + (POINT + POINT))
        results.append(jvp(paddle.exp, POINT, DIRECTION)[1])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def fn(x):
        entered.set()
        assert done.wait(30)
        return x * 2

    assert (jvp(fn, POINT, DIRECTION)[1] == 2 * DIRECTION).all()
    thread.join()
    assert (results[0] == paddle.digamma(POINT.abs() + 1.0) + 2 * POINT).all()
    assert (results[1] == POINT.exp() * DIRECTION).all()


def test_no_graph_is_recorded():
    layer = nn.Linear(3, 3)
    x = POINT.astype("float32")
    x.stop_gradient = False
    out, slope = jvp(lambda x: F.gelu(layer(x)), x, DIRECTION.astype("float32"))
    assert out.stop_gradient and slope.stop_gradient and out.grad_fn is None
    assert layer.weight.grad is None and x.grad is None


def test_tensors_are_freed_when_the_function_lets_go_of_them():
    alive = []

    def fn(x):
        for _ in range(3):
            x = (x * 2.0).tanh()
            alive.append((weakref.ref(x), None))
        gc.disable()
        assert [ref() is not None for ref, _ in alive] == [False, False, True]
        return x

    try:
        out, slope = jvp(fn, POINT, DIRECTION)
        refs = weakref.ref(out), weakref.ref(slope)
        del out, slope
        assert refs[0]() is None and refs[1]() is None
    finally:
        gc.enable()


def test_automatic_mixed_precision_keeps_the_dtype_of_the_results():
    x = POINT.astype("float32")
    out, slope = jvp(lambda x: x.astype("float16") * 2, x, DIRECTION.astype("float32"))
    assert out.dtype == slope.dtype == paddle.float16


def test_finite_differences_take_foreign_operators():
    out, slope = jvp(paddle.digamma, POINT.abs() + 1, DIRECTION, mode="finite_difference", eps=1e-4)
    assert (out == paddle.digamma(POINT.abs() + 1)).all()
    assert (slope - DIRECTION * paddle.polygamma(POINT.abs() + 1, 1)).abs().max() < 1e-6


def call_of(args, tangents):
    """What a rule sees of an operator that this machine cannot run."""
    dual = tape.Tape()
    for x, tangent in zip(args, tangents, strict=True):
        dual.set(x, tangent)
    return SimpleNamespace(call=Call(dual, "kernel", None, args, {}), tape=dual)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_kernels_of_gpus_in_closed_form(causal):
    """The same tangents as through matmul and softmax."""
    paddle.seed(0)
    qkv = tuple(paddle.randn([2, 5, 3, 4]).astype("float64") for _ in range(3))
    tangents = [paddle.randn(x.shape).astype("float64") for x in qkv]
    stub = call_of(qkv, tangents)
    slope = attention(stub.call, *qkv, None, 0.0, causal, 0.5)
    _, expected = jvp(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal), qkv, tangents)
    assert (slope - expected).abs().max() < 1e-12


def test_rms_norm_kernel_of_gpus_in_closed_form():
    weight = paddle.to_tensor([1.0, 2.0, -0.5], dtype="float64")
    stub = call_of((POINT, weight), (DIRECTION, weight * 0.1))
    slope = rms_norm(stub.call, POINT, weight, [3], 1e-5)

    def plain(x, w):
        return x * paddle.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w

    assert (slope - jvp(plain, (POINT, weight), (DIRECTION, weight * 0.1))[1]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda x: F.max_pool2d(x.reshape([1, 1, 2, 3]), 2), "average"),
        (lambda x: F.scaled_dot_product_attention(*[x.reshape([1, 2, 1, 3])] * 3, dropout_p=0.5), "dropout"),
        (lambda x: paddle.gather(x, paddle.to_tensor([0])) * paddle.clip(POINT[:1], x.min(), 9.0), "first tensor"),
        (lambda x: nn.BatchNorm1D(3, data_format="NLC").to(dtype="float64")(x.unsqueeze(0)), "eval"),
    ],
)
def test_what_rules_do_not_cover_is_an_error(fn, message):
    with pytest.raises(UserError, match=message):
        jvp(fn, POINT, DIRECTION)
