"""What the methods share that either run all blocks or skip all that follow a decision at the first block."""

from __future__ import annotations

from paddle import Tensor

from fast_diffusers.caching.families import Streams
from fast_diffusers.caching.method import BlockCall, BranchState, Step


class SkippingState(BranchState):
    """A subclass decides at the first block (`first`) and says what comes out of the last one (`recall`).

    Skipped blocks hand on what they get. What the transformer itself adds between blocks (a ControlNet's residuals)
    is not added to a recalled result: it is part of it already.
    """

    skipping = False
    entry: Streams = ()

    def begin(self, step: Step) -> None:
        super().begin(step)
        self.skipping = False

    def first(self, call: BlockCall) -> Streams:
        """What flows out of the first block; sets `skipping`."""
        raise NotImplementedError

    def recall(self) -> Tensor:
        """The main stream behind the last block."""
        raise NotImplementedError

    def keep(self, final: Tensor) -> None:
        """Take in the main stream behind the last block of a full computation."""
        raise NotImplementedError

    def block(self, call: BlockCall) -> Streams:
        """See `BranchState`."""
        if call.is_first:
            self.entry = call.streams
            streams = self.first(call)
        else:
            streams = call.streams if self.skipping else call.compute()
        if call.is_last:
            if self.skipping:
                streams = (self.recall(), *call.streams[1:])
            else:
                self.keep(streams[0].detach())
            self.entry = ()
        return streams

    def carried_entry(self) -> Tensor:
        """The main stream before the first block, in the form that it has behind the last."""
        return self.structure.carry(self.entry)[0]
