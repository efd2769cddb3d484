"""Each decision rule against a trace worked out by hand, on a model whose every number is known.

The model has four blocks. Block i adds gains[i] · drive to the image, half by self-attention, half by cross-attention;
what its attention reads is the image itself. A test gives the image and the drive of every step.
"""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from fast_diffusers.caching import (
    BlockDance,
    CGTaylor,
    FirstBlockTaylor,
    PyramidAttentionBroadcast,
    SortBlock,
    TaylorSeer,
    TeaBlockCache,
    TeaCache,
    TGate,
    cache_stats,
    denoising_run,
    enable_cache,
)
from fast_diffusers.caching.families import FAMILIES, FLUX_TEA_COEFFICIENTS, BlockKind, Family, Site
from fast_diffusers.caching.method import polynomial, relative_change
from fast_diffusers.caching.sortblock import FLUX_SCHEDULE, number_to_recompute, similarity
from fast_diffusers.caching.teacache import AccumulatedChange
from fast_diffusers.errors import UserError

RAW = (1.0, 0.0)
CHANNELS = 16


class Half(nn.Layer):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, image, drive):
        return drive * self.gain / 2


class ToyBlock(nn.Layer):
    def __init__(self, gain):
        super().__init__()
        self.own, self.text = Half(gain), Half(gain)

    def forward(self, hidden_states, drive):
        return hidden_states + self.own(hidden_states, drive) + self.text(hidden_states, drive)


class Toy(nn.Layer):
    def __init__(self, gains=(1.0, 2.0, 3.0, 4.0)):
        super().__init__()
        self.config = {}
        self.blocks = nn.LayerList([ToyBlock(gain) for gain in gains])
        self.eval()

    def forward(self, hidden_states, drive, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, drive)
        return (hidden_states,)


TOY = Family(
    segments=(
        (
            "blocks",
            BlockKind(
                streams=("hidden_states",),
                outputs=None,
                modulated=lambda block, given: given["hidden_states"],
                branches=(Site("own", "self"), Site("text", "cross")),
                attention=(Site("own", "self"), Site("text", "cross")),
            ),
        ),
    ),
    noise_level=lambda config, t: t,
    batched=("hidden_states", "drive", "timestep"),
    text="drive",
)


@pytest.fixture(autouse=True)
def toy_family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "Toy", TOY)


def wide(value):
    """A number, or CHANNELS numbers, as one token."""
    return paddle.to_tensor(np.broadcast_to(np.asarray(value, "float64"), [1, 1, CHANNELS]).copy())


def run(config, images, drives, times=None, gains=(1.0, 2.0, 3.0, 4.0), steps=None):
    """The model's results of a run, and the model with the cache that made them."""
    model = Toy(gains)
    enable_cache(model, config)
    times = times or np.linspace(1000, 1, len(images)).tolist()
    with denoising_run(model, steps or len(images)):
        outputs = [
            model(wide(image), wide(drive), paddle.to_tensor([time]))[0].numpy()[0, 0]
            for image, drive, time in zip(images, drives, times, strict=True)
        ]
    return outputs, cache_stats(model)


def full_steps(stats):
    """C for steps that computed all, R for those that reused something."""
    return "".join("R" if record.reused else "C" for record in stats.last_run)


def grown(*rates, start=1.0):
    """start, start (1 + rates[0]), ..."""
    return np.cumprod([start, *(1 + rate for rate in rates)]).tolist()


# ---------------------------------------------------------------------------------------------------------- TeaCache
def test_published_polynomial():
    by_hand = 498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861
    assert polynomial(FLUX_TEA_COEFFICIENTS, 0.1) == pytest.approx(by_hand)
    assert polynomial(FLUX_TEA_COEFFICIENTS, 0.0) == 0.264230861


def test_relative_change():
    assert float(relative_change(paddle.to_tensor([2.0, -1.0]), paddle.to_tensor([1.0, 3.0]))) == (1 + 4) / (1 + 3)


