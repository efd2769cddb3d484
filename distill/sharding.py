"""Optimisers whose state is spread over the processes: Paddle's group sharding (ZeRO, Rajbhandari et al., 2020).

A method's loss passes several times through one network, under several adapters; Paddle's wrapper wants to see one
forward pass before each backward pass. So it is given a layer of its own, `Parameters`: the micro-steps leave whole
gradients on every rank, as without sharding, and one pass through that layer an update hands them over. They are
summed over the ranks once an update, however many micro-steps it has; from then on each rank keeps its part only.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed.sharding import group_sharded_parallel

from distill.config import OptimizerConfig, TrainerConfig
from distill.optim import ACCUMULATORS, AdamW, Optimizer
from distill.parallel import World
from fast_diffusers.errors import UserError

Level = Literal["stage2", "stage3"]

LEVELS = {"stage2": "os_g", "stage3": "p_g_os"}
"""Paddle's names. stage2 spreads optimiser state and reduced gradients, stage3 also the trained parameters."""

SETTINGS: dict[str, dict[str, Any]] = {"stage2": {}, "stage3": {"segment_size": 0, "sync_comm": True}}
"""stage3: parameters of every size are spread, and fetched when they are needed, not in an order once recorded."""


def check_sharding(config: TrainerConfig, optimizers: Mapping[str, OptimizerConfig], world: World) -> None:
    """UserError if `config.sharding` asks for what cannot be; `optimizers` by the name that the message gives them."""
    if config.sharding is None:
        return
    wanted, without = f"trainer.sharding={config.sharding}", "set trainer.sharding=null to train without"
    device = device_kind()
    if device == "cpu":
        raise UserError(
            f"{wanted} needs GPUs: Paddle shards optimisers only there, and this process runs on the CPU; {without}"
        )
    if world.size == 1:
        raise UserError(
            f"{wanted} needs several processes, and this is the only one: start them with "
            f"python -m paddle.distributed.launch --nproc_per_node N, or {without}"
        )
    for name, each in optimizers.items():
        if each.kind != "adamw":
            raise UserError(f"{wanted} takes kind adamw only, and {name} has {each.kind}: change one; {without}")


def check_recipe(recipe: Any, world: World) -> None:
    """`check_sharding` of all optimiser sections of a recipe, for use before models are loaded."""
    sections = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    optimizers = {name: each for name, each in sections.items() if isinstance(each, OptimizerConfig)}
    check_sharding(recipe.trainer, optimizers, world)


def device_kind() -> str:
    """ "cpu", "gpu" or another kind of device that Paddle computes on here."""
    return paddle.get_device().split(":")[0]


