"""DC-AE (Chen et al. 2024, arXiv 2410.10733), the deep-compression autoencoder of SANA: 32 x 32 pixels to one latent.

Residual blocks at high resolution, linear attention at low resolution; averages and repetitions of channels are the
shortcuts through changes of resolution. Sizes in shapes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.vae import DecoderOutput
from ppdiffusers.utils import BaseOutput

from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.layers import GLUMBConv, at_least_float32, relu_attend, spread
from fast_diffusers.models.tiling import run_tiled

ACTIVATIONS: dict[str, Callable[[paddle.Tensor], paddle.Tensor]] = {"relu": F.relu, "silu": F.silu}
PerStage = str | Sequence[str]


@dataclass
class EncoderOutput(BaseOutput):
    """Latents [B, latent_channels, H, W]; the encoder is deterministic."""

    latent: paddle.Tensor


class ChannelRMSNorm(nn.Layer):
    """x / rms(x) * weight + bias over the channels of [B, C, H, W]; statistics in float32, or float64 as the input."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        super().__init__()
        self.weight = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)
        self.epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        wide = at_least_float32(x)
        factor = paddle.rsqrt(wide.square().mean(1, keepdim=True) + self.epsilon)
        normed = (wide * spread(factor, wide)).astype(x.dtype)
        return normed * self.weight.reshape([1, -1, 1, 1]) + self.bias.reshape([1, -1, 1, 1])


class ResBlock(nn.Layer):
    """Two 3 x 3 convolutions, a norm and a residual connection."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2D(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2D(channels, channels, 3, padding=1, bias_attr=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class MultiscaleProjection(nn.Layer):
    """Queries, keys and values [B, 3 C, H, W] gathered over a neighbourhood, head by head."""

    def __init__(self, channels: int, num_heads: int, kernel_size: int):
        super().__init__()
        channels *= 3
        self.proj_in = nn.Conv2D(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias_attr=False
        )
        self.proj_out = nn.Conv2D(channels, channels, 1, groups=3 * num_heads, bias_attr=False)

    def forward(self, qkv: paddle.Tensor) -> paddle.Tensor:
        return self.proj_out(self.proj_in(qkv))


class MultiscaleLinearAttention(nn.Layer):
    """Linear attention over pixels and over their neighbourhoods of each size in `scales`, side by side."""

    def __init__(self, channels: int, head_size: int, scales: Sequence[int]):
        super().__init__()
        num_heads = channels // head_size
        inner = num_heads * head_size
        self.head_size = head_size
        self.to_q = nn.Linear(channels, inner, bias_attr=False)
        self.to_k = nn.Linear(channels, inner, bias_attr=False)
        self.to_v = nn.Linear(channels, inner, bias_attr=False)
        self.to_qkv_multiscale = nn.LayerList([MultiscaleProjection(inner, num_heads, scale) for scale in scales])
        self.to_out = nn.Linear(inner * (1 + len(scales)), channels, bias_attr=False)
        self.norm_out = ChannelRMSNorm(channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        rows = x.shape[2]
        pixels = x.flatten(2)
        qkv = paddle.concat([_per_pixel(layer, pixels) for layer in (self.to_q, self.to_k, self.to_v)], axis=1)
        image = qkv.reshape([0, 0, rows, -1])
        every_scale = paddle.concat([qkv, *(scale(image).flatten(2) for scale in self.to_qkv_multiscale)], axis=1)
        # Heads are groups of 3 head_size neighbouring channels of this concatenation, not of q, k and v.
        heads = every_scale.reshape([0, every_scale.shape[1] // (3 * self.head_size), 3 * self.head_size, -1])
        attended = relu_attend(*heads.chunk(3, axis=2)).flatten(1, 2)
        return x + self.norm_out(_per_pixel(self.to_out, attended).reshape([0, 0, rows, -1]))


class ResidualGLUMBConv(GLUMBConv):
    """The gated bottleneck with a norm and a residual connection."""

    def __init__(self, channels: int, ratio: float = 4):
        super().__init__(channels, ratio)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x + self.norm(super().forward(x))


class EfficientViTBlock(nn.Layer):
    """Linear attention and a gated bottleneck, each with a residual connection (Cai et al. 2023)."""

    def __init__(self, channels: int, head_size: int, scales: Sequence[int]):
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_size, scales)
        self.conv_out = ResidualGLUMBConv(channels)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.conv_out(self.attn(x))


class DownBlock(nn.Layer):
    """[B, C, 2H, 2W] to [B, out, H, W]: a convolution, plus averages of the pixels' channels as the shortcut."""

    def __init__(self, channels: int, out_channels: int, unshuffle: bool, shortcut: bool = True):
        super().__init__()
        self.unshuffle, self.shortcut, self.out_channels = unshuffle, shortcut, out_channels
        self.conv = nn.Conv2D(
            channels, out_channels // (4 if unshuffle else 1), 3, stride=1 if unshuffle else 2, padding=1
        )

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        out = _unshuffle(self.conv(x)) if self.unshuffle else self.conv(x)
        return out + _average_channels(_unshuffle(x), self.out_channels) if self.shortcut else out


