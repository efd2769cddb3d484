"""Gemma-2, Qwen3 and Qwen2.5-VL against PyTorch transformers (tests/assets/make_decoder_goldens.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.static import InputSpec
from safetensors.numpy import load_file, save_file

from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import find_checkpoint
from fast_diffusers.text_encoders import Gemma2Model, Qwen2_5_VLTextModel, Qwen3Model, decoder

ASSETS = Path(__file__).parents[2] / "assets" / "text_encoders"
GOLDEN = load_file(ASSETS / "decoders.safetensors")
IDS, MASK = GOLDEN["input_ids"], GOLDEN["attention_mask"]  # full, padded on the right, padded on the left
MODELS = {"gemma2": Gemma2Model, "qwen3": Qwen3Model, "qwen2_5_vl": Qwen2_5_VLTextModel}

each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """A copy of the golden model of the test's `name`."""
    target = tmp_path / "model"
    target.mkdir()
    for file in (ASSETS / request.getfixturevalue("name")).iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def rewrite(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Put one file with `weights` in place of the folder's weights."""
    for file in folder.glob("model*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@paddle.no_grad()
def run(model, ids=IDS, mask=MASK) -> list[np.ndarray]:
    mask = None if mask is None else paddle.to_tensor(mask)
    output = model(paddle.to_tensor(ids), mask, output_hidden_states=True)
    assert output.hidden_states[-1] is output.last_hidden_state
    return [state.numpy() for state in output.hidden_states]


def check(model, name: str, tolerance: float = 1e-5) -> None:
    golden, kept = GOLDEN[f"{name}.hidden_states"], MASK.astype(bool)
    for state, expected in zip(run(model), golden, strict=True):
        assert np.abs(state - expected)[kept].max() < tolerance * np.abs(expected).max()
        assert np.isfinite(state).all()  # padding included


@each_model
@pytest.mark.parametrize("block", [7, 256])
def test_all_hidden_states_are_those_of_transformers(name, block, monkeypatch):
    monkeypatch.setattr(decoder, "QUERY_BLOCK", block)  # 20 tokens in three pieces, or in one
    check(MODELS[name].from_pretrained(ASSETS, name), name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gemma2", {"sliding_window": 6}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("gemma2", {"hidden_activation": "silu"}),
        ("qwen3", {"sliding_window": 7}),
        ("qwen3", {"use_sliding_window": False}),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e5}}),
        ("qwen3", {"rms_norm_eps": 1e-3}),
    ],
)
def test_every_setting_counts(name, changes, folder):
    edit_config(folder, **changes)
    with pytest.raises(AssertionError):
        check(MODELS[name].from_pretrained(folder), name, tolerance=1e-4)


@each_model
def test_padding_changes_nothing(name):
    model = MODELS[name].from_pretrained(ASSETS / name)
    for row, part in [(1, slice(0, 13)), (2, slice(7, 20))]:
        for batched, alone in zip(run(model), run(model, IDS[row : row + 1, part], None), strict=True):
            np.testing.assert_allclose(batched[row, part], alone[0], rtol=1e-4, atol=1e-5)


@each_model
def test_hidden_states_are_kept_on_request_only(name):
    model = MODELS[name].from_pretrained(ASSETS / name)
    output = model(paddle.to_tensor(IDS), paddle.to_tensor(MASK).astype("bool"))
    assert output.hidden_states is None
    assert np.array_equal(output.last_hidden_state.numpy(), run(model)[-1])


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("block", [2, 3, 8, 20])
def test_query_blocks_cover_causal_windows(window, block, monkeypatch):
    monkeypatch.setattr(decoder, "QUERY_BLOCK", block)
    length = 8
    seen = np.zeros([2, length, length], bool)
    mask = np.ones([2, length], int)
    mask[1, :3] = 0
    for queries, keys, bias in decoder.query_blocks(length, window, paddle.to_tensor(mask), "float32"):
        assert bias.shape[1:3] == [1, 1]
        assert keys.stop == queries.stop and queries.stop - queries.start <= block
        seen[:, queries, keys] = bias.numpy()[:, 0, 0] == 0
    query, key = np.indices([length, length])
    causal = (key <= query) & (key > query - (window or length))
    assert np.array_equal(seen, causal & mask[:, None].astype(bool))


def test_half_rope_turns_by_position():
    rope = decoder.half_rope_tables(5, 4, 100.0, "float64")
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([1, 5, 2, 4]))
    turned = decoder.apply_half_rope(x, rope).numpy()
    pairs = x.numpy()[..., :2] + 1j * x.numpy()[..., 2:]
    expected = pairs * np.exp(1j * np.arange(5)[:, None] * np.array([1.0, 0.1]))[:, None]
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-6)


