"""TwinFlow: any-step training, and a self-adversarial pair of flows that needs no second network."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import paddle

from distill.draws import Draws
from distill.objectives.phases import Batch
from distill.objectives.rcgm import (
    AnyStep,
    any_step_loss,
    any_step_target,
    draw_time,
    evaluate,
    one_step,
    regression,
    rows_of,
    time_weight,
    velocity_supervision,
)
from fast_diffusers.transports import LinearPath

WEIGHTS: Mapping[str, float] = MappingProxyType({"base": 1, "adv": 1, "rectify": 0.5, "velocity": 0, "e2e": 0})
PARTS: Mapping[str, float] = MappingProxyType({"e2e": 1, "mul": 1, "any": 1, "adv": 1, "one": 0})
SHORT = 0.05
"""Largest way, as a fraction of t, of the rows of part mul."""

Terms = dict[str, paddle.Tensor]


def twinflow(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    form: Literal["whole", "split"] = "whole",
    weights: Mapping[str, float] = WEIGHTS,
    parts: Mapping[str, float] = PARTS,
    rectify_weight: float = 0.5,
    real_score: Literal["student", "teacher"] = "student",
    **settings: Any,
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """L_base + L_adv + L_rectify (arXiv 2512.05150). x_fake is the student's one-step sample of `fake.noise`.

    - base: `rcgm` on data.
    - adv: at negative times the student learns the velocity of its own samples,
      F(t·ε + (1 − t)·sg(x_fake), −t, −t) → ε − sg(x_fake), with ε independent of the noise that x_fake came from.
    - rectify: at fresh noise and time on x_fake, Δv = F(·, −t, −t) − F(·, t, t) is how far the flow of the samples is
      from that of the data; the one-step velocity regresses sg(F_fake − clamp Δv), which moves x_fake by +Δv.
    - velocity: F(x_t, t, t) → the supervision of base; e2e: base at t = 1, target time 0.

    form "whole" (small data) takes all terms on all rows, weighted by `weights`. form "split" (large models) gives
    each row one part and evaluates the student once with gradient: e2e (1 → 0), mul (t → t − u·t·min(0.05, ratio)),
    any (t → t − u·t·ratio), one (t → 0), adv. `parts` are their shares (see `assign_parts`); rectify, weighted by
    `rectify_weight`, acts on the rows of e2e.

    Roles: student, target (see `rcgm`); teacher where `real_score` or velocity_target asks for it: it then gives
    F(·, t, t) of rectify. Draws: `t`, `target_t`, `noise`, `fake.noise`, `match.t`, `match.noise`; `part` if split.
    """
    s = AnyStep(**settings)
    if real_score not in ("student", "teacher"):
        raise ValueError(f"real_score is 'student' or 'teacher', not {real_score!r}")
    real = getattr(roles, real_score)
    if form == "whole":
        terms = _whole(roles, real, batch, draws, {**dict.fromkeys(WEIGHTS, 0.0), **_known(weights, WEIGHTS)}, s)
        scale = weights
    elif form == "split":
        terms = _split(roles, real, batch, draws, _known(parts, PARTS), s)
        scale = {**dict.fromkeys(terms, 1.0), "rectify": rectify_weight}
    else:
        raise ValueError(f"form is 'whole' or 'split', not {form!r}")
    loss = sum(scale[name] * term for name, term in terms.items())
    return loss, {name: term.detach() for name, term in terms.items()}


def _whole(roles: Any, real: Any, batch: Batch, draws: Draws, weights: Mapping[str, float], s: AnyStep) -> Terms:
    shape, dtype = batch["latents"].shape, batch["latents"].dtype
    t = draw_time(draws, shape[0], s)
    noise, fake_noise = (draws.normal(name, shape).astype(dtype) for name in ("noise", "fake.noise"))
    fake, fake_velocity = one_step(roles.student, batch, fake_noise)
    fake = fake.detach()
    if s.image_free:
        batch = {**batch, "latents": fake}
    terms = {}
    if weights["base"]:
        target_t = t - draws.uniform("target_t", t.shape) * t * s.consistency_ratio
        terms["base"] = any_step_loss(roles, batch, noise, t, target_t, s).mean()
    if weights["adv"]:
        prediction = evaluate(roles.student, batch, LinearPath.interpolate(fake, noise, t), -t, -t)
        terms["adv"] = regression(prediction, noise - fake, s.loss).mean()
    if weights["rectify"]:
        terms["rectify"] = _rectify(roles.student, real, batch, draws, fake, fake_velocity, s).mean()
    if weights["velocity"]:
        noisy = LinearPath.interpolate(batch["latents"], noise, t)
        goal = velocity_supervision(roles, batch, noisy, noise, t, s)
        terms["velocity"] = regression(evaluate(roles.student, batch, noisy, t, t), goal, s.loss).mean()
    if weights["e2e"]:
        one = paddle.ones_like(t)
        terms["e2e"] = _end_to_end(roles, batch, fake_noise, fake_velocity, one, s).mean()
    return terms


def _end_to_end(
    roles: Any, batch: Batch, noise: paddle.Tensor, velocity: paddle.Tensor, one: paddle.Tensor, s: AnyStep
) -> paddle.Tensor:
    """`any_step_loss` from t = 1 to 0 for a student's velocity that is known already."""
    supervision = velocity_supervision(roles, batch, noise, noise, one, s)
    zero = paddle.zeros_like(one)
    goal = any_step_target(roles.target, batch, noise, supervision, velocity.detach(), one, zero, s)
    return regression(velocity, goal, s.loss)


