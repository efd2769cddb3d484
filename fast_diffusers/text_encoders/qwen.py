"""The text models of the Qwen family: Qwen3, the text encoder of Z-Image, and Qwen2.5-VL, that of Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.text_encoders.decoder import Architecture, TextDecoder, layer_windows


class Qwen3Model(TextDecoder):
    """Qwen3 (Qwen Team 2025, arXiv 2505.09388); arguments are the keys of its config.json, defaults those of Qwen3-4B.

    With `use_sliding_window`, layers from `max_window_layers` on attend to `sliding_window` tokens.
    """

    model_type = "qwen3"
    config_types = ("qwen3",)

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2560,
        intermediate_size: int = 9728,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        use_sliding_window: bool = False,
        sliding_window: int | None = None,
        max_window_layers: int = 36,
        layer_types: Sequence[str] | None = None,
    ):
        super().__init__()
        window = sliding_window if use_sliding_window else None
        self._assemble(
            Architecture(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads or num_attention_heads,
                head_dim=head_dim,
                windows=_windows(num_hidden_layers, layer_types, max_window_layers, window),
                activation=hidden_act,
                epsilon=rms_norm_eps,
                rope_theta=rope_theta,
                attention_scale=head_dim**-0.5,
                head_norm=True,
            )
        )


class Qwen2_5_VLTextModel(TextDecoder):
    """The text part of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923); weights of the visual part are passed over.

    Arguments are the keys of its config.json, or of the `text_config` in it; defaults are those of
    Qwen2.5-VL-7B-Instruct. Text has the same position on all three axes of the rotary embedding, which is then the
    ordinary one; `rope_scaling` is kept for other readers of what is saved. Windows as in `Qwen3Model`.
    """

    model_type = "qwen2_5_vl_text"
    config_types = ("qwen2_5_vl", "qwen2_5_vl_text")
    _keys_to_ignore_on_load_unexpected = (*TextDecoder._keys_to_ignore_on_load_unexpected, r"^(model\.)?visual\.")

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1e6,
        rope_scaling: Mapping[str, Any] | None = None,
        use_sliding_window: bool = False,
        sliding_window: int | None = None,
        max_window_layers: int = 28,
        layer_types: Sequence[str] | None = None,
    ):
        super().__init__()
        head_dim = hidden_size // num_attention_heads
        window = sliding_window if use_sliding_window else None
        self._assemble(
            Architecture(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_heads=num_attention_heads,
                num_key_value_heads=num_key_value_heads or num_attention_heads,
                head_dim=head_dim,
                windows=_windows(num_hidden_layers, layer_types, max_window_layers, window),
                activation=hidden_act,
                epsilon=rms_norm_eps,
                rope_theta=rope_theta,
                attention_scale=head_dim**-0.5,
                qkv_bias=True,
            )
        )


def _windows(
    num_layers: int, layer_types: Sequence[str] | None, first: int, window: int | None
) -> tuple[int | None, ...]:
    """From layer `first` on the window, if there is one, unless `layer_types` says otherwise."""
    kinds = layer_types or ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    return layer_windows(kinds, num_layers, window)
