"""The TwinFlow recipes of the families other than FLUX: dry runs, and training runs on tiny pipelines."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from distill.recipe import RECIPES, load_recipe
from distill.train_twinflow import main, train
from distill.twinflow import Recipe, TwinFlow
from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.models import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from fast_diffusers.pipelines import (
    Pipeline,
    QwenImagePipeline,
    SanaLabelPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UnifiedScheduler
from fast_diffusers.text_encoders import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3Model,
)

TEXT = Path(__file__).parents[1] / "assets" / "text_encoders"
SIZES = dict(num_layers=2, attention_head_dim=8, num_attention_heads=2)
DECODER = dict(
    vocab_size=500,
    hidden_size=12,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def autoencoder():
    """Two pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sd3():
    def clip(width):
        special = dict(vocab_size=726, bos_token_id=724, eos_token_id=725)
        sizes = dict(hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
        return CLIPTextModelWithProjection(**sizes, **special, projection_dim=4)

    transformer = SD3Transformer2DModel(
        **SIZES,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=clip(8),
        tokenizer=CLIPTokenizer.from_pretrained(TEXT / "clip" / "tokenizer"),
        text_encoder_2=clip(12),
        tokenizer_2=CLIPTokenizer.from_pretrained(TEXT / "clip" / "tokenizer"),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sana():
    transformer = SanaTransformer2DModel(
        **SIZES,
        in_channels=1,
        out_channels=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=10,
        sample_size=8,
        patch_size=2,
    )
    return SanaLabelPipeline(FlowMatchEulerDiscreteScheduler(), transformer, sample_size=8)


def qwen_image():
    transformer = QwenImageTransformer2DModel(
        **SIZES, in_channels=16, out_channels=4, joint_attention_dim=12, axes_dims_rope=(2, 2, 4)
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=(1, 1),
        num_res_blocks=1,
        temperal_downsample=(False,),
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen2_5_VLTextModel(**DECODER),
        tokenizer=Qwen2Tokenizer.from_pretrained(TEXT / "qwen3" / "tokenizer_json"),
        transformer=transformer,
    )


def z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=(2, 2, 4),
        axes_lens=(256, 16, 16),
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=Qwen3Model(**DECODER, head_dim=8),
        tokenizer=Qwen2Tokenizer.from_pretrained(TEXT / "qwen3" / "tokenizer_json"),
        transformer=transformer,
    )


@dataclass(frozen=True)
class Case:
    """How to make a tiny pipeline; the published model's size, and that of the adapter of the recipe."""

    build: Callable[[], Pipeline]
    parameters: int
    learned: int


CASES = {
    "twinflow_sd3_lora": Case(sd3, 2_243_171_520, 37_863_424),
    "twinflow_sana_lora": Case(sana, 1_604_462_752, 46_321_664),
    "twinflow_qwen_image_lora": Case(qwen_image, 20_430_401_088, 425_279_488),
    "twinflow_z_image_lora": Case(z_image, 6_154_908_736, 158_924_800),
}


@pytest.fixture(scope="module", params=CASES)
def name(request):
    """Of a recipe."""
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """Of a tiny pipeline with random weights, none of them zero."""
    paddle.seed(0)
    pipe = CASES[name].build()
    with paddle.no_grad():
        for weight in pipe.transformer.parameters():
            weight.set_value(weight + 0.1 * paddle.randn(weight.shape))
    path = tmp_path_factory.mktemp(name)
    pipe.save_pretrained(path, layout="diffusers")
    return path


def small(name, folder, output):
    """A step of the recipe, on the tiny pipeline and digits."""
    recipe = load_recipe(Recipe, name)
    return replace(
        recipe,
        model=replace(recipe.model, path=str(folder)),
        data=replace(recipe.data, kind="digits", path=None, height=8, width=8, num_workers=0),
        lora=replace(recipe.lora, rank=2, alpha=2),
        trainer=replace(
            recipe.trainer,
            steps=1,
            gradient_accumulation=5,
            dtype="float32",
            sample_every=1,
            sample_prompts=("7",),
            output_dir=str(output),
        ),
    )


def counts(printed):
    found = re.findall(r"^([a-z -]+?) +([\d,]+)$", printed, re.M)
    return {name.strip(): int(number.replace(",", "")) for name, number in found}


def test_every_family_has_a_case():
    recipes = {path.stem for path in RECIPES.glob("twinflow_*_lora.yaml")}
    assert recipes == CASES.keys() | {"twinflow_flux_lora"}


def test_dry_run_of_the_published_model(name, capsys):
    main(["--recipe", name, "--dry-run"])
    printed = capsys.readouterr().out
    assert counts(printed) == {"transformer": CASES[name].parameters, "trained": CASES[name].learned}
    total = float(re.search(r"^total +([\d.]+) GiB$", printed, re.M).group(1))
    assert total > 2 * CASES[name].parameters / 2**30


@pytest.mark.parametrize("changes", [{}, {"train": "full", "target_time": "auxiliary"}], ids=["adapter", "full"])
def test_dry_run_counts_what_is_trained(name, folder, changes, tmp_path, capsys):
    recipe = small(name, folder, tmp_path)
    recipe = replace(recipe, model=replace(recipe.model, **changes))
    method = TwinFlow(recipe, open_pipeline(folder), lambda: open_pipeline(folder))
    settings = [f"model.path={folder}", "lora.rank=2", "trainer.dtype=float32", "data.height=8", "data.width=8"]
    settings += [f"model.{key}={value}" for key, value in changes.items()]
    main(["--recipe", name, "--dry-run", *(word for each in settings for word in ("--set", each))])
    found = counts(capsys.readouterr().out)
    trained = sum(int(weight.size) for weight in method.student.parameters.values())
    assert found["trained"] + found.get("target-time embedding", 0) == trained


def test_trains_and_loads(name, folder, tmp_path):
    """The adapter of a training run changes what the pipeline draws, from either layout alike."""
    recipe = small(name, folder, tmp_path / "run")
    adapter = train(recipe)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    images = []
    for file in (None, "paddle_lora_weights.safetensors", "pytorch_lora_weights.safetensors"):
        pipe = open_pipeline(folder)
        pipe.set_progress_bar_config(disable=True)
        if file:
            pipe.load_lora_weights(adapter, weight_name=file)
            assert pipe.denoiser.takes_target_time
            weights = lora.state_dict(pipe.transformer, *lora.adapters(pipe.transformer))
            assert all(np.isfinite(each.numpy()).all() for each in weights.values())
        pipe.scheduler = UnifiedScheduler(style="few")
        size = {} if isinstance(pipe, SanaLabelPipeline) else {"height": 8, "width": 8}
        drawn = pipe(["7"], num_inference_steps=2, generator=Generator(0), output_type="latent", **size).images
        images.append(np.asarray(drawn))
    assert np.isfinite(images[0]).all() and not np.array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[1])


def test_unknown_models_are_refused():
    with pytest.raises(UserError, match=r"model nowhere not found: .*FLUX\.1-dev.*Qwen-Image.*Z-Image"):
        main(["--dry-run", "--set", "model.path=nowhere"])
