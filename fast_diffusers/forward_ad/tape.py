"""Dual numbers for Paddle operators: which tensors have a tangent, and how an operator hands tangents on."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import paddle
from paddle import Tensor

from fast_diffusers.errors import UserError

Path = tuple[int | str, ...]
"""Where an argument stands: its position or keyword, then positions inside lists."""

Rule = Callable[..., Any]
"""`rule(call, *args, **kwargs)` -> the tangent of the first result, or a list of tangents; None means zero."""

_rules: dict[str, Rule] = {}
_ALIASES = {"input": "x", "other": "y", "dim": "axis"}
_DIFFERENTIABLE = frozenset(
    [paddle.float16, paddle.bfloat16, paddle.float32, paddle.float64, paddle.complex64, paddle.complex128]
)


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: make a function the rule of the operators `names`, replacing any rule they had.

    Names are those that `jvp` reports for an operator without a rule: "matmul" for `paddle._C_ops.matmul`,
    "Tensor.__add__" for methods, "legacy.*" for old operators, a custom operator's own name. `x_` (in place) uses the
    rule of `x` unless it has its own.

    The rule is called with a `Call` and the operator's arguments, `input`, `other`, `dim` renamed `x`, `y`, `axis`:

        @register_rule("my_square")
        def my_square(call, x):
            return 2 * x * call.tangent(x)
    """

    def register(rule: Rule) -> Rule:
        _rules.update(dict.fromkeys(names, rule))
        return rule

    return register


def differentiable(x: Any) -> bool:
    """Whether x is a tensor that can have a tangent: of a floating or complex dtype."""
    return isinstance(x, Tensor) and x.dtype in _DIFFERENTIABLE


class Call:
    """One call of an operator, as its rule sees it.

    Attributes:
        name: name of the operator.
        args, kwargs: its arguments. The rule of x also sees those of x_ as they were before the call; a rule registered
            for x_ itself sees them afterwards.
        out: what it returned.
        duals: {path: tangent} of the arguments that have one; never empty.
    """

    def __init__(self, tape: "Tape", name: str, operator: Callable[..., Any], args: tuple, kwargs: dict[str, Any]):
        self.name, self.operator, self.args, self.kwargs = name, operator, args, kwargs
        self.out: Any = None
        self._tape = tape
        found = ((path, tape.tangent(x)) for path, x in _tensors(args, kwargs))
        self.duals: dict[Path, Tensor] = {path: tangent for path, tangent in found if tangent is not None}

    def tangent(self, x: Any) -> Tensor | None:
        """The tangent of an argument; None where it is zero."""
        return self._tape.tangent(x) if isinstance(x, Tensor) else None

    def again(self, replaced: dict[Path, Any]) -> Any:
        """The operator's result with other values for the arguments at some paths."""
        args = [_replace(x, (i,), replaced) for i, x in enumerate(self.args)]
        return self.operator(*args, **{key: _replace(x, (key,), replaced) for key, x in self.kwargs.items()})

    def tensors(self) -> Iterator[tuple[Path, Tensor]]:
        """(path, tensor) of all tensor arguments."""
        return _tensors(self.args, self.kwargs)


