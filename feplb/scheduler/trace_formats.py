"""What a file of recorded routing holds, and the two formats in JSON: feplb's own and domains.

The formats of other programs are in foreign_traces.py. Every error says where in which file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feplb.scheduler.shares import Rows

OWN_FORMAT = "feplb_trace_v1"
OWN_FIELDS = ("top_k", "steps", "layers", "counts")

AnyRows = npt.NDArray[Any]


class Contents(NamedTuple):
    """What a file holds; the names as in Trace, which checks the counts."""

    counts: AnyRows  # [num_steps, num_layers, num_experts]
    top_k: int | None  # None: the file does not say
    steps: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    num_left_out: int = 0


def read_json(path: Path, part: str | None) -> Contents:
    """A .json file: feplb's own format, or counts by domain of text.

    Domains: {"<model>/<domain>": [num_layers][num_experts] selections}. One model is read, with
    its domains as steps, in the file's order. (Gathered so from allenai/OLMoE,
    scripts/routing_output/<model>/expert_counts/<domain>; the counts do not say top_k.)
    """
    document = parse_json(text_of(path), str(path))
    if isinstance(document, dict) and "format" in document:
        if part is not None:
            raise ValueError(f"{path}: part={part!r}, expected none: it is no file of domains")
        return _own(document, path)
    if not isinstance(document, dict) or not document or not all("/" in key for key in document):
        raise ValueError(
            f'{path}: expected "format": "{OWN_FORMAT}", or an object with keys "<model>/<domain>"'
        )
    models = list(dict.fromkeys(key.split("/")[0] for key in document))
    if part is None and len(models) == 1:
        part = models[0]
    if part not in models:
        raise ValueError(f"{path}: part={part!r}, expected one of {', '.join(models)}")
    domains = {key: rows for key, rows in document.items() if key.split("/")[0] == part}
    counts = [_rows(rows, f"{path}, {key}") for key, rows in domains.items()]
    for key, rows in zip(domains, counts, strict=True):
        if rows.shape != counts[0].shape:
            raise ValueError(
                f"{path}, {key}: {list(rows.shape)} layers and experts, expected "
                f"{list(counts[0].shape)} as in the domains before"
            )
    names = tuple(key.split("/", 1)[1] for key in domains)
    return Contents(np.stack(counts), top_k=None, steps=names)


def _own(document: Mapping[str, Any], path: Path) -> Contents:
    """feplb's own format; see traces.py."""
    if document["format"] != OWN_FORMAT:
        raise ValueError(f"{path}: format {document['format']!r}, expected {OWN_FORMAT!r}")
    if not set(OWN_FIELDS) <= set(document):
        raise ValueError(f"{path}: {sorted(document)}, expected {', '.join(OWN_FIELDS)}")
    top_k, steps, layers = document["top_k"], document["steps"], document["layers"]
    if type(top_k) is not int:
        raise ValueError(f"{path}: top_k={top_k!r}, expected an integer")
    for name in ("steps", "layers", "counts"):
        if not isinstance(document[name], list) or not document[name]:
            raise ValueError(f"{path}: {name} is no list, or an empty one")
    counts = [_rows(rows, f"{path}, step {i}") for i, rows in enumerate(document["counts"])]
    for step, rows in enumerate(counts):
        if rows.shape != counts[0].shape:
            raise ValueError(
                f"{path}, step {step}: {list(rows.shape)} layers and experts, expected "
                f"{list(counts[0].shape)} as in the steps before"
            )
    names = tuple(map(str, steps)), tuple(map(str, layers))
    return Contents(np.stack(counts), top_k, *names)


def _rows(value: Any, where: str) -> Rows:
    """A list over layers of lists over experts of selections, [num_layers, num_experts]."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list over layers, and at least one layer")
    for layer, row in enumerate(value):
        if not isinstance(row, list) or not row or len(row) != len(value[0]):
            raise ValueError(
                f"{where}, layer {layer}: expected a list over the same experts as in layer 0"
            )
        for expert, count in enumerate(row):
            if type(count) is not int or not 0 <= count < 2**63:
                raise ValueError(
                    f"{where}, layer {layer}, expert {expert}: {count!r} selections, expected an "
                    "integer, 0 or more"
                )
    return np.array(value, dtype=np.int64)


def contents_of(
    cells: Mapping[tuple[Any, Any], Rows],
    *,
    top_k: int | None,
    step_name: Callable[[Any], str] = str,
    layer_name: Callable[[Any], str] = str,
) -> Contents:
    """Counts by (step, layer) in order, of the steps that have all layers.

    Raises:
        ValueError: no step has all layers.
    """
    layers = sorted({layer for _, layer in cells})
    steps = sorted({step for step, _ in cells})
    whole = [step for step in steps if all((step, layer) in cells for layer in layers)]
    if not whole:
        raise ValueError(f"none of {len(steps)} steps has all {len(layers)} layers; record again")
    return Contents(
        counts=np.stack([[cells[step, layer] for layer in layers] for step in whole]),
        top_k=top_k,
        steps=tuple(step_name(step) for step in whole),
        layers=tuple(layer_name(layer) for layer in layers),
        num_left_out=len(steps) - len(whole),
    )


def text_of(path: Path) -> str:
    """The whole text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8 text, expected JSON") from error


def parse_json(text: str, where: str) -> Any:
    """A JSON text's value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: no whole JSON ({error}); the file is cut off or damaged: copy it again"
        ) from error
