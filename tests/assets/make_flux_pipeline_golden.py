"""Write a tiny random FLUX pipeline and an image of it next to this file, with PyTorch `diffusers`.

Its text encoders and tokenizers are those of make_text_encoder_goldens.py, which has to run first. To repeat:

    /tmp/goldens/bin/pip install diffusers==0.42.1
    /tmp/goldens/bin/python tests/assets/make_flux_pipeline_golden.py
"""

import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file

ASSETS = Path(__file__).parent
TEXT = ASSETS / "text_encoders"
OUT = ASSETS / "flux_pipeline"
PROMPTS = ["a cat, isn't it?", "a café in Zürich, ﬁlm grain"]


def half_precision(model: torch.nn.Module) -> torch.nn.Module:
    """Values that float16 holds exactly, none of them zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).half())
    return model.eval()


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=half_precision(vae),
        text_encoder=transformers.CLIPTextModel.from_pretrained(TEXT / "clip"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(TEXT / "clip" / "tokenizer_json"),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(TEXT / "t5"),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(TEXT / "t5" / "tokenizer_json"),
        transformer=half_precision(transformer),
    )
    latents = torch.randn([2, 4, 4, 6], generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(latents, 2, 4, 4, 6)
    options = dict(height=32, width=48, num_inference_steps=4, guidance_scale=3.0, max_sequence_length=32)
    images = pipe(PROMPTS, latents=packed, output_type="pt", **options).images
    pipe.save_pretrained(OUT)
    for part in ("transformer", "vae"):
        getattr(pipe, part).half().save_pretrained(OUT / part)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(OUT / part)
    save_file({"latents": latents, "images": images.contiguous()}, OUT / "output.safetensors")


if __name__ == "__main__":
    main()
