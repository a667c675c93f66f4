"""Hypothesis for tests that also run on a GPU's machine, which may not have it.

There the properties are skipped, each by name, and the files' other tests run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Stands for strategies, which nobody draws from."""

        def __getattr__(self, _: str) -> _Anything:
            return self

        def __call__(self, *_: Any, **__: Any) -> _Anything:
            return self

    st = _Anything()  # type: ignore[assignment]

    def settings(**_: Any) -> Callable[[Any], Any]:  # type: ignore[no-redef]
        return lambda test: test

    def given(**drawn: Any) -> Callable[[Any], Any]:  # type: ignore[no-redef]
        def without(test: Any) -> Any:
            @functools.wraps(test)
            def skipped(**_: Any) -> None:
                pytest.skip("needs hypothesis")

            signature = inspect.signature(test)
            kept = [p for name, p in signature.parameters.items() if name not in drawn]
            skipped.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
            return skipped

        return without


__all__ = ["given", "settings", "st"]
