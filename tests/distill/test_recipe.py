import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import DataConfig, LoraConfig, OptimizerConfig, TrainerConfig
from distill.recipe import build, entry, load_recipe, number, to_dict, to_yaml
from fast_diffusers.errors import UserError


@dataclass(frozen=True)
class Extra:
    mode: Literal["huber", "l2"] = entry("huber")
    weights: list[float] = field(default_factory=lambda: [1.0])
    offset: float = number(0.0, above=-1, below=1)


@dataclass(frozen=True)
class Recipe:
    trainer: TrainerConfig = TrainerConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig(lr=5e-6, eps=1e-6)
    discriminator_optimizer: OptimizerConfig | None = None
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    extra: Extra = field(default_factory=Extra)

    def __post_init__(self):
        if self.trainer.steps < self.student_optimizer.warmup_steps:
            raise ValueError("warm-up is longer than training")


def test_defaults():
    recipe = build(Recipe, None)
    assert recipe == Recipe()
    assert recipe.trainer.batch_size == 8 and recipe.discriminator_optimizer is None


def test_a_section_given_in_part_keeps_the_rest_of_its_own_defaults():
    """Not those of the section's class."""
    recipe = build(Recipe, {"student_optimizer": {"eps": 1e-7}})
    assert (recipe.student_optimizer.lr, recipe.student_optimizer.eps) == (5e-6, 1e-7)
    assert build(Recipe, {"student_optimizer": None}) == Recipe()


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),  # text in YAML 1.1
        ("1.0e-4", 1e-4),
        ("5E-6", 5e-6),
        (".5", 0.5),
        ("'0.25'", 0.25),
        ("3", 3.0),
    ],
)
def test_floats_as_people_write_them(written, value):
    recipe = build(Recipe, yaml.safe_load(f"student_optimizer: {{lr: {written}}}"))
    assert recipe.student_optimizer.lr == value and type(recipe.student_optimizer.lr) is float


def test_values_of_every_kind():
    recipe = build(
        Recipe,
        {
            "trainer": {"steps": "2e3", "ema_decay": 0, "gradient_checkpointing": True, "dtype": "bfloat16"},
            "discriminator_optimizer": {"betas": [0, 0.999], "grad_clip_norm": None},
            "lora": {"targets": ["to_q", "to_k"]},
            "data": None,
            "extra": {"weights": [1, "1e-2"]},
        },
    )
    assert recipe.trainer.steps == 2000 and type(recipe.trainer.steps) is int
    assert recipe.trainer.ema_decay == 0.0 and recipe.trainer.gradient_checkpointing is True
    assert recipe.discriminator_optimizer.betas == (0.0, 0.999)
    assert recipe.discriminator_optimizer.grad_clip_norm is None
    assert recipe.lora.targets == ("to_q", "to_k")
    assert recipe.data == DataConfig()
    assert recipe.extra.weights == [1.0, 0.01]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"trainer": {"step": 1}}, "unknown key trainer.step; the nearest valid key is trainer.steps"),
        ({"trainr": {}}, "unknown key trainr; the nearest valid key is trainer"),
        ({"batch_size": 1}, "unknown key batch_size; the nearest valid key is trainer.batch_size"),
        ({"discriminator_optimizer": {"l_r": 1}}, "nearest valid key is discriminator_optimizer.lr"),
        ({"extra": {"wieghts": []}}, "the nearest valid key is extra.weights"),
        ({3: 1}, "unknown key 3"),
        ({"trainer": {"steps": 1.5}}, "trainer.steps is 1.5; expected a whole number"),
        ({"trainer": {"steps": True}}, "trainer.steps is True; expected a whole number"),
        ({"trainer": {"steps": "many"}}, "trainer.steps is 'many'; expected a whole number"),
        ({"trainer": {"steps": 0}}, "trainer.steps is 0; expected a whole number at least 1"),
        ({"trainer": {"seed": 2**70}}, "expected a whole number at most"),
        ({"trainer": {"ema_decay": 1}}, "trainer.ema_decay is 1; expected a number less than 1"),
        ({"trainer": {"gradient_checkpointing": 1}}, "trainer.gradient_checkpointing is 1; expected true or false"),
        ({"trainer": {"dtype": "bf16"}}, "trainer.dtype is 'bf16'; expected one of float32, bfloat16"),
        ({"trainer": {"output_dir": 7}}, "trainer.output_dir is 7; expected text"),
        ({"trainer": [1]}, "trainer is [1]; expected a section with steps, batch_size"),
        ({"student_optimizer": {"lr": "fast"}}, "student_optimizer.lr is 'fast'; expected a number"),
        ({"student_optimizer": {"lr": float("nan")}}, "student_optimizer.lr is nan; expected a number"),
        ({"student_optimizer": {"lr": "1e999"}}, "student_optimizer.lr is '1e999'; expected a number"),
        ({"student_optimizer": {"lr": 10**400}}, "expected a number"),
        ({"student_optimizer": {"lr": 10**5000}}, "student_optimizer.lr is a huge number; expected a number"),
        ({"student_optimizer": {"eps": 0}}, "student_optimizer.eps is 0; expected a number greater than 0"),
        ({"student_optimizer": {"betas": [0.9]}}, "student_optimizer.betas is [0.9]; expected a list of 2"),
        ({"student_optimizer": {"betas": [0.9, 1]}}, "student_optimizer.betas.1 is 1; expected a number less than 1"),
        ({"student_optimizer": {"betas": 0.9}}, "student_optimizer.betas is 0.9; expected a list"),
        ({"student_optimizer": None, "lora": {"targets": "to_q"}}, "lora.targets is 'to_q'; expected a list"),
        ({"lora": {"targets": ["to_q", 3]}}, "lora.targets.1 is 3; expected text"),
        ({"student_optimizer": {"warmup_steps": 5000}}, "warm-up is longer than training"),
        ([1], "the recipe is [1]; expected a section with trainer"),
    ],
)
def test_what_is_wrong_is_named(mapping, message):
    with pytest.raises(UserError) as error:
        build(Recipe, mapping, "my.yaml")
    assert str(error.value).startswith("my.yaml: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_without_default_must_be_given():
    @dataclass(frozen=True)
    class Strict:
        teacher: str = entry(doc="folder of the teacher")

    assert build(Strict, {"teacher": "flux"}).teacher == "flux"
    with pytest.raises(UserError, match="recipe: teacher is missing"):
        build(Strict, {})


def test_resolved_recipe_reads_back():
    recipe = build(Recipe, {"discriminator_optimizer": {"lr": 1e-5, "betas": [0, 0.999]}, "data": {"path": "a: b"}})
    assert build(Recipe, yaml.safe_load(to_yaml(recipe))) == recipe
    assert build(Recipe, to_dict(recipe)) == recipe
    assert "betas: [0.0, 0.999]" in to_yaml(recipe)


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str | bytes):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


