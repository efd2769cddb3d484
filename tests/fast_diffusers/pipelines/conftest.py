"""Tiny pipelines with random weights; the text encoders and tokenizers are those of the goldens."""

from pathlib import Path

import paddle
import ppdiffusers
import pytest
from ppdiffusers import transformers
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as PPDiffusersSD3

from fast_diffusers.models import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from fast_diffusers.pipelines import (
    FluxLabelPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from fast_diffusers.text_encoders import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT = Path(__file__).parents[2] / "assets" / "text_encoders"


SD3 = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=24,
    pos_embed_max_size=12,
)


DECODER = dict(
    vocab_size=500,
    hidden_size=24,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def moved(model, seed, scale=0.1):
    """The model with no weight at zero."""
    paddle.seed(seed)
    with paddle.no_grad():
        for weight in model.parameters():
            weight.set_value(weight + scale * paddle.randn(weight.shape))
    model.eval()
    return model


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
    return quiet(pipe)


def label_pipeline(channels: int = 1, **config) -> FluxLabelPipeline:
    sizes = dict(in_channels=4 * channels, joint_attention_dim=10, pooled_projection_dim=10)
    pipe = FluxLabelPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=tiny_transformer(**sizes | config),
        num_classes=10,
        sample_size=8,
    )
    return quiet(pipe)


def small_autoencoder(**scale) -> AutoencoderKL:
    """Four pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **scale,
    )


def clip(width, activation, seed):
    sizes = dict(hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    special = dict(vocab_size=726, bos_token_id=724, eos_token_id=725)
    return moved(CLIPTextModelWithProjection(**sizes, **special, hidden_act=activation, projection_dim=12), seed, 0.3)


def qwen_transformer():
    sizes = dict(num_layers=2, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    return QwenImageTransformer2DModel(**sizes, in_channels=16, out_channels=4, joint_attention_dim=24)


def qwen_vae():
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1, 1),
        num_res_blocks=1,
        temperal_downsample=(False, True),
        latents_mean=(0.1, -0.2, 0.3, 0.0),
        latents_std=(1.1, 0.9, 1.2, 1.0),
    )


def z_transformer():
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=24,
        axes_dims=(4, 6, 6),
        axes_lens=(256, 64, 64),
    )


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


@pytest.fixture(scope="session")
def sd3_config():
    """Of the transformer of `sd3`."""
    return SD3


@pytest.fixture(scope="module")
def sd3(text_assets):
    """Shared by a module's tests, which leave it as it was."""
    t5 = T5EncoderModel.from_pretrained(text_assets / "t5").config
    return quiet(
        StableDiffusion3Pipeline(
            transformer=moved(SD3Transformer2DModel(**SD3), 1),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=moved(small_autoencoder(scaling_factor=1.5305, shift_factor=0.0609), 2),
            text_encoder=clip(8, "quick_gelu", 3),
            tokenizer=CLIPTokenizer.from_pretrained(text_assets / "clip" / "tokenizer"),
            text_encoder_2=clip(16, "gelu", 4),
            tokenizer_2=CLIPTokenizer.from_pretrained(text_assets / "clip" / "tokenizer_json"),
            text_encoder_3=moved(
                T5EncoderModel(vocab_size=t5.vocab_size, d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=2),
                5,
                0.3,
            ),
            tokenizer_3=T5Tokenizer.from_pretrained(text_assets / "t5" / "tokenizer"),
        )
    )


def with_weights(theirs, ours):
    """A model of ppdiffusers with the weights of ours."""
    theirs.set_state_dict(ours.state_dict())
    theirs.eval()
    return theirs


def ppdiffusers_pipeline(pipe: StableDiffusion3Pipeline) -> ppdiffusers.StableDiffusion3Pipeline:
    """ppdiffusers' own pipeline with the weights of ours, copied."""

    def settings(model):
        return {name: value for name, value in model.config.items() if not name.startswith("_")}

    def clip(model):
        config = transformers.CLIPTextConfig(**settings(model))
        return with_weights(transformers.CLIPTextModelWithProjection(config), model)

    t5, clip_words = pipe.text_encoder_3, str(TEXT / "clip" / "tokenizer")
    parts = dict(
        transformer=with_weights(PPDiffusersSD3(**SD3), pipe.transformer),
        scheduler=ppdiffusers.FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.shift),
        vae=with_weights(ppdiffusers.AutoencoderKL(**settings(pipe.vae)), pipe.vae),
        text_encoder=clip(pipe.text_encoder),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(clip_words),
        text_encoder_2=clip(pipe.text_encoder_2),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(clip_words),
        text_encoder_3=with_weights(transformers.T5EncoderModel(transformers.T5Config(**settings(t5))), t5),
        tokenizer_3=transformers.T5Tokenizer.from_pretrained(str(TEXT / "t5" / "tokenizer")),
    )
    return quiet(ppdiffusers.StableDiffusion3Pipeline(**parts))


@pytest.fixture
def theirs(sd3):
    return ppdiffusers_pipeline(sd3)


@pytest.fixture(scope="module")
def qwen_tokenizer(text_assets):
    return Qwen2Tokenizer.from_pretrained(text_assets / "qwen3" / "tokenizer_json")


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer):
    """Shared by a module's tests, which leave it as it was."""
    return quiet(
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9),
            vae=moved(qwen_vae(), 1),
            text_encoder=moved(Qwen2_5_VLTextModel(**DECODER), 2, 0.3),
            tokenizer=qwen_tokenizer,
            transformer=moved(qwen_transformer(), 3),
        )
    )


@pytest.fixture(scope="module")
def z(qwen_tokenizer):
    """Likewise."""
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=moved(small_autoencoder(scaling_factor=0.3611, shift_factor=0.1159), 1),
            text_encoder=moved(Qwen3Model(**DECODER, head_dim=8), 2, 0.3),
            tokenizer=qwen_tokenizer,
            transformer=moved(z_transformer(), 3),
        )
    )
