import json
import warnings
from pathlib import Path

import numpy as np
import paddle
import pytest
from ppdiffusers.loaders import SD3LoraLoaderMixin
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.paddle import save_file as save_paddle_file

from fast_diffusers import lora
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel

LAYOUTS = ["paddle", "diffusers"]


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="np") as handle:
        return handle.metadata()


def rewrite(file: Path, rename, metadata=None) -> None:
    """Rewrites the file with rename(key, value) -> (key, value), or None to drop a tensor."""
    pairs = (rename(key, value) for key, value in load_file(file).items())
    save_file({key: np.ascontiguousarray(value) for key, value in filter(None, pairs)}, file, metadata)


@pytest.fixture
def saved(toy, x, add_adapter, tmp_path):
    """(file in torch's layout with alpha, the output of the model with its adapter)."""
    add_adapter(toy)
    return lora.save(toy, tmp_path, layout="diffusers"), toy(x)


@pytest.fixture
def fresh(make_toy):
    return make_toy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_file", [False, True])
def test_round_trip_is_exact(make_toy, tmp_path, add_adapter, layout, as_file):
    toys = [make_toy() for _ in range(3)]
    add_adapter(toys[0], "student", rank=3, alpha=2.5)
    path = tmp_path / "new" / "my.safetensors" if as_file else tmp_path / "new"
    file = lora.save(toys[0], path, "student", layout)
    names = {"paddle": "paddle_lora_weights.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
    assert file == (path if as_file else path / names[layout])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameters = lora.load(toys[1], path, "again")
        lora.load(toys[2], lora.save(toys[1], tmp_path / "third", "again", LAYOUTS[0]), "student")
    assert lora.adapters(toys[1])["again"] == lora.adapters(toys[0])["student"] == lora.adapters(toys[2])["student"]
    for toy, name in ((toys[1], "again"), (toys[2], "student")):
        state = lora.state_dict(toy, name)
        assert list(state) == list(lora.state_dict(toys[0], "student"))
        for key, value in lora.state_dict(toys[0], "student").items():
            assert (state[key] == value).all()
            assert not state[key].stop_gradient
    assert all(a is b for a, b in zip(parameters, lora.state_dict(toys[1], "again").values(), strict=True))


def test_names_shapes_and_header_are_those_of_the_others(toy, add_adapter, tmp_path):
    a, b = add_adapter(toy, rank=3, alpha=2.5, targets=["proj_out"])
    torch = lora.save(toy, tmp_path, layout="diffusers")
    tensors = load_file(torch)
    assert set(tensors) == {"transformer.proj_out.lora_A.weight", "transformer.proj_out.lora_B.weight"}
    np.testing.assert_array_equal(tensors["transformer.proj_out.lora_A.weight"], a.numpy().T)
    np.testing.assert_array_equal(tensors["transformer.proj_out.lora_B.weight"], b.numpy().T)
    assert header(torch)["format"] == "pt"
    assert json.loads(header(torch)["lora_adapter_metadata"]) == {
        "transformer.r": 3,
        "transformer.lora_alpha": 2.5,
        "transformer.target_modules": ["proj_out"],
        "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
    }
    assert header(lora.save(toy, tmp_path))["format"] == "pd"
    state, is_torch = SD3LoraLoaderMixin.lora_state_dict(str(tmp_path), local_files_only=True)  # ppdiffusers' reader
    assert not is_torch
    assert (state["transformer.proj_out.lora_A.weight"] == a).all()
    assert (state["transformer.proj_out.lora_B.weight"] == b).all()


def test_a_file_that_diffusers_saved(fixtures_dir):
    """FLUX with rank and alpha patterns, saved by diffusers 0.42.1, and the output it computed."""
    folder = Path(__file__).parents[2] / "assets" / "flux_lora_diffusers"
    model = FluxTransformer2DModel.from_pretrained(fixtures_dir / "flux")
    model.eval()
    record = np.load(fixtures_dir / "flux" / "io.npz")
    inputs = {key.removeprefix("in_"): paddle.to_tensor(record[key]) for key in record if key.startswith("in_")}
    expected = np.load(folder / "output.npy")
    lora.load(model, folder)
    layers = {key.removesuffix(".lora_A.weight"): value for key, value in lora.state_dict(model).items() if "_A" in key}
    assert len(layers) == 7
    assert {(layer.endswith("ff.net.2"), value.shape[1]) for layer, value in layers.items()} == {(True, 2), (False, 3)}
    with paddle.no_grad():
        output = model(**inputs, return_dict=False)[0].numpy()
    assert np.abs(output - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(output - record["out_sample"]).max() > 0.1


def test_layers_may_differ_in_rank_and_alpha(toy, x, saved, fresh):
    file, _ = saved
    pattern = {"transformer.alpha_pattern": {"proj_out": 9.0, "^to_q": 50.0}, "transformer.lora_alpha": 2.0}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(pattern)}
    rewrite(file, lambda k, v: (k, v if "proj_out" not in k else v[:2] if "lora_A" in k else v[:, :2]), metadata)
    lora.load(fresh, file, "a")
    again = lora.save(fresh, file.parent / "again", "a", "diffusers")
    config = {k.removeprefix("transformer."): v for k, v in json.loads(header(again)["lora_adapter_metadata"]).items()}
    assert config["r"] == 3 and config["rank_pattern"] == {"^proj_out": 2}
    assert config["lora_alpha"] == 2.0 and config["alpha_pattern"] == {"^proj_out": 9.0}
    expected = fresh(x)
    lora.load(fresh, again, "b")
    assert (fresh(x) == expected).all()
    a, b = (value.numpy() for value in lora.parameters(fresh, "a")[-2:])
    assert a.shape == (12, 2)
    delta = fresh.proj_out.delta("a").numpy()
    np.testing.assert_allclose(delta, 9.0 / 2 * a @ b, atol=1e-6)


def kohya(key, value):
    layer, factor = key.removeprefix("transformer.").split(".lora_")
    return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if factor[0] == 'A' else 'up'}.weight", value


