"""The learned weighting of a loss over time."""

import math

import paddle
from paddle import Tensor, nn

from distill.objectives.trigflow import STEEPEST
from fast_diffusers.models.layers import sinusoid, zero_linear


class LogVariance(nn.Layer):
    """ℓ(t) for losses exp(−ℓ)·error + ℓ: angles [B] of TrigFlow to [B] (EDM2, arXiv 2312.02696, eq. 21).

    A linear layer on sines and cosines of ln tan t, the logarithm of the noise-to-data ratio, in which the best
    weighting changes evenly from data to noise; angles themselves crowd at both ends.

    The error of sCM's normalised tangent is about 1 / `num_elements` (of a row), so that the best ℓ is near
    −ln `num_elements`, where it starts. Starting at 0 leaves the loss that many times too weak for long.

    Args:
        num_elements: number of elements of a row, C·H·W.
    """

    def __init__(self, num_elements: int):
        super().__init__()
        if num_elements < 1:
            raise ValueError(f"num_elements must be at least 1, got {num_elements}")
        self.inputs = 256
        self.linear = zero_linear(self.inputs, 1)
        self.linear.bias.set_value(paddle.full([1], -math.log(num_elements), self.linear.bias.dtype))

    def forward(self, angle: Tensor) -> Tensor:
        position = paddle.log(paddle.tan(angle).clip(1 / STEEPEST, STEEPEST))
        return self.linear(sinusoid(position, self.inputs).astype(self.linear.weight.dtype)).squeeze(-1)
