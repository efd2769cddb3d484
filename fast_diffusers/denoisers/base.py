"""The interface of denoisers, and what the adapters of transformers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from paddle import Tensor, nn

from fast_diffusers.models.layers import at_least_float32


class Denoiser(Protocol):
    """A velocity model: v = denoiser(x, t, cond), v being the prediction of noise minus data."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity at (x, t).

        Args:
            x: state [B, C, H, W], any float dtype.
            t: time [B] or a scalar; 1 is noise, 0 data. Transformers take negative times too, as times of their own.
            cond: conditioning, batch first.
            target_t: time [B] that the caller is about to step to; a model without a second time ignores it.
            guidance: guidance strength [B] or a scalar, for models that embed it.

        Returns:
            [B, C, H, W], float32 (float64 from a float64 model).
        """


class TransformerDenoiser:
    """Base of the adapters: a transformer with one time condition, so that `target_t` is accepted and ignored.

    A subclass says how to run its transformer (`_predict`) and where the image tokens are after its blocks
    (`_blocks`, `_image_tokens`, `_token_grid`).
    """

    family: str
    """Name of the family in messages."""

    def __init__(self, transformer: nn.Layer):
        self.transformer = transformer

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer has an input for the guidance strength: it then needs one, and else takes none."""
        return bool(self.transformer.config.get("guidance_embeds", False))

    @property
    def num_taps(self) -> int:
        """Number of places where `features` can read: one after each block."""
        return len(self._blocks())

    @property
    def feature_channels(self) -> int:
        """Channels D of a feature map."""
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity at (x, t), see `Denoiser`; the class says what it reads of `cond`.

        Raises:
            ValueError: x does not fit the model, or guidance is missing for a model that embeds it or given to one that
                does not.
        """
        return at_least_float32(self._predict(x, t, cond, guidance))

    def features(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        taps: Sequence[int] | None = None,
        *,
        guidance: Tensor | float | None = None,
    ) -> list[Tensor]:
        """Image-token hidden states after the blocks `taps` (default: all), [B, D, h, w] in the model's dtype.

        A token is a point of the map: h, w are H, W over the patch size. The list follows the order of `taps`.
        Gradients flow to x and to whatever parameters require them.
        """
        taps = range(self.num_taps) if taps is None else taps
        if not all(0 <= tap < self.num_taps for tap in taps):
            raise ValueError(f"taps must lie in 0..{self.num_taps - 1}, got {list(taps)}")
        rows, columns = self._token_grid(x)
        taken: dict[int, Tensor] = {}

        def take(tap: int):
            def hook(block: nn.Layer, inputs: Any, output: Any) -> None:
                taken[tap] = self._image_tokens(tap, output, rows * columns)

            return hook

        blocks = self._blocks()
        hooks = [blocks[tap].register_forward_post_hook(take(tap)) for tap in set(taps)]
        try:
            self._predict(x, t, cond, guidance)
        finally:
            for hook in hooks:
                hook.remove()
        return [
            taken[tap].transpose([0, 2, 1]).reshape([x.shape[0], self.feature_channels, rows, columns]) for tap in taps
        ]

    def _predict(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        """The velocity [B, C, H, W] in the model's dtype."""
        raise NotImplementedError

    def _blocks(self) -> list[nn.Layer]:
        """The blocks after which `features` can read."""
        return list(self.transformer.transformer_blocks)

    def _image_tokens(self, tap: int, output: Any, count: int) -> Tensor:
        """The `count` image tokens [B, L, D] in what block `tap` returns."""
        raise NotImplementedError

    def _token_grid(self, x: Tensor) -> tuple[int, int]:
        """(rows, columns) of the image tokens of latents x."""
        size = self.transformer.config.patch_size
        return x.shape[2] // size, x.shape[3] // size

    def _check_inputs(self, x: Tensor, cond: Mapping[str, Tensor], guidance: Tensor | float | None) -> None:
        """ValueError for latents of other channels, conditioning of other rows, or guidance that does not fit."""
        channels = self.transformer.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"latents of shape {list(x.shape)} do not fit this {self.family} model: it takes [B, {channels}, H, W]"
            )
        self._check_rows(x, cond)
        self._check_guidance(guidance)

    def _check_guidance(self, guidance: Tensor | float | None) -> None:
        if self.embeds_guidance != (guidance is not None):
            needed = "needs" if self.embeds_guidance else "does not take"
            raise ValueError(f"this {self.family} model {needed} `guidance` (guidance_embeds={self.embeds_guidance})")

    def _check_rows(self, x: Tensor, cond: Mapping[str, Tensor]) -> None:
        rows = cond["prompt_embeds"].shape[0]
        if rows != x.shape[0]:
            raise ValueError(f"{x.shape[0]} latents, but the conditioning has {rows} rows")
