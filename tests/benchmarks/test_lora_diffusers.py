import runpy
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lora_diffusers.py"


def test_the_half_in_paddle_writes_what_the_other_reads(fixtures_dir, tmp_path):
    model = fixtures_dir / "flux"
    runpy.run_path(str(SCRIPT))["write"](tmp_path, model, model / "io.npz")
    record = np.load(tmp_path / "paddle.npz")
    assert (tmp_path / "diffusers" / "pytorch_lora_weights.safetensors").is_file()
    assert Path(str(record["model"])) == model.resolve()
    np.testing.assert_allclose(record["base"], np.load(model / "io.npz")["out_sample"], atol=2e-5)
    assert np.abs(record["output"] - record["base"]).max() > 0.1
