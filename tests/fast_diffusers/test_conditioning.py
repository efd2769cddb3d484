import numpy as np
import paddle
import pytest

from fast_diffusers.conditioning import Cond


@pytest.fixture
def cond() -> Cond:
    return Cond(
        prompt_embeds=paddle.arange(24, dtype="float32").reshape([3, 4, 2]), pooled_prompt_embeds=paddle.arange(3.0)
    )


def pooled(cond: Cond) -> list[float]:
    return cond["pooled_prompt_embeds"].tolist()


def test_is_a_mapping(cond):
    assert set(cond) == {"prompt_embeds", "pooled_prompt_embeds"} and len(cond) == 2 and cond.batch_size == 3
    assert "prompt_embeds" in cond and "label" not in cond
    assert Cond(dict(cond)).keys() == cond.keys()
    with pytest.raises(KeyError, match=r"no 'label'; it has \['pooled_prompt_embeds', 'prompt_embeds'\]"):
        cond["label"]


def test_cannot_be_changed(cond):
    with pytest.raises(TypeError):
        cond["pooled_prompt_embeds"] = paddle.zeros([3])
    source = {"x": paddle.zeros([2])}
    made = Cond(source)
    source["y"] = paddle.zeros([5])
    assert list(made) == ["x"]


@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        ([True, False, True], [0, 2]),
        (np.array([False, False, False]), []),
        (paddle.to_tensor([False, True, False]), [1]),
        ([2, 0, 2], [2, 0, 2]),
        (paddle.to_tensor([1], dtype="int32"), [1]),
    ],
)
def test_mask_selects_rows(cond, keep, rows):
    picked = cond.mask(keep)
    assert picked.batch_size == len(rows) and pooled(picked) == rows
    np.testing.assert_array_equal(picked["prompt_embeds"].numpy(), cond["prompt_embeds"].numpy()[rows])


def test_row_arrangements(cond):
    assert pooled(cond.roll(1)) == [2, 0, 1]
    assert pooled(cond.concat(cond.mask([1]))) == [0, 1, 2, 1]
    assert pooled(cond.repeat_interleave(2)) == [0, 0, 1, 1, 2, 2]
    assert pooled(cond.mask([1]).expand(3)) == [1, 1, 1]
    assert cond.expand(3) is cond
    null = cond.null()
    assert null["prompt_embeds"].shape == [3, 4, 2] and float(null["prompt_embeds"].abs().sum()) == 0
    assert pooled(cond) == [0, 1, 2], "the original is untouched"


def test_rows_keep_their_dtype(cond):
    half = cond.map(lambda x: x.astype("bfloat16"))
    for made in (
        half.mask([0]),
        half.roll(),
        half.concat(half),
        half.null(),
        half.repeat_interleave(2),
        half.mask([0]).expand(2),
    ):
        assert {x.dtype for x in made.values()} == {paddle.bfloat16}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c: Cond(), ValueError, "at least one tensor"),
        (lambda c: Cond(a=np.zeros(3)), TypeError, "a must be a paddle.Tensor, got ndarray"),
        (lambda c: Cond(a=paddle.to_tensor(1.0)), ValueError, "a is a scalar"),
        (lambda c: Cond(a=paddle.zeros([2]), b=paddle.zeros([3, 1])), ValueError, r"differ: a \[2\], b \[3, 1\]"),
        (lambda c: c.mask([True, False]), ValueError, "2 flags for a batch of 3"),
        (lambda c: c.mask([[True]]), ValueError, "1-d bool mask or int index"),
        (lambda c: c.mask([1.0, 0.0, 1.0]), ValueError, "1-d bool mask or int index, got paddle.float64"),
        (lambda c: c.concat(Cond(a=paddle.zeros([3]))), ValueError, "names differ"),
        (lambda c: c.concat({**c, "prompt_embeds": paddle.zeros([3, 5, 2])}), ValueError, "same sequence length"),
        (lambda c: c.expand(6), ValueError, "cannot expand a batch of 3 to 6"),
    ],
)
def test_bad_input(cond, make, error, message):
    with pytest.raises(error, match=message):
        make(cond)