def test_accumulated_change():
    """2x + 0.01 at x = .1, .1, .05, .3, .02 with threshold .45: .21, .42, .53 -> 0, .61 -> 0, .05."""
    rule = AccumulatedChange(0.45, (2.0, 0.01))
    assert [rule.reuse(x) for x in (0.1, 0.1, 0.05, 0.3, 0.02)] == [True, True, False, False, True]
    assert rule.total == pytest.approx(0.05)
    assert not rule.reuse(0.0, forced=True) and rule.total == 0


@pytest.mark.parametrize("change", [float("nan"), float("inf")])
def test_a_change_that_is_no_number_computes(change):
    rule = AccumulatedChange(0.45, RAW)
    assert not rule.reuse(change) and rule.total == 0


def test_teacache():
    """Changes .1 .1 .1 .02 .2 .1 .1: sums .1 .2 .3 -> 0, .02, .22, .32 -> 0; the last step is computed anyway.

    On reuse the image of the step gets what the blocks added in the last computed one.
    """
    images = grown(0.1, 0.1, 0.1, 0.02, 0.2, 0.1, 0.1)
    drives = [1, 2, 3, 4, 5, 6, 7, 8]
    outputs, stats = run(TeaCache(threshold=0.25, coefficients=RAW), images, drives)
    assert full_steps(stats) == "CRRCRRCC"
    for output, image, drive in zip(outputs, images, [1, 1, 1, 4, 4, 4, 7, 8], strict=True):
        np.testing.assert_allclose(output, image + 10 * drive)


def test_teacache_computes_the_last_step_only_if_it_is_known():
    config = TeaCache(threshold=1, coefficients=RAW)
    images = grown(0.1, 0.1, 0.1)
    assert full_steps(run(config, images, [1] * 4)[1]) == "CRRC"
    assert full_steps(run(config, images, [1] * 4, steps=100)[1]) == "CRRR"


def test_teacache_takes_the_familys_polynomial(monkeypatch):
    """With P(x) = 3x, changes of .1 reach .25 at once; x itself would not."""
    images = grown(0.1, 0.1, 0.1)
    assert full_steps(run(TeaCache(threshold=0.25), images, [1] * 4)[1]) == "CRRC"
    object.__setattr__(TOY, "tea_coefficients", (3.0, 0.0))
    try:
        assert full_steps(run(TeaCache(threshold=0.25), images, [1] * 4)[1]) == "CCCC"
    finally:
        object.__setattr__(TOY, "tea_coefficients", None)


# ----------------------------------------------------------------------------------------------------- TeaBlockCache
def test_teablockcache():
    """Block 0 reads the image, which grows by .1, .1, .1, .3, .1, ...; a step is judged by the change before it.

    Step 0 and 1 know no change. Block 0 (threshold .25): step 2 knows .1: .1 R; step 3 .1: .2 R; step 4 .1: .3 C -> 0;
    step 5 knows .3: C -> 0; step 6 .1 R; the last is computed. Drive zero: the other blocks read the same and follow.
    """
    images = grown(0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1)
    config = TeaBlockCache(threshold=0.25, coefficients=RAW, step_start=0, step_end=1000)
    _, stats = run(config, images, [0] * 8)
    assert full_steps(stats) == "CCRRCCRC"
    assert set(stats.reused.values()) == {3}


def test_teablockcache_decides_for_every_block_and_keeps_what_it_added():
    """The image stays at 1, the drive goes 0, 0, 1, 1, 1, 1; block 0 is always computed.

    Step 1 sees no change, so that step 2 reuses the others, with what they added at drive 0: they read 2 where they
    read 1. Step 3 knows that and computes; block 1 reads 2 again, blocks 2 and 3 read 4 and 7. Step 4 reuses block 1.
    """
    config = TeaBlockCache(threshold=0.25, coefficients=RAW, step_start=0, step_end=1000, cache_start=1)
    images, drives = [1] * 6, [0, 0, 1, 1, 1, 1]
    outputs, stats = run(config, images, drives)
    assert stats.reused["blocks.0"] == 0
    np.testing.assert_allclose(outputs[2][0], 1 + 1)
    np.testing.assert_allclose(outputs[3][0], 1 + 10)
    assert [record.reused for record in stats.last_run] == [0, 0, 3, 0, 1, 0]


