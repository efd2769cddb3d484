import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fast_diffusers import lora, models, target_time, text_encoders
from fast_diffusers.convert import convert
from fast_diffusers.convert.model import model_class
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.models.checkpoint_io import Entry, find_checkpoint, linear_weights, read_header, write_checkpoint
from fast_diffusers.pipelines import FluxPipeline

ASSETS = Path(__file__).parents[1] / "assets"
MODELS = [
    "dc_ae",
    "flux",
    "qwen_image",
    "sana",
    "sana_controlnet",
    "sana_sprint",
    "sd3",
    "sd35",
    "vae_kl",
    "vae_qwen_image",
    "z_image",
]
TEXT_ENCODERS = {
    "clip": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "gemma2": "Gemma2Model",
    "qwen3": "Qwen3Model",
    "qwen2_5_vl": "Qwen2_5_VLTextModel",
}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in the safetensors files of a folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def assert_as_saved(folder: Path, model, layout: str) -> None:
    """The folder holds, byte for byte, what the model's save_pretrained writes."""
    expected = folder.parent / f"{folder.name}_saved"
    model.save_pretrained(expected, layout=layout)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def is_clean(folder: Path) -> bool:
    """Whether no unfinished work lies about."""
    return not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp"))]


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_family_as_loaded_and_saved(self, fixtures_dir, tmp_path, name):
        source = fixtures_dir / name
        class_name = json.loads((source / "config.json").read_text())["_class_name"]
        model = getattr(models, class_name).from_pretrained(source)
        report = convert(source, tmp_path / "paddle", "paddle")
        assert_as_saved(tmp_path / "paddle", model, "paddle")
        (part,) = report.parts
        assert (report.kind, part.class_name, part.source_layout) == ("model", class_name, "diffusers")
        assert part.tensors == len(model.state_dict())
        assert part.transposed == len(linear_weights(model))
        assert part.num_bytes == sum(4 * value.size for value in model.state_dict().values())
        convert(tmp_path / "paddle", tmp_path / "back", "diffusers")
        assert_as_saved(tmp_path / "back", model, "diffusers")
        stored = tensors_of(source)
        assert_same(tensors_of(tmp_path / "back"), {key: stored[key] for key in tensors_of(tmp_path / "back")})
        assert set(part.left_out) == (stored.keys() - model.state_dict().keys()) | {"io.npz"}
        assert is_clean(tmp_path)

    @pytest.mark.parametrize("name", TEXT_ENCODERS)
    def test_every_text_encoder_as_loaded_and_saved(self, tmp_path, name):
        cls = getattr(text_encoders, TEXT_ENCODERS[name])
        source = ASSETS / "text_encoders" / name
        types = {stored.dtype for stored in find_checkpoint(source, cls.weight_stems).tensors.values()}
        wanted = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[types.pop()]
        convert(source, tmp_path / "paddle", "paddle")
        again = cls.from_pretrained(tmp_path / "paddle", paddle_dtype="float32")
        model = cls.from_pretrained(source, paddle_dtype="float32")
        assert_same(*({key: v.numpy() for key, v in each.state_dict().items()} for each in (again, model)))
        report = convert(tmp_path / "paddle", tmp_path / "back", "diffusers", max_shard_size="8KB")
        if wanted != "float16":  # in which Gemma 2 cannot be made
            half = cls.from_pretrained(source, paddle_dtype=wanted)
            assert_as_saved(tmp_path / "paddle", half, "paddle")
        assert report.parts[0].class_name == cls.__name__
        assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
        stored = {tensor.tobytes() for tensor in tensors_of(source).values()}
        assert {tensor.tobytes() for tensor in tensors_of(tmp_path / "back").values()} <= stored

    def test_two_classes_of_one_model_type(self, tmp_path):
        """transformers gives CLIP with and without its projection the same model_type; the class is stated too."""
        sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        cls = model_class("CLIPTextModelWithProjection")
        model = cls(**sizes, projection_dim=6)
        model.save_pretrained(tmp_path / "in", layout="diffusers")
        assert convert(tmp_path / "in", tmp_path / "out", "paddle").parts[0].class_name == cls.__name__
        assert_as_saved(tmp_path / "out", model, "paddle")

    @pytest.fixture
    def flux(self, tiny_teacher) -> Path:
        return tiny_teacher / "transformer"

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_types_stay(self, flux, tmp_path, dtype):
        model = FluxTransformer2DModel.from_pretrained(flux, paddle_dtype=dtype)
        model.save_pretrained(tmp_path / "half")
        convert(tmp_path / "half", tmp_path / "out", "diffusers")
        assert_as_saved(tmp_path / "out", model, "diffusers")

    def test_bits_that_are_no_number_stay(self, flux, tmp_path):
        model = FluxTransformer2DModel.from_pretrained(flux)
        odd = np.array([np.nan, -np.nan, np.inf, -0.0], np.float32)
        model.x_embedder.bias.set_value(np.resize(odd, model.x_embedder.bias.shape))
        model.save_pretrained(tmp_path / "odd")
        convert(tmp_path / "odd", tmp_path / "out", "diffusers")
        assert tensors_of(tmp_path / "out")["x_embedder.bias"][:4].tobytes() == odd.tobytes()

    def test_shards(self, flux, tmp_path):
        convert(flux, tmp_path / "out", "diffusers", max_shard_size="8KB")
        assert len(list((tmp_path / "out").glob("diffusion_pytorch_model-0*.safetensors"))) > 2
        convert(tmp_path / "out", tmp_path / "back", "paddle")
        assert_as_saved(tmp_path / "back", FluxTransformer2DModel.from_pretrained(flux), "paddle")

    def test_renamed_and_left_out_tensors_are_reported(self, tmp_path):
        source = shutil.copytree(ASSETS / "text_encoders" / "clip", tmp_path / "clip")
        model = text_encoders.CLIPTextModel.from_pretrained(source)
        state = {name.removeprefix("text_model."): value.numpy() for name, value in model.state_dict().items()}
        save_file(
            state | {"embeddings.position_ids": np.zeros(3, np.int64)}, source / "model.safetensors", {"format": "pd"}
        )
        report = convert(source, tmp_path / "out", "paddle")
        part = report.parts[0]
        assert part.renamed == {name: [f"text_model.{name}"] for name in state}
        assert "embeddings.position_ids" in part.left_out
        assert f"{len(state)} renamed (such as " in report.as_text() and "left out" in report.as_text()
        assert json.loads(json.dumps(report.as_json()))["parts"][0]["renamed"].keys() == state.keys()

    def test_no_more_memory_than_a_few_tensors(self, tmp_path):
        """A 100 MB model of 3 MB tensors; the peak is read from the kernel."""
        with paddle.LazyGuard():
            model = FluxTransformer2DModel(num_layers=6, num_single_layers=0, num_attention_heads=4, in_channels=4)
        linear = linear_weights(model)
        entries = {}
        for name, tensor in model.state_dict().items():
            shape = tuple(tensor.shape)[:: -1 if name in linear else 1]
            entries[name] = Entry(shape, "F32", lambda shape=shape: np.ones(shape, np.float32))
        write_checkpoint(entries, tmp_path / "in", "diffusion_pytorch_model", "diffusers")
        (tmp_path / "in" / "config.json").write_text(model.to_json_string(to_diffusers=True))
        sizes = [entry.num_bytes for entry in entries.values()]

        def memory(field: str) -> int:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        convert(tmp_path / "in", tmp_path / "out", "paddle")
        assert memory("VmHWM") - before < 5 * max(sizes) + 1e7 < sum(sizes)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory) -> Path:
    """A whole FLUX pipeline that PyTorch diffusers saved."""
    folder = tmp_path_factory.mktemp("flux") / "source"
    shutil.copytree(ASSETS / "flux_pipeline", folder, ignore=lambda *_: ["output.safetensors"])
    text = ASSETS / "text_encoders"
    for number, source in [("", "clip"), ("_2", "t5")]:
        shutil.copytree(text / source, folder / f"text_encoder{number}", ignore=lambda *_: ["tokenizer"])
        shutil.copytree(text / source / "tokenizer_json", folder / f"tokenizer{number}")
    return folder


