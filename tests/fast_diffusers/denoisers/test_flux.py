"""What FLUX's adapter has beyond test_contract.py: two kinds of blocks, and a model without guidance."""

import paddle
import pytest

TIME = paddle.to_tensor([0.9, 0.3])


@pytest.fixture
def flux(families):
    return families["flux"]


def test_last_feature_map_leads_to_the_velocity(flux):
    """The single blocks hold text and image in one sequence."""
    denoiser, x, cond = flux.build(), flux.x(), flux.cond()
    last = denoiser.features(x, TIME, cond, [denoiser.num_taps - 1], guidance=3.5)[0]
    model = denoiser.transformer
    temb = model.embed_conditioning(TIME, paddle.to_tensor([3.5, 3.5]), cond["pooled_prompt_embeds"])
    tokens = model.project_out(last.flatten(2).transpose([0, 2, 1]), temb)
    assert paddle.allclose(tokens, flux.tokens(denoiser(x, TIME, cond, guidance=3.5)), atol=1e-5)


def test_a_model_without_guidance_embedding(flux):
    schnell = flux.build(guidance_embeds=False)
    assert not schnell.embeds_guidance
    assert schnell(flux.x(), TIME, flux.cond()).shape == list(flux.shape)
    with pytest.raises(ValueError, match="does not take `guidance`"):
        schnell(flux.x(), TIME, flux.cond(), guidance=3.5)
