"""The Z-Image transformer (Tongyi-MAI 2025): a single stream of image patches and caption tokens.

Samples come as lists, so that their images and captions may differ in size. Sizes in shapes: B batch, L image tokens,
T caption tokens, C inner channels (heads * head size).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.joint_attention import MASKED, refuse_attention_kwargs
from fast_diffusers.models.layers import (
    RMSNorm,
    Rope,
    apply_rope,
    at_least_float32,
    attend,
    float16_clip,
    layer_norm,
    per_token,
    rope_tables,
    sinusoid,
    split_heads,
    zero_linear,
)

LENGTH_MULTIPLE = 32  # learned padding tokens fill every sample's image and caption up to it, and take part
CONDITION_SIZE = 256  # largest size of the embedded time


class ZImageTimeEmbedding(nn.Layer):
    """Time [B] in 0..t_scale to an embedding [B, size]; the sinusoid is float32."""

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.Silu(), nn.Linear(1024, size))

    def forward(self, timestep: paddle.Tensor) -> paddle.Tensor:
        return self.mlp(sinusoid(timestep).astype(self.mlp[0].weight.dtype))


class ZImageAttention(nn.Layer):
    """Self-attention with rotated, optionally RMS-normalised queries and keys; no biases."""

    def __init__(self, channels: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        if qk_norm:
            self.norm_q = RMSNorm(channels // num_heads, epsilon=1e-5)
            self.norm_k = RMSNorm(channels // num_heads, epsilon=1e-5)
        self.to_q = nn.Linear(channels, channels, bias_attr=False)
        self.to_k = nn.Linear(channels, channels, bias_attr=False)
        self.to_v = nn.Linear(channels, channels, bias_attr=False)
        self.to_out = nn.LayerList([nn.Linear(channels, channels, bias_attr=False)])

    def forward(self, x: paddle.Tensor, rope: Rope, bias: paddle.Tensor | None) -> paddle.Tensor:
        query, key, value = (split_heads(project(x), self.num_heads) for project in (self.to_q, self.to_k, self.to_v))
        if self.qk_norm:
            query, key = self.norm_q(query), self.norm_k(key)
        return self.to_out[0](attend(apply_rope(query, rope), apply_rope(key, rope), value, bias))


class SwiGLU(nn.Layer):
    """w2(silu(w1 x) * w3 x), without biases (Shazeer 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(channels, hidden, bias_attr=False)
        self.w2 = nn.Linear(hidden, channels, bias_attr=False)
        self.w3 = nn.Linear(channels, hidden, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ZImageTransformerBlock(nn.Layer):
    """Attention and SwiGLU, each between two RMS norms; time scales what goes in and gates what comes out."""

    def __init__(self, channels: int, num_heads: int, epsilon: float, qk_norm: bool, modulated: bool = True):
        super().__init__()
        self.modulated = modulated
        self.attention = ZImageAttention(channels, num_heads, qk_norm)
        self.feed_forward = SwiGLU(channels, int(channels / 3 * 8))
        self.attention_norm1 = RMSNorm(channels, epsilon)
        self.ffn_norm1 = RMSNorm(channels, epsilon)
        self.attention_norm2 = RMSNorm(channels, epsilon)
        self.ffn_norm2 = RMSNorm(channels, epsilon)
        if modulated:
            self.adaLN_modulation = nn.Sequential(zero_linear(min(channels, CONDITION_SIZE), 4 * channels))

    def forward(
        self, hidden_states: paddle.Tensor, rope: Rope, bias: paddle.Tensor | None, temb: paddle.Tensor | None = None
    ) -> paddle.Tensor:
        """Tokens [B, N, C], their rotary tables and attention bias [B, 1, 1, N], embedded time -> tokens."""
        x = hidden_states
        if not self.modulated:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, bias))
            return float16_clip(x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x))))
        scale, gate, mlp_scale, mlp_gate = (
            per_token(vector, x) for vector in self.adaLN_modulation(temb).chunk(4, axis=-1)
        )
        out = self.attention(self.attention_norm1(x) * (1 + scale), rope, bias)
        x = x + gate.tanh() * self.attention_norm2(out)
        out = self.feed_forward(self.ffn_norm1(x) * (1 + mlp_scale))
        return float16_clip(x + mlp_gate.tanh() * self.ffn_norm2(out))


