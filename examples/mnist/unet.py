"""A U-Net for small images whose every operation is fast on a CPU.

Two levels, patches of 2 x 2 pixels and patches of 4 x 4. Instead of convolutions, learned matrices mix the positions
(MLP-Mixer, arXiv 2105.01601): digits are centred, so little is lost, and a forward is hardly more than large matrix
products. Hidden states are [S, B, C], positions first: then mixing positions, [S', S] @ [S, B·C], mixing channels,
[S·B, C] @ [C, C'], and changing level are one product each, and no hidden state is ever transposed.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fast_diffusers.errors import UserError

NUM_CLASSES = 10
NO_LABEL = NUM_CLASSES
FREQUENCIES = 16


class UNet(nn.Layer):
    """Velocity v = model(x, t, cond, target_t=...): a `fast_diffusers.denoisers.Denoiser`, float32.

    Args:
        image_size: pixels an edge, a multiple of 4 (28 for MNIST, 8 for scikit-learn's digits).
        width: channels of the 2 x 2 patches; the 4 x 4 patches have four times as many.
        depth: blocks on the 4 x 4 patches; there is one on the 2 x 2 patches on either side.
    """

    def __init__(self, image_size: int = 28, width: int = 32, depth: int = 3):
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise UserError(f"image_size must be a multiple of 4, got {image_size}")
        if width < 1 or depth < 1:
            raise UserError(f"width and depth must be positive, got {width} and {depth}")
        self.config = {"image_size": image_size, "width": width, "depth": depth}
        fine, coarse, deep = (image_size // 2) ** 2, (image_size // 4) ** 2, 4 * width
        self.embedding = Embedding(deep)
        self.enter = _product(4, width)
        self.first = Block(fine, width, deep)
        self.down = _product(deep, deep)
        self.middle = nn.LayerList([Block(coarse, deep, deep) for _ in range(depth)])
        self.up = _product(deep, deep)
        self.last = Block(fine, width, deep)
        self.leave = _product(width, 4, gain=0.0)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity [B, 1, H, W] at state x [B, 1, H, W] and time t, a number or [B], negative on the twin branch.

        cond: `label`, int64 [B], where NO_LABEL or none at all is any digit. target_t: the time to which the velocity
        leads, t if None. guidance: ignored.
        """
        batch, size = x.shape[0], self.config["image_size"]
        if list(x.shape[1:]) != [1, size, size]:
            raise ValueError(f"this U-Net takes images [B, 1, {size}, {size}], got {list(x.shape)}")
        t = _per_row(t, batch)
        label = cond["label"] if "label" in cond else paddle.full([batch], NO_LABEL, dtype="int64")
        e = self.embedding(t, t if target_t is None else _per_row(target_t, batch), label)

        fine = self.first(self.enter(to_patches(x.astype("float32"))), e)
        h = self.down(_join(fine))
        for block in self.middle:
            h = block(h, e)
        h = fine + _split(self.up(h))
        return from_patches(self.leave(self.last(h, e)), size)

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file with the constructor's arguments in its header."""
        tensors = {name: tensor.numpy() for name, tensor in self.state_dict().items()}
        Path(path).write_bytes(save(tensors, metadata={"config": json.dumps(self.config)}))

    @classmethod
    def load(cls, path: str | Path) -> "UNet":
        """Read what `save` wrote. UserError for a file that is not whole, or not such a file."""
        try:
            with safe_open(path, "numpy") as file:
                model = cls(**json.loads((file.metadata() or {})["config"]))
                weights = {name: paddle.to_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a model of examples/mnist/train.py ({error})") from error
        missing, unexpected = model.set_state_dict(weights)
        if missing or unexpected:
            raise UserError(f"{path} does not fit its own configuration: {[*missing, *unexpected][:3]}")
        return model


class Embedding(nn.Layer):
    """Time, target time and label as [B, C]: sines and cosines of both times, a row for each label, and an MLP."""

    def __init__(self, channels: int):
        super().__init__()
        self.times = nn.Linear(4 * FREQUENCIES, channels)
        self.labels = nn.Embedding(NUM_CLASSES + 1, channels, weight_attr=_normal(1.0))
        self.out = nn.Linear(channels, channels)
        # Periods from 4, so that times from -1 to 1 are all different, down to 4 / 2^7.5.
        octaves = paddle.arange(FREQUENCIES, dtype="float32") / 2
        self.register_buffer("frequencies", 2 * math.pi / 4 * 2**octaves, persistable=False)

    def forward(self, t: Tensor, target_t: Tensor, label: Tensor) -> Tensor:
        """t, target_t [B], label [B] -> [B, C]."""
        angles = [time.unsqueeze(1) * self.frequencies for time in (t, t - target_t)]
        waves = paddle.concat([wave(angle) for angle in angles for wave in (paddle.sin, paddle.cos)], axis=1)
        return F.silu(self.out(F.silu(self.times(waves) + self.labels(label))))


class Block(nn.Layer):
    """Residual mixing of positions and of channels, side by side; the embedding scales and shifts what both read."""

    def __init__(self, positions: int, channels: int, embedding: int):
        super().__init__()
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.mix_in = self.create_parameter([positions, positions], attr=_normal(1 / math.sqrt(positions)))
        self.mix_out = self.create_parameter([positions, positions], attr=_normal(0.1 / math.sqrt(positions)))
        self.expand = _product(channels, 2 * channels)
        self.contract = _product(2 * channels, channels, gain=0.1)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """h [S, B, C], e [B, E] -> [S, B, C]."""
        s, b, c = h.shape
        scale, shift = self.modulation(e).chunk(2, axis=1)
        x = modulate(rms_norm(h), scale, shift)
        mixed = paddle.matmul(self.mix_out, F.relu(paddle.matmul(self.mix_in, x.reshape([s, b * c]))))
        return h + mixed.reshape([s, b, c]) + self.contract(F.relu(self.expand(x)))


def rms_norm(h: Tensor) -> Tensor:
    """h [..., C] over the root of its mean square; sums and broadcasts are products, whose gradients are fast."""
    c = h.shape[-1]
    inverse = paddle.rsqrt(paddle.matmul(h * h, paddle.full([c, 1], 1 / c)) + 1e-6)
    return h * paddle.matmul(inverse, paddle.ones([1, c]))


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """h·(1 + scale) + shift for h [S, B, C] and scale, shift [B, C]."""
    return h * along_positions(1 + scale, h.shape[0]) + along_positions(shift, h.shape[0])


def along_positions(x: Tensor, positions: int) -> Tensor:
    """[B, C] -> [S, B, C] as an outer product: its gradient is a product too, where that of a broadcast is slow."""
    return paddle.matmul(paddle.ones([positions, 1]), x.reshape([1, -1])).reshape([positions, *x.shape])


def to_patches(x: Tensor) -> Tensor:
    """[B, 1, H, W] -> [S, B, 4], S = (row, column of the 2 x 2 patch in its 4 x 4 patch, row, column of that)."""
    b, _, height, width = x.shape
    pixels = x.reshape([b, height // 4, 2, 2, width // 4, 2, 2])
    return pixels.transpose([2, 5, 1, 4, 0, 3, 6]).reshape([height * width // 4, b, 4])


def from_patches(h: Tensor, size: int) -> Tensor:
    """The inverse of `to_patches`."""
    b, n = h.shape[1], size // 4
    return h.reshape([2, 2, n, n, b, 2, 2]).transpose([4, 2, 0, 5, 3, 1, 6]).reshape([b, 1, size, size])


def _join(h: Tensor) -> Tensor:
    return paddle.concat(h.chunk(4), axis=-1)


def _split(h: Tensor) -> Tensor:
    return paddle.concat(h.chunk(4, axis=-1), axis=0)


def _product(rows: int, columns: int, gain: float = 1.0) -> nn.Linear:
    """A linear map without bias: the shifts that the embedding gives do what biases would, at less cost."""
    return nn.Linear(rows, columns, weight_attr=_normal(gain / math.sqrt(rows)), bias_attr=False)


def _normal(std: float) -> paddle.ParamAttr:
    return paddle.ParamAttr(initializer=nn.initializer.Normal(0.0, std))


def _per_row(t: Tensor | float, batch: int) -> Tensor:
    t = t if isinstance(t, Tensor) else paddle.to_tensor(t)
    return t.astype("float32").reshape([-1]).expand([batch])
