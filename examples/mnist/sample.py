"""Draw digits with a trained model: `python examples/mnist/sample.py --model_path outputs/mnist --steps 1`.

Writes a grid, one column for each digit. More than one step refines: style few predicts the data at every step, any
jumps from step to step, mul follows the velocity as flow matching does.
"""

import argparse
from pathlib import Path

from distill.commands import run
from distill.logs import save_grid
from fast_diffusers.errors import UserError
from fast_diffusers.samplers.unified import STYLES

from train import draw  # isort: skip  (beside this file)
from unet import NUM_CLASSES, UNet  # isort: skip


def open_model(path: Path) -> UNet:
    """The model of a file, or of a folder that train.py wrote."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist; train one: python examples/mnist/train.py --output_dir {path}")
    return UNet.load(file)


def main(argv: list[str] | None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_path", type=Path, default=Path("outputs/mnist"), help="model file or folder of a run")
    parser.add_argument("--steps", type=int, default=1, help="evaluations of the model (%(default)s)")
    parser.add_argument("--style", choices=list(STYLES), default="few", help="the time it is asked to jump to")
    parser.add_argument("--num_samples", type=int, default=80, help="images (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/mnist/samples"), help="folder for the grid")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    arguments = parser.parse_args(argv)
    for name, least in (("steps", 1), ("num_samples", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    labels = [i % NUM_CLASSES for i in range(arguments.num_samples)]
    images = draw(
        open_model(arguments.model_path), labels, arguments.seed, steps=arguments.steps, style=arguments.style
    )
    name = f"{arguments.style}-{arguments.steps:02d}-seed{arguments.seed}.png"
    print(save_grid(images, arguments.output_dir / name, columns=NUM_CLASSES))


if __name__ == "__main__":
    run(main)
