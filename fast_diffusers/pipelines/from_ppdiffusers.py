"""ppdiffusers' own Stable Diffusion 3 pipeline, made into the one of this package."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn
from ppdiffusers import StableDiffusion3Pipeline as PPDiffusersPipeline

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.pipelines.sd3 import StableDiffusion3Pipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler


def from_ppdiffusers(pipe: Any) -> StableDiffusion3Pipeline:
    """This package's pipeline with the weights of ppdiffusers' StableDiffusion3Pipeline, the very same, not copies.

    The transformer, with its adapters, is the same object. Two defaults of the call are others: ppdiffusers gives T5 as
    many tokens as CLIP, `max_sequence_length=77`, and visits `sigmas=numpy.linspace(1, scheduler.sigma_min, steps)`
    before the shift, where this package ends at 1 / steps. With these arguments the images are the same.

    Raises:
        UserError: another kind of pipeline, or a part that this package has no like of.
    """
    if not isinstance(pipe, PPDiffusersPipeline):
        raise UserError(
            f"expected a pipeline of fast_diffusers or ppdiffusers' StableDiffusion3Pipeline, got {type(pipe).__name__}"
        )
    types = StableDiffusion3Pipeline.component_types
    return StableDiffusion3Pipeline(**{name: _ours(getattr(pipe, name), name, kind) for name, kind in types.items()})


def _ours(part: Any, name: str, kind: Any) -> Any:
    """A component as one of the class that our pipeline wants under this name."""
    if type(part).__name__ == FlowMatchEulerDiscreteScheduler.__name__:
        return FlowMatchEulerDiscreteScheduler.from_config(part.config)
    if part is None or isinstance(part, kind):
        return part
    if type(part).__name__ != getattr(kind, "__name__", None):
        raise UserError(f"this pipeline's {name} is a {type(part).__name__}, which has no like in fast_diffusers")
    if isinstance(part, nn.Layer):
        return _model(part, kind)
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer
        part.save_pretrained(folder)
        return kind.from_pretrained(folder)


def _model(theirs: nn.Layer, kind: type[PretrainedModel]) -> PretrainedModel:
    """A model of class `kind` whose parameters are those of ppdiffusers' model of the same names."""
    config = theirs.config if isinstance(theirs.config, Mapping) else theirs.config.to_dict()
    with paddle.LazyGuard():  # no memory for weights that are replaced
        model = kind.from_config(dict(config))
    weights = theirs.state_dict()
    for path, layer in model.named_sublayers(include_self=True):
        for name, _ in list(layer.named_parameters(include_sublayers=False)):
            setattr(layer, name, weights[f"{path}.{name}" if path else name])
    model.eval()
    return model
