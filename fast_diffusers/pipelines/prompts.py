"""Prompts of a call, or embeddings in their place, and what guidance leads away from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import paddle
from paddle import Tensor, nn

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.base import as_prompts

Encode = Callable[[list[str]], Cond]
Shapes = Mapping[str, Sequence[int | str]]


class PromptMethods:
    """What pipelines share that read prompts by text encoders and guide away from others; before `Pipeline`.

    A subclass gives the names and shapes of its embeddings (`text_shapes`) and of the parts that make them.
    """

    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")

    @property
    def text_shapes(self) -> Shapes:
        """Shape of each tensor of the conditioning; a letter stands for a size that is free but the same everywhere."""
        raise NotImplementedError

    def _given(self, *tensors: Tensor | None, prefix: str = "") -> Cond | None:
        """Tensors of a call, in the order of `text_shapes`, as a conditioning; None where none was given.

        Raises:
            UserError: only some were given, or one of another shape.
        """
        return given_conditioning(dict(zip(self.text_shapes, tensors, strict=True)), self.text_shapes, prefix)

    def _count(self, prompt: str | Sequence[str] | None, embeds: Cond | None) -> int:
        """How many prompts the call is about. UserError unless exactly one of the two is there, and can be used."""
        if (prompt is None) == (embeds is None):
            raise UserError("pass either prompt or prompt_embeds" + (", not both" if prompt is not None else ""))
        if prompt is None:
            return embeds.batch_size
        self._require_text_parts()
        return len(as_prompts(prompt))

    def _require_text_parts(self) -> None:
        if missing := [name for name in self.text_parts if getattr(self, name) is None]:
            raise UserError(
                f"prompts need {' and '.join(missing)}, which this pipeline is without: "
                f"pass {' and '.join(self.text_shapes)} instead (for classifier-free guidance the negative ones too)"
            )

    def _check_decodable(self, output_type: str) -> None:
        if self.vae is None and output_type != "latent":
            raise UserError("this pipeline has no vae: ask for output_type='latent'")

    def _require_vae(self) -> nn.Layer:
        if self.vae is None:
            raise UserError("this pipeline has no vae, which turns images into latents and back")
        return self.vae

    def _negative(
        self, prompt: str | Sequence[str] | None, embeds: Cond | None, number: int, encode: Encode
    ) -> Callable[[], Cond]:
        """What guidance leads away from, a row a prompt, computed when called; the default prompt is "".

        Raises:
            UserError: both a prompt and embeddings, or not as many of them as there are prompts.
        """
        if prompt is not None and embeds is not None:
            raise UserError("pass negative_prompt or negative_prompt_embeds, not both")
        if embeds is not None:
            if embeds.batch_size != number:
                raise UserError(f"negative_prompt_embeds has {embeds.batch_size} rows for {number} prompts")
            return lambda: embeds
        self._require_text_parts()
        texts = as_prompts("" if prompt is None else prompt, "negative_prompt")
        if len(texts) not in (1, number):
            raise UserError(f"got {len(texts)} negative prompts for {number} prompts: pass 1, or one a prompt")
        return lambda: encode(texts * (number // len(texts)))


def given_conditioning(tensors: Mapping[str, Tensor | None], shapes: Shapes, prefix: str = "") -> Cond | None:
    """Tensors by name as a conditioning, None where all are None; `prefix` is what their names in a call begin with.

    Raises:
        UserError: some are None and others not, or one has another shape than `shapes` says.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not given:
        return None
    if len(given) < len(shapes):
        names = " and ".join(prefix + name for name in shapes)
        raise UserError(f"{names} belong together: pass all or none")
    free: dict[str, int] = {}
    for name, shape in shapes.items():
        expected, found = [free.get(size, size) for size in shape], given[name].shape
        if len(found) != len(expected) or any(
            isinstance(e, int) and e != f for e, f in zip(expected, found, strict=True)
        ):
            wanted = ", ".join(map(str, expected))
            raise UserError(f"{prefix}{name} must have shape [{wanted}] for this call, got {list(found)}")
        free |= {size: f for size, f in zip(shape, found, strict=True) if isinstance(size, str)}
    return Cond(given)


def fit_text(cond: Cond, length: int) -> Cond:
    """Tensors [B, T, ...] with `length` tokens: the first ones, or zeros behind (a mask then hides what is added)."""

    def fit(x: Tensor) -> Tensor:
        missing = length - x.shape[1]
        if missing <= 0:
            return x[:, :length]
        return paddle.concat([x, paddle.zeros([x.shape[0], missing, *x.shape[2:]], x.dtype)], axis=1)

    return cond.map(fit)
