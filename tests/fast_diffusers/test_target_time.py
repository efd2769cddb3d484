import json

import numpy as np
import paddle
import pytest

from fast_diffusers import lora
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import FluxDenoiser
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.models.layers import sinusoid
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.target_time import (
    CONFIG,
    WEIGHTS,
    AuxiliaryTimeEmbedding,
    ShortcutTimeDenoiser,
    TargetTime,
    TargetTimeDenoiser,
    attach,
    attached,
    of_lora,
    save_lora,
    time_embedding_of,
)

LAYOUTS = ("paddle", "diffusers")


@pytest.fixture
def pipe(tiny_teacher):
    return open_pipeline(tiny_teacher)


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(rng.standard_normal((3, 1, 8, 8), dtype=np.float32))
    labels = np.eye(10, dtype=np.float32)[[1, 2, 3]]
    cond = Cond(prompt_embeds=paddle.to_tensor(labels).unsqueeze(1), pooled_prompt_embeds=paddle.to_tensor(labels))
    return x, paddle.to_tensor([1.0, 0.7, -0.4]), cond


def random_embedding(transformer) -> AuxiliaryTimeEmbedding:
    """An embedding that does something, unlike a new one."""
    embedding = AuxiliaryTimeEmbedding.for_model(transformer)
    for parameter in embedding.parameters():
        parameter.set_value(0.3 * paddle.randn(parameter.shape))
    return embedding


def evaluate(denoiser, inputs, target_t=None, t=None):
    x, own_t, cond = inputs
    return denoiser(x, own_t if t is None else t, cond, target_t=target_t, guidance=3.5).numpy()


TARGET = paddle.to_tensor([0.0, 0.5, -0.1])


# ---------------------------------------------------------------------------------------------- wrappers
def test_a_new_embedding_changes_nothing(pipe, inputs):
    wrapped = TargetTimeDenoiser(pipe.denoiser, AuxiliaryTimeEmbedding.for_model(pipe.transformer))
    np.testing.assert_array_equal(evaluate(wrapped, inputs, TARGET), evaluate(pipe.denoiser, inputs))


