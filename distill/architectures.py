"""What `train_teacher.py` trains: a small transformer from scratch, or a trained SANA prepared for SANA-Sprint."""

from dataclasses import dataclass
from typing import Any

from distill.config import DataConfig, TrainerConfig
from distill.memory import find_model, flux_parameters
from distill.recipe import entry, number
from distill.sana_sprint import DENSE_TIME
from distill.sana_sprint_memory import SANA, sana_parameters
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel, SanaTransformer2DModel
from fast_diffusers.pipelines import FluxLabelPipeline, Pipeline, SanaLabelPipeline
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

PREPARED = {"qk_norm": "rms_norm_across_heads", "timestep_scale": DENSE_TIME}
PREPARABLE = SANA._replace(published={"Sana_1600M_1024px_diffusers": {}})


@dataclass(frozen=True)
class LabelConfig:
    """What a small transformer of any family is for."""

    channels: int = number(1, minimum=1, doc="of the image: 1 gray, 3 RGB")
    num_classes: int = number(10, minimum=1, doc="labels")


@dataclass(frozen=True)
class FluxConfig(LabelConfig):
    """A new FLUX transformer; the meaning of each entry is that of its config.json."""

    num_layers: int = number(2, minimum=0, maximum=1000, doc="double-stream blocks")
    num_single_layers: int = number(2, minimum=0, maximum=1000, doc="single-stream blocks")
    num_attention_heads: int = number(2, minimum=1)
    attention_head_dim: int = number(64, minimum=2)
    axes_dims_rope: tuple[int, int, int] = number((8, 28, 28), minimum=0, doc="channels of a head by position axis")

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(size % 2 for size in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {list(self.axes_dims_rope)} must be even and sum to attention_head_dim, "
                f"{self.attention_head_dim}"
            )

    def transformer_config(self) -> dict[str, Any]:
        """Arguments of `FluxTransformer2DModel`."""
        return {
            "in_channels": 4 * self.channels,
            "num_layers": self.num_layers,
            "num_single_layers": self.num_single_layers,
            "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.attention_head_dim,
            "axes_dims_rope": self.axes_dims_rope,
            "joint_attention_dim": self.num_classes,
            "pooled_projection_dim": self.num_classes,
            "guidance_embeds": True,
        }

    def parameters(self) -> int:
        """Their number."""
        return flux_parameters(self.transformer_config())

    def pipeline(self, data: DataConfig, trainer: TrainerConfig) -> FluxLabelPipeline:
        """The untrained pipeline."""
        transformer = FluxTransformer2DModel(**self.transformer_config())
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        return FluxLabelPipeline(scheduler, transformer, self.num_classes, data.height)


@dataclass(frozen=True)
class SanaConfig(LabelConfig):
    """A new SANA transformer, with what SANA-Sprint prepares a teacher with: QK-norm, and times that are not scaled."""

    num_layers: int = number(4, minimum=1, maximum=1000, doc="blocks")
    num_attention_heads: int = number(3, minimum=1)
    attention_head_dim: int = number(32, minimum=1)
    mlp_ratio: float = number(2.5, above=0, doc="of the feed-forward layers' channels to the others")
    patch_size: int = number(2, minimum=1, doc="edge in pixels of what a token stands for")
    shift: float = number(1.5, above=0, doc="of the noise levels, in training and in sampling")

    def transformer_config(self) -> dict[str, Any]:
        """Arguments of `SanaTransformer2DModel`, but for the image's size."""
        channels = self.num_attention_heads * self.attention_head_dim
        return {
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.attention_head_dim,
            "num_cross_attention_heads": self.num_attention_heads,
            "cross_attention_head_dim": self.attention_head_dim,
            "cross_attention_dim": channels,
            "caption_channels": self.num_classes,
            "mlp_ratio": self.mlp_ratio,
            "patch_size": self.patch_size,
            **PREPARED,
        }

    def parameters(self) -> int:
        """Their number."""
        return sana_parameters(self.transformer_config())

    def pipeline(self, data: DataConfig, trainer: TrainerConfig) -> SanaLabelPipeline:
        """The untrained pipeline."""
        transformer = SanaTransformer2DModel(**self.transformer_config(), sample_size=data.height)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return SanaLabelPipeline(scheduler, transformer, self.num_classes, data.height)


@dataclass(frozen=True)
class PreparedConfig:
    """A trained SANA that gets QK-norm and times that are not scaled, and learns on (SANA-Sprint, section 3.2)."""

    path: str = entry(doc="pipeline folder of the flow model")

    def pipeline(self, data: DataConfig, trainer: TrainerConfig) -> Pipeline:
        """The pipeline before it learns on: its transformer in float32, all else in the trainer's dtype."""
        pipe = open_pipeline(self.path, trainer.dtype)
        if not isinstance(pipe.transformer, SanaTransformer2DModel) or pipe.transformer.config.guidance_embeds:
            raise UserError(f"{self.path} cannot be prepared: it is not a SANA that flow matching has trained")
        pipe.register_modules(transformer=SanaTransformer2DModel.from_transformer(pipe.transformer, **PREPARED))
        return pipe

    def parameters(self) -> int:
        """Their number, from the files' sizes or the model's name."""
        return sana_parameters({**find_model(self.path, (PREPARABLE,)).config, **PREPARED})


@dataclass(frozen=True)
class ArchitectureConfig:
    """What becomes a teacher: one of these."""

    flux: FluxConfig | None = FluxConfig()
    sana: SanaConfig | None = None
    prepared: PreparedConfig | None = None

    def __post_init__(self) -> None:
        given = [name for name, section in vars(self).items() if section is not None]
        if len(given) != 1:
            names = f"exactly one of {', '.join(vars(self))} must be given, not {' and '.join(given) or 'none'}"
            raise ValueError(f"{names}; null takes one away")

    @property
    def chosen(self) -> FluxConfig | SanaConfig | PreparedConfig:
        """The one that is given."""
        return self.flux or self.sana or self.prepared