def early_diffusers(key, value):
    layer, factor = key.split(".lora_")
    return f"{layer.replace('attn.to', 'attn.processor.to')}_lora.{'down' if factor[0] == 'A' else 'up'}.weight", value


def lora_linear_layer(key, value):
    layer, factor = key.split(".lora_")
    return f"{layer}.lora_linear_layer.{'down' if factor[0] == 'A' else 'up'}.weight", value


def peft(key, value):
    return f"base_model.model.{key.removeprefix('transformer.')}".replace(".weight", ".default.weight"), value


def bare(key, value):
    return key.removeprefix("transformer."), value


@pytest.mark.parametrize("naming", [kohya, early_diffusers, lora_linear_layer, peft, bare])
def test_other_namings(x, saved, fresh, naming):
    file, expected = saved
    rewrite(file, naming)
    with pytest.warns(UserWarning, match="does not store LoRA alpha: using the given alpha 2"):
        lora.load(fresh, file, alpha=2.0)
    assert (fresh(x) == expected).all()


@pytest.mark.filterwarnings("ignore:.*does not store LoRA alpha")
def test_the_output_list_of_early_diffusers_has_no_index(toy, x, fresh, tmp_path, add_adapter):
    add_adapter(toy, alpha=3, targets=["to_out.0"])
    file = lora.save(toy, tmp_path, layout="diffusers")
    rewrite(file, lambda key, value: early_diffusers(key.replace("to_out.0", "to_out"), value))
    lora.load(fresh, file, alpha=3.0)
    assert (fresh(x) == toy(x)).all()


@pytest.mark.filterwarnings("ignore:.*does not store LoRA alpha")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_become_float32(toy, fresh, tmp_path, add_adapter, dtype):
    add_adapter(toy)
    tensors = {f"transformer.{key}": value.astype(dtype) for key, value in lora.state_dict(toy).items()}
    save_paddle_file(tensors, tmp_path / "paddle_lora_weights.safetensors", {"format": "pd"})
    lora.load(fresh, tmp_path, alpha=1.0)
    for key, value in lora.state_dict(fresh).items():
        assert value.dtype == paddle.float32
        assert (value == tensors[f"transformer.{key}"].astype("float32")).all()


def test_alpha_comes_from_the_tensors_the_header_or_the_user(toy, x, saved, fresh):
    file, expected = saved
    lora.load(fresh, file, "header")
    assert (fresh(x) == expected).all()
    lora.load(fresh, file, "user", alpha=1.0)
    half = fresh(x)
    with lora.active(toy, "default", 0.5):
        np.testing.assert_allclose(half, toy(x), atol=1e-6)
    tensors = load_file(file)
    layers = {key.split(".lora_")[0] for key in tensors}
    save_file(tensors | {f"{layer}.alpha": np.array(2.0, np.float32) for layer in layers}, file)
    lora.load(fresh, file, "tensors")
    assert (fresh(x) == expected).all()


def test_rslora_divides_by_the_root_of_the_rank(toy, x, saved, fresh):
    file, _ = saved
    rewrite(file, bare, {"lora_adapter_metadata": json.dumps({"lora_alpha": 2, "use_rslora": True})})
    lora.load(fresh, file)
    with lora.active(toy, "default", np.sqrt(3)):  # rank 3
        np.testing.assert_allclose(fresh(x), toy(x), atol=1e-6)


