import json

from distill import ablate, demo

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


def test_ablation_tabulates_every_variant_and_resumes(tiny_teacher, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--num_samples", "20", "--seeds", "0", *settings(tiny_teacher)]
    ablate.main(arguments)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["variant"] for line in lines] == list(ablate.VARIANTS)
    printed = capsys.readouterr().out
    assert all(f"| {variant} |" in printed for variant in ablate.VARIANTS)
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    ablate.main(arguments)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(lines)


def test_ablation_table_has_mean_and_deviation():
    metrics = {"frechet_teacher": 1.0, "frechet_same_noise": 1.0, "accuracy": 0.9, "recall": 0.5, "diversity": 1.0}
    results = [
        {
            "variant": "consistency only",
            "seed": seed,
            "student": metrics | {"frechet_teacher": value},
            "teacher": metrics,
        }
        for seed, value in enumerate((1.0, 2.0, 3.0))
    ]
    assert "| consistency only | 2.000 ± 1.000 |" in ablate.table(results)
