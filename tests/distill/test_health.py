import json

import pytest

from distill.config import HealthConfig
from distill.health import Health, UnhealthyError
from distill.recipe import build
from fast_diffusers.errors import UserError


def observed(lines, **settings):
    """Warnings by step, of lines that are 10 steps apart."""
    health = Health(HealthConfig(**settings))
    warnings = {}
    for i, line in enumerate(lines):
        if found := health.observe(10 * (i + 1), line):
            warnings[10 * (i + 1)] = found
    return warnings


def losses(values, name="student_loss"):
    return [{name: value} for value in values]


def test_spike_is_above_a_multiple_of_the_running_median():
    past = [1.0, 2.0, 100.0, 2.0]
    assert observed(losses([*past, 9.9]), spike_factor=5, spike_window=4) == {}
    assert observed(losses([*past, 10.1]), spike_factor=5, spike_window=4) == {
        50: ["step 50: student_loss is 10.1, above the limit of 10: the loss spikes"]
    }


def test_only_a_full_window_judges():
    assert observed(losses([1, 1, 1e6]), spike_window=3) == {}
    assert observed(losses([1, 1, 1, 1e6]), spike_window=3).keys() == {40}


def test_the_window_moves_on():
    """A loss at a new level is a spike only until half of the window is at that level."""
    warnings = observed(losses([1] * 4 + [100] * 6), spike_window=4, repeat_every=1)
    assert warnings.keys() == {50, 60}


def test_negative_losses_spike_by_their_magnitude():
    assert observed(losses([-1.0] * 4 + [2.9]), spike_window=4) == {}  # -1 + (5 - 1) * 1 = 3
    assert observed(losses([-1.0] * 4 + [3.1]), spike_window=4).keys() == {50}


def test_players_are_judged_apart_and_other_metrics_not():
    lines = [{"student_loss": 1.0, "fake_loss": 100.0, "student_grad_norm": 1.0}] * 3
    lines += [{"student_loss": 100.0, "fake_loss": 100.0, "student_grad_norm": 100.0}]
    (warning,) = observed(lines, spike_window=3)[40]
    assert "student_loss" in warning


def test_saturated_logits_are_found_after_patience():
    gap = {"logit_real": 8.0, "logit_fake": -4.0}
    closed = {"logit_real": 1.0, "logit_fake": 0.0}
    warnings = observed([gap, gap, closed, gap, gap, {}, gap], patience=3)  # a line of the other player counts for none
    assert warnings == {
        70: ["step 70: logit_real - logit_fake is 12, above the limit of 10: the discriminator is saturated"]
    }


def test_loss_at_the_floor_is_found_after_patience():
    warnings = observed([{"discriminator": value} for value in (0.01, 2.0, 0.01, 0.0)], patience=2)
    assert warnings == {40: ["step 40: discriminator is 0, below the limit of 0.02: the discriminator is saturated"]}


def test_diversity_is_compared_with_its_first_values():
    lines = [{"sample_diversity": value} for value in (0.9, 1.1, 0.51, 0.49)]
    assert observed(lines, reference=2) == {
        40: ["step 40: sample_diversity is 0.49, below the limit of 0.5: samples resemble each other"]
    }


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (1.4, 0.3, []),
        (1.6, 0.5, ["sample_mean is 1.6, above the limit of 1.5: the mean of samples drifts"]),
        (0.4, 0.5, ["sample_mean is 0.4, below the limit of 0.5: the mean of samples drifts"]),
        (1.0, 1.2, ["sample_std is 1.2, above the limit of 1: the spread of samples drifts"]),
        (1.0, 0.2, ["sample_std is 0.2, below the limit of 0.25: the spread of samples drifts"]),
        (None, 0.2, ["sample_std is 0.2, below the limit of 0.25: the spread of samples drifts"]),
        (9.0, None, []),
    ],
)
def test_drift(mean, std, expected):
    lines = [{"sample_mean": 1.0, "sample_std": 0.5}, {"sample_mean": mean, "sample_std": std}]
    warnings = observed(lines, reference=1)
    assert warnings == ({20: [f"step 20: {each}" for each in expected]} if expected else {})


def test_warnings_are_repeated_rarely_and_by_metric():
    lines = [{"student_loss": 1.0, "fake_loss": 1.0}] * 9
    lines += [{"student_loss": 99.0, "fake_loss": 1.0}] + [{"student_loss": 99.0, "fake_loss": 99.0}] * 3
    warnings = observed(lines, spike_window=9, repeat_every=3)
    names = {step: [message.split()[2] for message in found] for step, found in warnings.items()}
    assert names == {100: ["student_loss"], 110: ["fake_loss"], 130: ["student_loss"]}


GUARDS = {
    "on_loss_spike": ([{"student_loss": 1.0}] * 3 + [{"student_loss": 9.0}], "student_loss is 9"),
    "on_discriminator_saturation": ([{"discriminator": 0.0}], "discriminator is 0"),
    "on_diversity_drop": ([{"sample_diversity": 1.0}, {"sample_diversity": 0.1}], "sample_diversity is 0.1"),
    "on_drift": ([{"sample_std": 1.0}, {"sample_std": 9.0}], "sample_std is 9"),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_actions(guard):
    lines, what = GUARDS[guard]
    settings = {"spike_window": 3, "patience": 1, "reference": 1}
    (warning,) = observed(lines, **settings)[10 * len(lines)]
    assert what in warning
    assert observed(lines, **settings, **{guard: "ignore"}) == {}
    with pytest.raises(UnhealthyError, match=rf"^step {10 * len(lines)}: {what}.*; stopped") as error:
        observed(lines, **settings, **{guard: "stop"})
    assert isinstance(error.value, UserError) and "\n" not in str(error.value)


def test_one_guard_that_stops_leaves_the_others_warning():
    lines, _ = GUARDS["on_loss_spike"]
    assert observed(lines, spike_window=3, on_drift="stop").keys() == {40}


def test_values_that_are_not_finite_are_left_out():
    junk = [{"student_loss": value, "discriminator": value} for value in (float("nan"), float("inf"), None)]
    lines = [*losses([1.0] * 3), *junk, {"student_loss": 9.0}]
    assert observed(lines, spike_window=3).keys() == {70}


def test_restored_state_warns_as_if_never_interrupted():
    values = [1.0, 1.2, 0.9, 8.0, 1.0, 9.0, 30.0, 1.0, 50.0, 50.0]
    lines = [
        {"student_loss": v, "discriminator": 0.001 * v, "sample_std": v, "sample_mean": -v, "sample_diversity": 1 / v}
        for v in values
    ]
    config = HealthConfig(spike_window=3, patience=2, repeat_every=2)
    whole = Health(config)
    parts = Health(config)
    total = 0
    for step, line in enumerate(lines):
        saved = json.loads(json.dumps(parts.state()))
        parts = Health(config)
        parts.load_state(saved)
        expected = whole.observe(step, line)
        assert parts.observe(step, line) == expected
        assert parts.state() == whole.state()
        total += len(expected)
    assert total > 5


def test_recipe_names_the_actions():
    assert build(HealthConfig, {"on_drift": "stop"}).on_drift == "stop"
    with pytest.raises(UserError, match="on_drift is False; expected one of warn, stop, ignore"):
        build(HealthConfig, {"on_drift": False})
