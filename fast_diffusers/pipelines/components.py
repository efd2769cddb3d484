"""The parts of a pipeline on disk: model_index.json and one subfolder for each component."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from paddle import nn
from ppdiffusers import SchedulerMixin

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import read_json, write_text

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
LAYOUTS = ("paddle", "diffusers")

CLASSES: Mapping[str, tuple[str, str]] = {
    "AutoencoderDC": ("fast_diffusers.models", "AutoencoderDC"),
    "AutoencoderKL": ("fast_diffusers.models", "AutoencoderKL"),
    "AutoencoderKLQwenImage": ("fast_diffusers.models", "AutoencoderKLQwenImage"),
    "CLIPTextModel": ("fast_diffusers.text_encoders", "CLIPTextModel"),
    "CLIPTextModelWithProjection": ("fast_diffusers.text_encoders", "CLIPTextModelWithProjection"),
    "CLIPTokenizer": ("fast_diffusers.text_encoders", "CLIPTokenizer"),
    "CLIPTokenizerFast": ("fast_diffusers.text_encoders", "CLIPTokenizer"),
    "DPMSolverMultistepScheduler": ("fast_diffusers.schedulers", "FlowMatchEulerDiscreteScheduler"),
    "FlowMatchEulerDiscreteScheduler": ("fast_diffusers.schedulers", "FlowMatchEulerDiscreteScheduler"),
    "FluxTransformer2DModel": ("fast_diffusers.models", "FluxTransformer2DModel"),
    "Gemma2ForCausalLM": ("fast_diffusers.text_encoders", "Gemma2Model"),
    "Gemma2Model": ("fast_diffusers.text_encoders", "Gemma2Model"),
    "GemmaTokenizer": ("fast_diffusers.text_encoders", "GemmaTokenizer"),
    "GemmaTokenizerFast": ("fast_diffusers.text_encoders", "GemmaTokenizer"),
    "PhasedConsistencyScheduler": ("fast_diffusers.schedulers", "PhasedConsistencyScheduler"),
    "Qwen2Tokenizer": ("fast_diffusers.text_encoders", "Qwen2Tokenizer"),
    "Qwen2TokenizerFast": ("fast_diffusers.text_encoders", "Qwen2Tokenizer"),
    "Qwen2_5_VLForConditionalGeneration": ("fast_diffusers.text_encoders", "Qwen2_5_VLTextModel"),
    "Qwen2_5_VLTextModel": ("fast_diffusers.text_encoders", "Qwen2_5_VLTextModel"),
    "Qwen3ForCausalLM": ("fast_diffusers.text_encoders", "Qwen3Model"),
    "Qwen3Model": ("fast_diffusers.text_encoders", "Qwen3Model"),
    "QwenImageTransformer2DModel": ("fast_diffusers.models", "QwenImageTransformer2DModel"),
    "SCMScheduler": ("fast_diffusers.schedulers", "SCMScheduler"),
    "SD3Transformer2DModel": ("fast_diffusers.models", "SD3Transformer2DModel"),
    "SanaControlNetModel": ("fast_diffusers.models", "SanaControlNetModel"),
    "SanaTransformer2DModel": ("fast_diffusers.models", "SanaTransformer2DModel"),
    "T5EncoderModel": ("fast_diffusers.text_encoders", "T5EncoderModel"),
    "T5Tokenizer": ("fast_diffusers.text_encoders", "T5Tokenizer"),
    "T5TokenizerFast": ("fast_diffusers.text_encoders", "T5Tokenizer"),
    "UnifiedScheduler": ("fast_diffusers.schedulers", "UnifiedScheduler"),
    "ZImageTransformer2DModel": ("fast_diffusers.models", "ZImageTransformer2DModel"),
}
"""Our class (module, name) for each class name that a model_index.json may hold."""

PYTORCH_NAMES: Mapping[str, tuple[str, str]] = {
    "AutoencoderDC": ("diffusers", "AutoencoderDC"),
    "AutoencoderKL": ("diffusers", "AutoencoderKL"),
    "AutoencoderKLQwenImage": ("diffusers", "AutoencoderKLQwenImage"),
    "CLIPTextModel": ("transformers", "CLIPTextModel"),
    "CLIPTextModelWithProjection": ("transformers", "CLIPTextModelWithProjection"),
    "CLIPTokenizer": ("transformers", "CLIPTokenizerFast"),
    "FlowMatchEulerDiscreteScheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "FluxTransformer2DModel": ("diffusers", "FluxTransformer2DModel"),
    "Gemma2Model": ("transformers", "Gemma2Model"),
    "GemmaTokenizer": ("transformers", "GemmaTokenizerFast"),
    "Qwen2Tokenizer": ("transformers", "Qwen2TokenizerFast"),
    "Qwen2_5_VLTextModel": ("transformers", "Qwen2_5_VLTextModel"),
    "Qwen3Model": ("transformers", "Qwen3Model"),
    "QwenImageTransformer2DModel": ("diffusers", "QwenImageTransformer2DModel"),
    "SCMScheduler": ("diffusers", "SCMScheduler"),
    "SD3Transformer2DModel": ("diffusers", "SD3Transformer2DModel"),
    "SanaControlNetModel": ("diffusers", "SanaControlNetModel"),
    "SanaTransformer2DModel": ("diffusers", "SanaTransformer2DModel"),
    "T5EncoderModel": ("transformers", "T5EncoderModel"),
    "T5Tokenizer": ("transformers", "T5TokenizerFast"),
    "ZImageTransformer2DModel": ("diffusers", "ZImageTransformer2DModel"),
}
"""(library, class) in PyTorch of our classes that have a counterpart there, for the diffusers layout."""

PIPELINE_ALIASES: Mapping[str, str] = {
    "FluxImg2ImgPipeline": "FluxPipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline",
    "SanaControlNetPipeline": "SanaPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "ZImageImg2ImgPipeline": "ZImagePipeline",
}
"""The pipeline whose name ours have in a folder, for pipelines of the same parts that are called otherwise."""

SOLVER_OFF = (
    "shift_terminal",
    "thresholding",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
"""Settings of a multistep solver that change what it visits or predicts, off in published models."""


def read_index(directory: Path) -> dict[str, Any]:
    """The content of model_index.json.

    Raises:
        FileNotFoundError: there is no such folder or file.
        UserError: the file is not what it should be.
    """
    path = directory / INDEX
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a folder; pass a local one, checkpoints are not downloaded")
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a pipeline: it has no {INDEX}")
    index = read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise UserError(f"{path} does not describe a pipeline: it has no _class_name")
    return index


def write_index(directory: Path, class_name: str, entries: Mapping[str, Any]) -> None:
    """Write model_index.json with the pipeline's settings and what `index_entry` says of its components."""
    write_text(directory / INDEX, json.dumps({"_class_name": class_name, **entries}, indent=2, sort_keys=True) + "\n")