class ZImageFinalLayer(nn.Layer):
    """Tokens [B, N, C] to patches [B, N, patch volume * out channels]."""

    def __init__(self, channels: int, out_features: int):
        super().__init__()
        self.linear = zero_linear(channels, out_features)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), zero_linear(min(channels, CONDITION_SIZE), channels))

    def forward(self, x: paddle.Tensor, temb: paddle.Tensor) -> paddle.Tensor:
        return self.linear(layer_norm(x) * per_token(1 + self.adaLN_modulation(temb), x))


class ZImageTransformer2DModel(PretrainedModel):
    """Z-Image transformer; arguments, parameter names and results are those of HF diffusers' class of the same name.

    It predicts what leads from noise to data, the negative of this package's velocity. A new model predicts zero.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        all_patch_size: Sequence[int] = (2,),
        all_f_patch_size: Sequence[int] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: int | None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: Sequence[int] = (32, 48, 48),
        axes_lens: Sequence[int] = (1024, 512, 512),
    ):
        super().__init__()
        if siglip_feat_dim is not None:
            raise UserError("Z-Image variants with siglip_feat_dim are not supported: use a text-to-image checkpoint")
        if n_kv_heads != n_heads:
            raise ValueError(f"n_kv_heads {n_kv_heads} must equal n_heads {n_heads}")
        if sum(axes_dims) != dim // n_heads or any(size % 2 for size in axes_dims):
            raise ValueError(f"axes_dims {tuple(axes_dims)} must be even and sum to the head size {dim // n_heads}")
        self.t_scale, self.rope_theta = t_scale, rope_theta
        self.axes_dims, self.axes_lens = tuple(axes_dims), tuple(axes_lens)
        patches = [
            (f"{size}-{frames}", size * size * frames * in_channels)
            for size, frames in zip(all_patch_size, all_f_patch_size, strict=True)
        ]
        self.all_x_embedder = nn.LayerDict({key: nn.Linear(features, dim) for key, features in patches})
        self.all_final_layer = nn.LayerDict({key: ZImageFinalLayer(dim, features) for key, features in patches})

        def blocks(count: int, modulated: bool = True) -> nn.LayerList:
            return nn.LayerList(
                [ZImageTransformerBlock(dim, n_heads, norm_eps, qk_norm, modulated) for _ in range(count)]
            )

        self.noise_refiner = blocks(n_refiner_layers)
        self.context_refiner = blocks(n_refiner_layers, modulated=False)
        self.t_embedder = ZImageTimeEmbedding(min(dim, CONDITION_SIZE))
        self.cap_embedder = nn.Sequential(RMSNorm(cap_feat_dim, norm_eps), nn.Linear(cap_feat_dim, dim))
        normal = nn.initializer.Normal(std=0.02)
        self.x_pad_token = self.create_parameter([1, dim], default_initializer=normal)
        self.cap_pad_token = self.create_parameter([1, dim], default_initializer=normal)
        self.layers = blocks(n_layers)

    def embed_time(self, t: paddle.Tensor) -> paddle.Tensor:
        """Embedded time [B, size] of t [B]."""
        return self.t_embedder(at_least_float32(t) * self.t_scale)

    def refine_image(
        self, patches: Sequence[paddle.Tensor], ids: Sequence[np.ndarray], temb: paddle.Tensor, key: str
    ) -> list[paddle.Tensor]:
        """Patches [L, features] of every sample to filled up, refined tokens [len(ids), C]."""
        tokens = [self._fill(self.all_x_embedder[key](x), self.x_pad_token) for x in patches]
        return self._run(self.noise_refiner, tokens, ids, temb)

    def refine_captions(self, captions: Sequence[paddle.Tensor], ids: Sequence[np.ndarray]) -> list[paddle.Tensor]:
        """Caption features [T, cap_feat_dim] of every sample to filled up, refined tokens [len(ids), C]."""
        tokens = [self._fill(self.cap_embedder(x), self.cap_pad_token) for x in captions]
        return self._run(self.context_refiner, tokens, ids)

    def forward(
        self,
        x: Sequence[paddle.Tensor] | paddle.Tensor,
        t: paddle.Tensor,
        cap_feats: Sequence[paddle.Tensor] | paddle.Tensor,
        return_dict: bool = True,
        controlnet_block_samples: Mapping[int, paddle.Tensor] | None = None,
        siglip_feats: None = None,
        image_noise_mask: None = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: Mapping | None = None,
        cap_lengths: paddle.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[list[paddle.Tensor]]:
        """Predict the direction from noise to data.

        Args:
            x: latents [in_channels, F, H, W] of every sample; sizes may differ, in whole patches.
            t: [B], 0 = noise, 1 = data (times run backwards here); negative times too.
            cap_feats: caption features [T, cap_feat_dim] of every sample; lengths may differ.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.
            controlnet_block_samples: what to add to all tokens [B, N, C] after the layers of the given numbers.
            siglip_feats, image_noise_mask: for variants that are not supported, must be None.
            patch_size, f_patch_size: which of the model's patch sizes to use.
            joint_attention_kwargs: must be empty; adapters are switched and scaled by `fast_diffusers.lora.active`.
            cap_lengths: [B], how many of the features `cap_feats` [B, T, cap_feat_dim] of each sample count; T is at
                least each of them filled up to a multiple of 32. This is the form of static graphs, in which B and T
                may be free; x is then a tensor [B, in_channels, F, H, W].

        Returns:
            A list of [in_channels, F, H, W], or a tensor if `cap_lengths` is given, as `.sample` or as the only element
            of a tuple.
        """
        refuse_attention_kwargs("joint_attention_kwargs", joint_attention_kwargs)
        if siglip_feats is not None or image_noise_mask is not None:
            raise ValueError("this Z-Image model takes neither `siglip_feats` nor `image_noise_mask`")
        key = f"{patch_size}-{f_patch_size}"
        if key not in self.all_x_embedder:
            raise ValueError(f"this Z-Image model has patch sizes {list(self.all_x_embedder.keys())}, not {key}")
        if cap_lengths is not None:
            sample = self._forward_padded(
                x, t, cap_feats, cap_lengths, patch_size, f_patch_size, controlnet_block_samples
            )
            return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
        latents, captions = _samples(x), _samples(cap_feats)
        if not len(latents) == len(captions) == t.shape[0]:
            raise ValueError(f"{len(latents)} latents, {len(captions)} captions and {t.shape[0]} times do not match")
        grids = [_grid(latent.shape, f_patch_size, patch_size) for latent in latents]
        caption_ids = [_ids((_filled(caption.shape[0]), 1, 1), start=1) for caption in captions]
        image_ids = [_ids(grid, start=1 + len(ids)) for grid, ids in zip(grids, caption_ids)]  # noqa: B905
        for ids in image_ids:
            self._check_positions(ids)

        temb = self.embed_time(t)
        patches = [_patchify(latent, grid) for latent, grid in zip(latents, grids)]  # noqa: B905
        image = self.refine_image(patches, image_ids, temb, key)
        text = self.refine_captions(captions, caption_ids)
        tokens = [paddle.concat(pair, axis=0) for pair in list(zip(image, text))]  # noqa: B905
        ids = [np.concatenate(pair) for pair in list(zip(image_ids, caption_ids))]  # noqa: B905
        tokens = self._run(self.layers, tokens, ids, temb, controlnet_block_samples or {})
        out = self.all_final_layer[key](_stack(tokens), temb)
        sample = [_unpatchify(out[i], grid, latents[i].shape) for i, grid in enumerate(grids)]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _forward_padded(
        self,
        x: paddle.Tensor,
        t: paddle.Tensor,
        captions: paddle.Tensor,
        lengths: paddle.Tensor,
        patch_size: int,
        f_patch_size: int,
        residuals: Mapping[int, paddle.Tensor] | None,
    ) -> paddle.Tensor:
        """`forward` with `cap_lengths`: one sequence a sample, in which what follows a filled up caption is masked."""
        grid, key = _grid(x.shape[1:], f_patch_size, patch_size), f"{patch_size}-{f_patch_size}"
        ids = _ids(grid, start=1)
        self._check_positions(ids + [LENGTH_MULTIPLE, 0, 0])
        count = grid[0] * grid[1] * grid[2]
        lengths = lengths.unsqueeze(1)
        filled = (lengths + (LENGTH_MULTIPLE - 1)) // LENGTH_MULTIPLE * LENGTH_MULTIPLE  # [B, 1]
        is_patch = paddle.to_tensor((np.arange(len(ids)) < count).astype("int64"))  # [L]
        shifts = [filled * is_patch, filled * 0, filled * 0]
        image_ids = [shift + paddle.to_tensor(ids[:, i].astype("int64")) for i, shift in enumerate(shifts)]
        order = paddle.arange(0, captions.shape[1], dtype="int64") + 0 * filled  # [B, T]
        image_rope, text_rope = self._tables(image_ids), self._tables([order + 1, 0 * order, 0 * order])
        seen = (order < filled).astype(captions.dtype).unsqueeze([1, 2])  # [B, 1, 1, T]
        bias = (1 - seen) * MASKED
        is_feature = (order < lengths).astype(captions.dtype).unsqueeze(2)

        temb = self.embed_time(t)
        image = self.all_x_embedder[key](_patchify_batch(x, grid))
        image = F.pad(image, [0, 0, 0, len(ids) - count, 0, 0])
        image = image + (1 - is_patch).astype(image.dtype).unsqueeze(1) * self.x_pad_token
        image = self._run_stacked(self.noise_refiner, image, image_rope, None, temb)
        text = is_feature * self.cap_embedder(captions) + (1 - is_feature) * self.cap_pad_token
        text = self._run_stacked(self.context_refiner, text, text_rope, bias)
        rope = [paddle.concat([own, other], axis=1) for own, other in list(zip(image_rope, text_rope))]  # noqa: B905
        unmasked = (image_ids[0] * 0).astype(bias.dtype).unsqueeze([1, 2])
        bias = paddle.concat([unmasked, bias], axis=-1)
        tokens = paddle.concat([image, text], axis=1)
        tokens = self._run_stacked(self.layers, tokens, rope, bias, temb, residuals)
        return _unpatchify_batch(self.all_final_layer[key](tokens, temb), grid, x.shape[1:])

    def _tables(self, ids: Sequence[paddle.Tensor]) -> Rope:
        """Rotary tables of positions [B, N] on each axis."""
        dtype = "float64" if self.x_pad_token.dtype == paddle.float64 else "float32"
        return rope_tables(paddle.stack(ids, axis=-1), self.axes_dims, self.rope_theta, dtype)

    def _run(
        self,
        blocks: nn.LayerList,
        tokens: Sequence[paddle.Tensor],
        ids: Sequence[np.ndarray],
        temb: paddle.Tensor | None = None,
        residuals: Mapping[int, paddle.Tensor] | None = None,
    ) -> list[paddle.Tensor]:
        """Blocks over a batch of sequences of different lengths, [N, C] with positions [N, 3] each."""
        lengths = [len(sample) for sample in ids]
        x, rope = _stack(tokens), self._rope(ids)
        bias = None
        if min(lengths) < max(lengths):
            padding = np.arange(max(lengths)) >= np.array(lengths)[:, None]
            bias = paddle.to_tensor(np.float32(MASKED) * padding[:, None, None]).astype(x.dtype)
        x = self._run_stacked(blocks, x, rope, bias, temb, residuals)
        return [x[i, :length] for i, length in enumerate(lengths)]

    def _run_stacked(
        self,
        blocks: nn.LayerList,
        x: paddle.Tensor,
        rope: Rope,
        bias: paddle.Tensor | None,
        temb: paddle.Tensor | None = None,
        residuals: Mapping[int, paddle.Tensor] | None = None,
    ) -> paddle.Tensor:
        """Blocks over tokens [B, N, C]."""
        for index, block in enumerate(blocks):
            x = self._run_block(block, x, rope, bias, temb)
            if residuals and index in residuals:
                x = x + residuals[index]
        return x

    def _rope(self, ids: Sequence[np.ndarray]) -> Rope:
        longest = max(len(sample) for sample in ids)
        padded = np.stack([np.pad(sample, [(0, longest - len(sample)), (0, 0)]) for sample in ids])
        return self._tables(paddle.to_tensor(padded).unbind(-1))

    def _fill(self, tokens: paddle.Tensor, pad_token: paddle.Tensor) -> paddle.Tensor:
        """Tokens [N, C] followed by padding tokens up to a multiple of 32."""
        missing = _filled(tokens.shape[0]) - tokens.shape[0]
        return paddle.concat([tokens, pad_token.expand([missing, -1])], axis=0) if missing else tokens

    def _check_positions(self, ids: np.ndarray) -> None:
        sizes = ids.max(axis=0) + 1
        if (sizes > np.array(self.axes_lens)).any():
            raise ValueError(
                f"caption and image need {sizes.tolist()} positions, more than this model's axes_lens {self.axes_lens}"
            )


def _samples(x: Sequence[paddle.Tensor] | paddle.Tensor) -> list[paddle.Tensor]:
    return x.unbind(0) if isinstance(x, paddle.Tensor) else list(x)


def _filled(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _stack(tokens: Sequence[paddle.Tensor]) -> paddle.Tensor:
    """Sequences [N, C] as one batch, zeros after the shorter ones."""
    longest = max(x.shape[0] for x in tokens)
    return paddle.stack([F.pad(x, [0, longest - x.shape[0], 0, 0]) if x.shape[0] < longest else x for x in tokens])


def _grid(shape: Sequence[int], frame_size: int, size: int) -> tuple[int, int, int]:
    """(frames, rows, columns) in patches of latents [C, F, H, W]."""
    frames, height, width = shape[1:]
    if frames % frame_size or height % size or width % size:
        raise ValueError(
            f"latents of {frames} x {height} x {width} are not whole patches of {frame_size} x {size} x {size}"
        )
    return frames // frame_size, height // size, width // size


def _ids(grid: tuple[int, int, int], start: int) -> np.ndarray:
    """Positions [N, 3] of the patches of a grid, the first axis from `start` on; padding is at zero."""
    ids = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3) + [start, 0, 0]
    return np.pad(ids, [(0, _filled(len(ids)) - len(ids)), (0, 0)])


def _patchify(latent: paddle.Tensor, grid: tuple[int, int, int]) -> paddle.Tensor:
    """[C, F, H, W] to patches [N, features], ordered (frame, row, column in a patch, channel)."""
    return _patchify_batch(latent.unsqueeze(0), grid)[0]


def _patchify_batch(latents: paddle.Tensor, grid: tuple[int, int, int]) -> paddle.Tensor:
    """[B, C, F, H, W] to [B, N, features]."""
    channels, *sizes = latents.shape[1:]
    split = [length for count, size in zip(grid, sizes) for length in (count, size // count)]  # noqa: B905
    split = latents.reshape([-1, channels, *split]).transpose([0, 2, 4, 6, 3, 5, 7, 1])
    return split.flatten(4).flatten(1, 3)


def _unpatchify(patches: paddle.Tensor, grid: tuple[int, int, int], shape: Sequence[int]) -> paddle.Tensor:
    """The inverse of `_patchify` for the first tokens of [N, features]."""
    return _unpatchify_batch(patches.unsqueeze(0), grid, shape)[0]


def _unpatchify_batch(patches: paddle.Tensor, grid: tuple[int, int, int], shape: Sequence[int]) -> paddle.Tensor:
    """The inverse of `_patchify_batch` for the first tokens of [B, N, features], each to a latent of `shape`."""
    channels, *sizes = shape
    inner = [size // count for count, size in zip(grid, sizes)]  # noqa: B905
    image = patches[:, : grid[0] * grid[1] * grid[2]].reshape([-1, *grid, *inner, channels])
    return image.transpose([0, 7, 1, 4, 2, 5, 3, 6]).reshape([-1, *shape])
