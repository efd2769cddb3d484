"""Pipelines on disk."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import FluxImg2ImgPipeline, FluxLabelPipeline, FluxPipeline, Pipeline
from fast_diffusers.random import Generator
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler, PhasedConsistencyScheduler

ASSETS = Path(__file__).parents[2] / "assets"
SUBFOLDERS = {"scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"}


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """The pipeline saved in diffusers' layout; copy it before changing it."""
    folder = tmp_path_factory.mktemp("pipeline") / "flux"
    pipe.save_pretrained(folder, layout="diffusers")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "flux")


def change_index(folder, **entries):
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: entry for name, entry in index.items() if entry is not ...}))


def generate(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        ["a cat", "a café, isn't it?"],
        height=32,
        width=32,
        num_inference_steps=4,
        generator=Generator(0),
        output_type="np",
        max_sequence_length=32,
    ).images


@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_is_exact(pipe, layout, tmp_path):
    pipe.save_pretrained(tmp_path, layout=layout)
    assert {path.name for path in tmp_path.iterdir()} == SUBFOLDERS | {"model_index.json"}
    images = generate(pipe)
    assert np.array_equal(images, generate(FluxPipeline.from_pretrained(tmp_path)))
    assert np.isfinite(images).all() and images.std() > 0


@pytest.fixture
def of_diffusers(tmp_path):
    """A whole pipeline saved by diffusers (tests/assets/make_flux_pipeline_golden.py), weights in float16."""
    folder = shutil.copytree(ASSETS / "flux_pipeline", tmp_path / "of_diffusers")
    text = ASSETS / "text_encoders"
    for number, source in [("", "clip"), ("_2", "t5")]:
        shutil.copytree(text / source, folder / f"text_encoder{number}")
        shutil.copytree(text / source / "tokenizer_json", folder / f"tokenizer{number}")
    return folder


def same_as_golden(pipe, folder, name, **options):
    """Whether the pipeline makes the images of a golden file."""
    golden = load_file(folder / name)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a cat, isn't it?", "a café in Zürich, ﬁlm grain"],
        guidance_scale=3.0,
        max_sequence_length=32,
        latents=paddle.to_tensor(load_file(folder / "output.safetensors")["latents"]),
        output_type="pd",
        **options,
    ).images
    return golden["images"].std() > 0.1 and np.abs(images.numpy() - golden["images"]).max() < 1e-5


def test_same_image_as_pytorch_diffusers(of_diffusers):
    pipe = FluxPipeline.from_pretrained(of_diffusers)
    assert same_as_golden(pipe, of_diffusers, "output.safetensors", height=32, width=48, num_inference_steps=4)


@pytest.mark.parametrize("cls", [FluxPipeline, FluxImg2ImgPipeline])
def test_same_change_of_an_image_as_pytorch_diffusers(of_diffusers, cls):
    """tests/assets/make_flux_img2img_golden.py: half of five steps is three, with the shift of the image's size."""
    image = load_file(of_diffusers / "img2img.safetensors")["picture"]
    options = dict(image=image, strength=0.5, num_inference_steps=5)
    assert same_as_golden(cls.from_pretrained(of_diffusers), of_diffusers, "img2img.safetensors", **options)


