"""Optimisers with learning-rate schedule and gradient clipping, and weight averages, with exactly restorable state.

State is keyed by parameter path, never by Paddle's automatic names, which depend on what else was built before. The
learning rate, the average's decay and everything else that changes over time are pure functions of a step counter.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import paddle
from paddle import Tensor

from distill.config import OptimizerConfig
from distill.parallel import World, average_gradients


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of update `step` (from 0): linear warm-up to `config.lr`, then constant or down to 0 at `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    match config.schedule:
        case "cosine":
            return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return config.lr * (1.0 - progress)
        case _:
            return config.lr


def global_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm over all elements of all gradients, accumulated in float32; scalar, not yet synchronised."""
    return paddle.stack([gradient.astype("float32").square().sum() for gradient in gradients]).sum().sqrt()


class StepReport(NamedTuple):
    """What an update did: gradient norm before clipping, whether it was finite (else nothing changed), and the rate."""

    grad_norm: float
    finite: bool
    lr: float


class Optimizer(ABC):
    """Schedule, clipping and checks of the optimisers; a subclass has the update rule and its state.

    Args:
        parameters: path -> float32 parameter, whatever the dtype of the frozen weights; the paths key the saved state.
        config: hyper-parameters.
        total_steps: number of updates after which a decaying schedule reaches 0.
        rates: path -> factor on the learning rate of that parameter; 1 for those that it does not name.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: OptimizerConfig,
        total_steps: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.total_steps = total_steps
        self.rates = dict(rates or {})
        self.steps = 0
        if unknown := sorted(self.rates.keys() - self.parameters.keys()):
            raise ValueError(f"rates names {unknown[0]}, which is not among the parameters")
        if not self.parameters:
            raise ValueError("no parameters to optimise; check the adapter targets")
        for path, parameter in self.parameters.items():
            if parameter.dtype != paddle.float32:
                raise ValueError(
                    f"{path} is {str(parameter.dtype).removeprefix('paddle.')}; trained weights must be float32"
                )

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return learning_rate(self.config, self.steps, self.total_steps)

    @paddle.no_grad()
    def step(self) -> StepReport:
        """Clip, update and count, with one host synchronisation. A non-finite gradient changes nothing but the count.

        Returns:
            A StepReport. The gradients are left for the caller to clear, and are clipped in place.
        """
        gradients = self._gradients()
        norm, lr, limit = self._norm(gradients), self.lr, self.config.grad_clip_norm
        finite = math.isfinite(norm)
        if finite:
            if limit is not None and norm > limit:
                for gradient in gradients:
                    gradient.scale_(limit / norm)
            self._update(lr)
        self.steps += 1
        return StepReport(norm, finite, lr)

    def _gradients(self) -> list[Tensor]:
        """What `step` measures and scales."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if not gradients:
            raise ValueError("no parameter has a gradient; the loss does not depend on any of them")
        return gradients

    def _norm(self, gradients: list[Tensor]) -> float:
        return float(global_norm(gradients))

    def gather(self) -> None:  # noqa: B027  (nothing to do is a fine default)
        """Have all parameters whole in memory, for a loss that reads them; all ranks call it. Here they always are."""

    def synchronise(self, world: World) -> None:
        """Make the gradients those of all ranks together, once an update, after the last micro-step."""
        average_gradients(self.parameters.values(), world)

    @abstractmethod
    def _update(self, lr: float) -> None:
        """Move every parameter that has a gradient; called without recording."""

    def clear_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.clear_gradient(False)  # by position: Paddle ignores the keyword, and keeps zeros

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The state's own tensors, float32, as `<path>.<name>`."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by path, JSON-able scalars)."""
        return self.tensors(), {"steps": self.steps}

    @paddle.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Restore exactly what `state_dict` gave; the parameters themselves are restored by their owner.

        Raises:
            ValueError: a tensor is missing, extra or misshapen; nothing has been changed then.
        """
        _copy_all(self.tensors(), tensors, "optimiser state")
        self.steps = int(scalars["steps"])


class AdamW(Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov and Hutter, 2019) over named parameters.

    State: `<path>.moment1`, `.moment2`, `.beta1_pow` and `.beta2_pow`. `inner` is the `paddle.optimizer.AdamW`
    underneath.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: OptimizerConfig,
        total_steps: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(parameters, config, total_steps, rates)
        if len({parameter.name for parameter in self.parameters.values()}) < len(self.parameters):
            raise ValueError("two parameters share a Paddle name (or are the same); Paddle would mix up their moments")
        for path, rate in self.rates.items():
            self.parameters[path].optimize_attr["learning_rate"] = rate  # which Paddle multiplies its rate by
        self.inner = paddle.optimizer.AdamW(
            learning_rate=self.lr,
            beta1=config.betas[0],
            beta2=config.betas[1],
            epsilon=ADAM_EPS if config.eps is None else config.eps,
            parameters=list(self.parameters.values()),
            weight_decay=config.weight_decay,
        )

    def _update(self, lr: float) -> None:
        self.inner.set_lr(lr)
        self.inner.step()

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        self.inner._create_accumulators(paddle.static.default_main_program().global_block(), self.inner._parameter_list)
        return {
            f"{path}.{key}": self.inner._get_accumulator(accumulator, parameter)
            for path, parameter in self.parameters.items()
            for key, accumulator in ACCUMULATORS.items()
        }


ACCUMULATORS = {  # name in the saved state -> in Paddle's optimiser
    "moment1": "moment1",
    "moment2": "moment2",
    "beta1_pow": "beta1_pow_acc",
    "beta2_pow": "beta2_pow_acc",
}


ADAM_EPS = 1e-8
"""`eps` of AdamW and Adafactor where the recipe gives none."""


class Factored(Optimizer):
    """What the optimisers with factored moments share. A subclass moves one parameter; `shapes` names its state.

    A running mean over a matrix of non-negative numbers is kept as the means over its rows and its columns. A tensor of
    more dimensions is a matrix of its first one by all others; vectors are not factored.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: OptimizerConfig,
        total_steps: int,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(parameters, config, total_steps, rates)
        self._state = {
            path: {name: paddle.zeros(shape) for name, shape in self.shapes(parameter.shape, config).items()}
            for path, parameter in self.parameters.items()
        }

    @staticmethod
    @abstractmethod
    def shapes(shape: Sequence[int], config: OptimizerConfig) -> dict[str, list[int]]:
        """Shapes of the tensors kept for a parameter of this shape, by name."""

    @abstractmethod
    def _direction(self, state: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """What to subtract from a parameter at a learning rate of 1, weight decay aside; moves its state."""

    def _update(self, lr: float) -> None:
        for path, parameter in self.parameters.items():
            if parameter.grad is not None:
                rate = lr * self.rates.get(path, 1.0)
                step = self._direction(self._state[path], parameter.grad)
                paddle.assign(parameter * (1.0 - rate * self.config.weight_decay) - rate * step, parameter)

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizer`."""
        return {f"{path}.{name}": tensor for path, state in self._state.items() for name, tensor in state.items()}


class Adafactor(Factored):
    """Adam with a factored second moment (Shazeer and Stern, 2018, algorithm 2) and AdamW's decoupled weight decay.

    State: `<path>.rows` and `.columns`, or `.moment2`, of the squared gradients; `.moment1` unless betas[0] is 0; and
    `.updates`, their number.
    """

    @staticmethod
    def shapes(shape: Sequence[int], config: OptimizerConfig) -> dict[str, list[int]]:
        """See `Factored`."""
        second = factor_shapes(shape) or {"moment2": list(shape)}
        return second | ({"moment1": list(shape)} if config.betas[0] else {}) | {"updates": [1]}

    def _direction(self, state: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        beta1, beta2 = self.config.betas
        eps = ADAM_EPS if self.config.eps is None else self.config.eps
        state["updates"].add_(paddle.ones([1]))
        variance = _running_mean(state, gradient.square(), 1.0 - beta2, "moment2")
        if isinstance(variance, tuple):
            variance = (variance[0] * variance[1]).reshape(gradient.shape)
        variance = variance / (1.0 - beta2 ** state["updates"])
        if beta1:
            state["moment1"].lerp_(gradient, paddle.full([], 1.0 - beta1))
            gradient = state["moment1"] / (1.0 - beta1 ** state["updates"])
        return gradient / (variance.sqrt() + eps)


class CAME(Factored):
    """Confidence-guided adaptive memory-efficient optimisation (Luo et al., 2023, arXiv 2307.02047, algorithm 2).

    Adafactor's update u, scaled down to a root mean square of 1 at most, goes into a first moment m. Where m was a good
    prediction of the updates, steps are long: m is divided by the root of the running mean of (u − m)², which is
    factored as well. Vectors keep their squared gradients whole, and have no such division. Weight decay is AdamW's.

    Nothing corrects for the zeros that the means start from, as published, so the first updates are several times
    longer than the later ones: warm up.

    State: `<path>.rows` and `.columns`, or `.moment2`, of the squared gradients; `.moment1`; and for all but vectors
    `.instability_rows` and `.instability_columns`.
    """

    EPS, INSTABILITY_EPS = (
        1e-30,
        1e-16,
    )  # added to the squared gradients (where the recipe says nothing) and to (u − m)²

    @staticmethod
    def shapes(shape: Sequence[int], config: OptimizerConfig) -> dict[str, list[int]]:
        """See `Factored`."""
        factors = factor_shapes(shape) | factor_shapes(shape, "instability_")
        return (factors or {"moment2": list(shape)}) | {"moment1": list(shape)}

    def _direction(self, state: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        (beta1, beta2), beta3 = self.config.betas, self.config.confidence_decay
        eps = self.EPS if self.config.eps is None else self.config.eps
        second = _running_mean(state, gradient.square() + eps, 1.0 - beta2, "moment2")
        update = _over_root(gradient, second)
        update = update / update.square().mean().sqrt().clip(min=1.0)
        state["moment1"].lerp_(update, paddle.full([], 1.0 - beta1))
        if gradient.ndim < 2:
            return state["moment1"]
        deviation = (update - state["moment1"]).square() + self.INSTABILITY_EPS
        return _over_root(state["moment1"], _running_mean(state, deviation, 1.0 - beta3, "instability"))


def factor_shapes(shape: Sequence[int], prefix: str = "") -> dict[str, list[int]]:
    """Shapes of the two factors of a tensor of this shape; none for a vector or a scalar."""
    if len(shape) < 2:
        return {}
    return {f"{prefix}rows": [shape[0], 1], f"{prefix}columns": [1, math.prod(shape[1:])]}


def _running_mean(
    state: Mapping[str, Tensor], values: Tensor, weight: float, whole: str
) -> Tensor | tuple[Tensor, Tensor]:
    """Move the running mean of non-negative values, which is `state[whole]` or two factors; returns what it is now.

    Factors are returned as the pair [rows, 1], [1, columns] whose product the mean is taken to be.
    """
    weight = paddle.full([], weight)
    if whole in state:
        return state[whole].lerp_(values, weight)
    prefix = "" if whole == "moment2" else f"{whole}_"
    rows, columns = state[f"{prefix}rows"], state[f"{prefix}columns"]
    values = values.reshape([rows.shape[0], columns.shape[1]])
    rows.lerp_(values.mean(axis=1, keepdim=True), weight)
    columns.lerp_(values.mean(axis=0, keepdim=True), weight)
    # All values so far may be zero: then the rows are zero too, whatever they are divided by.
    return rows / rows.mean().clip(min=_TINY), columns


def _over_root(values: Tensor, mean: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """values / √mean. The factors one by one: their product may be below the smallest float32."""
    if isinstance(mean, Tensor):
        return values * mean.rsqrt()
    rows, columns = mean
    matrix = values.reshape([rows.shape[0], columns.shape[1]])
    return (matrix * rows.rsqrt() * columns.rsqrt()).reshape(values.shape)


_TINY = 1e-38  # near the smallest normal float32

OPTIMIZERS = {"adamw": AdamW, "adafactor": Adafactor, "came": CAME}


def make_optimizer(
    parameters: Mapping[str, Tensor],
    config: OptimizerConfig,
    total_steps: int,
    rates: Mapping[str, float] | None = None,
) -> Optimizer:
    """The optimiser of a recipe section, by its `kind`; see `Optimizer` for the arguments."""
    return OPTIMIZERS[config.kind](parameters, config, total_steps, rates)


def state_values(shape: Sequence[int], config: OptimizerConfig) -> int:
    """Number of float32 values that the optimiser of a recipe section keeps for a parameter of this shape."""
    if config.kind == "adamw":
        return 2 * math.prod(shape)
    return sum(map(math.prod, OPTIMIZERS[config.kind].shapes(shape, config).values()))


def ema_decay(step: int, decay: float, warmup: int) -> float:
    """Decay of update `step` (from 0): (1 + step) / (1 + step + warmup), at most `decay`. Without warm-up: `decay`."""
    return min(decay, (1 + step) / (1 + step + warmup))


class EMA:
    """Exponential moving average of named parameters, kept in float32.

    Args:
        parameters: path -> parameter; the average starts from their present values.
        decay: in [0, 1).
        warmup: length in updates of the period in which the average forgets faster; see `ema_decay`.
        into: path -> float32 tensor to keep the averages in, such as the weights of a second network, which can then
            be evaluated at any time: `swapped` would change weights that a backward pass still needs.
    """

    @paddle.no_grad()
    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        warmup: int = 10,
        into: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.warmup = warmup
        self.steps = 0
        if into is None:
            into = {path: paddle.empty(parameter.shape, "float32") for path, parameter in parameters.items()}
        self.averages = dict(into)
        for path, parameter in parameters.items():
            paddle.assign(parameter.astype("float32"), self.averages[path])

    @paddle.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters, after an optimiser update."""
        weight = paddle.full([], 1.0 - ema_decay(self.steps, self.decay, self.warmup))
        for path, parameter in self.parameters.items():
            self.averages[path].lerp_(parameter.astype("float32"), weight)
        self.steps += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the context the parameters hold the averages; afterwards, whatever happens, exactly what they held."""
        kept = {path: parameter.detach().clone() for path, parameter in self.parameters.items()}
        with paddle.no_grad():
            for path, parameter in self.parameters.items():
                paddle.assign(self.averages[path].astype(parameter.dtype), parameter)
        try:
            yield
        finally:
            with paddle.no_grad():
                for path, parameter in self.parameters.items():
                    paddle.assign(kept[path], parameter)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(averages by path, JSON-able scalars). Not copies."""
        return dict(self.averages), {"steps": self.steps}

    @paddle.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Restore exactly what `state_dict` gave. ValueError as `AdamW.load_state_dict`."""
        _copy_all(self.averages, tensors, "averaged weights")
        self.steps = int(scalars["steps"])


def _copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], what: str) -> None:
    missing, extra = sorted(targets.keys() - sources.keys()), sorted(sources.keys() - targets.keys())
    if missing or extra:
        named = [f"{len(missing)} missing ({missing[0]}, …)"] if missing else []
        named += [f"{len(extra)} unexpected ({extra[0]}, …)"] if extra else []
        raise ValueError(f"{what} does not fit these parameters: {' and '.join(named)}")
    for path, target in targets.items():
        if list(sources[path].shape) != list(target.shape):
            raise ValueError(f"{what}: {path} has shape {list(sources[path].shape)}, expected {list(target.shape)}")
    for path, target in targets.items():
        paddle.assign(sources[path].astype(target.dtype), target)
