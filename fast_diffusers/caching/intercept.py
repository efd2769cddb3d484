"""Standing in for a method of one object, reversibly: no class is patched and no file of a model is touched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fast_diffusers.errors import UserError


class Interceptor:
    """What an object's method is replaced by: handler(original, args, kwargs).

    The original is looked up in the object's class at every call, as the class may change meanwhile (LoRA adapters give
    a linear layer another one), unless the object had a method of its own before.
    """

    def __init__(self, owner: Any, method: str, handler: Callable[[Callable, tuple, dict], Any]):
        self._owner, self._method, self._handler = owner, method, handler
        self._before = vars(owner).get(method)
        # Its name and signature stay visible: ppdiffusers' pipelines look at the name of a transformer's forward.
        functools.update_wrapper(self, self.original, updated=())
        vars(owner)[method] = self

    @property
    def original(self) -> Callable:
        """The method that this one stands in for."""
        if self._before is not None:
            return self._before
        return getattr(type(self._owner), self._method).__get__(self._owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(self.original, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        raise UserError("a model with a cache cannot be copied: call disable_cache first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({})

    @property
    def is_outermost(self) -> bool:
        """Whether nothing else has replaced the method since."""
        return vars(self._owner).get(self._method) is self

    def remove(self) -> None:
        """Put back what was there before."""
        if self._before is None:
            del vars(self._owner)[self._method]
        else:
            vars(self._owner)[self._method] = self._before