def test_diffusers_layout_names_the_pytorch_classes(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index == {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assert (saved / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (saved / "text_encoder_2" / "model.safetensors").is_file()


def test_reads_what_flux_1_dev_has(pipe, folder, caplog):
    """Its class names, its absent optional parts, and T5 in shards."""
    change_index(
        folder,
        _diffusers_version="0.30.0.dev0",
        tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "T5TokenizerFast"],
        image_encoder=[None, None],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    shutil.rmtree(folder / "text_encoder_2")
    pipe.text_encoder_2.save_pretrained(folder / "text_encoder_2", layout="diffusers", max_shard_size="10KB")
    assert (folder / "text_encoder_2" / "model-00001-of-00002.safetensors").is_file()
    with caplog.at_level(logging.WARNING):
        again = FluxPipeline.from_pretrained(folder)
    assert np.array_equal(generate(pipe), generate(again))
    assert [record.getMessage() for record in caplog.records if "has no part" in record.getMessage()] == [
        f"FluxPipeline has no part 'feature_extractor': the one in {folder} is not used"
    ]


def test_base_class_opens_any_pipeline(saved, digits, tmp_path):
    digits.save_pretrained(tmp_path)
    assert type(Pipeline.from_pretrained(tmp_path)) is FluxLabelPipeline
    assert type(Pipeline.from_pretrained(saved)) is FluxPipeline
    with pytest.raises(UserError, match="holds a FluxLabelPipeline, expected a pipeline of class FluxPipeline"):
        FluxPipeline.from_pretrained(tmp_path)


def test_components_can_be_passed_or_left_out(pipe, folder):
    for name in ("scheduler", "vae", "text_encoder"):
        shutil.rmtree(folder / name)
    scheduler = PhasedConsistencyScheduler()
    again = FluxPipeline.from_pretrained(folder, scheduler=scheduler, vae=None, text_encoder=None)
    assert again.scheduler is scheduler and again.vae is None and again.text_encoder is None
    assert set(again.components) == SUBFOLDERS
    again.save_pretrained(folder.parent / "again")
    third = FluxPipeline.from_pretrained(folder.parent / "again")
    assert third.vae is None and isinstance(third.scheduler, PhasedConsistencyScheduler)


@pytest.mark.parametrize("dtype", ["float64", paddle.bfloat16])
def test_dtype(folder, dtype):
    again = FluxPipeline.from_pretrained(folder, paddle_dtype=dtype)
    models = [again.transformer, again.vae, again.text_encoder, again.text_encoder_2]
    assert {str(model.parameters()[0].dtype).split(".")[-1] for model in models} == {str(dtype).split(".")[-1]}


def test_moves_with_to(folder):
    again = FluxPipeline.from_pretrained(folder, vae=None).to("cpu", paddle.float64)
    assert again.transformer.parameters()[0].dtype == again.text_encoder.parameters()[0].dtype == paddle.float64


@pytest.mark.parametrize("name", sorted(SUBFOLDERS))
def test_missing_subfolder(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(FileNotFoundError, match=f"{folder} has no folder '{name}' .*pass {name}=None"):
        FluxPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "entry, message",
    [
        (..., "model_index.json has no 'vae'; pass vae="),
        ("AutoencoderKL", r"'vae' should be \[library, class\], not 'AutoencoderKL'"),
        (
            ["diffusers", "AutoencoderTiny"],
            "'vae' is of class AutoencoderTiny, supported are AutoencoderDC, AutoencoderKL, .*pass vae=",
        ),
        (["diffusers", "FluxTransformer2DModel"], "holds a AutoencoderKL, not a FluxTransformer2DModel"),
    ],
)
def test_bad_index_entry(folder, entry, message):
    change_index(folder, vae=entry)
    with pytest.raises(UserError, match=message):
        FluxPipeline.from_pretrained(folder)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder; pass a local one"):
        FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
    with pytest.raises(FileNotFoundError, match="is not a pipeline: it has no model_index"):
        FluxPipeline.from_pretrained(tmp_path)
    change_index(folder, _class_name="StableDiffusionPipeline")
    with pytest.raises(UserError, match="holds a StableDiffusionPipeline, expected a pipeline of class FluxPipeline"):
        FluxPipeline.from_pretrained(folder)
    change_index(folder, _class_name=...)
    with pytest.raises(UserError, match="does not describe a pipeline: it has no _class_name"):
        FluxPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json is not valid JSON"):
        FluxPipeline.from_pretrained(folder)


def test_bad_components(pipe, folder):
    with pytest.raises(UserError, match=r"does not take \['unet'\]; its components are \['scheduler', 'vae',"):
        FluxPipeline.from_pretrained(folder, unet=None)
    with pytest.raises(UserError, match="FluxPipeline: vae must be of class AutoencoderKL, got FluxTransformer2DModel"):
        FluxPipeline.from_pretrained(folder, vae=pipe.transformer)


def test_saving_errors(pipe, tmp_path):
    with pytest.raises(UserError, match="layout must be one of paddle, diffusers, got 'torch'"):
        pipe.save_pretrained(tmp_path, layout="torch")
    phased = FluxPipeline(**pipe.components | {"scheduler": PhasedConsistencyScheduler()})
    with pytest.raises(UserError, match="PyTorch diffusers has no PhasedConsistencyScheduler"):
        phased.save_pretrained(tmp_path / "out", layout="diffusers")
    assert not (tmp_path / "out").exists()


def test_scheduler_config_survives(tmp_path, digits):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    FluxLabelPipeline(scheduler, digits.transformer).save_pretrained(tmp_path)
    again = FluxLabelPipeline.from_pretrained(tmp_path).scheduler
    assert again.config.shift == 3.0 and again.config.use_dynamic_shifting
