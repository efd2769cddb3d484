"""LPIPS, the distance of images in the features of AlexNet (Zhang et al. 2018, arXiv 1801.03924, version 0.1).

The `lpips` package has the weights in two pickled files. Convert them once, where it is installed:

    python -c "import lpips, safetensors.torch as s; \\
        m = lpips.LPIPS(net='alex'); m.eval(); \\
        s.save_file({k: v for k, v in m.state_dict().items() if not k.startswith('lins.')}, 'lpips_alex.safetensors')"
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill.data.transforms import normalise
from fast_diffusers.errors import UserError

SMALLEST = 31  # pixels that leave the last layer one
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10  # of the norms

# Number in torchvision's `alexnet().features`, slice in the package, channels in and out, kernel, stride, padding
LAYERS = (
    (0, 1, 3, 64, 11, 4, 2),
    (3, 2, 64, 192, 5, 1, 2),
    (6, 3, 192, 384, 3, 1, 1),
    (8, 4, 384, 256, 3, 1, 1),
    (10, 5, 256, 256, 3, 1, 1),
)
POOLED = (3, 6)  # layers that read a smaller map, by maximum


class LPIPS(nn.Layer):
    """The sum over layers of the weighted mean square difference of features of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.LayerList(
            [nn.Conv2D(entry, out, kernel, stride, padding) for _, _, entry, out, kernel, stride, padding in LAYERS]
        )
        self.weights = nn.ParameterList([self.create_parameter([1, out, 1, 1]) for _, _, _, out, *_ in LAYERS])

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances [N] of images [N, 3, H, W] in [-1, 1]."""
        total = paddle.zeros([len(first)])
        for weight, a, b in zip(self.weights, self.features(first), self.features(second), strict=True):
            total += ((a - b).square() * weight).sum(axis=1).mean(axis=[1, 2])
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """What each layer gives, [N, C, h, w], scaled to unit length along C."""
        x = (images - paddle.to_tensor(SHIFT).reshape([3, 1, 1])) / paddle.to_tensor(SCALE).reshape([3, 1, 1])
        outputs = []
        for (number, *_), convolution in zip(LAYERS, self.convolutions, strict=True):
            x = F.relu(convolution(F.max_pool2d(x, 3, stride=2) if number in POOLED else x))
            outputs.append(x / (x.square().sum(axis=1, keepdim=True).sqrt() + EPSILON))
        return outputs

    @paddle.no_grad()
    def distances(self, images: np.ndarray, reference: np.ndarray, batch_size: int = 50) -> np.ndarray:
        """Of images uint8 [N, 1 or 3, H, W] to those of `reference`, one by one, float32 [N]. UserError if small."""
        if min(images.shape[2:]) < SMALLEST:
            raise UserError(f"LPIPS takes images of at least {SMALLEST} pixels an edge, these have {images.shape[2:]}")

        def tensor(part: np.ndarray) -> Tensor:
            return paddle.to_tensor(normalise(np.broadcast_to(part, (len(part), 3, *part.shape[2:]))))

        starts = range(0, len(images), batch_size)
        parts = [self(*(tensor(x[start : start + batch_size]) for x in (images, reference))) for start in starts]
        return np.concatenate([part.numpy() for part in parts])

    @classmethod
    def load(cls, path: str | Path) -> LPIPS:
        """Read weights from a safetensors file (see the module's docstring), in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            UserError: not safetensors, or a missing or misshapen tensor.
        """
        path, model = Path(path), cls()
        if not path.is_file():
            raise FileNotFoundError(f"no LPIPS weights at {path}")
        try:
            given = load_file(path)
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a readable safetensors file ({error}); see distill/metrics/lpips.py"
            ) from error
        state = {}
        for index, (number, part, *_) in enumerate(LAYERS):
            state[f"weights.{index}"] = f"lin{index}.model.1.weight"
            for name in ("weight", "bias"):
                state[f"convolutions.{index}.{name}"] = f"net.slice{part}.{number}.{name}"
        for name, tensor in model.state_dict().items():
            shape = given[state[name]].shape if state[name] in given else None
            if shape != tuple(tensor.shape):
                problem = "is missing" if shape is None else f"is {list(shape)}, not {list(tensor.shape)}"
                raise UserError(f"{path} does not hold LPIPS's AlexNet: {state[name]} {problem}")
        model.set_state_dict({name: given[key] for name, key in state.items()})
        model.eval()
        return model
