"""The Inception v3 network of the Fréchet Inception Distance, with the parameter names of pytorch-fid.

It is TensorFlow's 2015-12-05 network (Szegedy et al. 2015; the one that FID is defined with, Heusel et al. 2017). It
differs from torchvision's in its weights and in the pooling branches: average pooling leaves the padding out, and the
last block pools by maximum. Batch norms are folded into the convolutions when the weights are read.

pytorch-fid publishes the weights as a pickled torch file. Convert it once, where torch is installed:

    python -c "import torch, safetensors.torch as s; \\
        s.save_file(torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True), 'inception.safetensors')"
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from safetensors import SafetensorError, safe_open

from fast_diffusers.errors import UserError

FEATURE_DIM = 2048
IMAGE_SIZE = 299
BATCH_NORM_EPSILON = 1e-3

Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel] | tuple[str, int, Kernel, int]
"""A convolution of a branch: name, output channels, kernel, stride (1)."""


def _average_pool(x: paddle.Tensor) -> paddle.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, exclusive=True)


def _max_pool(x: paddle.Tensor) -> paddle.Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halving_max_pool(x: paddle.Tensor) -> paddle.Tensor:
    return F.max_pool2d(x, 3, stride=2)


class ConvReLU(nn.Conv2D):
    """Convolution (its batch norm folded in) and ReLU; padded to keep the size unless it is strided."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Kernel, stride: int = 1, padded: bool = True):
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded and stride == 1 else 0
        super().__init__(in_channels, out_channels, (rows, columns), stride=stride, padding=padding)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(super().forward(x))


class Mixed(nn.Layer):
    """Parallel branches, concatenated along the channels.

    Args:
        branches: each a chain of steps; a list inside a chain is a fork, steps that read the same input and are
            concatenated.
        pool: pooling of the last branch, followed by a 1x1 convolution to `pool_channels` unless that is 0.
    """

    def __init__(
        self,
        in_channels: int,
        branches: list[list[Step | list[Step]]],
        pool: Callable[[paddle.Tensor], paddle.Tensor],
        pool_channels: int = 0,
    ):
        super().__init__()
        self.pool, self.chains, self.out_channels = pool, [], 0
        for branch in branches:
            chain, channels = [], in_channels
            for entry in branch:
                fork = entry if isinstance(entry, list) else [entry]
                for name, *convolution in fork:
                    self.add_sublayer(name, ConvReLU(channels, *convolution))
                chain.append([name for name, *_ in fork])
                channels = sum(width for _, width, *_ in fork)
            self.chains.append(chain)
            self.out_channels += channels
        self.branch_pool = ConvReLU(in_channels, pool_channels, 1) if pool_channels else None
        self.out_channels += pool_channels or in_channels

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        outputs = []
        for chain in self.chains:
            hidden = x
            for names in chain:
                results = [getattr(self, name)(hidden) for name in names]
                hidden = results[0] if len(results) == 1 else paddle.concat(results, axis=1)
            outputs.append(hidden)
        pooled = self.pool(x)
        outputs.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
        return paddle.concat(outputs, axis=1)


def _mixed_35(in_channels: int, pool_channels: int) -> Mixed:
    """35 x 35 blocks (5b, 5c, 5d)."""
    branches = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return Mixed(in_channels, branches, _average_pool, pool_channels)


def _mixed_17(inner: int) -> Mixed:
    """17 x 17 blocks (6b to 6e) with factorised 7 x 7 convolutions of `inner` channels."""
    row, column = (1, 7), (7, 1)
    double = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row)]
    branches = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [*double, ("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)],
    ]
    return Mixed(768, branches, _average_pool, 192)


def _mixed_8(in_channels: int, pool: Callable[[paddle.Tensor], paddle.Tensor]) -> Mixed:
    """8 x 8 blocks (7b, 7c)."""
    row, column = (1, 3), (3, 1)
    branches = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ],
    ]
    return Mixed(in_channels, branches, pool, 192)


class InceptionV3(nn.Layer):
    """RGB images to the 2048 features after the last average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvReLU(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvReLU(80, 192, 3, padded=False)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]
        self.Mixed_6a = Mixed(288, [[("branch3x3", 384, 3, 2)], double], _halving_max_pool)
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        sevens = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
        branches = [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)], [*sevens, ("branch7x7x3_4", 192, 3, 2)]]
        self.Mixed_7a = Mixed(768, branches, _halving_max_pool)
        self.Mixed_7b = _mixed_8(1280, _average_pool)
        self.Mixed_7c = _mixed_8(2048, _max_pool)

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        """images [B, 3, H, W] in [-1, 1], any size -> features [B, 2048]; resized to 299 x 299 as pytorch-fid does."""
        x = F.interpolate(images, size=[IMAGE_SIZE, IMAGE_SIZE], mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean([2, 3])

    @classmethod
    def load(cls, path: str | Path) -> InceptionV3:
        """Read FID weights from a safetensors file (see the module's docstring), in evaluation mode.

        Tensors are `<layer>.conv.weight` and `<layer>.bn.{weight,bias,running_mean,running_var}`; the classification
        head is left out.

        Raises:
            FileNotFoundError: no such file.
            UserError: not safetensors, torchvision's ImageNet weights, or a missing, extra or misshapen tensor.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no Inception weights at {path}")
        try:
            with safe_open(str(path), framework="np") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise UserError(
                f"{path} is not a readable safetensors file ({error}); convert pytorch-fid's weights first"
            ) from error
        if any(name.startswith("AuxLogits.") for name in state):
            raise UserError(f"{path} holds torchvision's ImageNet weights; FID needs those of pytorch-fid")
        model = cls()
        model.set_state_dict(_fold_batch_norms(state, model, path))
        model.eval()
        return model


def _fold_batch_norms(state: dict[str, np.ndarray], model: InceptionV3, path: Path) -> dict[str, np.ndarray]:
    """{layer.weight, layer.bias} of every convolution, with its batch norm's scale and shift multiplied in."""
    used, folded, problems = set(), {}, []
    for layer, module in model.named_sublayers():
        if not isinstance(module, ConvReLU):
            continue
        channels = (module.weight.shape[0],)
        shapes = {"conv.weight": tuple(module.weight.shape), "bn.weight": channels, "bn.bias": channels}
        shapes |= {"bn.running_mean": channels, "bn.running_var": channels}
        names = {f"{layer}.{suffix}": shape for suffix, shape in shapes.items()}
        used |= names.keys()
        wrong = [
            f"{name} is missing" if name not in state else f"{name} is {list(state[name].shape)}, not {list(shape)}"
            for name, shape in names.items()
            if name not in state or state[name].shape != shape
        ]
        problems += wrong
        if not wrong:
            weight, gamma, beta, mean, variance = (state[name].astype(np.float64) for name in names)
            scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
            folded[f"{layer}.weight"] = (weight * scale[:, None, None, None]).astype(np.float32)
            folded[f"{layer}.bias"] = (beta - mean * scale).astype(np.float32)
    ignored = {name for name in state if name.startswith("fc.") or name.endswith(".num_batches_tracked")}
    problems += [f"{name} is unknown" for name in sorted(state.keys() - used - ignored)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} does not hold the FID Inception weights: {'; '.join(problems[:5])}{more}")
    return folded
