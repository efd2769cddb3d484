import json

from distill import demo

TINY = ["lora.rank=2", "objective.num_cells=8", "trainer.steps=2", "trainer.batch_size=4", "trainer.sample_every=null"]


def settings(teacher):
    return [argument for value in (*TINY, f"model.path={teacher}") for argument in ("--set", value)]


def test_demo_writes_everything_it_promises(tiny_teacher, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--num_samples", "20", *settings(tiny_teacher)]
    demo.main(arguments)
    demo.main(arguments)  # a second time, over the first
    names = {path.name for path in tmp_path.iterdir()}
    assert {"lora", "metrics.json", "table.txt", "comparison.png", "losses.png", "metrics.jsonl"} <= names
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert {(row["role"], row["steps"]) for row in rows} >= {("teacher", 50), ("teacher", 4), ("student", 4)}
    assert "student, 1 step" in capsys.readouterr().out
