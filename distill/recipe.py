"""Recipes: YAML files that are short diffs against the defaults of a typed schema.

A schema is a tree of frozen dataclasses; the fields carry the defaults, the allowed ranges and a line of
documentation (see `number` and `entry`). A section's default is an instance of its dataclass: what a recipe leaves out
of the section comes from there.

A recipe names only what differs, may start from another one (`base: other.yaml`) and may be changed on the command line
(`--set trainer.steps=100`). Whatever is wrong in it (syntax, unknown key, wrong type, value out of range) is one
`UserError` that names the file, the key, the value and what was expected.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from fast_diffusers.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
Schema = TypeVar("Schema")

# YAML 1.1 reads 1e-4 as text: only "1.0e-4" is a float to it.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_UNIONS = (typing.Union, types.UnionType)  # X | None is either, depending on X
_BOUNDS = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "above": (lambda value, bound: value > bound, "greater than"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "below": (lambda value, bound: value < bound, "less than"),
}


# ---------------------------------------------------------------------------------------------- declaring a schema
def entry(default: Any = dataclasses.MISSING, doc: str = "") -> Any:
    """A documented field. Without a default the recipe must give it."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def number(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    doc: str = "",
) -> Any:
    """A documented number, or tuple of numbers, within bounds: minimum/maximum are inclusive, above/below exclusive."""
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"doc": doc, **bounds})


# ---------------------------------------------------------------------------------------------- mapping -> dataclass
def build(cls: type[Schema], mapping: Mapping[str, Any] | None, where: str = "recipe") -> Schema:
    """An instance of the dataclass `cls` from nested mappings; `where` starts every message (a file name, say).

    Numbers may be written 1e-4; an integer is a valid float and 1e3 a valid integer. A section's own cross-field check
    is its `__post_init__`, which raises ValueError.

    Raises:
        UserError: unknown key, missing key, wrong type, value out of range, or a failed cross-field check.
    """
    check_keys(cls, mapping, where)
    return _section(cls, mapping, where, ())


def check_keys(cls: type, mapping: Mapping[str, Any] | None, where: str = "recipe") -> None:
    """Raise a UserError naming the first key that the schema does not have and the nearest one that it has."""
    valid = list(_paths(cls))
    for path in _unknown(cls, mapping, ()):
        nearest = max(valid, key=lambda candidate: _likeness(path, candidate))
        raise UserError(f"{where}: unknown key {_dotted(path)}; the nearest valid key is {_dotted(nearest)}")