def _rectify(
    student: Any, real: Any, batch: Batch, draws: Draws, fake: paddle.Tensor, velocity: paddle.Tensor, s: AnyStep
) -> paddle.Tensor:
    """[B]: the error of one-step velocities that made `fake` to themselves, corrected by Δv."""
    with paddle.no_grad():
        t = draws.uniform("match.t", [fake.shape[0]])
        noisy = LinearPath.interpolate(fake, draws.normal("match.noise", fake.shape).astype(fake.dtype), t)
        correction = evaluate(student, batch, noisy, -t, -t) - evaluate(real, batch, noisy, t, t)
        if s.clamp is not None:
            correction = correction.clip(-s.clamp, s.clamp)
        goal = velocity.detach() - correction
    return regression(velocity, goal, s.loss)


def _split(roles: Any, real: Any, batch: Batch, draws: Draws, parts: Mapping[str, float], s: AnyStep) -> Terms:
    shape, dtype = batch["latents"].shape, batch["latents"].dtype
    rows = assign_parts(draws, shape[0], parts)
    noise, fake_noise = (draws.normal(name, shape).astype(dtype) for name in ("noise", "fake.noise"))
    t = draw_time(draws, shape[0], s)
    way = draws.uniform("target_t", t.shape) * t
    ends = {
        "e2e": paddle.zeros_like(t),
        "one": paddle.zeros_like(t),
        "mul": t - way * min(SHORT, s.consistency_ratio),
        "any": t - way * s.consistency_ratio,
        "adv": -t,
    }
    target_t = _select(rows, ends)
    start = _select(rows, {**dict.fromkeys(parts, t), "e2e": paddle.ones_like(t), "adv": -t})

    generated = list(range(shape[0])) if s.image_free else rows.get("adv", [])
    data = batch["latents"]
    if generated:
        with paddle.no_grad():
            samples = one_step(roles.student, rows_of(batch, generated), _take(fake_noise, generated))[0]
            data = paddle.scatter(data, paddle.to_tensor(generated), samples.astype(dtype))
    batch = {**batch, "latents": data}
    noisy = LinearPath.interpolate(data, noise, start.abs())
    prediction = evaluate(roles.student, batch, noisy, start, target_t)

    goal, weight = noise - data, paddle.ones_like(t)
    consistent = [row for name, index in rows.items() if name != "adv" for row in index]
    if consistent:
        part, x, begin, end = rows_of(batch, consistent), *(_take(v, consistent) for v in (noisy, start, target_t))
        supervision = velocity_supervision(roles, part, x, _take(noise, consistent), begin, s)
        found = any_step_target(
            roles.target, part, x, supervision, _take(prediction, consistent).detach(), begin, end, s
        )
        index = paddle.to_tensor(consistent)
        goal = paddle.scatter(goal, index, found.astype(goal.dtype))
        weight = paddle.scatter(weight, index, time_weight(begin, end, s) * paddle.ones_like(begin))
    error = regression(prediction, goal, s.loss) * weight
    terms = {name: _take(error, index).sum() / shape[0] for name, index in rows.items()}
    if "e2e" in rows:
        velocity = _take(prediction, rows["e2e"])
        fake = (_take(noise, rows["e2e"]) - velocity).detach()
        rectified = _rectify(roles.student, real, rows_of(batch, rows["e2e"]), draws, fake, velocity, s)
        terms["rectify"] = rectified.sum() / shape[0]
    return terms


def assign_parts(draws: Draws, batch_size: int, parts: Mapping[str, float]) -> dict[str, list[int]]:
    """Rows of every part that has any: runs of rows in proportion to `parts` (largest remainder).

    Where that leaves a part without a row, each row draws its part at random with these weights instead, so that any
    batch trains every part in the long run. Draw: `part`.
    """
    names = [name for name in parts if parts[name] > 0]
    if not names:
        raise ValueError("every part of the batch has weight 0")
    share = np.array([parts[name] for name in names], dtype=np.float64)
    share /= share.sum()
    counts = np.floor(share * batch_size).astype(int)
    order = np.argsort(counts - share * batch_size, kind="stable")
    counts[order[: batch_size - counts.sum()]] += 1
    if counts.min() > 0:
        owner = np.repeat(np.arange(len(names)), counts)
    else:
        drawn = draws.uniform("part", [batch_size]).numpy()
        owner = np.minimum(np.searchsorted(np.cumsum(share), drawn, side="right"), len(names) - 1)
    rows = {name: np.flatnonzero(owner == number).tolist() for number, name in enumerate(names)}
    return {name: index for name, index in rows.items() if index}


def _select(rows: Mapping[str, Sequence[int]], values: Mapping[str, paddle.Tensor]) -> paddle.Tensor:
    """One [B] from several: each row reads the value of its part."""
    index = np.concatenate(list(rows.values()))
    taken = paddle.concat([_take(values[name], part) for name, part in rows.items()])
    return _take(taken, np.argsort(index))


def _take(x: paddle.Tensor, index: Sequence[int] | np.ndarray) -> paddle.Tensor:
    return paddle.gather(x, paddle.to_tensor(np.asarray(index)), axis=0)


def _known(given: Mapping[str, float], known: Mapping[str, float]) -> Mapping[str, float]:
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"unknown term {unknown[0]!r}; there are {', '.join(known)}")
    return given
