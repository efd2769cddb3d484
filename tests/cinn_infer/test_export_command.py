import pytest

import cinn_infer
from cinn_infer.export_command import main
from fast_diffusers.errors import UserError
from fast_diffusers.random import Generator


def test_what_is_written_is_said_and_runs(tiny_teacher, tmp_path, capsys):
    main([str(tiny_teacher), str(tmp_path / "out"), "--formats", "paddle", "--num_phases", "2", "--num_cells", "10"])
    text = capsys.readouterr().out
    assert "| transformer.forward | batch, tokens, text |" in text
    assert f"FluxLabelPipeline in {tmp_path / 'out'}: " in text and "largest difference to eager outputs" in text
    pipe = cinn_infer.load(tmp_path / "out", "paddle")
    assert type(pipe.scheduler).__name__ == "PhasedConsistencyScheduler"
    pipe.set_progress_bar_config(disable=True)
    assert pipe("3", num_inference_steps=2, generator=Generator(0), output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "neither a pipeline folder nor one of"),
        (["digits", "out", "--formats", "paddle,tvm"], "--formats takes paddle and onnx, with commas, got 'tvm'"),
        (["digits", "out", "--height", "8"], "--height and --width make pairs, got 1 and 0"),
        (["digits", "out", "--height", "7", "--width", "8"], "height must be a positive multiple of 2, got 7"),
        (["digits", "out", "--num_phases", "0"], "phases"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert not list(tmp_path.iterdir())
