import paddle
import pytest

from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines import FluxLabelPipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """Folder of a random FLUX label pipeline, 8×8 gray, two blocks."""
    paddle.seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    for parameter in transformer.parameters():  # the zero-initialised output would hide everything behind it
        parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("teacher")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    FluxLabelPipeline(scheduler, transformer).save_pretrained(folder)
    return folder
