"""Nested tuples, lists and dictionaries of tensors."""

from collections.abc import Callable
from typing import Any


def map_leaves(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """`function` over corresponding leaves of nested tuples, lists and dictionaries, in the structure of the first."""
    if isinstance(first, dict):
        values = {key: map_leaves(function, first[key], *(other[key] for other in others)) for key in first}
        return values if type(first) is dict else type(first)(**values)
    if isinstance(first, list | tuple):
        items = [map_leaves(function, *leaves) for leaves in zip(first, *others, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return function(first, *others)
