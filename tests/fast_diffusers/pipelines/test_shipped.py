import numpy as np
import pytest

from distill.metrics.classifier import shipped_classifier
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.random import Generator


def test_the_digits_teacher_draws_what_it_is_asked_for():
    pipe = open_pipeline("digits")
    pipe.set_progress_bar_config(disable=True)
    prompts = [str(i % 10) for i in range(50)]
    images = pipe(prompts, num_inference_steps=20, generator=Generator(0), output_type="pd").images * 2 - 1
    _, logits = shipped_classifier("digits")(images)
    assert (logits.argmax(-1).numpy() == np.arange(50) % 10).mean() >= 0.96


def test_unknown_model_is_one_message():
    with pytest.raises(UserError, match="model nowhere is neither a pipeline folder nor one of: digits"):
        open_pipeline("nowhere")
