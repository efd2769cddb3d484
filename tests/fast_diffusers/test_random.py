import numpy as np
import paddle
import pytest

from fast_diffusers.random import Generator, noise_source, randn


def test_same_seed_same_numbers_and_the_stream_goes_on():
    one, two = Generator(3), Generator().manual_seed(3)
    first = randn([2, 3], one)
    assert paddle.equal_all(first, randn([2, 3], two))
    assert not paddle.equal_all(first, randn([2, 3], one))
    assert not paddle.equal_all(first, randn([2, 3], Generator(4)))
    assert one.initial_seed() == 3
    assert paddle.equal_all(first, randn([2, 3], one.manual_seed(3)))


def test_interleaved_generators_do_not_meet():
    a, b = Generator(1), Generator(2)
    mixed = [randn([4], a), randn([4], b), randn([4], a)]
    alone = Generator(1)
    assert paddle.equal_all(mixed[0], randn([4], alone)) and paddle.equal_all(mixed[2], randn([4], alone))


def test_global_state_is_left_alone():
    paddle.seed(11)
    expected = paddle.randn([4])
    paddle.seed(11)
    randn([2, 2], Generator(0))
    randn([2, 2], [Generator(0), Generator(1)])
    assert paddle.equal_all(paddle.randn([4]), expected)


def test_without_generator_the_global_state_decides():
    paddle.seed(11)
    first = randn([4])
    paddle.seed(11)
    assert paddle.equal_all(randn([4]), first)


def test_paddles_own_generators():
    first = randn([2, 4], paddle.seed(5))
    again = randn([2, 4], paddle.seed(5))
    assert paddle.equal_all(first, again) and not paddle.equal_all(first, randn([2, 4], paddle.seed(6)))


def test_one_generator_a_row_makes_rows_independent_of_the_batch():
    batch = randn([3, 2, 2], [Generator(7), Generator(8), Generator(9)])
    assert paddle.equal_all(batch[1:2], randn([1, 2, 2], [Generator(8)]))


def test_half_precision_is_the_rounded_float32():
    half = randn([64], Generator(1), dtype="bfloat16")
    assert half.dtype == paddle.bfloat16
    rounded = randn([64], Generator(1)).astype("bfloat16")
    assert paddle.equal_all(half.astype("float32"), rounded.astype("float32"))


def test_moments():
    values = randn([200_000], Generator(0)).numpy()
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert abs(np.mean(values**4) - 3) < 0.1


def test_noise_source():
    like = paddle.zeros([2, 3])
    assert paddle.equal_all(noise_source(like, Generator(2), None)(), randn([2, 3], Generator(2)))
    draw = noise_source(like, None, lambda shape: paddle.ones(shape, dtype="float16"))
    assert draw().dtype == paddle.float32 and float(draw().sum()) == 6


@pytest.mark.parametrize(
    ("generator", "error", "message"),
    [
        ([Generator(0)], ValueError, "1 generators for a batch of 2"),
        ("12.5", ValueError, "state 12.5 does not exist"),
        (7, TypeError, "got int"),
    ],
)
def test_bad_generators(generator, error, message):
    with pytest.raises(error, match=message):
        randn([2, 3], generator)


def test_negative_seed():
    with pytest.raises(ValueError, match="negative, got -1"):
        Generator(-1)


def test_ppdiffusers_generators_draw_what_ppdiffusers_draws():
    from ppdiffusers.utils.paddle_utils import randn_tensor

    ours = randn([2, 3], paddle.Generator().manual_seed(7)).numpy()
    theirs = randn_tensor([2, 3], generator=paddle.Generator().manual_seed(7), dtype="float32").numpy()
    np.testing.assert_array_equal(ours, theirs)
