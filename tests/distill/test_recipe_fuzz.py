"""Random mutations of the shipped recipes and of --set: a dry run, or one message on one line."""

import contextlib
import functools
import io
import json
import re
import shutil
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import train_flux_lightning, train_sana_sprint, train_teacher, train_twinflow
from distill.recipe import RECIPES
from fast_diffusers.errors import UserError

SCRIPTS = {
    "flux_lightning": (train_flux_lightning, "model data lora objective student_optimizer trainer trainer.health"),
    "sana_sprint": (train_sana_sprint, "model data lora objective student_optimizer sampler trainer trainer.health"),
    "teacher": (train_teacher, "architecture architecture.flux data objective optimizer trainer trainer.health"),
    "twinflow": (train_twinflow, "model data lora objective objective.parts optimizer sampler trainer trainer.health"),
}
"""By how the names of their recipes start; with the sections that are mutated."""
NASTY = [
    *("", "null", "true", "off", "[]", "{}", "[1, 2]", "{a: 1}", "[[1]]", "''", "~", "text", "two\nlines", "*alias"),
    *("0", "-1", "1", "2", "3.5", "1e-4", "1e999", "1e300", "1e18", ".nan", ".inf", "-.inf", "1_000", "0x10", "1:30"),
    *("9" * 400, "2001-99-99", "2001-01-01", "!!python/object:os.system x", "!!bool x", "!!binary =", "!!set {a}"),
    *(
        '"\\ud800"',
        '"\\0"',
        "<<: {a: 1}",
        "[" * 2000,
        "/",
        "..",
        "digits",
        "&a [*a]",
        "a: b: c",
        "% x",
        "\t",
        "---",
        "x" * 5000,
    ),
]
VALUES = st.sampled_from(NASTY) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
TOKEN = re.compile(r"[\w.+-]+|[^\w\s]")


def entries(kind: str) -> dict[str, Any]:
    """Dotted key -> default, of the sections of a script's recipe and of all that is in them."""
    script, sections = SCRIPTS[kind]
    found = {}
    for section in sections.split():
        default = functools.reduce(getattr, section.split("."), script.Recipe())
        found |= {section: None, **{f"{section}.{name}": value for name, value in vars(default).items()}}
    return found


@st.composite
def mutated_text(draw, text: str) -> bytes:
    """A recipe with a token, a line or some bytes replaced, removed or doubled."""
    match draw(st.sampled_from(["token", "line", "bytes"])):
        case "token":
            token = draw(st.sampled_from(list(TOKEN.finditer(text))))
            text = text[: token.start()] + draw(VALUES) + text[token.end() :]
        case "line":
            lines = text.splitlines(keepends=True)
            i = draw(st.integers(0, len(lines) - 1))
            lines[i : i + 1] = draw(st.sampled_from([[], [lines[i]] * 2, [" " + lines[i]], [draw(VALUES) + "\n"]]))
            text = "".join(lines)
        case "bytes":
            content = bytearray(text.encode())
            i = draw(st.integers(0, len(content) - 1))
            content[i : i + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
            return bytes(content)
    return text.encode()


@st.composite
def overrides(draw, defaults: dict[str, Any]) -> list[str]:
    """One or two --set; about half of them of a key that there is and a value of the right kind."""
    found = []
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(defaults)))
        value = defaults[name]
        match draw(st.sampled_from(["mild", "mild", "mild", "value", "value", "key", "junk"])):
            case "mild":
                if type(value) in (int, float):
                    value = value * draw(st.sampled_from([0.5, 1, 2, 100]))
                found.append(f"{name}={'{}' if is_dataclass(value) else json.dumps(value)}")
            case "value":
                found.append(f"{name}={draw(VALUES)}")
            case "key":
                found.append(f"{draw(st.sampled_from([name[1:], name + '.x', name.upper()]))}=1")
            case "junk":
                found.append(draw(st.text(max_size=8)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of the shipped recipes, in which a mutated one finds its base."""
    return shutil.copytree(RECIPES, tmp_path_factory.mktemp("fuzz") / "recipes")


def dry_run(kind: str, recipe: Path | str, sets: list[str]) -> str:
    """What became of it: "done", "refused" or "usage". Anything but one message on one line fails."""
    arguments = ["--dry-run", "--recipe", str(recipe)]
    for each in sets:
        arguments += ["--set", each]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            SCRIPTS[kind][0].main(arguments)
    except (UserError, FileNotFoundError) as error:
        assert len(str(error).splitlines()) == 1
        return "refused"
    except SystemExit as error:
        assert error.code == 2
        return "usage"
    assert "\ntrainer:\n" in printed.getvalue()
    return "done"


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_dry_run_or_one_message(folder, data):
    original = data.draw(st.sampled_from(sorted(RECIPES.glob("*.yaml"))), "recipe")
    kind = next(kind for kind in SCRIPTS if original.stem.startswith(kind))
    recipe, sets = folder / "mutated.yaml", []
    if original.stem == "flux_lightning_mnist":
        sets = ["model.path=digits"]  # its own teacher is trained first
    where = data.draw(st.sampled_from(["text", "set", "both"]))
    text = original.read_text("utf-8")
    recipe.write_bytes(text.encode() if where == "set" else data.draw(mutated_text(text)))
    if where != "text":
        sets = sets + data.draw(overrides(entries(kind)))
    dry_run(kind, recipe, sets)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_unmutated_recipes_run_dry(kind, folder):
    outcomes = {path.stem: dry_run(kind, path, []) for path in folder.glob(f"{kind}_digits.yaml")}
    assert set(outcomes.values()) == {"done"}


@pytest.mark.parametrize(
    ("sets", "outcome"),
    [
        (["data.height=" + "9" * 400], "refused"),
        (["data.height=1e300"], "refused"),
        (["trainer.batch_size=1e18", "data.width=9e18", "data.height=9e18"], "done"),
        (["trainer.stops=1\n"], "refused"),
        (["trainer\n"], "refused"),
        (["trainer.output_dir=\udcff"], "refused"),
        (["-"], "refused"),
        (["--set"], "usage"),
    ],
)
def test_values_that_once_ended_in_a_traceback(sets, outcome):
    assert dry_run("flux_lightning", "flux_lightning_digits", sets) == outcome


@pytest.mark.parametrize("name", ["x" * 5000, "two\nlines", "\0", ""])
def test_recipes_and_bases_that_cannot_be_files(name, folder):
    (folder / "base.yaml").write_text(f"base: {json.dumps(name)}\n")
    for recipe in (name, folder / "base.yaml"):
        assert dry_run("flux_lightning", recipe, []) == "refused"
