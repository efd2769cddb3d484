import json
import math
import os
import subprocess
import sys

import numpy as np
import paddle
import pytest

import cinn_infer
from cinn_infer import program_cache
from cinn_infer.program_cache import ProgramCache
from cinn_infer.programs import Stored

STORED = Stored("text", ["x"], ["y"], [["w", "weight"]], {"fields": {"sample": 0}})

PROCESS = """
import sys
import numpy as np
import paddle
import cinn_infer
from fast_diffusers.models import SanaTransformer2DModel

paddle.seed(0)
for _ in range(int(sys.argv[1])):
    paddle.nn.Linear(2, 2)  # parameters get other names
sizes = dict(num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8)
model = SanaTransformer2DModel(4, 4, num_layers=1, cross_attention_dim=16, caption_channels=6, sample_size=4, **sizes)
rng = np.random.default_rng(0)
for weight in model.parameters():
    weight.set_value(rng.standard_normal(weight.shape).astype("float32"))
x, text = (rng.standard_normal(shape).astype("float32") for shape in ([2, 4, 4, 4], [2, 3, 6]))
compiled = cinn_infer.compile(model, "pir")
out = model(paddle.to_tensor(x), paddle.to_tensor(text), paddle.ones([2]), return_dict=False)[0]
print(compiled.cache.hits, compiled.cache.misses, compiled.cache.skipped, out.numpy().tobytes().hex())
"""


class Small(paddle.nn.Layer):
    def __init__(self, factor=2.0):
        super().__init__()
        self.linear = paddle.nn.Linear(3, 3)
        self.factor = factor
        self.register_buffer("shift", paddle.to_tensor([1.0, 2.0, 3.0]))

    def forward(self, x, start=0):
        y = self.factor * self.linear(x) + self.shift + 1 / 3
        return {"y": y, "both": (y, paddle.nn.functional.layer_norm(y, [3], epsilon=1e-7) + start)}


class Infinite(paddle.nn.Layer):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return paddle.where(x > 1, x, paddle.full_like(x, self.value))


class Holding(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.held = [paddle.ones([3])]  # no buffer, as it is in a list

    def forward(self, x):
        return x + self.held[0]


def run(model, folder, x=None, **options):
    """(what the model gives, its compiled self), from one call."""
    compiled = cinn_infer.compile(model, "pir", cache=folder)
    with paddle.no_grad():
        result = model(paddle.arange(6, dtype="float32").reshape([2, 3]) if x is None else x, **options)
    compiled.restore()
    return result, compiled


def counts(compiled):
    return compiled.cache.hits, compiled.cache.misses


def test_another_process_runs_the_same_program(tmp_path):
    environment = os.environ | {"FAST_DIFFUSERS_CACHE": str(tmp_path)}

    def process(others):
        command = [sys.executable, "-c", PROCESS, others]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip().split("\n")[-1].rsplit(" ", 1)

    first, second = process("0"), process("3")
    assert (first[0], second[0]) == ("0 1 []", "1 0 []")
    assert first[1] == second[1]
    assert [path.suffix for path in (tmp_path / "programs").iterdir()] == [".json"]


def test_restored_program_is_the_traced_one_with_the_weights_of_now(tmp_path):
    model, other = Small(), Small()
    traced, first = run(model, tmp_path)
    again, second = run(model, tmp_path)
    assert (counts(first), counts(second)) == ((0, 1), (1, 0))
    assert second.report()["cache"] == {"directory": str(tmp_path), "hits": 1, "misses": 0, "skipped": []}
    assert again._fields == ("y", "both")
    for a, b in zip((traced.y, *traced.both), (again.y, *again.both), strict=True):
        np.testing.assert_array_equal(a, b)
    different, third = run(other, tmp_path)
    assert counts(third) == (1, 0)
    with paddle.no_grad():
        np.testing.assert_allclose(different.y, other(paddle.arange(6, dtype="float32").reshape([2, 3]))["y"], 1e-6)
    other.shift.set_value(paddle.zeros([3]))  # values of buffers may be in the graph
    assert counts(run(other, tmp_path)[1]) == (0, 1)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: Small(3.0), {}),
        (Small, dict(start=1)),
        (Small, dict(x=paddle.ones([2, 3], "float64").astype("float32")[:1])),
    ],
    ids=["constant of the model", "constant of the call", "shape"],
)
def test_what_another_graph_would_serve_is_no_hit(model, options, tmp_path):
    run(Small(), tmp_path)
    assert counts(run(model(), tmp_path, **options)[1]) == (0, 1)


@pytest.mark.parametrize("damage", ["empty", "cut", "altered", "foreign", "another program"])
def test_damaged_entry_is_replaced(damage, tmp_path):
    truth = run(Small(), tmp_path)[0].y.shape
    [file] = tmp_path.iterdir()
    good = file.read_text()
    content = json.loads(good)
    if damage == "altered":
        content["program"]["inputs"] = ["z"]
    elif damage == "foreign":
        content["key"] = "0" * 64
    elif damage == "another program":  # with a checksum of its own
        content["program"]["text"] = "{}"
        content["sha256"] = program_cache._digest(content["program"])
    file.write_text({"empty": "", "cut": good[:100]}.get(damage, json.dumps(content)))
    result, compiled = run(Small(), tmp_path)
    assert counts(compiled) == (0, 1) and result.y.shape == truth
    assert json.loads(file.read_text())["program"]["inputs"] == ["x"]
    assert counts(run(Small(), tmp_path)[1]) == (1, 0)


def test_what_cannot_be_kept_says_why(tmp_path):
    for model, reason in [
        (Infinite(math.nan), "Paddle cannot read the program that it wrote"),
        (Holding(), "1 tensors that are no parameters or buffers"),
    ]:
        truth = model(paddle.ones([3]))
        for _ in range(2):
            result, compiled = run(model, tmp_path, paddle.ones([3]))
            np.testing.assert_array_equal(result, truth)
            assert counts(compiled) == (0, 1) and reason in compiled.cache.skipped[0]
    assert not list(tmp_path.iterdir())


def test_infinity_is_restored(tmp_path):
    for hits in (0, 1):
        result, compiled = run(Infinite(-math.inf), tmp_path)
        np.testing.assert_array_equal(result, [[-math.inf, -math.inf, 2], [3, 4, 5]])
        assert counts(compiled) == (hits, 1 - hits)


def test_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("FAST_DIFFUSERS_CACHE", "off")
    for cache in (True, False):
        compiled = run(Small(), cache)[1]
        assert counts(compiled) == (0, 0) and compiled.report()["cache"]["directory"] is None
    monkeypatch.setenv("FAST_DIFFUSERS_CACHE", str(tmp_path))
    assert program_cache.folder() == tmp_path / "programs"
    monkeypatch.delenv("FAST_DIFFUSERS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program_cache.folder() == tmp_path / "fast_diffusers" / "programs"


def test_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    cache = ProgramCache(tmp_path / "file")
    cache.put("a", STORED)
    assert cache.get("a") is None and "cannot be written to" in cache.skipped[0]


def test_least_recently_used_goes_first(tmp_path, monkeypatch):
    cache = ProgramCache(tmp_path)
    for age, key in enumerate("abc"):
        cache.put(key, STORED)
        os.utime(tmp_path / f"{key}.json", (100 + age, 100 + age))
    cache.found("a")
    monkeypatch.setattr(program_cache, "LIMIT", 3 * (tmp_path / "a.json").stat().st_size)
    cache.put("d", STORED)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}
    assert cache.get("b") is None and cache.get("d").layout == STORED.layout
