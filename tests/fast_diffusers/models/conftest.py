import paddle
import pytest

from fast_diffusers.models import FluxTransformer2DModel

CONFIG = dict(
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    pooled_projection_dim=5,
    axes_dims_rope=(2, 2, 4),
)


@pytest.fixture
def tiny_flux():
    """Factory of tiny FLUX models in which no weight is zero; keyword arguments override the config."""

    def build(seed=0, **overrides):
        paddle.seed(seed)
        model = FluxTransformer2DModel(**{**CONFIG, **overrides})
        with paddle.no_grad():
            for weight in model.parameters():
                weight.set_value(weight + 0.2 * paddle.randn(weight.shape, dtype=weight.dtype))
        return model

    return build


@pytest.fixture
def flux_inputs():
    """Factory of forward arguments for the tiny model: two samples, 3 x 4 image tokens, 3 text tokens."""

    def build(guidance=False, dtype="float32", batch=2):
        paddle.seed(1)
        rows, columns = paddle.meshgrid(paddle.arange(3), paddle.arange(4))
        positions = paddle.stack([paddle.zeros_like(rows), rows, columns], axis=-1)
        inputs = dict(
            hidden_states=paddle.randn([batch, 12, 4], dtype=dtype),
            encoder_hidden_states=paddle.randn([batch, 3, 6], dtype=dtype),
            pooled_projections=paddle.randn([batch, 5], dtype=dtype),
            timestep=paddle.linspace(0.2, 0.9, batch).astype(dtype),
            img_ids=positions.reshape([12, 3]).astype("float32"),
            txt_ids=paddle.zeros([3, 3]),
        )
        return inputs | (dict(guidance=paddle.full([batch], 3.5, dtype=dtype)) if guidance else {})

    return build