def set_entry(folder: Path, **entries) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | entries
    (folder / "model_index.json").write_text(json.dumps(index))


class TestPipelines:
    NAMES = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
    MODELS = ("text_encoder", "text_encoder_2", "transformer", "vae")

    def test_there_and_back(self, flux_folder, tmp_path):
        report = convert(flux_folder, tmp_path / "paddle", "paddle")
        actions = {part.name: part.action for part in report.parts}
        assert actions == {name: "converted" if name in self.MODELS else "copied" for name in self.NAMES}
        again, original = FluxPipeline.from_pretrained(tmp_path / "paddle"), FluxPipeline.from_pretrained(flux_folder)
        for name in self.MODELS:
            states = (getattr(pipe, name).state_dict().items() for pipe in (again, original))
            assert_same(*({key: value.numpy() for key, value in state} for state in states))
        assert (tmp_path / "paddle" / "transformer" / "diffusion_paddle_model.safetensors").is_file()
        convert(tmp_path / "paddle", tmp_path / "back", "diffusers")
        index, first = (
            json.loads((path / "model_index.json").read_text()) for path in (tmp_path / "back", flux_folder)
        )
        assert {name: entry[1] for name, entry in index.items() if name in self.NAMES} == {
            name: first[name][1] for name in self.NAMES
        }
        assert {index[name][0] for name in self.NAMES} == {"diffusers", "transformers"}
        for name in ("transformer", "vae"):
            assert_same(tensors_of(tmp_path / "back" / name), tensors_of(flux_folder / name))
        for name in ("scheduler", "tokenizer", "tokenizer_2"):
            for path in (flux_folder / name).iterdir():
                assert (tmp_path / "back" / name / path.name).read_bytes() == path.read_bytes()
        assert is_clean(tmp_path)

    def test_settings_and_loose_files_come_along_but_loose_weights_do_not(self, tiny_teacher, tmp_path):
        source = shutil.copytree(tiny_teacher, tmp_path / "in")
        transformer = FluxTransformer2DModel.from_pretrained(source / "transformer")
        target_time.TargetTime.new("auxiliary", transformer).save(source)
        (source / "README.md").write_text("about it")
        (source / "single_file.safetensors").write_bytes(b"")
        report = convert(source, tmp_path / "out", "diffusers")
        assert report.left_out == ("single_file.safetensors",)
        assert "left out: single_file.safetensors" in report.as_text()
        names = {"README.md", "model_index.json", "scheduler", "transformer", target_time.CONFIG, target_time.WEIGHTS}
        assert {path.name for path in (tmp_path / "out").iterdir()} == names
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["num_classes"] == 10 and index["transformer"] == ["diffusers", "FluxTransformer2DModel"]

    def test_components_can_be_left_out(self, flux_folder, tmp_path):
        report = convert(flux_folder, tmp_path / "out", "paddle", without=["vae", "text_encoder_2"])
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["vae"] == index["text_encoder_2"] == [None, None]
        assert not (tmp_path / "out" / "vae").exists()
        assert "vae: AutoencoderKL, left out" in report.as_text()
        with pytest.raises(UserError, match=r"has no component unet; it has scheduler, text_encoder, .*vae"):
            convert(flux_folder, tmp_path / "no", "paddle", without=["unet"])

    def test_unknown_components_are_copied_if_they_have_no_weights(self, flux_folder, tmp_path):
        source = shutil.copytree(flux_folder, tmp_path / "in")
        set_entry(source, processor=["transformers", "CLIPImageProcessor"], image_encoder=[None, None])
        (source / "processor").mkdir()
        (source / "processor" / "preprocessor_config.json").write_text("{}")
        convert(source, tmp_path / "out", "paddle")
        assert (tmp_path / "out" / "processor" / "preprocessor_config.json").read_text() == "{}"
        (source / "processor" / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(
            UserError, match=r"holds weights \(pytorch_model.bin\) of a CLIPImageProcessor.*--without pr"
        ):
            convert(source, tmp_path / "no", "paddle")
        convert(source, tmp_path / "yes", "paddle", without=["processor"])

    def test_what_pytorch_does_not_have(self, tiny_teacher, tmp_path):
        source = shutil.copytree(tiny_teacher, tmp_path / "in")
        set_entry(source, scheduler=["fast_diffusers.schedulers", "PhasedConsistencyScheduler"])
        with pytest.raises(UserError, match="PyTorch diffusers has no PhasedConsistencyScheduler: put another"):
            convert(source, tmp_path / "out", "diffusers")
        assert not (tmp_path / "out").exists() and is_clean(tmp_path)
        convert(source, tmp_path / "out", "paddle")


class TestFailures:
    """Each is one line, and leaves no target behind."""

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"),
                "vae.*is truncated or not",
            ),
            (lambda f: shutil.rmtree(f / "vae"), "has no folder 'vae'.*--without vae"),
            (lambda f: (f / "vae" / "config.json").unlink(), r"vae/config\.json does not exist"),
            (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
            (
                lambda f: set_entry(f, **{"../vae": ["diffusers", "AutoencoderKL"]}),
                r"'\.\./vae', which is no folder of",
            ),
            (lambda f: set_entry(f, vae=["diffusers", "FluxTransformer2DModel"]), "holds a AutoencoderKL, not a Flux"),
        ],
    )
    def test_bad_pipelines(self, flux_folder, tmp_path, spoil, message):
        source = shutil.copytree(flux_folder, tmp_path / "in")
        spoil(source)
        with pytest.raises((UserError, FileNotFoundError), match=message) as caught:
            convert(source, tmp_path / "out", "paddle")
        assert "\n" not in str(caught.value)
        assert {path.name for path in tmp_path.iterdir()} == {"in"}

    @pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
    def test_an_interrupted_conversion(self, flux_folder, tmp_path, monkeypatch, error):
        def fail(*_):
            raise error

        monkeypatch.setattr("fast_diffusers.convert.model.verify", fail)
        with pytest.raises(type(error)):
            convert(flux_folder, tmp_path / "out", "paddle")
        assert not list(tmp_path.iterdir())

    def test_a_target_is_never_overwritten(self, flux_folder, tmp_path):
        (tmp_path / "empty").mkdir()
        convert(flux_folder / "vae", tmp_path / "empty", "paddle")
        for target in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
            before = sorted(path.name for path in (tmp_path / "empty").iterdir())
            with pytest.raises(UserError, match="exists already: give a new name, or remove it first"):
                convert(flux_folder / "vae", target, "paddle")
            assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == before

    def test_bad_arguments(self, flux_folder, tmp_path):
        vae = flux_folder / "vae"
        (tmp_path / "empty").mkdir()
        for arguments, message in [
            ((vae, "torch"), "layout must be one of paddle, diffusers, got 'torch'"),
            ((tmp_path / "nowhere", "paddle"), "nowhere does not exist; give a local"),
            ((tmp_path / "empty", "paddle"), "neither a pipeline's model_index.json, a model's config.json nor a LoRA"),
        ]:
            with pytest.raises((UserError, FileNotFoundError), match=message):
                convert(arguments[0], tmp_path / "out", arguments[1])
        for options, message in [
            (dict(max_shard_size="many"), "bad size 'many'"),
            (dict(without=["vae"]), "is no pipeline that vae could be left out of"),
            (dict(alpha=1.0), "is no LoRA"),
            (dict(model=vae), "is no LoRA"),
            (dict(alpha=-1.0), "alpha must be a positive number"),
        ]:
            with pytest.raises(UserError, match=message):
                convert(vae, tmp_path / "out", "paddle", **options)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("config", [{"_class_name": "UNet2DModel"}, {"architectures": ["GPT2"]}, {}])
    def test_unknown_models(self, tmp_path, config):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "config.json").write_text(json.dumps(config))
        name = config.get("_class_name") or config.get("architectures", ["no class of model"])[0]
        with pytest.raises(UserError, match=f"describes {name}, which there is no model for here"):
            convert(tmp_path / "in", tmp_path / "out", "paddle")


