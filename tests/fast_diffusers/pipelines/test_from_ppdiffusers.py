import numpy as np
import paddle
import pytest
from ppdiffusers import DDIMScheduler, DDPMPipeline

from fast_diffusers.errors import UserError
from fast_diffusers.models import SD3Transformer2DModel
from fast_diffusers.pipelines import StableDiffusion3Pipeline, from_ppdiffusers

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def images(pipe, **more):
    paddle.seed(0)
    call = dict(height=32, width=32, guidance_scale=3.0, negative_prompt="a dog", latents=paddle.randn([1, 4, 8, 8]))
    return pipe("a cat on a mat", output_type="np", **call | more).images


def test_same_images_from_the_same_weights(theirs):
    pipe = from_ppdiffusers(theirs)
    assert type(pipe) is StableDiffusion3Pipeline and pipe.transformer is theirs.transformer
    for name in MODELS:
        weights = getattr(theirs, name).state_dict()
        assert all(weight is weights[key] for key, weight in getattr(pipe, name).state_dict().items()), name
    pipe.set_progress_bar_config(disable=True)
    sigmas = np.linspace(1, theirs.scheduler.sigma_min, 3)
    mine = images(pipe, sigmas=sigmas, max_sequence_length=77)
    np.testing.assert_allclose(mine, images(theirs, num_inference_steps=3), atol=2e-5)


def test_parts_may_be_absent(theirs):
    theirs.text_encoder_3 = theirs.tokenizer_3 = theirs.vae = None
    pipe = from_ppdiffusers(theirs)
    assert pipe.vae is None and pipe.text_encoder_3 is None


def test_folders_of_ppdiffusers_are_read(sd3, theirs, tmp_path):
    theirs.save_pretrained(str(tmp_path), safe_serialization=True)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    for name in MODELS:
        expected, model = getattr(sd3, name).state_dict(), getattr(pipe, name)
        assert model.state_dict().keys() == expected.keys()
        assert all(paddle.equal_all(weight, expected[key]) for key, weight in model.state_dict().items()), name
    pipe.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(images(pipe), images(sd3), atol=1e-6)


def test_biases_that_only_ppdiffusers_has_are_not_dropped_silently(theirs, tmp_path):
    theirs.transformer.norm_out.norm.bias.set_value(paddle.ones([32]))
    theirs.transformer.save_pretrained(str(tmp_path), safe_serialization=True)
    with pytest.raises(UserError, match=r"trained in ppdiffusers with biases .* norm_out\.norm\.bias"):
        SD3Transformer2DModel.from_pretrained(tmp_path)


def test_other_pipelines_are_refused(theirs):
    with pytest.raises(UserError, match="got DDPMPipeline"):
        from_ppdiffusers(DDPMPipeline(paddle.nn.Linear(1, 1), DDIMScheduler()))
    theirs.vae = theirs.text_encoder
    with pytest.raises(UserError, match="vae is a CLIPTextModelWithProjection"):
        from_ppdiffusers(theirs)
