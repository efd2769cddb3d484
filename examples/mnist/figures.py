"""The figures of docs/tutorial_mnist.md, from runs of compare.py: `python examples/mnist/figures.py --runs FOLDER`."""

import argparse
from io import BytesIO
from pathlib import Path

import numpy as np
import paddle
from matplotlib.figure import Figure
from PIL import Image

from distill.commands import run
from distill.logs import image_grid

from sample import open_model  # isort: skip  (beside this file)
from train import OBJECTIVES, draw  # isort: skip
from unet import NUM_CLASSES, UNet  # isort: skip

PIXELS = 5


def one_step_figure(models: dict[str, UNet], seed: int) -> Figure:
    """One-step samples of the models side by side, from the same noise; a column for each digit."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    labels = list(range(NUM_CLASSES)) * 8
    for axes, (name, model) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        axes.imshow(image_grid(draw(model, labels, seed), NUM_CLASSES, margin=1), cmap="gray")
        axes.set_title(f"{name}, 1 step", fontsize=10)
        axes.axis("off")
    return figure


def path_figure(model: UNet, seed: int, steps: int = 20) -> Figure:
    """Paths from noise to data: pixels over time (the 20-step path, and the straight line of one step), and images."""
    labels, path = [3, 8, 0, 5], []
    jump = draw(model, labels, seed)
    draw(model, labels, seed, steps=steps, style="mul", trajectory=path)
    states = np.stack([state.astype(paddle.float32).numpy() for state in path])  # [steps + 1, 4, 1, H, W]
    times = np.linspace(1, 0, steps + 1)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    moving = np.argsort(-states[-1, 0, 0].ravel())[:: states[-1, 0, 0].size // PIXELS][:PIXELS]
    for number, pixel in enumerate(moving):
        curve = states[:, 0, 0].reshape(steps + 1, -1)[:, pixel]
        left.plot(times, curve, color=f"C{number}")
        left.plot([1, 0], [curve[0], jump[0, 0].ravel()[pixel]], color=f"C{number}", linestyle=":")
    left.invert_xaxis()
    left.set(xlabel="t (1 = noise, 0 = data)", ylabel="pixel value", title=f"{steps} steps (solid), 1 step (dotted)")
    shown = [*range(0, steps + 1, steps // 5)]
    columns = np.concatenate([states[shown], jump[None]]).swapaxes(0, 1).reshape(-1, 1, *jump.shape[2:])
    right.imshow(image_grid(columns, len(shown) + 1, margin=1), cmap="gray")
    pitch = jump.shape[-1] + 1
    ticks = [*(f"t = {times[index]:.1f}" for index in shown), "1 step"]
    right.set_xticks(np.arange(len(ticks)) * pitch + pitch / 2, ticks, fontsize=8)
    right.set_yticks([])
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure with 64 colours, to keep the file small."""
    whole = BytesIO()
    figure.savefig(whole, dpi=80)
    Image.open(whole).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    return path


def main(argv: list[str] | None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("outputs/mnist_comparison"), help="folder of compare.py")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the noise")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args(argv)
    models = {name: open_model(arguments.runs / f"{name}-seed{arguments.seed}") for name in OBJECTIVES}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    titles = {"rcgm": "RCGM", "twinflow": "TwinFlow"}
    named = {titles[name]: model for name, model in models.items()}
    figures = {
        "mnist_one_step": one_step_figure(named, arguments.seed),
        "mnist_paths": path_figure(models["twinflow"], arguments.seed),
    }
    for name, figure in figures.items():
        print(save(figure, arguments.output_dir / f"{name}.png"))


if __name__ == "__main__":
    run(main)
