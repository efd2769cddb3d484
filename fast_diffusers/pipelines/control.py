"""What pipelines of SANA with a ControlNet share: the optional part, and the control images of a call."""

from __future__ import annotations

from collections.abc import Callable

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import Denoiser, SanaDenoiser
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.target_time import AttachedDenoiser, attached


class ControlMethods:
    """An optional `controlnet`, which reads `control_image`; it stands before `Pipeline` among the bases of a class."""

    _optional_components = ("controlnet",)

    def _with_control(
        self,
        encode: Callable[[], Cond],
        image: ImageInput | None,
        conditioning_scale: float,
        number: int,
        height: int | None,
        width: int | None,
    ) -> tuple[Callable[[], Cond], Denoiser | None]:
        """`encode` with the latents of the control images as `control`, and the denoiser that reads them.

        Without an image, `encode` as it is and None. `number` counts the prompts, whose images have this size.
        """
        if image is None:
            return encode, None
        if self.controlnet is None:
            raise UserError("control_image needs a controlnet: pass controlnet= to the pipeline")

        def controlled() -> Cond:
            shape = self._latent_shape(number, height, width)
            return Cond(encode(), control=self._to_latents(image, number, shape, "control_image"))

        denoiser = SanaDenoiser(self.transformer, self.controlnet, conditioning_scale)
        return controlled, AttachedDenoiser(denoiser) if attached(self.transformer) else denoiser


def check_controlnet(controlnet: SanaControlNetModel | None, transformer: SanaTransformer2DModel) -> None:
    """UserError unless the one's output can be added to the other's tokens."""
    if controlnet is None:
        return
    for name in ("in_channels", "patch_size", "num_attention_heads", "attention_head_dim", "caption_channels"):
        if controlnet.config[name] != transformer.config[name]:
            raise UserError(
                f"the controlnet does not fit this transformer: {name} is {controlnet.config[name]}, "
                f"expected {transformer.config[name]}"
            )
    blocks = controlnet.config.num_layers
    if not 0 < blocks < transformer.config.num_layers:
        raise UserError(
            f"the controlnet does not fit this transformer: it has {blocks} blocks, "
            f"expected 1 to {transformer.config.num_layers - 1}"
        )
