import io
import json
import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKL, FluxTransformer2DModel, checkpoint_io
from fast_diffusers.models.checkpoint_io import (
    Entry,
    find_checkpoint,
    linear_weights,
    load_into,
    parse_size,
    read_header,
    save_from,
    verify,
    write_checkpoint,
    write_safetensors,
)

STEM = {"paddle": "diffusion_paddle_model", "diffusers": "diffusion_pytorch_model"}
DTYPES = ["float32", "float16", "bfloat16", "float64"]


class Mixed(nn.Layer):
    """Square matrices of all kinds: only layer types tell which one is transposed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embedding = nn.Embedding(4, 4)
        self.conv = nn.Conv2D(4, 4, 1)
        self.table = self.create_parameter([4, 4])
        self.register_buffer("steps", paddle.arange(3))


def assert_same_weights(actual, expected):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        other = actual.state_dict()[name]
        assert other.dtype == weight.dtype
        np.testing.assert_array_equal(other.numpy(), weight.numpy(), err_msg=name)


def edit(folder, change, layout="diffusers"):
    """Rewrite a weight file with `change` applied to its dict of arrays."""
    path = folder / f"{STEM[layout]}.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path, {"format": {"paddle": "pd", "diffusers": "pt"}[layout]})


@pytest.fixture
def saved(tiny_flux, tmp_path):
    tiny_flux().save_pretrained(tmp_path, layout="diffusers")
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["paddle", "diffusers"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "4KB"])
def test_round_trip_is_bitwise(tiny_flux, tmp_path, layout, dtype, max_shard_size):
    model = tiny_flux()
    model.to(dtype=dtype)
    model.save_pretrained(tmp_path, layout=layout, max_shard_size=max_shard_size)
    files = {path.name for path in tmp_path.iterdir()}
    if max_shard_size == "10GB":
        assert files == {"config.json", f"{STEM[layout]}.safetensors"}
    else:
        index = json.loads((tmp_path / f"{STEM[layout]}.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict()) and len(files) > 4
        sizes = [os.path.getsize(tmp_path / name) for name in set(index["weight_map"].values())]
        assert index["metadata"]["total_size"] < sum(sizes)
        assert index["metadata"]["total_size"] == sum(w.size * w.element_size() for w in model.parameters())
    assert_same_weights(FluxTransformer2DModel.from_pretrained(tmp_path, paddle_dtype=dtype), model)


def test_our_files_are_valid_for_other_readers(tiny_flux, tmp_path):
    model = tiny_flux()
    model.save_pretrained(tmp_path / "paddle")
    model.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    paddle_file, torch_file = (tmp_path / layout / f"{STEM[layout]}.safetensors" for layout in ("paddle", "diffusers"))
    ours, theirs = load_file(paddle_file), load_file(torch_file)
    assert ours["x_embedder.weight"].shape == (4, 16) and theirs["x_embedder.weight"].shape == (16, 4)
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(ours[name], weight)
        np.testing.assert_array_equal(theirs[name], weight.numpy().T if name in linear_weights(model) else weight)
    for file, tag in ((paddle_file, "pd"), (torch_file, "pt")):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": tag}
    assert "_ppdiffusers_version" in json.loads((tmp_path / "paddle" / "config.json").read_text())
    assert "_diffusers_version" in json.loads((tmp_path / "diffusers" / "config.json").read_text())


def test_saving_reproduces_the_reference_file(fixtures_dir, tmp_path):
    FluxTransformer2DModel.from_pretrained(fixtures_dir / "flux").save_pretrained(tmp_path, layout="diffusers")
    written, original = (load_file(p / f"{STEM['diffusers']}.safetensors") for p in (tmp_path, fixtures_dir / "flux"))
    assert written.keys() == original.keys()
    for name, weight in original.items():
        np.testing.assert_array_equal(written[name], weight, err_msg=name)


def test_ppdiffusers_own_files_load(tmp_path):
    import ppdiffusers

    config = dict(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2)
    original = ppdiffusers.AutoencoderKL(**config, up_block_types=("UpDecoderBlock2D",) * 2)
    for layout in ("paddle", "diffusers"):
        original.save_pretrained(str(tmp_path / layout), to_diffusers=layout == "diffusers")
        assert (tmp_path / layout / f"{STEM[layout]}.safetensors").is_file()
        assert_same_weights(AutoencoderKL.from_pretrained(tmp_path / layout), original)


def test_only_linear_layers_are_transposed(tmp_path):
    model, other = Mixed(), Mixed()
    save_from(model, tmp_path, "weights", layout="diffusers")
    stored = load_file(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(stored["linear.weight"], model.linear.weight.numpy().T)
    for name in ("embedding.weight", "conv.weight", "table", "steps"):
        np.testing.assert_array_equal(stored[name], model.state_dict()[name])
    load_into(other, find_checkpoint(tmp_path, {"diffusers": "weights"}))
    assert_same_weights(other, model)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", DTYPES)
def test_dtype_conversion_on_load(tiny_flux, tmp_path, stored, wanted):
    model = tiny_flux()
    model.to(dtype=stored)
    model.save_pretrained(tmp_path, layout="diffusers")
    before = paddle.get_default_dtype()
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, paddle_dtype=wanted)
    assert paddle.get_default_dtype() == before
    for name, weight in loaded.state_dict().items():
        expected = model.state_dict()[name].astype(wanted)
        assert weight.dtype == expected.dtype and not weight.stop_gradient
        np.testing.assert_array_equal(weight.numpy(), expected.numpy(), err_msg=name)


def test_default_dtype_is_float32(tiny_flux, tmp_path):
    model = tiny_flux()
    model.to(dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert FluxTransformer2DModel.from_pretrained(tmp_path).dtype == paddle.float32


def test_a_loaded_model_trains(saved, flux_inputs):
    model = FluxTransformer2DModel.from_pretrained(saved)
    optimizer = paddle.optimizer.AdamW(0.1, parameters=model.parameters())
    before = model.x_embedder.weight.numpy().copy()
    model(**flux_inputs()).sample.square().mean().backward()
    optimizer.step()
    assert np.abs(model.x_embedder.weight.numpy() - before).max() > 0.01
    np.testing.assert_array_equal(FluxTransformer2DModel.from_pretrained(saved).x_embedder.weight, before)


def test_subfolder(tiny_flux, tmp_path):
    model = tiny_flux()
    model.save_pretrained(tmp_path / "transformer")
    assert_same_weights(FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer"), model)


def test_loading_draws_no_random_numbers(saved):
    paddle.seed(5)
    expected = paddle.randn([4]).numpy()
    paddle.seed(5)
    FluxTransformer2DModel.from_pretrained(saved)
    np.testing.assert_array_equal(paddle.randn([4]), expected)


def test_adapters_are_neither_saved_nor_required(tiny_flux, tmp_path):
    model = tiny_flux()
    model.x_embedder.add_sublayer("lora_A", nn.LayerDict({"default": nn.Linear(2, 2)}))
    assert "x_embedder.lora_A.default.weight" in model.state_dict()
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / f"{STEM['paddle']}.safetensors") if "lora" in name]
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.x_embedder.weight, model.x_embedder.weight)
    load_into(model, find_checkpoint(tmp_path, STEM))
    edit(tmp_path, lambda t: t.update({"proj_out.lora_B.default.weight": np.zeros([1], np.float32)}), "paddle")
    FluxTransformer2DModel.from_pretrained(tmp_path)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(saved):
    def spoil(tensors):
        del tensors["proj_out.bias"], tensors["transformer_blocks.0.attn.to_q.weight"]
        tensors["surplus"] = np.zeros([2], np.float32)
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"].T.copy()
        tensors["x_embedder.bias"] = tensors["x_embedder.bias"].astype(np.int64)

    edit(saved, spoil)
    with pytest.raises(UserError) as caught:
        FluxTransformer2DModel.from_pretrained(saved)
    message = str(caught.value)
    assert f"the weights in {saved} do not fit FluxTransformer2DModel" in message
    assert "missing: proj_out.bias, transformer_blocks.0.attn.to_q.weight; unexpected: surplus;" in message
    assert "misshapen: x_embedder.bias of type I64, x_embedder.weight [4, 16] instead of [16, 4]" in message
    assert "\n" not in message


def test_a_refused_checkpoint_leaves_the_model_as_it_was(saved, tiny_flux):
    edit(saved, lambda tensors: tensors.pop("proj_out.bias"))
    model, untouched = tiny_flux(seed=3), tiny_flux(seed=3)
    with pytest.raises(UserError, match=r"missing: proj_out\.bias$"):
        load_into(model, find_checkpoint(saved, STEM))
    assert_same_weights(model, untouched)


def test_long_lists_are_shortened(saved):
    edit(saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("transformer_blocks")])
    with pytest.raises(UserError, match=r"and \d+ more$"):
        FluxTransformer2DModel.from_pretrained(saved)


def test_unexpected_names_can_be_declared_harmless(saved, tiny_flux):
    edit(saved, lambda tensors: tensors.update({"old.position_ids": np.zeros([2], np.int64)}))
    with pytest.raises(UserError, match=r"unexpected: old\.position_ids"):
        load_into(tiny_flux(), find_checkpoint(saved, STEM))
    load_into(tiny_flux(), find_checkpoint(saved, STEM), ignore=[r"\.position_ids$"])


@pytest.mark.parametrize("kept", [4, 200, 3000, -1])
def test_truncated_files_are_named(saved, kept):
    path = saved / f"{STEM['diffusers']}.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{path} is truncated or not a safetensors file"):
        FluxTransformer2DModel.from_pretrained(saved)


def test_unsupported_types_are_named(saved):
    header = {"x_embedder.bias": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    (saved / f"{STEM['diffusers']}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(UserError, match=r"x_embedder\.bias of type F8_E4M3"):
        FluxTransformer2DModel.from_pretrained(saved)


def test_missing_shards_and_broken_indices_are_named(tiny_flux, tmp_path):
    tiny_flux().save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / f"{STEM['paddle']}.safetensors.index.json"
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{shard}, which {index.name} lists, does not exist"):
        FluxTransformer2DModel.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=r"elsewhere.safetensors, which .* lists, does not exist"):
        FluxTransformer2DModel.from_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match=f"{index} has no weight_map"):
        FluxTransformer2DModel.from_pretrained(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match=f"{index} is not valid JSON"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_layouts_must_be_unambiguous(tiny_flux, saved):
    tiny_flux().save_pretrained(saved, layout="paddle")
    with pytest.raises(UserError, match="holds weights in several layouts"):
        FluxTransformer2DModel.from_pretrained(saved)
    (saved / f"{STEM['diffusers']}.safetensors").replace(saved / f"{STEM['paddle']}.safetensors")
    with pytest.raises(UserError, match="named as paddle layout, but their metadata says diffusers"):
        FluxTransformer2DModel.from_pretrained(saved)


@pytest.mark.parametrize("tag, layout", [("pt", "diffusers"), ("pd", "paddle"), (None, "diffusers"), ("np", "paddle")])
def test_metadata_decides_where_names_do_not(tmp_path, tag, layout):
    save_file({"x": np.zeros([1], np.float32)}, tmp_path / "model.safetensors", tag and {"format": tag})
    assert find_checkpoint(tmp_path, {"paddle": "model", "diffusers": "model"}).layout == layout


def test_files_without_metadata_are_read_by_name(saved, tiny_flux):
    path = saved / f"{STEM['diffusers']}.safetensors"
    save_file(load_file(path), path)
    assert_same_weights(FluxTransformer2DModel.from_pretrained(saved), tiny_flux())


def test_missing_pieces_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder: give a local directory"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds a FluxTransformer2DModel, not a AutoencoderKL"):
        AutoencoderKL.from_pretrained(saved)
    (saved / f"{STEM['diffusers']}.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights in .*: expected diffusion_paddle_model\.safetensors or"):
        FluxTransformer2DModel.from_pretrained(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json must hold a JSON object"):
        FluxTransformer2DModel.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        FluxTransformer2DModel.from_pretrained(saved)


def test_bad_save_arguments_are_refused(tiny_flux, tmp_path):
    model = tiny_flux()
    with pytest.raises(UserError, match="unknown layout 'torch': choose one of paddle, diffusers"):
        model.save_pretrained(tmp_path, layout="torch")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: give a directory"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="bad size '10 boxes'"):
        model.save_pretrained(tmp_path, max_shard_size="10 boxes")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("text, size", [(7, 7), ("7", 7), ("2KB", 2000), ("1.5 mb", 1500000), ("10GB", 10**10)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "-1", "", "GB", 0, "1TB"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="bad size"):
        parse_size(text)


def test_saving_again_replaces_shards_of_the_same_layout_only(tiny_flux, tmp_path):
    first, second = tiny_flux(seed=0), tiny_flux(seed=1)
    first.save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "README.md").write_text("kept")
    second.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "README.md", f"{STEM['paddle']}.safetensors"}
    assert_same_weights(FluxTransformer2DModel.from_pretrained(tmp_path), second)
    first.save_pretrained(tmp_path, max_shard_size="4KB")
    assert not (tmp_path / f"{STEM['paddle']}.safetensors").exists()
    assert_same_weights(FluxTransformer2DModel.from_pretrained(tmp_path), first)


def test_an_interrupted_save_leaves_the_old_files(tiny_flux, tmp_path, monkeypatch):
    first, second = tiny_flux(seed=0), tiny_flux(seed=1)
    first.save_pretrained(tmp_path)
    synced = []

    def full_disk(descriptor):
        synced.append(descriptor)
        if len(synced) > 1:
            raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        second.save_pretrained(tmp_path, max_shard_size="8KB")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", f"{STEM['paddle']}.safetensors"}
    assert_same_weights(FluxTransformer2DModel.from_pretrained(tmp_path), first)


@pytest.fixture
def stored(tmp_path):
    """A function from an array to its StoredTensor in a file that holds others too."""

    def store(array):
        save_file({"a": np.ones(3, np.float64), "array": array, "z": np.ones(5, np.int32)}, tmp_path / "x.safetensors")
        return read_header(tmp_path / "x.safetensors")[1]["array"]

    return store


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 24])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (0, 3)])
def test_matrices_are_transposed_in_blocks(stored, monkeypatch, block_bytes, shape):
    monkeypatch.setattr(checkpoint_io, "_BLOCK_BYTES", block_bytes)
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(stored(array).read(), array)
    np.testing.assert_array_equal(stored(array).read(transposed=True), array.T)
    assert stored(array).num_bytes == array.nbytes


def test_scalars_rows_and_floats(stored, tmp_path):
    assert stored(np.array(2.5, np.float32)).read() == 2.5
    array = np.arange(24, dtype=np.float16).reshape(4, 3, 2)
    np.testing.assert_array_equal(stored(array).rows(1, 3).read(), array[1:3])
    assert stored(array).floats().dtype == np.float32
    np.testing.assert_array_equal(stored(array).floats("float64"), array)
    bfloat16 = paddle.to_tensor([1.0, -3.140625, float("inf")], dtype="bfloat16")
    write_safetensors(tmp_path / "b.safetensors", {"b": Entry.of(bfloat16)}, {})
    values = read_header(tmp_path / "b.safetensors")[1]["b"].floats()
    np.testing.assert_array_equal(values, np.array([1.0, -3.140625, np.inf], np.float32))


def test_a_file_that_becomes_shorter_is_named(stored):
    tensor = stored(np.ones([4, 4], np.float32))
    tensor.file.write_bytes(tensor.file.read_bytes()[: tensor.offset + 10])
    for transposed in (False, True):
        with pytest.raises(UserError, match="became shorter while it was read"):
            tensor.read(transposed)


class TestVerify:
    @pytest.fixture
    def entries(self):
        values = np.array([[1.0, np.nan], [-0.0, np.inf], [3.0, 4.0]], np.float32)
        return {"x": Entry((3, 2), "F32", lambda: values), "y": Entry((2, 3), "F32", lambda: values.T)}

    @pytest.fixture
    def written(self, entries, tmp_path):
        write_checkpoint(entries, tmp_path, "weights")
        return find_checkpoint(tmp_path, {"paddle": "weights"}).tensors

    def test_equal_bits_pass(self, entries, written):
        verify(entries, written, "weights")

    def test_every_flipped_bit_is_found(self, entries, written):
        file = written["x"].file
        content = file.read_bytes()
        for name in ("x", "y"):
            for i in (0, 11, 23):
                spoilt = bytearray(content)
                spoilt[written[name].offset + i] ^= 1
                file.write_bytes(spoilt)
                with pytest.raises(OSError, match=f"weights was not written as it should: {name} differs"):
                    verify(entries, written, "weights")

    def test_names_shapes_and_types_count(self, entries, written):
        with pytest.raises(OSError, match=r"not written as it should: y$"):
            verify({"x": entries["x"]}, written, "weights")
        for other in (Entry((2, 3), "F32", entries["x"].values), Entry((3, 2), "F16", entries["x"].values)):
            with pytest.raises(OSError, match="x differs"):
                verify(entries | {"x": other}, written, "weights")


def test_progress_counts_every_byte(tiny_flux, tmp_path, monkeypatch):
    bars = []

    def record(**settings):
        bars.append(tqdm(**settings | {"disable": False, "delay": 0, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(checkpoint_io, "tqdm", record)
    tiny_flux().save_pretrained(tmp_path / "flux", layout="diffusers", max_shard_size="8KB")
    FluxTransformer2DModel.from_pretrained(tmp_path / "flux")
    assert [bar.desc for bar in bars] == ["write FluxTransformer2DModel", "load FluxTransformer2DModel"]
    assert all(bar.n == bar.total == sum(w.size * 4 for w in tiny_flux().parameters()) for bar in bars)


def test_loading_needs_the_memory_of_the_model_and_a_few_tensors(tmp_path):
    """A 126 MB model of 100 equal linear layers, loaded in a fresh process; its peak is read from the kernel."""
    script = textwrap.dedent("""
        import sys
        import fast_diffusers
        from fast_diffusers.models.checkpoint_io import find_checkpoint, load_into, save_from
        import paddle
        from pathlib import Path

        folder, size, count = Path(sys.argv[1]), 560, 100

        def memory(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        with paddle.LazyGuard():
            model = paddle.nn.LayerList([paddle.nn.Linear(size, size) for _ in range(count)])
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        load_into(model, find_checkpoint(folder, {"diffusers": "weights"}))
        print((memory("VmHWM") - before) / (count * size * (size + 1) * 4))
    """)
    weights = {f"{i}.weight": np.ones([560, 560], np.float32) for i in range(100)}
    biases = {f"{i}.bias": np.ones([560], np.float32) for i in range(100)}
    save_file(weights | biases, tmp_path / "weights.safetensors")
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert float(run.stdout.split()[-1]) < 1.2