def test_inheritance_and_overrides(write, tmp_path):
    write("root.yaml", "trainer: {steps: 5, batch_size: 2}\nlora: {rank: 4, targets: [a, b]}\n")
    write("middle.yaml", "base: root.yaml\ntrainer: {steps: 6}\nlora: {targets: [c]}\n")
    leaf = write("leaf.yaml", "base: middle\nstudent_optimizer: {lr: 1e-3}\n")
    recipe = load_recipe(Recipe, leaf, ["trainer.seed=7", "lora.targets=[d, e]", "data.path=null"], folder=tmp_path)
    assert (recipe.trainer.steps, recipe.trainer.batch_size, recipe.trainer.seed) == (6, 2, 7)
    assert (recipe.lora.rank, recipe.lora.targets) == (4, ("d", "e"))
    assert recipe.student_optimizer.lr == 1e-3
    assert load_recipe(Recipe, "leaf", folder=tmp_path).lora.targets == ("c",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {step: 1}", "r.yaml: unknown key trainer.step"),
        ("trainer: {steps: [}", "not valid YAML"),
        ("trainer: {steps: 1}\ntrainer: {seed: 1}", "key trainer is given twice"),
        ("trainer: &a {steps: 1}\nlora: *a", "aliases"),
        ("- 1", "a recipe is a mapping of keys to values, this is a list"),
        ("word", "this is the single value 'word'"),
        ("base: 3", "base is 3; expected the file name of another recipe"),
        ("base: nowhere.yaml", "recipe nowhere.yaml not found"),
        ("base: r.yaml", "a recipe cannot be its own base"),
        ("data: {path: 2001-99-99}", "not valid YAML: month must be in 1..12"),
        ("data: {path: !!timestamp x}", "not valid YAML"),
        ("data: {path: !!bool x}", "not valid YAML"),
        ("data: {path: !!python/object:os.system x}", "not valid YAML"),
        (b"\xff\xfe\xff", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
    ],
)
def test_bad_files(write, tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_recipe(Recipe, write("r.yaml", text), folder=tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.steps", "--set trainer.steps: expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("trainer.stesp=3", "unknown key trainer.stesp; the nearest valid key is trainer.steps"),
        ("trainer.steps.x=3", "unknown key trainer.steps.x|expected a whole number"),
        ("trainer=3", "trainer is 3; expected a section"),
        ("trainer.steps=[", "--set trainer.steps=[: not valid YAML"),
    ],
)
def test_bad_overrides(write, tmp_path, override, message):
    with pytest.raises(UserError) as error:
        load_recipe(Recipe, write("r.yaml", "trainer: {steps: 5}"), [override], folder=tmp_path)
    assert any(part in str(error.value) for part in message.split("|"))


def test_missing_recipe_lists_what_there_is(write, tmp_path):
    write("digits.yaml", "")
    with pytest.raises(UserError, match=r"recipe digit not found: .*: digits$"):
        load_recipe(Recipe, "digit", folder=tmp_path)


# ---------------------------------------------------------------------------------------------- fuzzing
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1e-4", "nan", "-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw) -> Any:
    """The full default recipe with one to three places replaced, removed or given a wrong neighbour."""
    recipe = copy.deepcopy(to_dict(Recipe(discriminator_optimizer=OptimizerConfig())))
    for _ in range(draw(st.integers(1, 3))):
        place = recipe
        while True:
            name = draw(st.sampled_from(sorted(place, key=str)))
            if not (isinstance(place[name], dict) and place[name] and draw(st.booleans())):
                break
            place = place[name]
        match draw(st.sampled_from(["replace", "scale", "remove", "misspell"])):
            case "replace":
                place[name] = draw(JUNK)
            case "scale" if isinstance(place[name], int | float):
                place[name] = place[name] * draw(st.sampled_from([-1, 0, 1e-300, 1e300, 3]))
            case "misspell":
                place[draw(st.text(max_size=3)) + str(name)[1:]] = place[name]
            case _ if len(place) > 1:
                del place[name]
    return recipe


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mutated())
def test_fuzzed_recipes_are_valid_or_one_message(mapping):
    try:
        recipe = build(Recipe, mapping)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
    else:
        assert build(Recipe, yaml.safe_load(to_yaml(recipe))) == recipe


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_fuzzed_text_is_valid_or_one_message(tmp_path_factory, data):
    text = bytearray(to_yaml(Recipe()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text)
    try:
        load_recipe(Recipe, path)
    except UserError as error:
        assert "\n" not in str(error)