def _section(cls: type[Schema], mapping: Any, where: str, path: tuple[str, ...], base: Schema | None = None) -> Schema:
    """`base` holds the values of what the mapping leaves out; without it they are the class's defaults."""
    if mapping is None:  # a section header with nothing below it
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise _wrong(where, path, mapping, f"a section with {', '.join(_hints(cls))}")
    values = {}
    for field in dataclasses.fields(cls):
        place, default = (*path, field.name), _default(field)
        if field.name in mapping:
            kind, value = _hints(cls)[field.name], mapping[field.name]
            if (section := _subsection(kind)) and not (value is None and section is not kind):
                values[field.name] = _section(section, value, where, place, default)
            else:
                values[field.name] = _value(kind, value, where, place, field.metadata)
        elif default is dataclasses.MISSING and base is None:
            raise UserError(f"{where}: {_dotted(place)} is missing; it has no default")
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except ValueError as error:
        raise UserError(f"{where}: {_dotted(path) + ': ' if path else ''}{error}") from error


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _value(kind: Any, value: Any, where: str, path: tuple[str, ...], bounds: Mapping[str, Any]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        kinds = [argument for argument in arguments if argument is not type(None)]
        assert len(kinds) == 1 < len(arguments), f"{_dotted(path)}: a field has one type, or one type or None"
        return None if value is None else _value(kinds[0], value, where, path, bounds)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise _wrong(where, path, value, f"one of {', '.join(map(str, arguments))}")
    if origin in (tuple, list):
        return _sequence(kind, value, where, path, bounds)
    if kind in (int, float):
        return _number(kind, value, where, path, bounds)
    assert kind in (str, bool), f"{_dotted(path)}: schema type {kind} is not supported"
    if type(value) is not kind:
        raise _wrong(where, path, value, "text (quote it)" if kind is str else "true or false")
    return value


def _sequence(kind: Any, value: Any, where: str, path: tuple[str, ...], bounds: Mapping[str, Any]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise _wrong(where, path, value, "a list")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _wrong(where, path, value, f"a list of {len(arguments)}")
        kinds = arguments
    else:
        kinds = (arguments[0],) * len(value)
    items = zip(kinds, value, strict=True)
    return origin(_value(kind, item, where, (*path, str(i)), bounds) for i, (kind, item) in enumerate(items))


def _number(kind: type, value: Any, where: str, path: tuple[str, ...], bounds: Mapping[str, Any]) -> int | float:
    expected = "a whole number" if kind is int else "a number"
    parsed = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
    if type(parsed) not in (int, float) or (type(parsed) is float and not math.isfinite(parsed)):
        raise _wrong(where, path, value, expected)
    if kind is int and parsed != int(parsed):
        raise _wrong(where, path, value, expected)
    try:
        parsed = kind(parsed)
    except OverflowError:
        raise _wrong(where, path, value, expected) from None
    for name, (holds, words) in _BOUNDS.items():
        if name in bounds and not holds(parsed, bounds[name]):
            raise _wrong(where, path, value, f"{expected} {words} {bounds[name]}")
    if kind is int and abs(parsed) >= 2**63:
        raise _wrong(where, path, value, f"{expected} of 64 bits")
    return parsed


def _wrong(where: str, path: tuple[str, ...], value: Any, expected: str) -> UserError:
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = "a huge number"
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return UserError(f"{where}: {_dotted(path) or 'the recipe'} is {shown}; expected {expected}")


# ---------------------------------------------------------------------------------------------- keys of a schema
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _subsection(kind: Any) -> type | None:
    """The dataclass of a section's type, optional or not; None for a plain value."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    return next((each for each in kinds if dataclasses.is_dataclass(each)), None)


def _paths(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, kind in _hints(cls).items():
        yield (*path, name)
        if section := _subsection(kind):
            yield from _paths(section, (*path, name))


def _unknown(cls: type | None, mapping: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    if cls is None or not isinstance(mapping, Mapping):
        return
    hints = _hints(cls)
    for name, value in mapping.items():
        if name in hints:
            yield from _unknown(_subsection(hints[name]), value, (*path, name))
        else:
            yield (*path, name)


def _likeness(path: tuple[Any, ...], candidate: tuple[str, ...]) -> float:
    """How much like a mistyped key a valid one looks: the name counts most, the section breaks ties."""

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    return ratio(str(path[-1]), candidate[-1]) + 0.25 * ratio(_dotted(path[:-1]), _dotted(candidate[:-1]))


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(part if isinstance(part, str) and part.isprintable() else repr(part) for part in path)


# ---------------------------------------------------------------------------------------------- files and overrides
def load_recipe(
    cls: type[Schema], path_or_name: str | Path, overrides: Sequence[str] = (), folder: Path = RECIPES
) -> Schema:
    """Read a recipe into the schema `cls`.

    Args:
        cls: root dataclass of the schema.
        path_or_name: a YAML file, or the name of one in `folder` (with or without ".yaml").
        overrides: "section.key=value" each, the value in YAML; applied last, in order.
        folder: where names are looked up.

    Raises:
        UserError: the file is missing or unreadable, or anything `build` rejects.
    """
    path = find_recipe(path_or_name, folder)
    merged: dict[str, Any] = {}
    for layer, where in reversed(list(_layers(path, folder))):
        check_keys(cls, layer, where)
        merged = _merge(merged, layer)
    return build(cls, _with_overrides(cls, merged, overrides), path.name)


def from_overrides(cls: type[Schema], overrides: Sequence[str]) -> Schema:
    """The schema's defaults, changed by "section.key=value" each. UserError as `load_recipe`."""
    return build(cls, _with_overrides(cls, {}, overrides), "--set")


def _with_overrides(cls: type, mapping: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, Any]:
    for override in overrides:
        layer = _override(override)
        check_keys(cls, layer, f"--set {_one_line(override)}")
        mapping = _merge(mapping, layer)
    return mapping


def find_recipe(path_or_name: str | Path, folder: Path = RECIPES) -> Path:
    """The recipe file meant: an existing path, or a name in `folder`. UserError listing the names there otherwise."""
    candidates = [Path(path_or_name), folder / path_or_name, folder / f"{path_or_name}.yaml"]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
    missing = _one_line(str(path_or_name))
    raise UserError(f"recipe {missing} not found: give a YAML file, or one of the recipes in {folder}: {names}")


def _layers(path: Path, folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The recipe and the chain of its bases, most specific first, each with its file name."""
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise UserError(f"{path}: its chain of bases comes back to it; a recipe cannot be its own base")
        seen.append(path.resolve())
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
        layer = _parse(content, str(path))
        if not isinstance(layer, dict | None):
            raise UserError(f"{path}: a recipe is a mapping of keys to values, this is {_kind_name(layer)}")
        layer = dict(layer or {})
        base = layer.pop("base", None)
        yield layer, path.name
        if base is None:
            return
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}; expected the file name of another recipe")
        sibling = path.parent / base
        path = sibling if os.path.isfile(sibling) else find_recipe(base, folder)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {_one_line(override)}: expected section.key=value")
    value = _parse(text.encode(errors="surrogateescape"), f"--set {_one_line(override)}")
    for name in reversed(key.strip().split(".")):
        value = {name: value}
    return value


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (which can be made infinite) and without silently overwritten duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported in recipes")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"key {name} is given twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def _parse(content: bytes, where: str) -> Any:
    try:
        return yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}{place}") from error
    # PyYAML's constructors raise all of these on malformed dates, numbers and explicit tags, and on deep nesting.
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: not valid YAML: {message}") from error


def _kind_name(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"


# ---------------------------------------------------------------------------------------------- dataclass -> mapping
def to_dict(recipe: Any) -> dict[str, Any]:
    """The whole recipe, defaults included, as JSON-able nested dicts; `build` reads it back to an equal recipe."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(recipe)


def to_yaml(recipe: Any) -> str:
    """The whole recipe as YAML text, in the order of the schema."""
    return yaml.dump(to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Lists on one line."""

    def represent_list(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)