def test_teablockcache_computes_outside_of_its_window():
    config = TeaBlockCache(threshold=9, coefficients=RAW, step_start=200, step_end=700)
    _, stats = run(config, grown(*[0.1] * 6), [0] * 7, times=[1000, 900, 800, 700, 200, 100, 50])
    assert full_steps(stats) == "CCCRRCC"


def test_teablockcache_extrapolates_behind_its_gate():
    """Order 1, first two steps computed, changes of .1 against .25: R R C. The drive is linear, the image is not."""
    images, drives = grown(*[0.1] * 5), [0, 1, 2, 3, 4, 5]
    config = TeaBlockCache(
        threshold=0.25, coefficients=RAW, step_start=0, step_end=1000, taylor_order=1, first_enhance=2
    )
    outputs, stats = run(config, images, drives)
    final = [image + 10 * drive for image, drive in zip(images, drives, strict=True)]
    assert [record.reused for record in stats.last_run][:4] == [0, 0, 4, 4]
    for step in (2, 3):
        np.testing.assert_allclose(outputs[step], final[1] + (final[1] - final[0]) * (step - 1))


# -------------------------------------------------------------------------------------------------- first-block rules
def test_first_block_taylor():
    """Block 0 adds the drive: 1, 1.04 (.04 < .05: R), 1.08 (.08 of 1: C), 1.12 (.037 of 1.08: R), 1.2 (.11: C), last.

    The reuse at step 3 extrapolates from the computed steps 0 and 2: the distance is two.
    """
    drives, images = [1, 1.04, 1.08, 1.12, 1.2, 1.2], [0, 1, 4, 9, 16, 25]
    outputs, stats = run(FirstBlockTaylor(threshold=0.05, first_enhance=1), images, drives)
    assert full_steps(stats) == "CRCRCC"
    assert [record.computed for record in stats.last_run] == [4, 1, 4, 1, 4, 4]
    np.testing.assert_allclose(outputs[1], 10)
    np.testing.assert_allclose(outputs[3], 14.8 + (14.8 - 10) / 2)


def test_first_block_taylor_computes_its_first_steps():
    _, stats = run(FirstBlockTaylor(threshold=0.05, first_enhance=3), [1] * 6, [1] * 6)
    assert full_steps(stats) == "CCCRRC"


def test_cg_taylor():
    """Block 0 gives 1, 2, 3, 4, 6, 7. Step 1: predicted 1, off by 1/2: C. Steps 2, 3: predicted right: R R.

    Step 4: predicted 5, off by 1/6 > .1: C. Step 5: slope (6 − 2)/3 from steps 1 and 4: 7.33, off by .048: R.
    """
    images = [0, 1, 2, 3, 5, 6]
    outputs, stats = run(CGTaylor(threshold=0.1), images, [1] * 6)
    assert full_steps(stats) == "CCRRCR"
    np.testing.assert_allclose(outputs[3], 13)
    np.testing.assert_allclose(outputs[5], 15 + 4 / 3)
    assert full_steps(run(CGTaylor(threshold=0.2), images, [1] * 6)[1]) == "CCRRRR"


