"""Schedulers that a pipeline folder brings along."""

import json

import pytest

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.components import load_component
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

SOLVER = {  # of the published SANA
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lambda_min_clipped": None,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}


@pytest.fixture
def load(tmp_path):
    def load(name, config):
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
        return load_component(tmp_path, "scheduler", ["diffusers", name], None)

    return load


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": 1000, "shift": 3.0},  # Stable Diffusion 3 and 3.5
        {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},  # Z-Image
        {"shift": 6.0, "use_karras_sigmas": False, "time_shift_type": "exponential", "shift_terminal": None},
    ],
)
def test_published_configurations(load, config):
    scheduler = load("FlowMatchEulerDiscreteScheduler", config)
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler and scheduler.config.shift == config["shift"]


def test_the_solver_of_sana(load):
    assert load("DPMSolverMultistepScheduler", SOLVER).config.shift == 3.0


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "supports use_karras_sigmas = False only"),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "linear"}, "= 'exponential' only, this one has 'linea"),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 2}, r"shift_terminal must lie in \[0, 1\), got 2"),
        ("SCMScheduler", {"prediction_type": "epsilon"}, 'prediction_type must be "trigflow"'),
        ("DPMSolverMultistepScheduler", SOLVER | {"use_beta_sigmas": True}, "has use_beta_sigmas, which is not supp"),
        (
            "DPMSolverMultistepScheduler",
            SOLVER | {"use_lu_lambdas": True, "use_dynamic_shifting": True},
            "has use_dynamic_shifting and use_lu_lambdas, which is not supported here: pass a scheduler of your own",
        ),
    ],
)
def test_what_is_not_supported_is_one_message(load, name, config, message):
    with pytest.raises(UserError, match=message):
        load(name, config)
