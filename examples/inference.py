"""Generate images in few steps: `python examples/inference.py --model_name digits --prompt 7 --steps 2`.

Large models are opened from their Hugging Face folder, downloaded beforehand: --model_name qwen-image looks for
Qwen/Qwen-Image here, --model_path says where else it is. --lora adds a student trained with distill/train_twinflow.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distill.commands import run
from fast_diffusers import UnifiedSampler
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import SHIPPED, open_pipeline
from fast_diffusers.random import Generator

HUGGING_FACE = {
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "qwen-image": "Qwen/Qwen-Image",
    "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
}
"""Short name to repository, which is also the folder that a download of it makes."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*SHIPPED, *HUGGING_FACE])
    made.add_argument("--model_name", default="digits", help=f"{names}, or a pipeline folder (default: %(default)s)")
    made.add_argument("--model_path", metavar="DIR", help="pipeline folder of that model")
    made.add_argument("--lora", metavar="PATH", help="LoRA file, or folder with one, to add to the model")
    made.add_argument("--prompt", action="append", required=True, help="what to draw; repeat for several")
    made.add_argument("--steps", type=int, default=2, help="evaluations of the model (default: %(default)s)")
    made.add_argument("--order", type=int, default=1, help="1, or 2 with corrections (default: %(default)s)")
    made.add_argument("--style", help="few, any or mul: the target time told to the model (default: by the steps)")
    made.add_argument("--no_random_aug", action="store_true", help="no fresh noise between the steps")
    made.add_argument("--guidance_scale", type=float, default=3.5, help="strength of the guidance (%(default)s)")
    made.add_argument("--num_images", type=int, default=1, help="images per prompt (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="image i has the noise of seed + i (default: %(default)s)")
    made.add_argument("--height", type=int, help="in pixels (default: the model's)")
    made.add_argument("--width", type=int, help="in pixels (default: the model's)")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (as stored)")
    made.add_argument(
        "--output_dir", default="outputs/inference", metavar="DIR", help="for the PNG files (%(default)s)"
    )
    return made


def find_model(name: str, path: str | None) -> str:
    """What `open_pipeline` opens: the folder that is given or found here, or a shipped name."""
    if path is not None or name not in HUGGING_FACE:
        return name if path is None else path
    repository = HUGGING_FACE[name]
    for folder in (Path(repository), Path(repository).name):
        if Path(folder).is_dir():
            return str(folder)
    raise UserError(
        f"{name} is not here: download {repository} from Hugging Face and pass --model_path with its folder"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write `image-000.png`, ...; images of one prompt are neighbours."""
    arguments = parser().parse_args(argv)
    if arguments.num_images < 1:
        raise UserError(f"--num_images must be positive, got {arguments.num_images}")
    if arguments.seed < 0:
        raise UserError(f"--seed must not be negative, got {arguments.seed}")
    pipe = open_pipeline(find_model(arguments.model_name, arguments.model_path), arguments.dtype)
    if arguments.lora is not None:
        pipe.load_lora_weights(arguments.lora)
        pipe.fuse_lora()
    sampler = UnifiedSampler(
        model=pipe,
        order=arguments.order,
        steps=arguments.steps,
        random_aug=not arguments.no_random_aug,
        style=arguments.style,
    )
    count = len(arguments.prompt) * arguments.num_images
    images = sampler.sample(
        prompt=arguments.prompt,
        num_images_per_prompt=arguments.num_images,
        guidance_scale=arguments.guidance_scale,
        height=arguments.height,
        width=arguments.width,
        generator=[Generator(arguments.seed + i) for i in range(count)],
    )
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"image-{i:03d}.png")
    print(f"{count} images in {folder}")


if __name__ == "__main__":
    run(main)