@each_model
@pytest.mark.parametrize("prefix", decoder.WEIGHT_PREFIXES)
def test_prefixes_of_other_classes(name, prefix, folder):
    text = {
        key.removeprefix("model."): value
        for key, value in read_weights(folder).items()
        if not key.startswith(("visual.", "lm_head."))
    }
    weights = {prefix + key: value for key, value in text.items()}
    weights |= {"lm_head.weight": text["embed_tokens.weight"].copy()}
    weights |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}  # of older files
    if name == "qwen2_5_vl":
        weights |= {f"{where}visual.norm.weight": np.zeros(3, np.float32) for where in ("", "model.")}
    rewrite(folder, weights)
    check(MODELS[name].from_pretrained(folder), name)


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_configurations_of_older_versions(name, folder):
    """Before transformers 5 there was no layer_types, and rope_theta stood by itself."""
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": None}))
    check(MODELS[name].from_pretrained(folder), name)


@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_flat_configuration(name, folder):
    config = json.loads((folder / "config.json").read_text())
    flat = config | config["text_config"] | {"model_type": "qwen2_5_vl", "rope_theta": 1e6}
    del flat["text_config"], flat["rope_parameters"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    (folder / "config.json").write_text(json.dumps(flat))
    check(Qwen2_5_VLTextModel.from_pretrained(folder), name)


@each_model
@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
def test_round_trip_in_shards(name, layout, tmp_path):
    model = MODELS[name].from_pretrained(ASSETS / name)
    model.save_pretrained(tmp_path, layout=layout, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = MODELS[name].from_pretrained(tmp_path)
    for before, after in zip(run(model), run(again), strict=True):
        assert np.array_equal(before, after)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == model.model_type and config["architectures"] == [type(model).__name__]
    if name == "qwen2_5_vl":  # transformers asks for it
        assert config["rope_scaling"]["mrope_section"] == [2, 1, 1]


@each_model
def test_bfloat16_loads(name):
    """Paddle has no bfloat16 matrix product on CPU; the weights are those of the file, rounded."""
    model = MODELS[name].from_pretrained(ASSETS / name, paddle_dtype="bfloat16")
    exact = MODELS[name].from_pretrained(ASSETS / name)
    for (key, weight), full in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert weight.dtype == paddle.bfloat16, key
        assert np.array_equal(weight.astype("float32"), full.astype("bfloat16").astype("float32")), key


@each_model
def test_bfloat16_files(name, tmp_path):
    MODELS[name].from_pretrained(ASSETS / name, paddle_dtype="bfloat16").save_pretrained(tmp_path, layout="diffusers")
    dtypes = {tensor.dtype for tensor in find_checkpoint(tmp_path, {"diffusers": "model"}).tensors.values()}
    assert dtypes == {"BF16"}
    check(MODELS[name].from_pretrained(tmp_path), name, tolerance=0.1)


@each_model
def test_float64(name):
    check(MODELS[name].from_pretrained(ASSETS / name, paddle_dtype="float64"), name)


class LastState(nn.Layer):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask).last_hidden_state


@each_model
@paddle.no_grad()
def test_traced_program_gives_the_same_for_any_batch(name):
    model = MODELS[name].from_pretrained(ASSETS / name)
    specs = [InputSpec([None, IDS.shape[1]], "int64"), InputSpec([None, IDS.shape[1]], "int64")]
    traced = paddle.jit.to_static(LastState(model).eval(), input_spec=specs, full_graph=True)
    for rows in (slice(3), slice(1, 2)):
        inputs = [paddle.to_tensor(array[rows]) for array in (IDS, MASK)]
        np.testing.assert_allclose(traced(*inputs).numpy(), model(*inputs).last_hidden_state.numpy(), atol=1e-5)


@each_model
def test_weights_that_do_not_fit_are_one_error(name, folder):
    weights = read_weights(folder)
    prefix = "model." if name == "qwen2_5_vl" else ""
    del weights[f"{prefix}layers.1.mlp.up_proj.weight"]
    weights[f"{prefix}layers.7.extra"] = np.zeros(2, np.float32)
    weights[f"{prefix}norm.weight"] = np.zeros(5, np.float32)
    rewrite(folder, weights)
    pattern = (
        rf"do not fit {MODELS[name].__name__}.*missing: layers\.1\.mlp\.up_proj\.weight; "
        r"unexpected: layers\.7\.extra; misshapen: norm\.weight \[5\] instead of"
    )
    with pytest.raises(UserError, match=pattern):
        MODELS[name].from_pretrained(folder)


@pytest.mark.parametrize("name", ["gemma2"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, "that of a 'gemma3_text' model, not of a Gemma2Model"),
        ({"hidden_activation": "relu"}, "activation 'relu' is not one of"),
        ({"use_bidirectional_attention": True}, "Gemma2Model is causal"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "no rotary embedding of type 'yarn'"),
        ({"layer_types": ["full_attention"]}, "for each of 4 layers, not"),
        ({"layer_types": ["linear_attention"] * 4}, "should be full_attention or sliding_attention"),
    ],
)
def test_configurations_that_are_refused(name, folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        Gemma2Model.from_pretrained(folder)


def test_gemma_refuses_float16():
    with pytest.raises(UserError, match="Gemma 2 leaves the range of float16"):
        Gemma2Model.from_pretrained(ASSETS / "gemma2", paddle_dtype="float16")
