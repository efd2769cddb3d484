"""Which settings of the caches `bench_cache` compares: a small grid of all methods, or those of a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from distill.data.records import one_of
from fast_diffusers import caching
from fast_diffusers.caching import CacheConfig, Calibration
from fast_diffusers.caching.teacache import RAW_CHANGE
from fast_diffusers.errors import UserError

METHODS: dict[str, type[CacheConfig]] = {
    method.__name__: method
    for method in (
        caching.TeaCache,
        caching.TeaBlockCache,
        caching.SortBlock,
        caching.FirstBlockTaylor,
        caching.TaylorSeer,
        caching.CGTaylor,
        caching.BlockDance,
        caching.PyramidAttentionBroadcast,
        caching.TGate,
    )
}
FEW_STEPS = 8  # up to so many, windows and warm-ups for many steps would leave nothing


def describe(config: CacheConfig) -> str:
    """A method with the settings that are not its defaults, as one would write it."""
    changed = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def default_grid(steps: int, calibration: Calibration | None = None) -> list[CacheConfig]:
    """All nine methods at a few settings each.

    Args:
        steps: of the sampler; up to `FEW_STEPS` the grid is another.
        calibration: its polynomial and schedule are used by the methods that have one. Without it TeaCache's rules
            apply to the change itself, as a polynomial that was published for one model is right for that one only.
    """
    tea = {"coefficients": calibration.tea_cache().coefficients if calibration else RAW_CHANGE}
    sort = {"schedule": calibration.sort_block().schedule} if calibration else {}
    return _few(tea, sort) if steps <= FEW_STEPS else _many(tea, sort)


def _many(tea: dict[str, Any], sort: dict[str, Any]) -> list[CacheConfig]:
    c = caching
    return [
        *(c.TeaCache(threshold, **tea) for threshold in (0.1, 0.2, 0.4)),
        *(c.TeaBlockCache(threshold, **tea) for threshold in (0.1, 0.2, 0.4)),
        c.TeaBlockCache(0.2, **tea, taylor_order=1),
        *(c.SortBlock(interval=interval, **sort) for interval in (3, 5, 8)),
        *(c.FirstBlockTaylor(threshold) for threshold in (0.05, 0.1, 0.2, 0.4)),
        c.FirstBlockTaylor(0.2, max_order=2),
        *(c.TaylorSeer(interval) for interval in (2, 3, 5)),
        c.TaylorSeer(4, max_order=2),
        *(c.CGTaylor(threshold) for threshold in (0.01, 0.03, 0.06)),
        *(c.BlockDance(period=period) for period in (2, 4)),
        *(c.PyramidAttentionBroadcast(spatial, spatial) for spatial in (2, 4)),
        c.TGate(),
        c.TGate(gate=25, fi_interval=2),
    ]


def _few(tea: dict[str, Any], sort: dict[str, Any]) -> list[CacheConfig]:
    c, whole = caching, {"start": 1000.0, "end": 0.0}
    return [
        *(c.TeaCache(threshold, **tea) for threshold in (0.2, 0.5, 1.0)),
        *(c.TeaBlockCache(threshold, **tea, step_start=0.0, step_end=1000.0) for threshold in (0.2, 0.5, 1.0)),
        *(c.SortBlock(interval=2, beta=beta, **whole, **sort) for beta in (0.1, 0.5, 1.0)),
        *(c.FirstBlockTaylor(threshold, max_order=0, first_enhance=1) for threshold in (0.1, 0.3, 0.6)),
        *(c.FirstBlockTaylor(threshold, max_order=1, first_enhance=2) for threshold in (0.3, 0.6)),
        *(c.TaylorSeer(2, max_order=order, first_enhance=enhance) for order, enhance in ((0, 1), (1, 2))),
        *(c.CGTaylor(threshold) for threshold in (0.1, 0.3)),
        *(c.BlockDance(period=2, depth=depth, **whole) for depth in (0.25, 0.5, 0.75)),
        *(c.BlockDance(start=700.0, end=0.0, period=2, depth=depth) for depth in (0.5, 0.75)),
        c.PyramidAttentionBroadcast(2, 2, **whole),
        c.PyramidAttentionBroadcast(2, 2, start=900.0, end=500.0),
        c.TGate(gate=2, warm_up=1, fi_interval=2),
    ]


def read_configs(path: str | Path) -> list[CacheConfig]:
    """The methods of a YAML file: a list of `Method: {setting: value, ...}`.

    Raises:
        FileNotFoundError: no such file.
        UserError: it is not such a list, or names a method or setting that is not there, or a value that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of cache settings at {path}")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must be a list of entries such as - TeaCache: {{threshold: 0.25}}")
    configs = [_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, 1)]
    return list({describe(config): config for config in configs}.values())


def _entry(entry: Any, where: str) -> CacheConfig:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: expected one method and its settings, got {entry!r:.80}")
    ((name, settings),) = entry.items()
    method = METHODS[one_of(name, METHODS, f"caching method in {where}:")]
    if not isinstance(settings, dict | None):
        raise UserError(f"{where}: the settings of {name} must be a mapping, got {settings!r:.80}")
    known = [f.name for f in fields(method)]
    for key in settings or {}:
        one_of(key, known, f"setting of {name} in {where}:")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in (settings or {}).items()}
    try:
        return method(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def fitting(configs: Iterable[CacheConfig], transformer: Any) -> tuple[list[CacheConfig], dict[str, str]]:
    """Those that can work with a model, and why the others cannot."""
    structure, fit, unfit = caching.families.Structure.of(transformer), [], {}
    for config in configs:
        try:
            config.check(structure)
            fit.append(config)
        except UserError as error:
            unfit[describe(config)] = str(error)
    return fit, unfit