def index_entry(component: object | None, layout: str) -> list[str | None]:
    """What model_index.json says of a component: [library, class], or [null, null] for an absent one.

    Raises:
        UserError: the layout is diffusers', and PyTorch has no such class; or the component is a model of ppdiffusers.
    """
    if component is None:
        return [None, None]
    name = type(component).__name__
    if isinstance(component, nn.Layer) and not isinstance(component, PretrainedModel):
        raise UserError(
            f"a {name} of ppdiffusers runs in this pipeline but is not saved with it: "
            f"save it by itself, or copy its weights into a fast_diffusers.models.{name}"
        )
    if layout == "paddle":
        return list(CLASSES.get(name, (type(component).__module__, name)))
    if name not in PYTORCH_NAMES:
        raise UserError(f"PyTorch diffusers has no {name}: save in the paddle layout, or replace it first")
    return list(PYTORCH_NAMES[name])


def load_component(directory: Path, name: str, entry: object, paddle_dtype: Any) -> Any:
    """Load the component `name` from its subfolder with the class that model_index.json names in `entry`.

    Raises:
        FileNotFoundError: the subfolder or a file in it is missing.
        UserError: the entry is malformed or names a class that is not supported.
    """
    if not (isinstance(entry, list) and len(entry) == 2):
        raise UserError(f"{directory / INDEX}: {name!r} should be [library, class], not {entry!r}")
    if entry[1] is None:
        return None
    if entry[1] not in CLASSES:
        known = ", ".join(CLASSES)
        raise UserError(
            f"{directory / INDEX}: {name!r} is of class {entry[1]}, supported are {known}; pass {name}= yourself"
        )
    folder = directory / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{directory} has no folder {name!r} ({entry[1]}); pass {name}=None to do without it")
    module, class_name = CLASSES[entry[1]]
    cls = getattr(import_module(module), class_name)
    if issubclass(cls, SchedulerMixin):
        return _load_scheduler(cls, folder, of_solver=entry[1] == "DPMSolverMultistepScheduler")
    return cls.from_pretrained(folder, **({"paddle_dtype": paddle_dtype} if issubclass(cls, nn.Layer) else {}))


def _load_scheduler(cls: type[SchedulerMixin], folder: Path, of_solver: bool) -> SchedulerMixin:
    """A scheduler of the class from its folder, or `of_solver` from that of a multistep solver.

    Raises:
        UserError: it has settings that are not supported.
    """
    config = read_json(folder / cls.config_name)
    if of_solver:
        config = _euler_config(config, folder)
    try:
        return cls.from_config(config)
    except ValueError as error:
        raise UserError(f"{folder}: {error}; pass a scheduler of your own") from error


def _euler_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Config of Euler's method for a flow-matching multistep solver's: the same shift, but steps of first order.

    Raises:
        UserError: the solver is not one of flow matching, or has settings that Euler's method could not follow.
    """
    if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas"):
        raise UserError(f"{folder} is a solver of noise-prediction models, expected one with use_flow_sigmas: pass one")
    if on := [name for name in SOLVER_OFF if config.get(name)]:
        raise UserError(f"{folder} has {' and '.join(on)}, which is not supported here: pass a scheduler of your own")
    shift = config.get("flow_shift", 1.0)
    logger.warning(
        "%s: there is no DPMSolverMultistepScheduler here; FlowMatchEulerDiscreteScheduler runs in its place "
        "with the same shift, %g, and needs more steps for the same accuracy",
        folder,
        shift,
    )
    return {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": shift}


def save_component(component: Any, folder: Path, layout: str) -> None:
    """Write a model, tokenizer or scheduler to its subfolder."""
    if isinstance(component, SchedulerMixin):
        component.save_config(str(folder), to_diffusers=layout == "diffusers")
    else:
        component.save_pretrained(folder, layout=layout)