# ------------------------------------------------------------------------------------------------ schedules of steps
def test_taylorseer():
    """Three first steps, then every third. The parts are predicted, the image itself is that of the step."""
    images, drives = [5, 1, 4, 1, 5, 9, 2, 6, 5], [0, 1, 2, 9, 9, 5, 9, 9, 8]
    outputs, stats = run(TaylorSeer(interval=3, max_order=1, first_enhance=3), images, drives)
    assert full_steps(stats) == "CCCRRCRRC"
    assert [output[0] - image for output, image in zip(outputs, images, strict=True)] == pytest.approx(
        [0, 10, 20, 30, 40, 50, 60, 70, 80]  # predicted 3 and 4; from steps 2 and 5, with a slope of 1, 6 and 7
    )


def test_block_dance():
    """Outside of 100..900 all; inside every second is full. Three of four blocks are shallow; what they add is kept."""
    times, drives = [1000, 900, 800, 500, 300, 100, 50], [1, 2, 3, 4, 5, 6, 7]
    outputs, stats = run(BlockDance(period=2, depth=0.75), [0] * 7, drives, times)
    assert full_steps(stats) == "CCRCRCC"
    assert [record.computed for record in stats.last_run] == [4, 4, 1, 4, 1, 4, 4]
    assert [output[0] for output in outputs] == [10, 20, 6 * 2 + 4 * 3, 40, 6 * 4 + 4 * 5, 60, 70]


@pytest.mark.parametrize("depth, expected", [(0.75, [14, 29]), (0.5, [10, 19]), ((0, 3), [0, 3])])
def test_depth_of_block_dance(depth, expected):
    assert BlockDance(depth=depth).depths(SimpleNamespace(segment_lengths=[19, 38])) == expected


def test_pyramid_attention_broadcast():
    """Between 800 and 100, without them: self-attention every second step, cross-attention every third (by number)."""
    times = [1000, 800, 700, 600, 500, 400, 300, 200, 100, 50]
    _, stats = run(PyramidAttentionBroadcast(2, 3), [0] * 10, range(10), times)
    # steps inside: 2..7; self reused at 3, 5, 7; cross at 2, 4, 5, 7
    assert [record.reused for record in stats.last_run] == [0, 0, 4, 4, 4, 8, 0, 8, 0, 0]
    assert stats.reused["blocks.2.own"] == 3 and stats.reused["blocks.2.text"] == 4


def test_tgate():
    """Gate 6, warm-up 2, every third: self at 0, 1, 3, 5 | 6, 8, 10; cross at 0..5 and never again."""
    outputs, stats = run(TGate(gate=6, warm_up=2, sp_interval=3, fi_interval=2), [0] * 11, range(11))
    own, text = [0, 1, 1, 3, 3, 5, 6, 6, 8, 8, 10], [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5]
    assert [output[0] for output in outputs] == [5 * (a + b) for a, b in zip(own, text, strict=True)]
    assert stats.computed["blocks.0.own"] == 7 and stats.computed["blocks.0.text"] == 6


@pytest.mark.parametrize("negative, positive_row", [("first_half", 1), ("second_half", 0)])
def test_tgate_drops_the_negative_half(negative, positive_row):
    model = Toy()
    enable_cache(model, TGate(gate=2, negative_pass=negative, sp_interval=1))
    with denoising_run(model, 4):
        for step in range(4):
            rows = wide(step).expand([2, 1, CHANNELS]) + paddle.to_tensor([0.0, 100.0], "float64").reshape([2, 1, 1])
            out = model(rows, rows, paddle.to_tensor([10.0 - step] * 2))[0]
            value = step + 100 * positive_row
            text = value if step < 2 else 1 + 100 * positive_row
            assert out.shape == [2, 1, CHANNELS]
            assert float(out[positive_row, 0, 0]) == value + 5 * value + 5 * text
            assert (float(out[0, 0, 0]) == float(out[1, 0, 0])) == (step >= 2)
    # cross-attention has no weights in this model, so that only the dropped rows count
    assert cache_stats(model).compute_fraction == (1 + 1 + 0.5 + 0.5) / 4