def test_without_alpha_the_warning_says_what_is_used(toy, x, saved, fresh):
    file, _ = saved
    rewrite(file, bare)
    with pytest.warns(UserWarning, match=r"does not store LoRA alpha: using alpha = rank \(scale 1\)"):
        lora.load(fresh, file)
    assert lora.adapters(fresh)["default"].alpha == 3.0
    with lora.active(toy, "default", 3 / 2):
        np.testing.assert_allclose(fresh(x), toy(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not store LoRA alpha")
@pytest.mark.parametrize("told", ["pd", None])
def test_shapes_decide_where_header_or_name_are_wrong(x, saved, fresh, told):
    file, expected = saved
    rewrite(file, lambda key, value: (key, value), told and {"format": told})
    if told is None:
        file = file.rename(file.with_name("paddle_lora.safetensors"))
    lora.load(fresh, file, alpha=2.0)
    assert (fresh(x) == expected).all()


@pytest.mark.filterwarnings("ignore:.*does not store LoRA alpha")
def test_a_text_encoders_part_is_left_with_a_warning(x, saved, fresh):
    file, expected = saved
    save_file(load_file(file) | {"text_encoder.q_proj.lora_A.weight": np.zeros((3, 4), np.float32)}, file)
    with pytest.warns(UserWarning, match=r"left text_encoder.q_proj.lora_A.weight, which are not of 'transformer'"):
        lora.load(fresh, file, alpha=2.0)
    assert (fresh(x) == expected).all()


def test_missing_files(toy, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no LoRA file in .*: expected paddle_lora_weights\.safetensors or pyt"
    ):
        lora.load(toy, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no LoRA file .*nothing\.safetensors"):
        lora.load(toy, tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"not a file", lambda data: b""])
def test_corrupt_files(saved, fresh, damage):
    file, _ = saved
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"pytorch_lora_weights.safetensors is truncated or not a safetensors file"):
        lora.load(fresh, file)
    assert lora.adapters(fresh) == {}


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda key, value: (key.replace("to_q", "to_qkv"), value),
            r"for another model: .* no linear layers for blocks.0.attn.to_qkv, blocks.1.attn.to_qkv$",
        ),
        (
            lambda key, value: (key, np.zeros((3, 99), np.float32) if "proj_out.lora_A" in key else value),
            r"does not fit this model: proj_out A \[3, 99\] B \[5, 3\] in a layer \[12, 5\]$",
        ),
        (
            lambda key, value: (key, value[:2] if "proj_out.lora_A" in key else value),
            r"does not fit this model: proj_out A \[2, 12\] B \[5, 3\] in a layer \[12, 5\]$",
        ),
        (
            lambda key, value: None if "proj_out.lora_B" in key else (key, value),
            "lacks one of the two LoRA factors of proj_out",
        ),
        (
            lambda key, value: (key.replace("lora_B.weight", "lora_B.bias"), value),
            r"tensors that are not LoRA factors: blocks.0.attn.to_q.lora_B.bias, .*proj_out.lora_B.bias$",
        ),
        (
            lambda key, value: (key.replace("lora_A.weight", "dora_scale"), value),
            r"tensors that are not LoRA factors: blocks.0.attn.to_q.dora_scale, .*proj_out.dora_scale$",
        ),
        (lambda key, value: None, "holds no tensors"),
    ],
)
def test_files_of_something_else(saved, fresh, rename, message):
    file, _ = saved
    rewrite(file, rename, {"format": "pt"})
    with pytest.raises(UserError, match=f"^{file.parent}.*{message}"):
        lora.load(fresh, file)
    assert lora.adapters(fresh) == {}
    assert not any("lora" in name for name in fresh.state_dict())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "malformed lora_adapter_metadata in the header"),
        ("[1]", "malformed lora_adapter_metadata in the header"),
        ('{"lora_alpha": "high"}', "malformed lora_adapter_metadata in the header"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(": 2}}', "malformed lora_adapter_metadata in the header"),
        ('{"transformer.use_dora": true}', "DoRA adapter, which is not supported"),
    ],
)
def test_malformed_headers(saved, fresh, metadata, message):
    file, _ = saved
    rewrite(file, lambda key, value: (key, value), {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=message):
        lora.load(fresh, file)


def test_bad_arguments(toy, saved):
    file, _ = saved
    with pytest.raises(UserError, match="layout must be one of paddle, diffusers, got 'torch'"):
        lora.save(toy, file.parent, layout="torch")
    with pytest.raises(UserError, match="no LoRA adapter 'other'; it has: default"):
        lora.save(toy, file.parent, "other")
    with pytest.raises(UserError, match="already has a LoRA adapter 'default'"):
        lora.load(toy, file)
    with pytest.raises(UserError, match="alpha must be a positive number, got -1"):
        lora.load(toy, file, "new", alpha=-1)
