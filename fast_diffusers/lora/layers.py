"""Low-rank adapters on nn.Linear layers: inject, switch, scale, fuse (Hu et al., 2021, arXiv:2106.09685).

An adapter adds scale * alpha/rank * x A B to a linear layer, with A [in, rank] and B [rank, out]. A model carries any
number of named adapters. Which of them run is the model's default unless an `active` block says otherwise; that choice
lives in a ContextVar, so threads do not see each other's and a recomputation that runs in a copied context sees the
forward's. `model` is the same root in every call.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

import numpy as np
import paddle
from paddle import nn
from ppdiffusers.models.lora import LoRACompatibleLinear

from fast_diffusers.errors import UserError

Selection = str | Sequence[str] | Mapping[str, float] | None
Scales = Mapping[str, float]


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is: its rank and alpha (the most common ones where layers differ) and the suffixes it targets."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class LayerAdapter:
    """An adapter's values in one layer: A [in, rank], B [rank, out], alpha."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(eq=False)
class AdapterSet:
    """The adapters of one model, shared by its LoRALinear layers; `default` and `fused` map names to scales."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    default: Scales = field(default_factory=dict)
    fused: Scales = field(default_factory=dict)
    base_weights: dict[str, paddle.Tensor] = field(default_factory=dict)

    def running(self) -> Scales:
        """The adapters that a forward has to add, here and now."""
        selected = _SELECTED.get().get(self, self.default)
        return {n: s for n, s in selected.items() if n not in self.fused} if self.fused else selected

    def require_unfused(self, action: str) -> None:
        if self.fused:
            raise UserError(f"cannot {action} while {', '.join(self.fused)} is fused into the weights: unfuse first")


# The selection of each model that is inside an `active` block, per context.
_SELECTED: ContextVar[Mapping[AdapterSet, Scales]] = ContextVar("lora_selected", default=MappingProxyType({}))


class Factor(nn.Layer):
    """One factor of an adapter: a single trainable `weight`, made without drawing from the global generator."""

    def __init__(self, value: np.ndarray):
        super().__init__()
        zeros = nn.initializer.Constant(0.0)
        self.weight = self.create_parameter(list(value.shape), dtype=str(value.dtype), default_initializer=zeros)
        self.weight.set_value(value)


class LoRALinear(nn.Linear):
    """An nn.Linear that adds the running adapters; with none running it computes exactly what nn.Linear does.

    A layer becomes one through `adopt`, which changes its class and keeps the object, so that parameters and their
    names, hooks and every reference to the layer stay valid.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear, adapter_set: AdapterSet) -> None:
        linear.own_class, linear.__class__ = type(linear), cls
        linear.adapter_set, linear.alphas = adapter_set, {}
        linear.lora_A, linear.lora_B = nn.LayerDict(), nn.LayerDict()

    def release(self) -> None:
        """Makes the layer what it was."""
        own_class = self.own_class
        del self.lora_A, self.lora_B, self.adapter_set, self.alphas, self.own_class
        self.__class__ = own_class

    def add(self, name: str, adapter: LayerAdapter) -> None:
        self.lora_A[name], self.lora_B[name] = Factor(adapter.a), Factor(adapter.b)
        self.alphas[name] = adapter.alpha

    def discard(self, name: str) -> None:
        """Removes an adapter, if the layer has it."""
        if name in self.alphas:
            del self.lora_A[name], self.lora_B[name], self.alphas[name]

    def factors(self, name: str) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(A [in, rank], B [rank, out])."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def delta(self, name: str) -> paddle.Tensor:
        """What the adapter adds to the weight: alpha/rank * A B, [in, out], in the adapter's dtype."""
        a, b = self.factors(name)
        return paddle.matmul(a, b) * (self.alphas[name] / a.shape[1])

    def forward(self, x: paddle.Tensor, scale: float = 1.0) -> paddle.Tensor:
        """x [..., in] -> [..., out]. The factors are used in the dtype of x; gradients arrive in their own.

        scale: what ppdiffusers' models pass on to its own kind of adapter, which the layer does not have.
        """
        out = super().forward(x)
        for name, strength in self.adapter_set.running().items():
            if name in self.alphas:
                a, b = (w if w.dtype == x.dtype else w.astype(x.dtype) for w in self.factors(name))
                out = out + paddle.matmul(paddle.matmul(x, a) * (strength * self.alphas[name] / a.shape[1]), b)
        return out


