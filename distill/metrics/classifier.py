"""The small convolutional classifier whose features and labels measure samples of the embedded data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fast_diffusers.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"
FEATURE_DIM = 64


class ImageClassifier(nn.Layer):
    """Convolutions, halving the map down to 4x4, then a 64-dimensional feature and the class logits.

    The feature is standardised by a batch norm without affine parameters: each coordinate has about unit variance, so
    that distances on different data sets are in the same unit. Smaller images get a black margin, as MNIST's 28 x 28 in
    a model of 32 x 32.

    Args:
        image_size: side of the training images in pixels.
        widths: channels of each convolution stage; every stage after the first halves the map.
    """

    def __init__(self, image_size: int, widths: tuple[int, ...], num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.config = {
            "image_size": image_size,
            "widths": list(widths),
            "num_classes": num_classes,
            "channels": channels,
        }
        layers: list[nn.Layer] = []
        previous, size = channels, image_size
        for index, width in enumerate(widths):
            stride = 1 if index == 0 else 2
            layers += [
                nn.Conv2D(previous, width, 3, stride=stride, padding=1, bias_attr=False),
                nn.BatchNorm2D(width),
                nn.ReLU(),
            ]
            previous, size = width, -(-size // stride)
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.feature = nn.Linear(previous * size * size, FEATURE_DIM)
        self.standardise = nn.BatchNorm1D(FEATURE_DIM, weight_attr=False, bias_attr=False)
        self.head = nn.Linear(FEATURE_DIM, num_classes)

    def forward(self, images: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """images [B, C, H, W] in [-1, 1] -> (features [B, 64], logits [B, num_classes]), float32."""
        hidden = self.dropout(self.body(self._with_margin(images)).flatten(1))
        features = self.standardise(self.feature(hidden))
        return features, self.head(F.relu(features))

    def _with_margin(self, images: paddle.Tensor) -> paddle.Tensor:
        size, channels = self.config["image_size"], self.config["channels"]
        if images.ndim != 4 or images.shape[1] != channels or max(images.shape[2:]) > size:
            raise UserError(
                f"this classifier takes images [B, {channels}, H, W] of at most {size} x {size} pixels, "
                f"got {list(images.shape)}"
            )
        rows, columns = size - images.shape[2], size - images.shape[3]
        margins = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        return F.pad(images, margins, value=-1.0) if any(margins) else images

    def save(self, path: str | Path) -> None:
        """Write every parameter and buffer to a safetensors file with the constructor's arguments in its header."""
        tensors = {name: tensor.numpy() for name, tensor in self.state_dict().items()}
        Path(path).write_bytes(save(tensors, metadata={"config": json.dumps(self.config)}))

    @classmethod
    def load(cls, path: str | Path) -> ImageClassifier:
        """The classifier saved at `path`, in evaluation mode; FileNotFoundError or UserError names what is wrong."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no classifier weights at {path}; train them with distill/train_classifier.py")
        try:
            with safe_open(str(path), framework="np") as file:
                config = json.loads((file.metadata() or {}).get("config", "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not a readable classifier file: {error}") from error
        if not config:
            raise UserError(f"{path} was not written by distill/train_classifier.py: its header has no config")
        model = cls(**config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        wrong = sorted(name for name in expected.keys() | state.keys() if expected.get(name) != _shape(state.get(name)))
        if wrong:
            raise UserError(f"{path} does not fit its own config {config}: wrong tensors {', '.join(wrong)}")
        model.set_state_dict(state)
        model.eval()
        return model


def _shape(array: np.ndarray | None) -> tuple[int, ...] | None:
    return None if array is None else array.shape


def shipped_classifier(data: str) -> ImageClassifier:
    """The classifier that ships with the project for `data` ("digits" or "mnist")."""
    known = sorted(path.stem.removeprefix("classifier_") for path in ASSETS.glob("classifier_*.safetensors"))
    if data not in known:
        raise UserError(f"no classifier ships for data {data!r}; there is one for: {', '.join(known)}")
    return ImageClassifier.load(ASSETS / f"classifier_{data}.safetensors")
