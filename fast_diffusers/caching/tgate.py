"""T-GATE: the text matters early (Zhang et al. 2024, arXiv 2404.02747)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import paddle
from paddle import Tensor

from fast_diffusers.caching.families import Block, Site, Structure
from fast_diffusers.caching.method import (
    BranchState,
    CacheConfig,
    ForwardCall,
    SiteCall,
    Step,
    check_count,
    require_attention,
)
from fast_diffusers.caching.taylor import map_tensors
from fast_diffusers.errors import UserError

NegativePass = Literal["first_half", "second_half", "second_call"]


class TGateState(BranchState):
    """Keeps the last result of each attention layer."""

    def __init__(self, config: TGate, structure: Structure):
        super().__init__(config, structure)
        self.kept: dict[tuple[int, str], Any] = {}
        self.negative = config.negative_pass

    def begin(self, step: Step) -> None:
        super().begin(step)
        if self.count == self.config.gate and self.negative in ("first_half", "second_half"):
            self.kept = {key: map_tensors(self._half, value) for key, value in self.kept.items()}

    def forward(self, call: ForwardCall) -> Any:
        """See `BranchState`."""
        gated = self.count >= self.config.gate
        if self.negative == "second_call":
            if gated and self.step.branch == 1:
                return self.step.shared["positive"]
            result = call.compute()
            if self.step.branch == 0:
                self.step.shared["positive"] = result
            return result
        if gated and self.negative is not None:
            return _twice(call.compute(self._halve(call.given), share=0.5))
        return call.compute()

    def site(self, call: SiteCall) -> Any:
        """See `BranchState`."""
        if call.key in self.kept and not self._refreshes(call.site.role == "cross"):
            return self.kept[call.key]
        result = call.compute()
        self.kept[call.key] = map_tensors(lambda x: x.detach(), result)
        return result

    def _refreshes(self, cross: bool) -> bool:
        config, count = self.config, self.count
        if count >= config.gate:
            return not cross and (count - config.gate) % config.fi_interval == 0
        return cross or count < config.warm_up or count % config.sp_interval == 0 or count == config.gate - 1

    def _halve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The model's arguments for the rows that are not negative."""
        family = self.structure.family
        latents = given[family.latents]
        rows = latents.shape[0] if isinstance(latents, Tensor) else len(latents)
        if rows % 2:
            raise UserError(
                f"TGate: negative_pass {self.negative!r} needs an even number of rows, the batch has {rows}: guidance "
                "is off or takes two calls"
            )
        halved = {name: self._half(given[name]) for name in family.batched if given.get(name) is not None}
        controls = given.get(family.controls)
        if isinstance(controls, Mapping):
            halved[family.controls] = {name: self._half(control) for name, control in controls.items()}
        elif controls is not None:
            halved[family.controls] = [self._half(control) for control in controls]
        return {**given, **halved}

    def _half(self, rows: Any) -> Any:
        middle = len(rows) // 2
        return rows[middle:] if self.negative == "first_half" else rows[:middle]


def _twice(result: Any) -> Any:
    """A model's result with every row of its sample, or every entry if that is a list, a second time behind them."""
    sample = result[0]
    doubled = paddle.concat([sample, sample], axis=0) if isinstance(sample, Tensor) else [*sample, *sample]
    return (doubled, *result[1:]) if isinstance(result, tuple) else type(result)(sample=doubled)


@dataclass(frozen=True)
class TGate(CacheConfig):
    """Fix what the image takes from the text after a few steps, and save attention to itself before.

    Before `gate`, self-attention is computed in the first `warm_up` steps, in every `sp_interval`-th and just before
    the gate, and its last result is used in the others; cross-attention is computed. From `gate` on, cross-attention
    is that of the step before the gate, self-attention is computed in every `fi_interval`-th step, and a negative pass
    is left out if `negative_pass` says where it is: both passes then give the positive one's result, so that guidance
    of any strength gives it too. Joint attention of image and text counts as self-attention.

    Args:
        gate: number of steps before the gate, at least 1. With more than a run has and intervals of 1 all is run.
        warm_up, sp_interval, fi_interval: as above.
        negative_pass: which rows, or which of two calls, of guided runs are negative; only for guided runs.
    """

    state: ClassVar = TGateState
    looks_inside: ClassVar = True

    gate: int = 10
    warm_up: int = 2
    sp_interval: int = 5
    fi_interval: int = 1
    negative_pass: NegativePass | None = None

    def __post_init__(self):
        check_count(self, "gate")
        check_count(self, "warm_up", 0)
        check_count(self, "sp_interval")
        check_count(self, "fi_interval")
        if self.negative_pass is not None and self.negative_pass not in get_args(NegativePass):
            raise UserError(
                f"TGate: negative_pass must be None or one of {', '.join(get_args(NegativePass))}, "
                f"got {self.negative_pass!r}"
            )

    def sites(self, block: Block) -> list[Site]:
        """See `CacheConfig`."""
        return block.sites(block.kind.attention)

    def check(self, structure: Structure) -> None:
        """See `CacheConfig`."""
        require_attention(self, structure)
