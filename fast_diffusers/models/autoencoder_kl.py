"""The KL autoencoder of Stable Diffusion and FLUX: ppdiffusers' network with this package's checkpoint reading."""

from typing import Any, Self

from ppdiffusers.models.autoencoder_kl import AutoencoderKL as PPDiffusersAutoencoderKL

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel


class AutoencoderKL(PretrainedModel, PPDiffusersAutoencoderKL):
    """Images [B, 3, H, W] in [-1, 1] to and from latents [B, latent_channels, H / f, W / f].

    `encode(x).latent_dist` has `sample(generator)` and `mode()`; `decode(z).sample` is an image. Latents are unscaled:
    diffusion models see (z - config.shift_factor) * config.scaling_factor.
    """

    _supports_gradient_checkpointing = False

    @classmethod
    def from_config(cls, config: dict[str, Any], **kwargs: Any) -> Self:
        """Build from a config of diffusers or ppdiffusers; the middle blocks always have attention."""
        if not config.get("mid_block_add_attention", True):
            raise UserError("an AutoencoderKL without attention in its middle blocks is not supported")
        config = {key: value for key, value in config.items() if key != "mid_block_add_attention"}
        return super().from_config(config, **kwargs)