def inject(
    model: nn.Layer, rank: int, alpha: float, targets: Sequence[str], name: str = "default", seed: int = 0
) -> list[paddle.Tensor]:
    """Adds a fresh adapter to every nn.Linear that a target names and makes it the model's default.

    A target is a layer's path or the end of it from a dot on: "attn.to_q" is the to_q of every attn, not of my_attn.
    A starts kaiming-uniform and B at zero, so the output does not change; A is a function of (seed, layer path), not
    of the global generator. Factors are float32 (float64 on a float64 layer) whatever the layer's dtype. The base
    parameters are left as they are: `freeze` stops their gradients.

    Returns the new parameters: A, B of each layer in the model's order.
    """
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"LoRA rank must be a positive integer, got {rank!r}")
    check_alpha(alpha)
    if isinstance(targets, str) or not targets:
        raise UserError(f"LoRA targets must be a non-empty list of layer-name suffixes, got {targets!r}")
    linears = linear_layers(model)
    chosen = {path for target in targets for path in _match(target, linears)}
    layers = {}
    for path, layer in linears.items():
        if path in chosen:
            fan_in, fan_out = layer.weight.shape
            dtype = master_dtype(layer)
            a = _uniform(f"{seed}/{path}", (fan_in, rank), 1 / math.sqrt(fan_in)).astype(dtype)
            layers[path] = LayerAdapter(a, np.zeros((rank, fan_out), dtype), float(alpha))
    return add_adapter(model, name, layers, tuple(targets))


def add_adapter(
    model: nn.Layer, name: str, layers: Mapping[str, LayerAdapter], targets: tuple[str, ...]
) -> list[paddle.Tensor]:
    """Adds an adapter with the given values per layer path, makes it the default and returns its parameters."""
    adapter_set = find_set(model) or AdapterSet()
    if not re.fullmatch(r"\w+", name):
        raise UserError(f"LoRA adapter name {name!r} must consist of letters, digits and underscores")
    if name in adapter_set.configs:
        raise UserError(f"the model already has a LoRA adapter {name!r}: give another name or remove it first")
    adapter_set.require_unfused("add an adapter")
    linears = linear_layers(model)
    for path, adapter in layers.items():
        if not isinstance(linears[path], LoRALinear):
            LoRALinear.adopt(linears[path], adapter_set)
        linears[path].add(name, adapter)
    rank = _most_common(adapter.rank for adapter in layers.values())
    alpha = _most_common(adapter.alpha for adapter in layers.values())
    adapter_set.configs[name] = LoRAConfig(rank, alpha, targets)
    adapter_set.default = {name: 1.0}
    return parameters(model, name)


def remove(model: nn.Layer, name: str) -> None:
    """Takes an adapter off the model; layers left without one are what they were."""
    adapter_set = _require(model, name)
    adapter_set.require_unfused("remove an adapter")
    del adapter_set.configs[name]
    adapter_set.default = {key: scale for key, scale in adapter_set.default.items() if key != name}
    for _, layer in list(lora_layers(model)):
        layer.discard(name)
        if not layer.alphas:
            layer.release()


@contextmanager
def active(model: nn.Layer, name: Selection, scale: float = 1.0) -> Iterator[None]:
    """Runs the named adapters, and only those, inside the block and in this thread.

    name: one adapter, several, a mapping of adapters to their own scales, or None for the base model (bitwise what it
    computed before injection). Blocks nest; the innermost decides.
    """
    selected = _select(model, name, scale)
    adapter_set = find_set(model)
    if adapter_set is None:
        yield
        return
    adapter_set.require_unfused("switch adapters")
    token = _SELECTED.set({**_SELECTED.get(), adapter_set: selected})
    try:
        yield
    finally:
        _SELECTED.reset(token)


def set_default(model: nn.Layer, name: Selection, scale: float = 1.0) -> None:
    """Chooses the adapters that run outside any `active` block, in every thread; arguments as for `active`."""
    selected = _select(model, name, scale)
    if adapter_set := find_set(model):
        adapter_set.require_unfused("switch adapters")
        adapter_set.default = selected


@paddle.no_grad()
def fuse(model: nn.Layer, name: Selection = "default", scale: float = 1.0, keep_base: bool = True) -> None:
    """Adds the named adapters into the weights, computed in float32, so that they cost nothing at inference.

    keep_base=True keeps the replaced weights in host memory: `unfuse` restores them bitwise, and until then adapters
    cannot be switched. keep_base=False is final: the weights are the new base and the adapters are removed.
    """
    selected = _select(model, name, scale)
    if not selected:
        raise UserError("name the LoRA adapters to fuse")
    adapter_set = find_set(model)
    adapter_set.require_unfused("fuse again")
    for path, layer in lora_layers(model):
        deltas = [layer.delta(key) * own for key, own in selected.items() if key in layer.alphas]
        if deltas:
            if keep_base:
                adapter_set.base_weights[path] = layer.weight.detach().clone().cpu()
            total = sum(deltas, start=layer.weight.astype(deltas[0].dtype))
            layer.weight.set_value(total.astype(layer.weight.dtype))
    if keep_base:
        adapter_set.fused = selected
    else:
        for key in selected:
            remove(model, key)


