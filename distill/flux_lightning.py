"""FLUX-Lightning: a LoRA student of a flow model by phased consistency, adversarial heads, DMD and reflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import paddle

from distill.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
from distill.discriminators import PatchDiscriminator
from distill.draws import Draws
from distill.objectives import adversarial, distribution_matching, fake_score, phased_consistency, reflow
from distill.objectives.phases import student_jump
from distill.optim import EMA, make_optimizer
from distill.recipe import entry, number
from distill.roles import Roles, adapter_roles
from distill.trainer import Batch, Loss, frozen
from fast_diffusers import lora
from fast_diffusers.time_grids import PhaseGrid, scheduler_mu

STUDENT, FAKE = "student", "fake"


@dataclass(frozen=True)
class LightningConfig:
    """The objective: L_consistency + Σ weight · L."""

    num_cells: int = number(100, minimum=1, doc="N, cells of the teacher's solver grid")
    num_phases: int = number(4, minimum=1, doc="M, phases = steps of the student")
    distance: Literal["huber", "l2"] = entry("huber", doc="of the consistency loss")
    huber_c: float = number(1e-3, above=0, doc="where the pseudo-Huber distances turn linear")
    guidance_scale: float = number(3.5, minimum=0, doc="embedded guidance given to student and teacher")
    cfg_weight: float = number(0.0, minimum=0, doc="w of true guidance v_c + w(v_c − v_u) of the teacher; 0: none")
    adversarial_weight: float = number(0.1, minimum=0, doc="0: no discriminator")
    gan_loss: Literal["hinge", "lsgan", "non_saturating"] = entry("hinge", doc="see distill.objectives.adversarial")
    taps: tuple[int, ...] | None = entry(None, doc="blocks whose features the heads see; null: all")
    dmd_weight: float = number(0.01, minimum=0, doc="of distribution matching")
    fake_score: Literal["student", "adapter"] = entry("student", doc="who scores the student's samples in DMD")
    reflow_weight: float = number(0.01, minimum=0, doc="of reflow")
    reference_compat: bool = entry(False, doc="the published formulas, faults included, for old checkpoints")

    def __post_init__(self) -> None:
        if self.num_phases > self.num_cells:
            raise ValueError(f"num_phases ({self.num_phases}) must not exceed num_cells ({self.num_cells})")


@dataclass(frozen=True)
class Recipe:
    """All settings of `train_flux_lightning.py`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    objective: LightningConfig = LightningConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig()
    fake_optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()


class FluxLightning:
    """The method for `distill.trainer.Trainer`: even steps train the heads, odd steps the student, as published.

    Without an adversarial term every step trains the student; with a separate fake score, the fake adapter learns
    on every step.
    """

    def __init__(self, recipe: Recipe, pipe: Any, num_tokens: int):
        """`pipe`: the teacher's pipeline; its transformer gets the adapters. `num_tokens`: of an image."""
        self.settings, self.model, denoiser = recipe.objective, pipe.transformer, pipe.denoiser
        self.grid = phase_grid(self.settings, num_tokens, pipe.scheduler.config)
        lora.freeze(self.model)
        seed = recipe.trainer.seed
        players: dict[str, tuple[Mapping[str, paddle.Tensor], OptimizerConfig, int]] = {}
        separate_fake = self.settings.fake_score == "adapter" and self.settings.dmd_weight > 0
        if separate_fake:
            players[FAKE] = self._inject(recipe.lora, FAKE, seed + 1), recipe.fake_optimizer, recipe.trainer.steps
        self.discriminator = None
        if self.settings.adversarial_weight > 0:
            taps = self.settings.taps
            paddle.seed(seed)
            self.discriminator = PatchDiscriminator(
                denoiser.feature_channels,
                len(taps) if taps else denoiser.num_taps,
                checkpointing=recipe.trainer.gradient_checkpointing,
            )
            heads = dict(self.discriminator.named_parameters())
            players["discriminator"] = heads, recipe.discriminator_optimizer, (recipe.trainer.steps + 1) // 2
        updates = recipe.trainer.steps // 2 if self.discriminator else recipe.trainer.steps
        players[STUDENT] = self._inject(recipe.lora, STUDENT, seed), recipe.student_optimizer, max(1, updates)
        self.optimizers = {name: make_optimizer(*each) for name, each in players.items()}
        decay = recipe.trainer.ema_decay
        self.averages = {} if decay is None else {STUDENT: EMA(self.optimizers[STUDENT].parameters, decay)}
        self.roles: Roles = adapter_roles(
            denoiser, self.model, STUDENT, FAKE if separate_fake else None, self.discriminator
        )

    def _inject(self, config: LoraConfig, name: str, seed: int) -> dict[str, paddle.Tensor]:
        lora.inject(self.model, config.rank, config.alpha, config.targets, name=name, seed=seed)
        return {path: p for path, p in self.model.named_parameters() if path.endswith(f".{name}.weight")}

    def turns(self, step: int) -> Sequence[str]:
        """See `Method`."""
        fake = [FAKE] if FAKE in self.optimizers else []
        return [*fake, "discriminator" if self.discriminator is not None and step % 2 == 0 else STUDENT]

    def loss(self, player: str, batch: Batch, draws: Draws) -> Loss:
        """See `Method`."""
        if player == FAKE:
            return fake_score(self.roles, batch, draws, grid=self.grid)
        if player == "discriminator":
            return adversarial(
                self.roles,
                batch,
                draws,
                side="discriminator",
                cfg_weight=self.settings.cfg_weight,
                **self._adversarial_settings(),
            )
        return self._student_loss(batch, draws)

    def _adversarial_settings(self) -> dict[str, Any]:
        s = self.settings
        return {"grid": self.grid, "gan_loss": s.gan_loss, "taps": s.taps, "reference_compat": s.reference_compat}

    def _student_loss(self, batch: Batch, draws: Draws) -> Loss:
        s, given = self.settings, (self.roles, batch, draws)
        jump = student_jump(*given, self.grid)
        shared = {"grid": self.grid, "jump": jump}
        compat = {"reference_compat": s.reference_compat}
        total, metrics = phased_consistency(
            *given, distance=s.distance, huber_c=s.huber_c, cfg_weight=s.cfg_weight, **shared
        )
        terms: list[tuple[float, Loss]] = []
        if s.adversarial_weight > 0:
            with frozen(self.discriminator):
                terms.append((s.adversarial_weight, adversarial(*given, jump=jump, **self._adversarial_settings())))
        if s.dmd_weight > 0:
            terms.append((s.dmd_weight, distribution_matching(*given, cfg_weight=s.cfg_weight, **compat, **shared)))
        if s.reflow_weight > 0:
            terms.append((s.reflow_weight, reflow(*given, huber_c=s.huber_c, **compat, **shared)))
        for weight, (loss, parts) in terms:
            total = total + weight * loss
            metrics |= parts
        return total, metrics


def phase_grid(settings: LightningConfig, num_tokens: int, scheduler_config: Mapping[str, Any]) -> PhaseGrid:
    """The student's phases for images of `num_tokens` tokens, shifted as the teacher's scheduler shifts them."""
    return PhaseGrid(settings.num_cells, settings.num_phases, scheduler_mu(scheduler_config, num_tokens))
