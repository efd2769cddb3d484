import functools
import importlib.util
import math
import sys

import numpy as np
import paddle
import pytest

from cinn_infer.fingerprint import UnknownError, fingerprint


class Leaf(paddle.nn.Layer):
    def __init__(self, **values):
        super().__init__()
        self.linear = paddle.nn.Linear(2, 3)
        for name, value in values.items():
            setattr(self, name, value)


class Config:
    __slots__ = ("a",)


def test_names_and_weights_do_not_count():
    assert fingerprint(Leaf(), []) == fingerprint(Leaf(), [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1e-6, 1e-5),
        (1, 1.0),
        ("1", 1),
        (None, False),
        ([1, 2], (1, 2)),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        (np.zeros(3), np.ones(3)),
        (np.zeros(3), np.zeros([3, 1])),
        (np.zeros(3, "float32"), np.zeros(3, "int32")),
        (math.sin, math.cos),
        (functools.partial(round, ndigits=1), functools.partial(round, ndigits=2)),
        (paddle.float32, paddle.float64),
    ],
)
def test_constants_count(one, other):
    assert fingerprint(Leaf(value=one), []) == fingerprint(Leaf(value=one), [])
    assert fingerprint(Leaf(value=one), []) != fingerprint(Leaf(value=other), [])


def test_tensors_layers_facts_and_flags_count():
    base = fingerprint(Leaf(), [])
    assert base != fingerprint(Leaf(extra=paddle.nn.Linear(2, 3)), [])
    assert base != fingerprint(Leaf(), ["fact"])
    assert fingerprint(Leaf(value=paddle.zeros([2])), []) != fingerprint(Leaf(value=paddle.ones([2])), [])
    training = Leaf()
    training.eval()
    assert base != fingerprint(training, [])
    before = paddle.get_flags(["FLAGS_enable_cse_in_dy2st"])
    paddle.set_flags({name: not value for name, value in before.items()})
    changed = fingerprint(Leaf(), [])
    paddle.set_flags(before)
    assert base != changed and base == fingerprint(Leaf(), [])


@pytest.mark.parametrize("value", [(lambda x: lambda: x)(1), Config(), iter([1])])
def test_what_cannot_be_described_is_an_error_that_says_where(value):
    with pytest.raises(UnknownError, match=r"Leaf\.value\.0 is a"):
        fingerprint(Leaf(value=[value]), [])


def test_source_counts_with_what_it_imports(tmp_path, monkeypatch):
    def module(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    def digest(helper):
        from cinn_infer import fingerprint as module_under_test

        module_under_test._sources.cache_clear()
        module("fingerprint_helper", helper)
        text = "import paddle\nfrom fingerprint_helper import double\nclass Model(paddle.nn.Layer):\n    pass\n"
        return fingerprint(module("fingerprint_model", text).Model(), [])

    first = digest("def double(x):\n    return 2 * x\n")
    assert first == digest("def double(x):\n    return 2 * x\n")
    assert first != digest("def double(x):\n    return x + x\n")


def test_references_in_circles_end():
    leaf = Leaf()
    leaf.values = [leaf.linear]
    leaf.values.append(leaf.values)
    fingerprint(leaf, [])
