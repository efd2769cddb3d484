"""Latents of the KL autoencoder of Stable Diffusion 3, FLUX and Z-Image, as their transformers see them."""

from __future__ import annotations

import paddle
from paddle import Tensor

from fast_diffusers.random import AnyGenerator, randn


class KLLatents:
    """Geometry and conversion for pipelines with an `AutoencoderKL`; stands before `Pipeline` among the bases."""

    @property
    def pixels_per_latent(self) -> int:
        """See `Pipeline`: 8 for the published models."""
        return 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """See `Pipeline`: 1024 for the published models."""
        return 128 * self.pixels_per_latent

    @paddle.no_grad()
    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents [B, C, H / 8, W / 8], float32, scaled as the transformer expects.

        The posterior is sampled with `generator`; without one its mode is taken.
        """
        vae = self._require_vae()
        posterior = vae.encode(images.astype(vae.dtype)).latent_dist
        z = posterior.mode()
        if generator is not None:
            z = z + posterior.std * randn(z.shape, generator, z.dtype)
        return (z.astype("float32") - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Pipeline`; [B, C, h, w] to [B, 3, 8 h, 8 w]. Differentiable."""
        vae = self._require_vae()
        z = latents.astype("float32") / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(z.astype(vae.dtype), return_dict=False)[0].astype("float32")
