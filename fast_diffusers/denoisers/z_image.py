"""Z-Image as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from fast_diffusers.denoisers.base import TransformerDenoiser
from fast_diffusers.transports import per_sample


class ZImageDenoiser(TransformerDenoiser):
    """Adapter of `ZImageTransformer2DModel`, whose time runs from noise to data: it is shown 1 - t, and gives -v.

    A time t < 0 is shown as 1 - t > 1, which no time of the path is. Reads `prompt_embeds` [B, T, D] and, where it is
    there, `prompt_embeds_mask` [B, T] (not 0 = keep) of the conditioning: captions go in without what is masked. Taps
    are the layers after the refiners.
    """

    family = "Z-Image"

    @property
    def feature_channels(self) -> int:
        """Channels D of a feature map."""
        return self.transformer.config.dim

    def _predict(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        self._check_inputs(x, cond, guidance)
        dtype = self.transformer.x_pad_token.dtype
        sample = self.transformer(
            x=x.astype(dtype).unsqueeze(2),
            t=1 - per_sample(t, x),
            cap_feats=_captions(cond, dtype),
            patch_size=self._patch_size,
            return_dict=False,
        )[0]
        return -paddle.stack(sample).squeeze(2)

    @property
    def _patch_size(self) -> int:
        return self.transformer.config.all_patch_size[0]

    def _blocks(self) -> list[nn.Layer]:
        return list(self.transformer.layers)

    def _image_tokens(self, tap: int, output: Any, count: int) -> Tensor:
        return output[:, :count]  # then padding tokens, then the caption

    def _token_grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self._patch_size, x.shape[3] // self._patch_size


def _captions(cond: Mapping[str, Tensor], dtype: Any) -> list[Tensor]:
    """The caption features that count, [T, D] for every sample."""
    captions = cond["prompt_embeds"].astype(dtype).unbind(0)
    if "prompt_embeds_mask" not in cond:
        return captions
    kept = [np.flatnonzero(row) for row in cond["prompt_embeds_mask"].numpy()]
    return [paddle.gather(caption, paddle.to_tensor(index)) for caption, index in zip(captions, kept, strict=True)]
