"""numba's decorators with a cache on disk, or without one if no folder for it can be written; a pointer intrinsic."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numba
from numba.core import cgutils, types
from numba.extending import intrinsic

_warned = False


@intrinsic  # type: ignore[untyped-decorator]
def address_as_void_pointer(typing_context: Any, address: Any) -> Any:
    """In compiled code: makes the pointer that `numba.carray` requires of an integer address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def njit(signature: str, **options: Any) -> Callable[[Any], Any]:
    """`numba.njit` for one signature, with the machine code cached on disk, so that only the first process compiles."""
    return _cached(numba.njit, signature, options)


def cfunc(signature: str) -> Callable[[Any], Any]:
    """`numba.cfunc`, cached like `njit`."""
    return _cached(numba.cfunc, signature, {})


def _cached(decorator: Callable[..., Any], signature: str, options: dict[str, Any]) -> Callable[[Any], Any]:
    def compile_(function: Any) -> Any:
        try:
            return decorator(signature, cache=True, **options)(function)
        except (RuntimeError, OSError) as error:  # RuntimeError: numba finds no folder that it may write to
            if isinstance(error, RuntimeError) and "cannot cache function" not in str(error):
                raise
            _warn()
            return decorator(signature, **options)(function)

    return compile_


def _warn() -> None:
    """Prints one line in a process, however many functions are compiled."""
    global _warned
    if not _warned:
        print(
            "warning: numba's cache cannot be written, so every process compiles for some seconds when it starts; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            file=sys.stderr,
        )
    _warned = True