class Tape:
    """The tangents of one `jvp`, by identity of their tensors; both go when the tensor goes."""

    def __init__(self) -> None:
        self._tangents: dict[int, tuple[weakref.ref, Tensor]] = {}
        self._results: dict[int, weakref.ref] = {}

    def tangent(self, x: Tensor) -> Tensor | None:
        """The tangent of x, None where it is zero."""
        entry = self._tangents.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def set(self, x: Tensor, tangent: Tensor | None) -> None:
        """Make x a dual number, or a constant again with None."""
        key = id(x)
        if tangent is None:
            self._tangents.pop(key, None)
        else:
            self._tangents[key] = (weakref.ref(x, lambda _: self._tangents.pop(key, None)), tangent)

    def clear(self) -> None:
        """Forget everything (the weak references' callbacks make cycles that would outlive the tape)."""
        self._tangents.clear()
        self._results.clear()

    def handle(self, name: str, operator: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator and find the tangents of its results; the handler of `compat.intercepted_operators`."""
        if name.endswith("_run_custom_op"):
            name = args[0]
        out = kwargs.get("out")
        kept = {key: value for key, value in kwargs.items() if key != "out"}
        call = Call(self, name, operator, args, kept)
        if not call.duals and (out is None or self.tangent(out) is None):
            result = operator(*args, **kwargs)
            self._remember(result)
            return result
        target = out if out is not None else _in_place_target(name, args, kwargs)
        if target is not None and out is None:
            call = self._before_overwriting(call, target)
        call.out = operator(*args, **kwargs)
        tangents = self._apply_rule(call) if call.duals else None
        self._store(call, target, tangents)
        self._remember(call.out)
        return call.out

    def _apply_rule(self, call: Call) -> Any:
        results = [x for _, x in _tensors((call.out,), {})]
        rule = _rules.get(call.name)
        if rule is None and results and not any(map(differentiable, results)):
            return None  # integers and booleans have no tangent
        if rule is None:
            raise UserError(
                f"jvp: operator '{call.name}' has no forward-mode rule. Add one with "
                f"fast_diffusers.forward_ad.register_rule('{call.name}'), or use jvp(..., mode='finite_difference')"
            )
        aliased = {_ALIASES.get(key, key): value for key, value in call.kwargs.items() if key != "name"}
        return rule(call, *call.args, **aliased)

    def _store(self, call: Call, target: Tensor | None, tangents: Any) -> None:
        results = [x for _, x in _tensors((call.out,), {})]
        tangents = list(tangents) if isinstance(tangents, list | tuple) else [tangents]
        if target is not None:
            results, tangents = [target, *results], [tangents[0]] * (1 + len(results))
        changes = target is not None and (self.tangent(target) is not None or tangents[0] is not None)
        if changes and any(ref() is not None and target._is_shared_buffer_with(ref()) for ref in self._others(target)):
            raise UserError(
                f"jvp: the in-place operator '{call.name}' changes a tensor that shares its memory with another one, "
                "whose tangent would be lost. Make a copy first, or use the operator that returns a new tensor"
            )
        for x, tangent in zip(results, tangents, strict=False):
            if tangent is not None:
                tangent = _like(x, tangent, call.name)
            self.set(x, tangent if differentiable(x) else None)

    def _before_overwriting(self, call: Call, target: Tensor) -> Call:
        """The same call of the operator that returns a new tensor, on a copy of the one that will be overwritten."""
        if call.name in _rules:
            return call
        old = target.clone()
        self.set(old, self.tangent(target))
        paths: dict[Path, Any] = {path: old for path, x in call.tensors() if x is target}
        name = call.name[:-1]
        operator = getattr(paddle._C_ops, name, call.operator)
        args = tuple(_replace(x, (i,), paths) for i, x in enumerate(call.args))
        return Call(self, name, operator, args, {k: _replace(x, (k,), paths) for k, x in call.kwargs.items()})

    def _remember(self, result: Any) -> None:
        for _, x in _tensors((result,), {}):
            if differentiable(x):
                key = id(x)
                self._results[key] = weakref.ref(x, lambda _, key=key: self._results.pop(key, None))

    def _others(self, x: Tensor) -> list[weakref.ref]:
        return [ref for ref in list(self._results.values()) if ref() is not x]


_OVERWRITING = {"Tensor.copy_": 0, "Tensor._setitem_dygraph": 0, "assign_out_": 1}
"""Position of the argument that these operators overwrite; that of other operators whose name ends in _ is 0."""


def _in_place_target(name: str, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    position = _OVERWRITING.get(name, 0 if name.endswith("_") and not name.endswith("__") else None)
    if position is None:
        return None
    return [*args, *kwargs.values()][position]


def _tensors(args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    for key, x in (*enumerate(args), *kwargs.items()):
        if isinstance(x, Tensor):
            yield (key,), x
        elif isinstance(x, list | tuple):
            for path, inner in _tensors(x, {}):
                yield (key, *path), inner


def _replace(x: Any, path: Path, replaced: dict[Path, Any]) -> Any:
    if path in replaced:
        return replaced[path]
    if isinstance(x, list | tuple) and any(isinstance(y, Tensor | list | tuple) for y in x):
        return type(x)(_replace(y, (*path, i), replaced) for i, y in enumerate(x))
    return x


def _like(x: Tensor, tangent: Tensor, name: str) -> Tensor:
    """The tangent in the dtype of x and, where it was broadcast, in its shape."""
    if tangent.dtype != x.dtype:
        tangent = tangent.astype(x.dtype)
    if tangent.shape != x.shape:
        if tangent.ndim > x.ndim or tangent.size > x.size:
            raise UserError(f"jvp: the rule of '{name}' gave a tangent {tangent.shape} for a result {x.shape}")
        tangent = tangent.expand(x.shape)
    return tangent
