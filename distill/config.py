"""Recipe sections that every training script shares, with their defaults."""

from dataclasses import dataclass
from typing import Literal

from distill.recipe import entry, number


@dataclass(frozen=True)
class ModelConfig:
    """The teacher."""

    path: str = entry("digits", doc="pipeline folder (HF diffusers' or Paddle's layout), or the shipped 'digits'")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser with its learning-rate schedule and gradient clipping; see `distill.optim`."""

    kind: Literal["adamw", "adafactor", "came"] = entry(
        "adamw", doc="adafactor, came: with a factored second moment, for less memory"
    )
    lr: float = number(1e-4, minimum=0, doc="peak learning rate")
    betas: tuple[float, float] = number((0.9, 0.999), minimum=0, below=1, doc="decay of the first and second moment")
    confidence_decay: float = number(0.9999, minimum=0, below=1, doc="came: decay of the updates' instability")
    eps: float | None = number(
        None, above=0, doc="added to the root of the second moment (null: 1e-8); came: to squares (null: 1e-30)"
    )
    weight_decay: float = number(1e-3, minimum=0, doc="decoupled weight decay, on every parameter")
    grad_clip_norm: float | None = number(1.0, above=0, doc="largest global gradient norm; null: no clipping")
    schedule: Literal["constant", "cosine", "linear"] = entry("constant", doc="after warm-up: stay, or decay to zero")
    warmup_steps: int = number(0, minimum=0, doc="linear warm-up, in updates of this optimiser")


@dataclass(frozen=True)
class LoraConfig:
    """The trainable adapter."""

    rank: int = number(32, minimum=1, doc="inner dimension")
    alpha: float = number(32.0, above=0, doc="the adapter is scaled by alpha / rank")
    targets: tuple[str, ...] = entry(
        (
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        ),
        doc="suffixes of the names of the linear layers that get one",
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the training pairs come from and how they are shaped."""

    kind: Literal["digits", "mnist", "image_folder", "laion_list", "parquet"] = entry("digits", doc="kind of data set")
    path: str | None = entry(None, doc="folder or file of the data; digits needs none")
    split: Literal["train", "test", "all"] = entry("train", doc="for digits and mnist")
    download: bool = entry(False, doc="mnist: fetch missing files")
    height: int = number(8, minimum=1, doc="image height in pixels after resize and centre crop")
    width: int = number(8, minimum=1, doc="image width in pixels after resize and centre crop")
    max_bad_fraction: float = number(0.05, minimum=0, maximum=1, doc="stop when more of the records are unusable")
    cache: str | None = entry(None, doc="folder for encoded latents and prompts; null: encode every time")
    num_workers: int = number(1, minimum=0, doc="threads that prepare batches; 0: in the training thread")


Action = Literal["warn", "stop", "ignore"]  # not "off": YAML reads that as false


@dataclass(frozen=True)
class HealthConfig:
    """Guards on the logged metrics; see `distill.health`. Lines are those of the log, `log_every` steps apart."""

    on_loss_spike: Action = entry("warn", doc="when a player's loss is far above its running median")
    spike_factor: float = number(5.0, above=1, doc="multiple of the median from which a loss is a spike")
    spike_window: int = number(20, minimum=3, doc="values of the running median; guarded once there are so many")
    on_discriminator_saturation: Action = entry("warn", doc="when the discriminator wins for long")
    max_logit_gap: float = number(10.0, above=0, doc="of logit_real - logit_fake")
    min_discriminator_loss: float = number(0.02, minimum=0, doc="its floor is 0")
    patience: int = number(10, minimum=1, doc="lines running that count as long")
    on_diversity_drop: Action = entry("warn", doc="when samples resemble each other")
    min_diversity: float = number(0.5, minimum=0, maximum=1, doc="fraction of the reference of sample_diversity")
    on_drift: Action = entry("warn", doc="when mean or spread of samples leaves its reference")
    max_mean_drift: float = number(1.0, above=0, doc="of sample_mean, in reference standard deviations")
    max_std_factor: float = number(2.0, above=1, doc="of sample_std to its reference, or of that to it")
    reference: int = number(2, minimum=1, doc="first values of a sample metric whose median is its reference")
    repeat_every: int = number(50, minimum=1, doc="lines before the same warning comes again")


@dataclass(frozen=True)
class TrainerConfig:
    """The loop around the objective."""

    steps: int = number(1000, minimum=1, doc="training steps")
    batch_size: int = number(8, minimum=1, doc="samples of one micro-step on one process")
    gradient_accumulation: int = number(1, minimum=1, doc="micro-steps averaged into one step")
    dtype: Literal["float32", "bfloat16"] = entry("float32", doc="of the frozen weights and the forward pass")
    sharding: Literal["stage2", "stage3"] | None = entry(None, doc="of optimisers over GPUs; see distill.sharding")
    ema_decay: float | None = number(None, minimum=0, below=1, doc="average of the trained weights; null: none")
    gradient_checkpointing: bool = entry(False, doc="recompute block activations in the backward pass")
    seed: int = number(0, minimum=0, maximum=2**63 - 1, doc="of data order, draws and initial weights")
    on_nonfinite: Literal["stop", "skip"] = entry("stop", doc="when a loss or gradient is not finite")
    max_skips: int = number(3, minimum=1, doc="with skip: so many of a player in a row stop the run")
    health: HealthConfig = HealthConfig()
    output_dir: str = entry("outputs/train", doc="checkpoints, logs and samples")
    checkpoint_every: int = number(500, minimum=1, doc="steps between checkpoints")
    keep_last: int = number(2, minimum=1, doc="checkpoints kept")
    log_every: int = number(10, minimum=1, doc="steps between lines of the log")
    sample_every: int | None = number(500, minimum=1, doc="steps between sample grids; null: none")
    sample_prompts: tuple[str, ...] = entry(tuple("0123456789") * 4, doc="prompts of the sample grids")
    visualdl: bool = entry(False, doc="also write the metrics for VisualDL")
