from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import nn

from fast_diffusers import lora

WIDTH = 12


class Attention(nn.Layer):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, 2 * WIDTH)
        self.to_out = nn.LayerList([nn.Linear(2 * WIDTH, WIDTH)])

    def forward(self, x):
        return self.to_out[0](nn.functional.gelu(self.to_q(x)))


class Block(nn.Layer):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.my_attn = Attention()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.my_attn(self.norm(x + self.attn(x)))


class Toy(nn.Layer):
    """Two blocks and a projection; x [B, 12] -> [B, 5]."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.LayerList([Block(), Block()])
        self.proj_out = nn.Linear(WIDTH, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


def randomize(model: nn.Layer, name: str, seed: int) -> None:
    """Random values in both factors, so that the adapter does something."""
    rng = np.random.default_rng(seed)
    for parameter in lora.parameters(model, name):
        parameter.set_value(0.3 * rng.standard_normal(parameter.shape).astype(np.float32))


@pytest.fixture
def make_toy() -> Callable[[], Toy]:
    """Builds the same toy every time."""

    def make() -> Toy:
        paddle.seed(0)
        return Toy()

    return make


@pytest.fixture
def toy(make_toy) -> Toy:
    return make_toy()


@pytest.fixture
def x() -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(1).standard_normal([3, WIDTH]).astype(np.float32))


@pytest.fixture
def add_adapter() -> Callable[..., list[paddle.Tensor]]:
    """Injects an adapter that is not zero."""

    def add(model, name="default", rank=3, alpha=2.0, targets=("attn.to_q", "proj_out"), seed=7):
        parameters = lora.inject(model, rank, alpha, targets, name)
        randomize(model, name, seed)
        return parameters

    return add
