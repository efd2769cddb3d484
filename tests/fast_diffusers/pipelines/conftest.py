"""Tiny pipelines with random weights; the text encoders and tokenizers are those of the goldens."""

from pathlib import Path

import paddle
import pytest

from fast_diffusers.models import AutoencoderKL, FluxTransformer2DModel
from fast_diffusers.pipelines import FluxLabelPipeline, FluxPipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from fast_diffusers.text_encoders import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

TEXT = Path(__file__).parents[2] / "assets" / "text_encoders"


def tiny_transformer(**config) -> FluxTransformer2DModel:
    """A FLUX transformer whose output is not zero."""
    paddle.seed(0)
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    model = FluxTransformer2DModel(**sizes | config, axes_dims_rope=(4, 6, 6))
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.05 * paddle.randn(parameter.shape))
    model.eval()
    return model


def flux_pipeline() -> FluxPipeline:
    paddle.seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(TEXT / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(TEXT / "clip" / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(TEXT / "t5"),
        tokenizer_2=T5Tokenizer.from_pretrained(TEXT / "t5" / "tokenizer"),
        transformer=tiny_transformer(
            in_channels=16, joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=True
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def label_pipeline(channels: int = 1, **config) -> FluxLabelPipeline:
    sizes = dict(in_channels=4 * channels, joint_attention_dim=10, pooled_projection_dim=10)
    pipe = FluxLabelPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=tiny_transformer(**sizes | config),
        num_classes=10,
        sample_size=8,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    """Shared by a module's tests, which leave it as it was."""
    return flux_pipeline()


@pytest.fixture(scope="module")
def digits() -> FluxLabelPipeline:
    """Shared by a module's tests, which leave it as it was."""
    return label_pipeline()


@pytest.fixture(scope="session")
def text_assets() -> Path:
    """The goldens of text encoders and tokenizers."""
    return TEXT


@pytest.fixture(scope="session")
def make_label_pipeline():
    return label_pipeline
