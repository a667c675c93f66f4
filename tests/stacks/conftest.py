"""Tests against the real packages feplb plugs into: `make test-stacks`, not `make test`.

They run where this folder is named on the command line (pytest tests/stacks), else not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent.parent / "examples", HERE.parent, HERE):
    sys.path.insert(0, str(folder))

import ranks  # noqa: E402

# Loaded once by the server that every rank's process is forked from.
ranks.PRELOAD.append("megatron.core.models.gpt")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless it was asked for."""
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if any(HERE in (path, *path.parents) for path in asked):
        return None
    return True if HERE in (collection_path, *collection_path.parents) else None
