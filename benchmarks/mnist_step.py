"""Time of a training step of examples/mnist: `python benchmarks/mnist_step.py [--torch_python PYTHON]`.

Prints steps per second and peak memory of RCGM and TwinFlow. With a Python that has PyTorch, the same network takes the
same steps there (mnist_step_torch.py), in turns with Paddle so that both see the same machine, and the medians of the
ratios are printed too.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "mnist"))

import distill  # noqa: F401  # isort: skip  (before paddle)
import numpy as np
import paddle

from distill.draws import StepDraws

from train import IMAGE_SIZE, OBJECTIVES, STUDENT, OneStep, Settings, to_batch  # isort: skip
from unet import NUM_CLASSES  # isort: skip


class Steps:
    """Training steps of one method on one batch of random images."""

    def __init__(self, name: str, batch_size: int, width: int):
        self.method = OneStep(Settings(method=name, batch_size=batch_size, width=width), steps=1000)
        size, rng = IMAGE_SIZE["mnist"], np.random.default_rng(0)
        images = rng.uniform(-1, 1, [batch_size, 1, size, size]).astype(np.float32)
        self.batch = to_batch({"images": images, "prompts": np.arange(batch_size) % NUM_CLASSES})
        self.done = 0

    def __call__(self) -> float:
        """Seconds of one step, as `distill.trainer.Trainer` takes it."""
        started = time.perf_counter()
        optimizer = self.method.optimizers[STUDENT]
        loss, _ = self.method.loss(STUDENT, self.batch, StepDraws(0, self.done))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        self.method.averages[STUDENT].update()
        self.done += 1
        return time.perf_counter() - started


class TorchSteps:
    """The same in another process: a line "step <method>" on its input is answered with the seconds."""

    def __init__(self, python: str, settings: dict[str, Any], threads: int):
        script = Path(__file__).with_name("mnist_step_torch.py")
        command = [python, str(script), json.dumps(settings), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str) -> Any:
        """One request and its answer."""
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("error: the PyTorch process ended; see above")
        return json.loads(answer)

    def check(self, steps: Steps) -> float:
        """Largest difference of the two networks' velocities, with the same random weights."""
        model = steps.method.student
        rng = np.random.default_rng(1)
        weights = {name: rng.standard_normal(p.shape).astype(np.float32) * 0.1 for name, p in model.named_parameters()}
        kept = {name: parameter.numpy() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.set_value(weights[name])
        x, t = steps.batch["latents"], paddle.linspace(-1, 1, steps.batch["latents"].shape[0])
        with paddle.no_grad():
            velocity = model(x, t, steps.batch["cond"], target_t=0.5 * t).numpy()
        for name, parameter in model.named_parameters():
            parameter.set_value(kept[name])
        with tempfile.TemporaryDirectory() as folder:
            label = steps.batch["cond"]["label"].numpy()
            np.savez(f"{folder}/case.npz", x=x.numpy(), t=t.numpy(), label=label, velocity=velocity, **weights)
            return self.ask(f"check {folder}/case.npz")


def measure(batch_size: int, width: int, repeats: int, torch: TorchSteps | None) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step by method, of Paddle and, if given, PyTorch, and the median of their ratios."""
    figures = {}
    for name in OBJECTIVES:
        steps = Steps(name, batch_size, width)
        if torch and not figures:
            print(f"largest difference of the two networks' velocities: {torch.check(steps):.1e}")
        rounds = [(steps(), torch.ask(f"step {name}") if torch else None) for _ in range(repeats + 2)][2:]
        ours = [mine for mine, _ in rounds]
        figures[name] = {"paddle_ms": 1e3 * statistics.median(ours)}
        if torch:
            figures[name]["torch_ms"] = 1e3 * statistics.median(other for _, other in rounds)
            figures[name]["torch_over_paddle"] = statistics.median(other / mine for mine, other in rounds)
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1, help="of both (%(default)s)")
    parser.add_argument("--torch_python", help="interpreter of an environment with PyTorch and numpy")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    paddle.base.core.set_num_threads(arguments.threads)
    settings = {"batch_size": arguments.batch_size, "width": arguments.width, "depth": Settings().depth}
    objectives = {name: options for name, (_, options) in OBJECTIVES.items()}
    settings |= {"image_size": IMAGE_SIZE["mnist"], "objectives": objectives}
    torch = TorchSteps(arguments.torch_python, settings, arguments.threads) if arguments.torch_python else None
    figures = measure(arguments.batch_size, arguments.width, arguments.repeats, torch)
    for name, row in figures.items():
        line = f"{name:10s} Paddle {row['paddle_ms']:7.1f} ms, {1e3 / row['paddle_ms']:5.2f} steps/s"
        if torch:
            line += f"; PyTorch {row['torch_ms']:7.1f} ms, {1e3 / row['torch_ms']:5.2f} steps/s"
            line += f"; PyTorch's time over Paddle's {row['torch_over_paddle']:.2f}"
        print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory: Paddle {peak:.0f} MiB" + (f", PyTorch {torch.ask('memory'):.0f} MiB" if torch else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "peak_mib": peak}, indent=1))


if __name__ == "__main__":
    main()