def test_tgate_drops_the_negative_call():
    model = Toy()
    enable_cache(model, TGate(gate=2, negative_pass="second_call", sp_interval=1))
    with denoising_run(model, 4):
        for step in range(4):
            time = paddle.to_tensor([10.0 - step])
            positive, negative = (model(wide(x), wide(1), time)[0] for x in (step, step + 50))
            assert bool(paddle.equal_all(positive, negative)) == (step >= 2)
    stats = cache_stats(model)
    assert (stats.forwards, stats.dropped) == (8, 2)
    assert all(stats.computed[part] + stats.reused[part] == 6 for part in stats.computed)


def test_tgate_needs_pairs_of_rows_to_drop_one_of_each():
    with pytest.raises(UserError, match="needs an even number of rows, the batch has 1: guidance is off"):
        run(TGate(gate=1, negative_pass="first_half"), [0] * 2, [0] * 2)


# ---------------------------------------------------------------------------------------------------------- SortBlock
def test_published_schedule():
    t = 500.0
    by_hand = 5.67621e-14 * t**5 - 1.36659e-10 * t**4 + 1.16246e-7 * t**3 - 3.97725e-5 * t**2 + 0.00361 * t + 0.56088
    assert polynomial(FLUX_SCHEDULE, t) == pytest.approx(by_hand)
    assert polynomial(FLUX_SCHEDULE, 0.0) == 0.56088


@pytest.mark.parametrize(
    "blocks, beta, share, expected",
    [(57, 0.1, 0.56, 4), (57, 0.1, 0.52, 3), (4, 0.0, 0.9, 1), (4, 1.0, 1.0, 4), (4, 1.0, -3.0, 1)],
)
def test_number_of_blocks_to_recompute(blocks, beta, share, expected):
    """int(57 · .056) + 1 = int(3.19) + 1, int(57 · .052) + 1 = int(2.96) + 1; one at least, all at most."""
    assert number_to_recompute(blocks, beta, (share,), 500.0) == expected


def test_similarity_looks_at_the_first_eighth_of_the_channels():
    a, b = np.ones([1, 2, 16], "float32"), -np.ones([1, 2, 16], "float32")
    b[..., :2] = [[1, 1], [1, -1]]
    assert float(similarity(paddle.to_tensor(a), paddle.to_tensor(b))) == pytest.approx((1 + 0) / 2)


def test_sortblock():
    """Block i adds base + gains[i] · step · across, so that its direction is atan(gains[i] · step).

    Steps 0 and 1 are outside of the window, 2 and 6 full (interval 4), 3 and 7 rank int(4 · .3) + 1 = 2 blocks. From 2
    to 3 the directions turn by .094, .080, .197, .142: blocks 2 and 3 turn most. From 6 to 7: .070, .012, .043, .023.
    """
    gains = (0.1, 2.0, 0.5, 1.0)
    base, across = np.zeros(CHANNELS), np.zeros(CHANNELS)
    base[0], across[1] = 1, 1
    model = Toy(gains)
    for block, gain in zip(model.blocks, gains, strict=True):
        block.own.forward = lambda image, drive, gain=gain: wide(base) + drive * gain
        block.text.forward = lambda image, drive: drive * 0
    enable_cache(model, SortBlock(start=850, end=50, interval=4, beta=1.0, schedule=(0.3,)))
    times = [1000, 900, 800, 700, 600, 500, 400, 300]
    with denoising_run(model, 8):
        for step, time in enumerate(times):
            out = model(wide(0), wide(across * step), paddle.to_tensor([float(time)]))[0].numpy()[0, 0]
            np.testing.assert_allclose(out, 4 * base + sum(gains) * across * step, atol=1e-12)  # all is linear
    stats = cache_stats(model)
    assert [record.computed for record in stats.last_run] == [4, 4, 4, 2, 2, 2, 4, 2]
    assert dict(stats.reused) == {"blocks.0": 3, "blocks.1": 4, "blocks.2": 0, "blocks.3": 1}