def test_the_embedding_is_added_to_the_embedded_time(pipe, inputs):
    """temb += embed(target_t)·(t − target_t), per row, and only within its own denoiser."""
    embedding, seen = random_embedding(pipe.transformer), []
    time_embedding_of(pipe.transformer).register_forward_post_hook(lambda layer, given, output: seen.append(output))
    plain, wrapped = pipe.denoiser, TargetTimeDenoiser(pipe.denoiser, embedding)
    before = evaluate(plain, inputs)
    told = evaluate(wrapped, inputs, TARGET)
    np.testing.assert_array_equal(evaluate(plain, inputs, TARGET), before)
    assert np.abs(told - before).max() > 0.01
    mlp = embedding.embedder
    expected = mlp.linear_2(paddle.nn.functional.silu(mlp.linear_1(sinusoid(1000 * TARGET))))
    expected = expected * (inputs[1] - TARGET).unsqueeze(1)
    np.testing.assert_allclose((seen[1] - seen[0]).numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target_t", [None, "t"])
def test_the_embedding_is_silent_where_there_is_no_way_to_go(pipe, inputs, target_t):
    wrapped = TargetTimeDenoiser(pipe.denoiser, random_embedding(pipe.transformer))
    told = evaluate(wrapped, inputs, None if target_t is None else inputs[1])
    np.testing.assert_array_equal(told, evaluate(pipe.denoiser, inputs))


def test_scalars_stand_for_every_row(pipe, inputs):
    wrapped = TargetTimeDenoiser(pipe.denoiser, random_embedding(pipe.transformer))
    rows = evaluate(wrapped, inputs, paddle.full([3], 0.25), paddle.full([3], 0.75))
    np.testing.assert_array_equal(evaluate(wrapped, inputs, 0.25, 0.75), rows)
    with pytest.raises(ValueError):
        evaluate(wrapped, inputs, paddle.ones([2]))


def test_two_embeddings_of_one_model_do_not_meet(pipe, inputs):
    first, second = (TargetTimeDenoiser(pipe.denoiser, random_embedding(pipe.transformer)) for _ in range(2))
    alone = evaluate(first, inputs, TARGET)
    assert np.abs(evaluate(second, inputs, TARGET) - alone).max() > 1e-3
    np.testing.assert_array_equal(evaluate(first, inputs, TARGET), alone)


@pytest.mark.parametrize("target_t", [0.0, 0.3, TARGET, None])
def test_the_shortcut_shows_one_time(pipe, inputs, target_t):
    _, t, _ = inputs
    shown = t - 0.5 * (t if target_t is None else target_t)
    wrapped = ShortcutTimeDenoiser(pipe.denoiser)
    np.testing.assert_array_equal(evaluate(wrapped, inputs, target_t), evaluate(pipe.denoiser, inputs, t=shown))


@pytest.mark.parametrize("wrap", ["shortcut", "auxiliary"])
def test_wrappers_have_what_denoisers_have(pipe, inputs, wrap):
    x, t, cond = inputs
    way = TargetTime.new(wrap, pipe.transformer)
    wrapped, plain = way.wrap(pipe.denoiser), pipe.denoiser
    assert wrapped.takes_target_time
    assert wrapped.transformer is pipe.transformer
    assert (wrapped.num_taps, wrapped.feature_channels) == (plain.num_taps, plain.feature_channels)
    shown = t if wrap == "auxiliary" else t - TARGET / 2
    expected = plain.features(x, shown, cond, [1], guidance=3.5)[0]
    actual = wrapped.features(x, t, cond, [1], target_t=TARGET, guidance=3.5)[0]
    np.testing.assert_array_equal(actual.numpy(), expected.numpy())
    with pytest.raises(AttributeError):
        _ = wrapped.nothing_like_this


def test_negative_times_are_times_of_their_own(pipe, inputs):
    x, t, cond = inputs
    positive, negative = (pipe.denoiser(x, sign * t.abs(), cond, guidance=3.5).numpy() for sign in (1, -1))
    assert np.isfinite(negative).all()
    assert np.abs(positive - negative).max() > 1e-3


@pytest.mark.parametrize("where", ["outside the blocks", "in a block"])
def test_gradient_checkpointing_sees_the_same_times(pipe, inputs, where, monkeypatch):
    """Also where a model embeds its time inside a checkpointed block, and the times have changed since."""
    x, t, cond = inputs
    transformer, gradients = pipe.transformer, []
    embedding = random_embedding(transformer)
    if where == "in a block":
        block = transformer.transformer_blocks[0]
        pooled = cond["pooled_prompt_embeds"]
        block.register_forward_pre_hook(
            lambda layer, given: (*given[:2], given[2] + transformer.embed_conditioning(t, t, pooled), *given[3:])
        )
    wrapped = TargetTimeDenoiser(pipe.denoiser, embedding)
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        losses = [wrapped(x, t, cond, target_t=TARGET * k, guidance=3.5).square().mean() for k in (1, 0)]
        with embedding.told(t, t):
            sum(losses).backward()
        gradients.append([p.grad.numpy() for p in (*embedding.parameters(), transformer.x_embedder.weight)])
        for parameter in (*embedding.parameters(), *transformer.parameters()):
            parameter.clear_gradient(set_to_zero=False)
    for plain, recomputed in zip(*gradients, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(recomputed, plain, rtol=1e-4, atol=1e-7)


def test_bfloat16_models_have_a_float32_embedding(tiny_teacher):
    transformer = open_pipeline(tiny_teacher, "bfloat16").transformer
    embedding = AuxiliaryTimeEmbedding.for_model(transformer)
    assert {each.dtype for each in embedding.parameters()} == {paddle.float32}


def test_a_model_whose_time_embedding_is_unknown():
    with pytest.raises(TypeError, match="where Linear embeds its time is not known; it is for FluxT"):
        AuxiliaryTimeEmbedding.for_model(paddle.nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------- files
def student(pipe, mode, name="student"):
    """The pipeline with an adapter that does something, trained for a way."""
    for weight in lora.inject(pipe.transformer, 2, 2, ["attn.to_q", "attn.to_v"], name=name):
        weight.set_value(paddle.randn(weight.shape))
    way = TargetTime("shortcut")
    if mode == "auxiliary":
        way = TargetTime(mode, random_embedding(pipe.transformer))
    attach(pipe.transformer, way, name)
    return pipe


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["shortcut", "auxiliary"])
def test_a_lora_file_brings_its_way(tiny_teacher, inputs, tmp_path, mode, layout):
    trained = student(open_pipeline(tiny_teacher), mode)
    save_lora(trained.transformer, tmp_path, "student", layout)
    fresh = open_pipeline(tiny_teacher)
    base = evaluate(fresh.denoiser, inputs, TARGET)
    fresh.load_lora_weights(tmp_path)
    expected = evaluate(trained.denoiser, inputs, TARGET)
    np.testing.assert_array_equal(evaluate(fresh.denoiser, inputs, TARGET), expected)
    assert fresh.denoiser.takes_target_time
    with lora.active(fresh.transformer, None):  # the teacher knows of nothing
        np.testing.assert_array_equal(evaluate(fresh.denoiser, inputs, TARGET), base)
        assert not fresh.denoiser.takes_target_time
    fresh.fuse_lora()
    np.testing.assert_allclose(evaluate(fresh.denoiser, inputs, TARGET), expected, rtol=1e-3, atol=1e-4)
    fresh.unload_lora_weights()  # what is fused stays, with its way
    np.testing.assert_allclose(evaluate(fresh.denoiser, inputs, TARGET), expected, rtol=1e-3, atol=1e-4)


def test_an_ordinary_lora_has_no_way(pipe, tmp_path):
    lora.inject(pipe.transformer, 2, 2, ["attn.to_q"], name="plain")
    save_lora(pipe.transformer, tmp_path, "plain")
    assert of_lora(tmp_path, pipe.transformer) is None
    assert not list(tmp_path.glob("target_time*"))
    attach(pipe.transformer, TargetTime("shortcut"), "default")  # of an adapter of that name that was here before
    pipe.load_lora_weights(tmp_path)
    assert attached(pipe.transformer) == {}
    assert isinstance(pipe.denoiser, FluxDenoiser)


def test_two_adapters_with_ways_cannot_run_together(pipe, inputs):
    student(student(pipe, "shortcut", "a"), "auxiliary", "b")
    evaluate(pipe.denoiser, inputs, TARGET)  # b alone
    with lora.active(pipe.transformer, ["a", "b"]), pytest.raises(UserError, match="adapters a, b are each told"):
        evaluate(pipe.denoiser, inputs, TARGET)


@pytest.mark.parametrize("mode", ["shortcut", "auxiliary"])
def test_a_pipeline_folder_brings_its_way(tiny_teacher, inputs, tmp_path, mode):
    pipe = open_pipeline(tiny_teacher)
    way = TargetTime("shortcut") if mode == "shortcut" else TargetTime(mode, random_embedding(pipe.transformer))
    attach(pipe.transformer, way)
    names = set(pipe.transformer.state_dict())
    pipe.save_pretrained(tmp_path, layout="diffusers")
    again = open_pipeline(tmp_path)
    assert set(again.transformer.state_dict()) == names
    np.testing.assert_array_equal(evaluate(again.denoiser, inputs, TARGET), evaluate(pipe.denoiser, inputs, TARGET))
    config = json.loads((tmp_path / CONFIG).read_text())
    attach(pipe.transformer, None)
    pipe.save_pretrained(tmp_path / "again")
    again.save_pretrained(tmp_path / "again")
    pipe.save_pretrained(tmp_path / "again")
    assert isinstance(open_pipeline(tmp_path / "again").denoiser, FluxDenoiser)
    assert config == ({"mode": mode} if mode == "shortcut" else {"mode": mode, "channels": 16})


def test_models_do_not_share_what_they_remember(tiny_teacher):
    first, second = open_pipeline(tiny_teacher), open_pipeline(tiny_teacher)
    attach(first.transformer, TargetTime("shortcut"))
    assert isinstance(second.denoiser, FluxDenoiser)
    assert type(first.transformer) is type(second.transformer) is FluxTransformer2DModel


def damage(folder, what):
    match what:
        case "no config":
            (folder / CONFIG).unlink()
        case "config is a list":
            (folder / CONFIG).write_text("[]")
        case "config is not JSON":
            (folder / CONFIG).write_text("{")
        case "another mode":
            (folder / CONFIG).write_text('{"mode": "shortcut"}')
        case "unknown mode":
            (folder / CONFIG).write_text('{"mode": "none"}')
        case "no weights":
            (folder / WEIGHTS).unlink()
        case "half the weights":
            content = (folder / WEIGHTS).read_bytes()
            (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
        case "other weights":
            TargetTime("auxiliary", AuxiliaryTimeEmbedding(8)).save(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", r"target time of mode auxiliary, but .*target_time\.json is missing"),
        ("config is a list", r"target_time\.json is damaged"),
        ("config is not JSON", r"target_time\.json is damaged"),
        ("another mode", "is of mode shortcut"),
        ("unknown mode", "mode is 'none'; expected one of shortcut, auxiliary"),
        ("no weights", r"target_time\.safetensors cannot be read"),
        ("half the weights", r"target_time\.safetensors cannot be read"),
        ("other weights", "is of another model"),
    ],
)
def test_damaged_files(tiny_teacher, tmp_path, what, message):
    save_lora(student(open_pipeline(tiny_teacher), "auxiliary").transformer, tmp_path, "student")
    damage(tmp_path, what)
    fresh = open_pipeline(tiny_teacher)
    with pytest.raises(UserError, match=message):
        fresh.load_lora_weights(tmp_path)
    assert lora.adapters(fresh.transformer) == {}


def test_a_shortcut_lora_needs_its_file_alone(tiny_teacher, inputs, tmp_path):
    trained = student(open_pipeline(tiny_teacher), "shortcut")
    save_lora(trained.transformer, tmp_path, "student")
    (tmp_path / CONFIG).unlink()
    fresh = open_pipeline(tiny_teacher)
    fresh.load_lora_weights(tmp_path)
    np.testing.assert_array_equal(evaluate(fresh.denoiser, inputs, TARGET), evaluate(trained.denoiser, inputs, TARGET))