class UpBlock(nn.Layer):
    """[B, C, H, W] to [B, out, 2H, 2W]: a convolution, plus repeated channels as the shortcut."""

    def __init__(self, channels: int, out_channels: int, interpolate: bool, shortcut: bool = True):
        super().__init__()
        self.interpolate, self.shortcut, self.out_channels = interpolate, shortcut, out_channels
        self.conv = nn.Conv2D(channels, out_channels * (1 if interpolate else 4), 3, padding=1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.interpolate:
            out = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            out = F.pixel_shuffle(self.conv(x), 2)
        return out + F.pixel_shuffle(_repeat_channels(x, 4 * self.out_channels), 2) if self.shortcut else out


class Encoder(nn.Layer):
    """Images to latents. A first stage without layers is skipped: its convolution halves the resolution at once."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        stages: Sequence[list[nn.Layer]],
        widths: Sequence[int],
        depths: Sequence[int],
        unshuffle: bool,
        shortcut: bool,
    ):
        super().__init__()
        self.latent_channels, self.shortcut = latent_channels, shortcut
        if depths[0] > 0:
            self.conv_in = nn.Conv2D(in_channels, widths[0], 3, padding=1)
        else:
            self.conv_in = DownBlock(in_channels, widths[1], unshuffle, shortcut=False)
        self.down_blocks = nn.LayerList()
        for i, blocks in enumerate(stages):
            if blocks and i + 1 < len(widths):
                blocks = [*blocks, DownBlock(widths[i], widths[i + 1], unshuffle)]
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2D(widths[-1], latent_channels, 3, padding=1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(x) + _average_channels(x, self.latent_channels) if self.shortcut else self.conv_out(x)


class Decoder(nn.Layer):
    """Latents to images, the mirror of `Encoder`."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        stages: Sequence[list[nn.Layer]],
        widths: Sequence[int],
        depths: Sequence[int],
        interpolate: bool,
        shortcut: bool,
        activation: str,
    ):
        super().__init__()
        self.channels, self.shortcut, self.activation = widths[-1], shortcut, ACTIVATIONS[activation]
        self.conv_in = nn.Conv2D(latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.LayerList()
        for i, blocks in enumerate(stages):
            if blocks and i + 1 < len(widths):
                blocks = [UpBlock(widths[i + 1], widths[i], interpolate), *blocks]
            self.up_blocks.append(nn.Sequential(*blocks))
        last = widths[0] if depths[0] > 0 else widths[1]
        self.norm_out = ChannelRMSNorm(last)
        if depths[0] > 0:
            self.conv_out = nn.Conv2D(last, out_channels, 3, padding=1)
        else:
            self.conv_out = UpBlock(last, out_channels, interpolate, shortcut=False)

    def forward(self, z: paddle.Tensor) -> paddle.Tensor:
        x = self.conv_in(z) + _repeat_channels(z, self.channels) if self.shortcut else self.conv_in(z)
        for stage in list(self.up_blocks)[::-1]:
            x = stage(x)
        return self.conv_out(self.activation(self.norm_out(x)))


class AutoencoderDC(PretrainedModel):
    """Images [B, 3, H, W] in [-1, 1] to and from latents [B, latent_channels, H / f, W / f], f = 32 by default.

    Names and results are those of HF diffusers' class of the same name. Latents are unscaled: diffusion models see
    z * config.scaling_factor. Run it in float32 (float16 overflows). Large images: `enable_tiling`, `enable_slicing`.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: PerStage = "ResBlock",
        decoder_block_types: PerStage = "ResBlock",
        encoder_block_out_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: Sequence[int] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: Sequence[int] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: Sequence[Sequence[int]] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: Sequence[Sequence[int]] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: PerStage = "rms_norm",
        decoder_act_fns: PerStage = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        _check_choice("decoder_norm_types", decoder_norm_types, ("rms_norm",))
        _check_choice("decoder_act_fns", decoder_act_fns, tuple(ACTIVATIONS))
        _check_choice("decoder_conv_act_fn", decoder_conv_act_fn, tuple(ACTIVATIONS))
        _check_choice("upsample_block_type", upsample_block_type, ("pixel_shuffle", "interpolate"))
        _check_choice("downsample_block_type", downsample_block_type, ("pixel_unshuffle", "Conv", "conv"))
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            _stages(
                encoder_block_types,
                "silu",
                encoder_block_out_channels,
                encoder_layers_per_block,
                encoder_qkv_multiscales,
                attention_head_dim,
            ),
            encoder_block_out_channels,
            encoder_layers_per_block,
            unshuffle=downsample_block_type == "pixel_unshuffle",
            shortcut=encoder_out_shortcut,
        )
        self.decoder = Decoder(
            in_channels,
            latent_channels,
            _stages(
                decoder_block_types,
                decoder_act_fns,
                decoder_block_out_channels,
                decoder_layers_per_block,
                decoder_qkv_multiscales,
                attention_head_dim,
            ),
            decoder_block_out_channels,
            decoder_layers_per_block,
            interpolate=upsample_block_type == "interpolate",
            shortcut=decoder_in_shortcut,
            activation=decoder_conv_act_fn,
        )
        self.spatial_compression_ratio = 2 ** (len(encoder_block_out_channels) - 1)
        self.use_slicing = False
        self._tiling: tuple[tuple[int, int], tuple[int, int]] | None = None

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    @property
    def use_tiling(self) -> bool:
        return self._tiling is not None

    def enable_tiling(
        self,
        tile_sample_min_height: int = 512,
        tile_sample_min_width: int = 512,
        tile_sample_stride_height: int = 448,
        tile_sample_stride_width: int = 448,
    ) -> None:
        """Process images that are larger than a tile in overlapping tiles that are blended.

        Attention then sees a tile instead of the image, so results differ a little from those in one piece.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile in pixels.
            tile_sample_stride_height, tile_sample_stride_width: pixels from a tile to the next; the rest is overlap.

        Raises:
            ValueError: sizes that are not multiples of the compression ratio, or a stride that exceeds the tile.
        """
        tile = (tile_sample_min_height, tile_sample_min_width)
        stride = (tile_sample_stride_height, tile_sample_stride_width)
        ratio = self.spatial_compression_ratio
        if any(size % ratio for size in (*tile, *stride)) or not all(
            0 < s <= t for s, t in zip(stride, tile, strict=True)
        ):
            raise ValueError(
                f"tiles of {tile} pixels with strides of {stride}: all must be positive multiples of {ratio}, "
                "and no stride longer than its tile"
            )
        latent_tile, latent_stride = (tuple(size // ratio for size in sizes) for sizes in (tile, stride))
        self._tiling = latent_tile, tuple(t - s for t, s in zip(latent_tile, latent_stride, strict=True))

    def disable_tiling(self) -> None:
        self._tiling = None

    def encode(self, x: paddle.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[paddle.Tensor]:
        """Images [B, 3, H, W] to latents, as `.latent` or as the only element of a tuple.

        ValueError for H or W that is not a multiple of the compression ratio.
        """
        ratio = self.spatial_compression_ratio
        if paddle.in_dynamic_mode() and (x.shape[2] % ratio or x.shape[3] % ratio):
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} pixels: both sizes must be multiples of {ratio}")
        latent = self._by_slices(lambda part: self._run(self.encoder, part, ratio, 1), x)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def decode(self, z: paddle.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[paddle.Tensor]:
        """Latents [B, latent_channels, h, w] to images, as `.sample` or as the only element of a tuple."""
        ratio = self.spatial_compression_ratio
        sample = self._by_slices(lambda part: self._run(self.decoder, part, 1, ratio), z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: paddle.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[paddle.Tensor]:
        """Images encoded and decoded again."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)

    def _by_slices(self, function: Callable[[paddle.Tensor], paddle.Tensor], x: paddle.Tensor) -> paddle.Tensor:
        if not self.use_slicing or x.shape[0] == 1:
            return function(x)
        return paddle.concat([function(x[i : i + 1]) for i in range(x.shape[0])])

    def _run(self, network: nn.Layer, x: paddle.Tensor, pixels_in: int, pixels_out: int) -> paddle.Tensor:
        """network(x), in tiles where they are on and x is larger than one; sizes are pixels per latent."""
        if self._tiling is None:
            return network(x)
        tile, overlap = (tuple(size * pixels_in for size in sizes) for sizes in self._tiling)
        if x.shape[2] <= tile[0] and x.shape[3] <= tile[1]:
            return network(x)
        return run_tiled(network, x, tile, overlap, pixels_out / pixels_in)


def _per_pixel(layer: nn.Linear, pixels: paddle.Tensor) -> paddle.Tensor:
    """A linear layer without bias on the channels of [B, C, L], which need not become the last axis."""
    return paddle.matmul(layer.weight, pixels, transpose_x=True)


def _unshuffle(x: paddle.Tensor) -> paddle.Tensor:
    """[B, C, 2H, 2W] to [B, 4C, H, W]: `F.pixel_unshuffle`, which refuses sizes that a traced program leaves open."""
    channels, rows, columns = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    blocks = x.reshape([-1, channels, rows, 2, columns, 2]).transpose([0, 1, 3, 5, 2, 4])
    return blocks.reshape([-1, 4 * channels, rows, columns])


def _average_channels(x: paddle.Tensor, channels: int) -> paddle.Tensor:
    """[B, C, H, W] to [B, channels, H, W]: means of neighbouring channels."""
    groups = x.flatten(2).reshape([0, channels, x.shape[1] // channels, -1])
    return groups.mean(2).reshape([0, 0, x.shape[2], -1])


def _repeat_channels(x: paddle.Tensor, channels: int) -> paddle.Tensor:
    """[B, C, H, W] to [B, channels, H, W]: every channel repeated in place."""
    return x.unsqueeze(2).expand([-1, -1, channels // x.shape[1], -1, -1]).flatten(1, 2)


def _stages(
    types: PerStage,
    activations: PerStage,
    widths: Sequence[int],
    depths: Sequence[int],
    scales: Sequence[Sequence[int]],
    head_size: int,
) -> list[list[nn.Layer]]:
    """The layers of each resolution, without those that change it."""
    types, activations = ([x] * len(widths) if isinstance(x, str) else x for x in (types, activations))
    if len({len(x) for x in (types, activations, widths, depths, scales)}) > 1:
        raise ValueError(f"types {types}, widths {widths}, depths {depths}, scales {scales}: one entry for each stage")
    _check_choice("block types", types, ("ResBlock", "EfficientViTBlock"))

    def block(i: int) -> nn.Layer:
        if types[i] == "ResBlock":
            return ResBlock(widths[i], activations[i])
        return EfficientViTBlock(widths[i], head_size, scales[i])

    return [[block(i) for _ in range(depth)] for i, depth in enumerate(depths)]


def _check_choice(name: str, value: PerStage, choices: Sequence[str]) -> None:
    values = [value] if isinstance(value, str) else value
    for wrong in set(values) - set(choices):
        raise ValueError(f"{name} {wrong!r} is not supported: choose {' or '.join(choices)}")
