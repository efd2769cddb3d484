import paddle
from ppdiffusers import SD3Transformer2DModel

from fast_diffusers.denoisers import SD3Denoiser, denoiser_for
from fast_diffusers.models import SD3Transformer2DModel as OwnSD3Transformer2DModel
from fast_diffusers.random import Generator, randn

CONFIG = dict(
    sample_size=8,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=6,
    caption_projection_dim=16,
    pooled_projection_dim=4,
    out_channels=4,
    pos_embed_max_size=8,
)


def test_ppdiffusers_own_class():
    """It has the same weights and gives the same velocities and features, at negative times too."""
    theirs, ours = SD3Transformer2DModel(**CONFIG), OwnSD3Transformer2DModel(**CONFIG)
    theirs.eval()
    for seed, (name, weight) in enumerate(ours.named_parameters()):
        value = 0.2 * randn(weight.shape, Generator(seed))
        weight.set_value(value)
        theirs.state_dict()[name].set_value(value)
    adapters = [denoiser_for(model) for model in (theirs, ours)]
    assert [type(each) for each in adapters] == [SD3Denoiser] * 2 and not adapters[0].embeds_guidance
    x, t = randn([2, 4, 8, 8], Generator(100)), paddle.to_tensor([0.9, -0.3])
    cond = {"prompt_embeds": randn([2, 5, 6], Generator(101)), "pooled_prompt_embeds": randn([2, 4], Generator(102))}
    made = [[each(x, t, cond), *each.features(x, t, cond)] for each in adapters]
    for a, b in zip(*made, strict=True):
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())