@paddle.no_grad()
def unfuse(model: nn.Layer) -> None:
    """Puts back, bitwise, the weights that `fuse` replaced; adapters run as they did before."""
    adapter_set = find_set(model)
    if adapter_set is None or not adapter_set.fused:
        raise UserError("no LoRA adapter is fused into this model that could be taken out again")
    for path, layer in lora_layers(model):
        if path in adapter_set.base_weights:
            layer.weight.set_value(adapter_set.base_weights[path])
    adapter_set.base_weights.clear()
    adapter_set.fused = {}


def freeze(model: nn.Layer) -> None:
    """Stops the gradient of every parameter of the model that is not an adapter's."""
    kept = {id(p) for _, layer in lora_layers(model) for name in layer.alphas for p in layer.factors(name)}
    for parameter in model.parameters():
        parameter.stop_gradient = id(parameter) not in kept


def adapters(model: nn.Layer) -> dict[str, LoRAConfig]:
    """The model's adapters by name, oldest first."""
    adapter_set = find_set(model)
    return dict(adapter_set.configs) if adapter_set else {}


def parameters(model: nn.Layer, name: str = "default") -> list[paddle.Tensor]:
    """The adapter's parameters: A [in, rank], B [rank, out] of each layer in the model's order."""
    return list(state_dict(model, name).values())


def state_dict(model: nn.Layer, name: str = "default") -> dict[str, paddle.Tensor]:
    """The adapter's parameters: "<path>.lora_A.weight" [in, rank] and "<path>.lora_B.weight" [rank, out] per layer."""
    _require(model, name)
    return {
        f"{path}.lora_{factor}.weight": weight
        for path, layer in lora_layers(model)
        if name in layer.alphas
        for factor, weight in zip("AB", layer.factors(name), strict=True)
    }


def lora_layers(model: nn.Layer) -> Iterator[tuple[str, LoRALinear]]:
    """(path, layer) of every layer that carries adapters."""
    return ((path, layer) for path, layer in model.named_sublayers() if isinstance(layer, LoRALinear))


def linear_layers(model: nn.Layer) -> dict[str, nn.Linear]:
    """The layers that can carry adapters, by path; subclasses of nn.Linear with a forward of their own cannot.

    Those of ppdiffusers can, as long as they carry none of its own.
    """

    def fits(layer: nn.Layer) -> bool:
        if type(layer) is LoRACompatibleLinear:
            return layer.lora_layer is None
        return type(layer) in (nn.Linear, LoRALinear)

    return {path: layer for path, layer in model.named_sublayers() if fits(layer)}


def master_dtype(layer: nn.Linear) -> str:
    """The dtype of a layer's factors: float32, and float64 on a float64 layer."""
    return "float64" if layer.weight.dtype == paddle.float64 else "float32"


def check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"LoRA alpha must be a positive number, got {alpha!r}")


def find_set(model: nn.Layer) -> AdapterSet | None:
    """The model's adapters, or None if it has none."""
    return next((layer.adapter_set for _, layer in lora_layers(model)), None)


def _require(model: nn.Layer, *names: str) -> AdapterSet | None:
    """The model's adapters, after making sure that those named are among them."""
    adapter_set = find_set(model)
    known = adapter_set.configs if adapter_set else {}
    for name in names:
        if name not in known:
            raise UserError(f"the model has no LoRA adapter {name!r}; it has: {', '.join(known) or 'none'}")
    return adapter_set


def _select(model: nn.Layer, name: Selection, scale: float) -> Scales:
    """The scale of each adapter of a selection; all of them must exist."""
    if name is None:
        return {}
    names = [name] if isinstance(name, str) else name
    _require(model, *names)
    own = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    return {key: float(value) * scale for key, value in own.items()}


def _match(target: str, linears: Mapping[str, nn.Linear]) -> list[str]:
    """Paths of the linear layers that a target names; it must name one."""
    paths = [path for path in linears if path == target or path.endswith(f".{target}")]
    if not paths:
        suffixes = {path.split(".", i)[-1] for path in linears for i in range(path.count(".") + 1)}
        near = ", ".join(get_close_matches(target, sorted(suffixes), n=3, cutoff=0.0))
        raise UserError(f"LoRA target {target!r} matches no nn.Linear of the model; nearest: {near or 'none'}")
    return paths


def _uniform(key: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """float64 uniform in [-bound, bound), a pure function of `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).uniform(-bound, bound, shape)


def _most_common(values: Iterator[float]) -> float:
    return Counter(values).most_common(1)[0][0]