def shard(optimizer: Optimizer, level: Level, world: World) -> "ShardedAdamW":
    """Spread an optimiser over the ranks, with the state that it has; the given one must not be used any more.

    Parameters and state must be the same on all ranks. All ranks must call it, and everything on what it returns.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"only AdamW can be sharded, not {type(optimizer).__name__}")
    return ShardedAdamW(optimizer, level, world)


class ShardedAdamW(AdamW):
    """An AdamW of which each rank updates a part.

    stage2 gives each parameter to one rank, stage3 a slice of each parameter to every rank. A parameter without a
    gradient on any rank is updated as with a gradient of zero.

    Parameters are whole and up to date on all ranks after `clear_grad` and `gather`. With stage3 each is given up in a
    backward pass as soon as its gradient is there, until then.
    """

    def __init__(self, optimizer: AdamW, level: Level, world: World) -> None:
        self.parameters, self.config, self.total_steps = optimizer.parameters, optimizer.config, optimizer.total_steps
        self.steps, self.level, self.world = optimizer.steps, level, world
        state, self.rule = optimizer.tensors(), optimizer.inner
        parameters = Parameters(list(self.parameters.values()))
        self.layer, self.inner, _ = group_sharded_parallel(parameters, self.rule, LEVELS[level], **SETTINGS[level])
        self.parts = {path: self._part(parameter) for path, parameter in self.parameters.items()}
        self.handed_over = False
        self._scatter(state)
        self.gather()

    def _part(self, parameter: Tensor) -> "Part":
        if self.level == "stage3":
            start, stop = self.layer._param2buffer[parameter.name][self.world.rank]
            return Part(f"slice@{parameter.name}", start, stop, self.world.is_main)
        own = self.inner.param2rank[parameter.name] == self.world.rank
        return Part(parameter.name, 0, parameter.size if own else 0, own)

    # ------------------------------------------------------------------------------------------ gradients
    def synchronise(self, world: World) -> None:
        """See `Optimizer`. Here gradients of the ranks' own parts remain; with stage2 still to be divided by `world`'s
        size, which Paddle does in its step.
        """
        with paddle.no_grad():
            gradients = [self._take(path, parameter) for path, parameter in self.parameters.items()]
        self.layer(gradients).backward()
        self.handed_over = True

    def _take(self, path: str, parameter: Tensor) -> Tensor:
        """A copy of the gradient; the parameter's own is zero or gone then."""
        if parameter.grad is None:
            return paddle.zeros(parameter.shape, parameter.dtype)
        gradient = parameter.grad.clone()
        if self.level == "stage2" and self.parts[path].size:
            parameter.grad.zero_()  # it is a view of Paddle's buffer, and has to stay one
        else:
            parameter.clear_gradient(False)
        return gradient

    def _gradients(self) -> list[Tensor]:
        if self.level == "stage3":
            return [parameter.bw_storage for parameter in self.parameters.values()]
        return [parameter.grad for path, parameter in self.parameters.items() if self.parts[path].size]

    def _norm(self, gradients: list[Tensor]) -> float:
        """Over all parameters, of the mean over the ranks."""
        squares = paddle.zeros([])
        for gradient in gradients:
            squares = squares + gradient.astype("float32").square().sum()
        dist.all_reduce(squares, op=dist.ReduceOp.SUM)
        return float(squares.sqrt()) / (self.world.size if self.level == "stage2" else 1)

    def clear_grad(self) -> None:
        """See `Optimizer`."""
        if not self.handed_over:  # Paddle's has no buffers before
            super().clear_grad()
        elif self.level == "stage2":
            self.inner.clear_grad()
            for path, parameter in self.parameters.items():
                if not self.parts[path].size:
                    parameter.clear_gradient(False)
        else:
            if all(parameter.bw_storage is not None for parameter in self.parameters.values()):
                self.inner.clear_grad()
            super().clear_grad()
        self.gather()

    def gather(self) -> None:
        """See `Optimizer`."""
        if self.level == "stage3":
            self.layer.get_all_parameters()

    # ------------------------------------------------------------------------------------------ state
    @paddle.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The whole state in host memory, as `AdamW` has it, on rank 0; the others help, and get nothing."""
        state = {}
        for path, parameter in self.parameters.items():
            part = self.parts[path]
            for key, accumulator in ACCUMULATORS.items():
                own = self.rule._accumulators[accumulator].get(part.name)
                power = key.endswith("_pow")
                size = 1 if power else parameter.size
                whole = paddle.zeros([size], "float32")
                if part.leads if power else part.size and part.start < size:
                    stop = min(part.stop, size) if not power else 1
                    start = 0 if power else part.start
                    whole[start:stop] = paddle.to_tensor(own.numpy()).flatten()[: stop - start]
                dist.all_reduce(whole, op=dist.ReduceOp.SUM)  # with zeros: exact
                if self.world.is_main:
                    state[f"{path}.{key}"] = (whole if power else whole.reshape(parameter.shape)).cpu()
        return state

    def load_state_dict(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Not possible here: load into the optimiser, then `shard` it."""
        raise NotImplementedError("load the state before sharding")

    @paddle.no_grad()
    def _scatter(self, state: Mapping[str, Tensor]) -> None:
        """Keep this rank's part of the whole state, and drop the rest."""
        for key, accumulator in ACCUMULATORS.items():
            kept = self.rule._accumulators[accumulator] = {}
            for path, parameter in self.parameters.items():
                part, whole = self.parts[path], state[f"{path}.{key}"]
                if not part.size:
                    continue
                if self.level == "stage2" or key.endswith("_pow"):
                    kept[part.name] = whole
                else:
                    own = whole.flatten()[min(part.start, parameter.size) : part.stop]
                    kept[part.name] = paddle.concat([own, paddle.zeros([part.size - own.size])])


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a flattened parameter: what this rank updates.

    They may go beyond its end, into padding. name: under which Paddle's optimiser keeps their state. leads: whether
    this rank's copy of what is not spread (the powers of beta) counts.
    """

    name: str
    start: int
    stop: int
    leads: bool

    @property
    def size(self) -> int:
        return self.stop - self.start


class Parameters(nn.Layer):
    """A layer of nothing but given parameters, each in a layer of its own.

    forward: a list of gradients, one for each parameter and emptied, to a scalar that has these gradients.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.members = nn.LayerList([_Member(parameter) for parameter in parameters])

    def forward(self, gradients: list[Tensor]) -> Tensor:
        gradients.reverse()
        return paddle.stack([member(gradients.pop()) for member in self.members]).sum()


class _Member(nn.Layer):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.weight = parameter

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient).sum()
