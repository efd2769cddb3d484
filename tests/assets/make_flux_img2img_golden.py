"""Write what PyTorch `diffusers` makes of a picture with the tiny pipeline of make_flux_pipeline_golden.py, next to it.

The noise is that of output.safetensors, and the picture's latents are the mode of their distribution. To repeat:

    /tmp/goldens/bin/pip install diffusers==0.42.1
    /tmp/goldens/bin/python tests/assets/make_flux_img2img_golden.py
"""

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux import pipeline_flux_img2img as module
from make_flux_pipeline_golden import OUT, PROMPTS, TEXT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast


def main() -> None:
    noise = load_file(OUT / "output.safetensors")["latents"]
    module.randn_tensor = lambda shape, **_: noise.reshape(shape)
    module.retrieve_latents = lambda output, **_: output.latent_dist.mode()
    pipe = diffusers.FluxImg2ImgPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(OUT / "scheduler"),
        vae=diffusers.AutoencoderKL.from_pretrained(OUT / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(TEXT / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(TEXT / "clip" / "tokenizer_json"),
        text_encoder_2=T5EncoderModel.from_pretrained(TEXT / "t5"),
        tokenizer_2=T5TokenizerFast.from_pretrained(TEXT / "t5" / "tokenizer_json"),
        transformer=diffusers.FluxTransformer2DModel.from_pretrained(OUT / "transformer", torch_dtype=torch.float32),
    )
    picture = np.random.default_rng(0).integers(0, 256, [32, 48, 3], dtype=np.uint8)
    options = dict(height=32, width=48, num_inference_steps=5, guidance_scale=3.0, max_sequence_length=32)
    images = pipe(PROMPTS, image=Image.fromarray(picture), strength=0.5, output_type="pt", **options).images
    save_file({"picture": torch.from_numpy(picture), "images": images.contiguous()}, OUT / "img2img.safetensors")


if __name__ == "__main__":
    main()
