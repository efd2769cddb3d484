"""The autoencoder of Qwen-Image (Wu et al. 2025, §2.3): the causal 3-D network of Wan's video autoencoder, for images.

An image is a video of one frame. A causal convolution then sees nothing but zeros before it, so that of its temporal
taps only the last acts, and the layers that halve or double the number of frames leave the first frame alone: on
images the network is two-dimensional, and it is computed so. The weights keep all their taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.modeling_outputs import AutoencoderKLOutput
from ppdiffusers.models.vae import DecoderOutput, DiagonalGaussianDistribution

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.layers import at_least_float32, attend

WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


class FrameConv(nn.Conv3D):
    """A causal 3-D convolution of one frame [B, C, H, W]: the last temporal tap of its kernel, zeros around."""

    def __init__(self, in_channels: int, out_channels: int, size: int):
        super().__init__(in_channels, out_channels, size)
        self.frame_padding = size // 2

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self.frame_padding)


class ChannelNorm(nn.Layer):
    """x / rms(x) over channels times gamma; `axes` is the number of axes behind the channel axis in gamma's shape."""

    def __init__(self, channels: int, axes: int = 3):
        super().__init__()
        self.gamma = self.create_parameter([channels] + [1] * axes, default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        wide = at_least_float32(x)
        norm = wide.square().sum(axis=1, keepdim=True).sqrt().clip(min=1e-12)
        return (wide / norm * self.gamma.shape[0] ** 0.5).astype(x.dtype) * self.gamma.reshape([-1, 1, 1])


class ResidualBlock(nn.Layer):
    """Twice norm, SiLU and convolution, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm1 = ChannelNorm(in_channels)
        self.conv1 = FrameConv(in_channels, out_channels, 3)
        self.norm2 = ChannelNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = FrameConv(out_channels, out_channels, 3)
        self.conv_shortcut = FrameConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(self.dropout(F.silu(self.norm2(out))))
        return out + self.conv_shortcut(x)


class PixelAttention(nn.Layer):
    """One-headed attention between the pixels of a frame, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, axes=2)
        self.to_qkv = nn.Conv2D(channels, 3 * channels, 1)
        self.proj = nn.Conv2D(channels, channels, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        pixels = self.to_qkv(self.norm(x)).flatten(2).transpose([0, 2, 1]).unsqueeze(2)
        out = attend(*pixels.chunk(3, axis=-1))
        return x + self.proj(out.transpose([0, 2, 1]).reshape(x.shape))


class MidBlock(nn.Layer):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.resnets = nn.LayerList([ResidualBlock(channels, channels, dropout) for _ in range(2)])
        self.attentions = nn.LayerList([PixelAttention(channels)])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Layer):
    """[B, C, H, W] to [B, C, H / 2, W / 2]; `time_conv`, which joins frames after the first, is idle."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2D([0, 1, 0, 1]), nn.Conv2D(channels, channels, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3D(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.resample(x)


class Upsample(nn.Layer):
    """[B, C, H, W] to [B, C / 2, 2 H, 2 W]; `time_conv`, which doubles frames after the first, is idle."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2D(channels, channels // 2, 3, padding=1)
        )
        if temporal:
            self.time_conv = nn.Conv3D(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.resample(x)


class Encoder(nn.Layer):
    """Frames [B, input_channels, H, W] to moments [B, 2 z_dim, H / f, W / f]; `widths` are the stages' channels."""

    def __init__(
        self, in_channels: int, z_dim: int, widths: Sequence[int], blocks: int, temporal: Sequence[bool], dropout: float
    ):
        super().__init__()
        channels = widths[0]
        self.conv_in = FrameConv(in_channels, channels, 3)
        layers = []
        for stage, width in enumerate(widths[1:]):
            for _ in range(blocks):
                layers.append(ResidualBlock(channels, width, dropout))
                channels = width
            if stage < len(temporal):
                layers.append(Downsample(channels, temporal[stage]))
        self.down_blocks = nn.LayerList(layers)
        self.mid_block = MidBlock(channels, dropout)
        self.norm_out = ChannelNorm(channels)
        self.conv_out = FrameConv(channels, 2 * z_dim, 3)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.conv_in(x)
        for layer in self.down_blocks:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nn.Layer):
    """Residual blocks, then an upsampling unless `temporal` is None."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, temporal: bool | None, dropout: float):
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks + 1)
        self.resnets = nn.LayerList([ResidualBlock(widths[i], widths[i + 1], dropout) for i in range(blocks + 1)])
        self.upsamplers = nn.LayerList([] if temporal is None else [Upsample(out_channels, temporal)])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Decoder(nn.Layer):
    """Latents [B, z_dim, h, w] to frames [B, out_channels, f h, f w]; `widths` are the stages' channels."""

    def __init__(
        self,
        z_dim: int,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        temporal: Sequence[bool],
        dropout: float,
    ):
        super().__init__()
        self.conv_in = FrameConv(z_dim, widths[0], 3)
        self.mid_block = MidBlock(widths[0], dropout)
        inputs = [widths[0], *(width // 2 for width in widths[1:-1])]  # an upsampling halves the channels
        self.up_blocks = nn.LayerList(
            [
                UpBlock(channels, width, blocks, upsampling, dropout)
                for channels, width, upsampling in zip(inputs, widths[1:], [*temporal, None], strict=True)
            ]
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = FrameConv(widths[-1], out_channels, 3)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(PretrainedModel):
    """Qwen-Image's autoencoder; arguments, parameter names and results are those of HF diffusers' class.

    Images are videos of one frame, [B, 3, 1, H, W] in [-1, 1]; latents are [B, z_dim, 1, H / f, W / f] and unscaled:
    diffusion models see (z - config.latents_mean) / config.latents_std, channel by channel.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        input_channels: int = 3,
        latents_mean: Sequence[float] = WAN_MEAN,
        latents_std: Sequence[float] = WAN_STD,
    ):
        super().__init__()
        if attn_scales:
            raise UserError(f"attn_scales {list(attn_scales)} are not supported: no released autoencoder has them")
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise ValueError(f"{len(dim_mult)} stages have {len(dim_mult) - 1} temperal_downsample between them")
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(f"latents_mean and latents_std must have z_dim = {z_dim} entries")
        widths = [base_dim * factor for factor in (1, *dim_mult)]
        temporal = list(temperal_downsample)
        self.encoder = Encoder(input_channels, z_dim, widths, num_res_blocks, temporal, dropout)
        self.quant_conv = FrameConv(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = FrameConv(z_dim, z_dim, 1)
        widths = [base_dim * factor for factor in (dim_mult[-1], *reversed(dim_mult))]
        self.decoder = Decoder(z_dim, input_channels, widths, num_res_blocks, temporal[::-1], dropout)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels to a latent, f."""
        return 2 ** len(self.config.temperal_downsample)

    def encode(
        self, x: paddle.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images [B, input_channels, 1, H, W], sizes in multiples of f, to the distribution of their latents.

        Returns:
            `.latent_dist`, or a tuple of it, with `mode()` and `sample(generator)`: [B, z_dim, 1, H / f, W / f].
        """
        frame = _frame(x, "images")
        factor = self.spatial_compression_ratio
        if paddle.in_dynamic_mode() and (frame.shape[2] % factor or frame.shape[3] % factor):
            raise ValueError(f"images of {frame.shape[2]} x {frame.shape[3]} are not multiples of {factor}")
        posterior = DiagonalGaussianDistribution(self.quant_conv(self.encoder(frame)).unsqueeze(2))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: paddle.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[paddle.Tensor]:
        """Latents [B, z_dim, 1, h, w] to images [B, input_channels, 1, f h, f w], -1..1, as `.sample` or a tuple."""
        image = self.decoder(self.post_quant_conv(_frame(z, "latents"))).clip(-1.0, 1.0).unsqueeze(2)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: paddle.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: paddle.Generator | None = None,
    ) -> DecoderOutput | tuple[paddle.Tensor]:
        """Encode and decode images; latents are the mode, or a sample drawn with `generator`."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict)


def _frame(x: paddle.Tensor, name: str) -> paddle.Tensor:
    """The only frame of [B, C, 1, H, W]."""
    if x.ndim != 5 or x.shape[2] != 1:
        raise UserError(
            f"{name} must be [B, C, 1, H, W], one frame each, got {list(x.shape)}: videos are not supported"
        )
    return x.squeeze(2)