LORA_FAMILIES = {
    "flux": ["attn.to_q", "proj_mlp", "ff.net.2", "x_embedder"],
    "sd3": ["attn.to_q", "attn.to_out.0", "proj_out"],
    "sana": ["attn1.to_q", "attn2.to_k", "caption_projection.linear_1"],
    "qwen_image": ["attn.to_q", "attn.add_k_proj", "img_in"],
    "z_image": ["attention.to_q", "attention.to_out.0", "feed_forward.w1"],
}


def add_lora(model, targets, rank=3, alpha=2.5, seed=0) -> None:
    generator = np.random.default_rng(seed)
    for parameter in lora.inject(model, rank, alpha, targets):
        parameter.set_value(generator.standard_normal(parameter.shape).astype(np.float32))


def kohya_names(file: Path, alpha: float | None) -> None:
    """Rewrite a LoRA file as kohya's scripts do: flat names, alpha as tensors, no header."""
    tensors = {}
    for name, value in load_file(file).items():
        layer, factor = name.removeprefix("transformer.").split(".lora_")
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{flat}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = value
        if alpha is not None:
            tensors[f"{flat}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, file)


class TestLoRA:
    @pytest.mark.parametrize("name", LORA_FAMILIES)
    def test_round_trip_is_exact(self, fixtures_dir, tmp_path, name):
        class_name = json.loads((fixtures_dir / name / "config.json").read_text())["_class_name"]
        model = getattr(models, class_name).from_pretrained(fixtures_dir / name)
        add_lora(model, LORA_FAMILIES[name])
        saved = {layout: lora.save(model, tmp_path / layout, layout=layout) for layout in lora_layouts()}
        report = convert(tmp_path / "paddle", tmp_path / "to_diffusers", "diffusers")
        assert Path(report.target).name == "pytorch_lora_weights.safetensors"
        assert Path(report.target).read_bytes() == saved["diffusers"].read_bytes()
        convert(tmp_path / "to_diffusers", tmp_path / "back" / "any_name.safetensors", "paddle")
        assert (tmp_path / "back" / "any_name.safetensors").read_bytes() == saved["paddle"].read_bytes()
        fresh = getattr(models, class_name).from_pretrained(fixtures_dir / name)
        lora.load(fresh, tmp_path / "back" / "any_name.safetensors")
        for key, value in lora.state_dict(model).items():
            assert (lora.state_dict(fresh)[key] == value).all()
        assert is_clean(tmp_path)

    @pytest.mark.parametrize("name", LORA_FAMILIES)
    def test_from_kohya(self, fixtures_dir, tmp_path, name):
        """Names with underscores are told from dots by the model, of which only config.json is needed."""
        class_name = json.loads((fixtures_dir / name / "config.json").read_text())["_class_name"]
        model = getattr(models, class_name).from_pretrained(fixtures_dir / name)
        add_lora(model, LORA_FAMILIES[name])
        file = lora.save(model, tmp_path / "kohya.safetensors", layout="diffusers")
        expected = load_file(lora.save(model, tmp_path / "expected"))
        kohya_names(file, alpha=2.5)
        (tmp_path / "model").mkdir()
        shutil.copy(fixtures_dir / name / "config.json", tmp_path / "model")
        report = convert(file, tmp_path / "out", "paddle", model=tmp_path / "model")
        assert_same(load_file(Path(report.target)), expected)
        (part,) = report.parts
        assert part.tensors == part.transposed == len(part.renamed) == len(expected) and not report.left_out
        assert "alpha 2.5" in part.notes
        convert(report.target, tmp_path / "again", "diffusers")
        with pytest.raises(UserError, match=r"writes paths with underscores .*--model tells them from dots"):
            convert(file, tmp_path / "no", "paddle")
        assert not (tmp_path / "no").exists()

    def test_flux_as_kohya_trains_it_needs_no_model(self, tiny_teacher, tmp_path):
        """With the FLUX authors' layers, several of which are one: an adapter of each part has the same A."""
        generator = np.random.default_rng(0)
        width, rank = 16, 2

        def factor(*shape: int) -> np.ndarray:
            return generator.standard_normal(shape).astype(np.float32)

        def adapter(layer: str, fan_in: int, fan_out: int) -> dict[str, np.ndarray]:
            name = f"lora_unet_{layer}"
            return {
                f"{name}.lora_down.weight": factor(rank, fan_in),
                f"{name}.lora_up.weight": factor(fan_out, rank),
                f"{name}.alpha": np.array(1.0, np.float32),
            }

        tensors = adapter("double_blocks_0_img_attn_qkv", width, 3 * width) | adapter("img_in", 4, width)
        tensors |= adapter("double_blocks_0_txt_mlp_2", 4 * width, width)
        tensors |= adapter("single_blocks_0_linear1", width, 7 * width) | adapter(
            "single_blocks_0_linear2", 5 * width, width
        )
        text = adapter("x", 4, 4)
        save_file(
            tensors | {name.replace("lora_unet_x", "lora_te1_x"): value for name, value in text.items()},
            tmp_path / "kohya.safetensors",
        )
        report = convert(tmp_path / "kohya.safetensors", tmp_path / "out", "diffusers")
        assert len(report.left_out) == 3 and all(name.startswith("lora_te1_x.") for name in report.left_out)
        stored = load_file(Path(report.target))
        for block, fused in (
            ("transformer_blocks.0", "double_blocks_0_img_attn_qkv"),
            ("single_transformer_blocks.0", "single_blocks_0_linear1"),
        ):
            parts = [f"transformer.{block}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            parts = [part for part in parts if f"{part}.lora_B.weight" in stored]
            rows = np.concatenate([stored[f"{part}.lora_B.weight"] for part in parts])
            np.testing.assert_array_equal(rows, tensors[f"lora_unet_{fused}.lora_up.weight"])
            for part in parts:
                np.testing.assert_array_equal(
                    stored[f"{part}.lora_A.weight"], tensors[f"lora_unet_{fused}.lora_down.weight"]
                )
        assert len(report.parts[0].renamed["lora_unet_single_blocks_0_linear1.lora_up.weight"]) == 4
        outputs = []
        for path in (tmp_path / "kohya.safetensors", tmp_path / "out"):  # what is loaded is the same
            transformer = FluxTransformer2DModel.from_pretrained(tiny_teacher / "transformer")
            if path.is_file():
                with pytest.warns(UserWarning, match="left lora_te1_x"):
                    lora.load(transformer, path)
            else:
                lora.load(transformer, path)
            outputs.append({name: value.numpy() for name, value in lora.state_dict(transformer).items()})
        assert_same(*outputs)

    @pytest.fixture
    def saved(self, tiny_teacher, tmp_path) -> Path:
        """A LoRA of the tiny pipeline in diffusers' layout."""
        model = FluxTransformer2DModel.from_pretrained(tiny_teacher / "transformer")
        add_lora(model, ["attn.to_q", "proj_out"])
        return lora.save(model, tmp_path / "in", layout="diffusers")

    def test_text_encoders_have_their_part(self, saved, tmp_path):
        text = {"text_encoder.q_proj.lora_A.weight": np.ones([2, 8], np.float32)}
        text["text_encoder.q_proj.lora_B.weight"] = np.ones([5, 2], np.float32)
        with safe_open(saved, "np") as file:
            save_file(load_file(saved) | text, saved, file.metadata())
        report = convert(saved, tmp_path / "out", "paddle")
        assert [part.name for part in report.parts] == ["transformer", "text_encoder"]
        assert report.parts[1].notes == ("rank 2", "alpha 2 (not stored: the rank is taken)")
        assert load_file(Path(report.target))["text_encoder.q_proj.lora_A.weight"].shape == (8, 2)
        convert(report.target, tmp_path / "back", "diffusers")
        assert_same(tensors_of(tmp_path / "back"), tensors_of(saved.parent))

    @pytest.mark.parametrize("given", [None, 7.0])
    def test_alpha(self, saved, tmp_path, given):
        save_file(load_file(saved), saved)
        report = convert(saved, tmp_path / "out", "paddle", alpha=given)
        assert f"alpha {given:g} (given)" in report.as_text() if given else "(not stored: the rank" in report.as_text()
        metadata = json.loads(read_header(Path(report.target))[0]["lora_adapter_metadata"])
        assert metadata["transformer.lora_alpha"] == (given or 3.0) and metadata["transformer.r"] == 3

    def test_types_stay(self, saved, tmp_path):
        save_file({name: value.astype(np.float16) for name, value in load_file(saved).items()}, saved)
        report = convert(saved, tmp_path / "out", "paddle")
        assert {value.dtype for value in load_file(Path(report.target)).values()} == {np.dtype(np.float16)}

    def test_a_target_time_comes_along(self, tiny_teacher, tmp_path):
        model = FluxTransformer2DModel.from_pretrained(tiny_teacher / "transformer")
        add_lora(model, ["attn.to_q"])
        target_time.attach(model, target_time.TargetTime.new("auxiliary", model), "default")
        target_time.save_lora(model, tmp_path / "in", "default")
        convert(tmp_path / "in", tmp_path / "out", "diffusers")
        way = target_time.of_lora(
            tmp_path / "out", FluxTransformer2DModel.from_pretrained(tiny_teacher / "transformer")
        )
        assert way.mode == "auxiliary"
        for name in (target_time.CONFIG, target_time.WEIGHTS):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()

    def test_failures_leave_nothing(self, saved, tiny_teacher, tmp_path, monkeypatch):
        wide = FluxTransformer2DModel(num_layers=0, num_single_layers=1, num_attention_heads=1, in_channels=4)
        wide.save_pretrained(tmp_path / "wide")
        with pytest.raises(UserError, match="was made for another model"):
            convert(saved, tmp_path / "out", "paddle", model=tmp_path / "wide")
        convert(saved, tmp_path / "ok.safetensors", "paddle", model=tiny_teacher)
        with pytest.raises(UserError, match=r"ok\.safetensors exists already"):
            convert(saved, tmp_path / "ok.safetensors", "paddle")
        with pytest.raises(UserError, match="not LoRA factors"):
            convert(tiny_teacher / "transformer" / "diffusion_paddle_model.safetensors", tmp_path / "out", "paddle")
        monkeypatch.setattr(lora.files.AdapterFile, "all_alphas", lambda self, given: {})
        with pytest.raises((OSError, IndexError)):
            convert(saved, tmp_path / "out", "paddle")
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("paddle_lora", ".paddle_lora"))]


def lora_layouts() -> tuple[str, ...]:
    return tuple(lora.files.FILE_NAMES)
