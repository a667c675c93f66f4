"""Recorded routing: how often each expert was chosen, by step and layer, read from users' files.

read_trace(path) tells the format by the name and the content:

  folder, or router_trace_rank<N>.jsonl   Megatron-LM's routing trace
  folder, or <trace>.chunk<N>.npz         UltraEP's load profile
  folder, or *.pt                         SGLang's expert distribution recorder
  *.json with "format": "feplb_trace_v1"  feplb's own, as write_trace() writes it
  *.json with keys "<model>/<domain>"     counts by domain of text (OLMoE's routing analysis)

foreign_traces.py and trace_formats.py describe them. No file can run code: nothing is unpickled.
feplb's own format is one JSON object: format, top_k (int), steps and layers (names), and counts,
a list over steps of lists over layers of lists over experts of selections.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feplb.scheduler.foreign_traces import read_megatron, read_sglang, read_ultra_ep
from feplb.scheduler.shares import Rows, Weights, apportion, capped
from feplb.scheduler.trace_formats import OWN_FORMAT, Contents, read_json

MOST_SELECTIONS = 2**40  # of one expert in one step and layer: sums and scaled counts stay exact


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """How often each expert was chosen, as recorded: the selections of all ranks together.

    Args:
        name: for messages; read_trace() puts the path here.
        recorded: [num_steps, num_layers, num_experts] selections, int64, read-only; a step is one
            micro-batch (one domain of text, in a file of domains).
        top_k: experts that a token selects, all different.
        steps, layers: what the file calls them, one name each; "0", "1", ... if left out.
        num_left_out: steps that the file holds only in part, and which are not in `recorded`.
    Raises:
        ValueError: a wrong shape, a negative or too large count, or counts that top_k rules out.
    """

    name: str
    recorded: Rows
    top_k: int
    steps: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    num_left_out: int = 0

    def __post_init__(self) -> None:
        recorded = np.array(self.recorded)
        if recorded.ndim != 3 or recorded.size == 0 or recorded.dtype.kind not in "iu":
            raise ValueError(
                f"{self.name}: counts of shape {list(recorded.shape)} and type {recorded.dtype}, "
                "expected integers [num_steps, num_layers, num_experts], none of them 0"
            )
        recorded = recorded.astype(np.int64)
        recorded.setflags(write=False)
        object.__setattr__(self, "recorded", recorded)
        for field, size in (("steps", recorded.shape[0]), ("layers", recorded.shape[1])):
            names = tuple(getattr(self, field)) or tuple(str(i) for i in range(size))
            object.__setattr__(self, field, names)
            if len(names) != size:
                raise ValueError(f"{self.name}: {len(names)} names of {field}, expected {size}")
        self._check_counts()

    def _check_counts(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"{self.name}: top_k={self.top_k}, expected 1 to num_experts={self.num_experts}"
            )
        wrong = np.argwhere((self.recorded < 0) | (self.recorded > MOST_SELECTIONS))
        if wrong.size:
            step, layer, expert = wrong[0].tolist()
            raise ValueError(
                f"{self._where(step, layer)}: expert {expert} has "
                f"{self.recorded[step, layer, expert]} selections, expected 0 to "
                f"{MOST_SELECTIONS}; the file is damaged"
            )
        totals = self.recorded.sum(axis=2)
        wrong = np.argwhere(self.recorded.max(axis=2) * self.top_k > totals)
        if wrong.size:
            step, layer = wrong[0].tolist()
            most, total = int(self.recorded[step, layer].max()), int(totals[step, layer])
            raise ValueError(
                f"{self._where(step, layer)}: one expert has {most} of {total} selections, "
                f"expected at most 1 / top_k of them, {total // self.top_k} at "
                f"top_k={self.top_k}, as a token selects an expert once; give the right top_k"
            )

    @property
    def num_steps(self) -> int:
        return int(self.recorded.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.recorded.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.recorded.shape[2])

    def selections(self, step: int, layer: int = 0) -> Rows:
        """Selections of each expert as recorded, [num_experts]; step and layer are positions.

        Raises:
            ValueError: there is no such step or layer, or nothing was selected in it.
        """
        if not (0 <= step < self.num_steps and 0 <= layer < self.num_layers):
            raise ValueError(
                f"{self.name}: step={step}, layer={layer}, expected step 0 to "
                f"{self.num_steps - 1} and layer 0 to {self.num_layers - 1}"
            )
        rows: Rows = self.recorded[step, layer]
        if not rows.any():
            raise ValueError(
                f"{self._where(step, layer)}: no selections, expected some; choose another layer"
            )
        return rows

    def popularity(self, step: int, layer: int = 0) -> Weights:
        """Shares of the selections, [num_experts]; they sum to 1, none is above 1 / top_k."""
        rows = self.selections(step, layer)
        shares: Weights = rows / rows.sum()
        return shares

    def counts(
        self, ep_size: int, *, step: int, layer: int = 0, num_tokens: int | None = 4096
    ) -> Rows:
        """The step's popularity at this size, by owner: [ep_size, num_experts / ep_size].

        Args:
            num_tokens: tokens per rank, each with top_k selections; the counts sum to exactly
                ep_size * num_tokens * top_k. None means as recorded: the counts of the file.
        Raises:
            ValueError: as selections(); or ep_size does not divide the experts.
        """
        if ep_size < 1 or self.num_experts % ep_size:
            raise ValueError(
                f"{self.name}: ep_size={ep_size}, expected a divisor of {self.num_experts} experts"
            )
        rows = self.selections(step, layer)
        if num_tokens is not None:
            if num_tokens < 1:
                raise ValueError(f"{self.name}: num_tokens={num_tokens}, expected 1 or more")
            most = ep_size * num_tokens
            rows = capped(apportion(rows, most * self.top_k), most)
        return rows.reshape(ep_size, -1)

    def _where(self, step: int, layer: int) -> str:
        return f"{self.name}: step {self.steps[step]}, layer {self.layers[layer]}"


def read_trace(
    path: str | Path,
    *,
    part: str | None = None,
    top_k: int | None = None,
    num_experts: int | None = None,
) -> Trace:
    """The routing recorded in a file, or in all files of a folder; see the top of this file.

    Args:
        part: which model of a file of domains; needed if it holds several.
        top_k: experts that a token selects. Needed if the file does not say (SGLang, UltraEP,
            domains), else it must agree.
        num_experts: of the model. Megatron's trace does not say, and an expert that was never
            chosen would be missing at the end; else it must agree.
    Raises:
        ValueError: not one of these formats, damaged, or not as the arguments say.
        OSError: the path cannot be read.
    """
    path = Path(path)
    held = _contents(path, part, num_experts)
    if held.top_k is None and top_k is None:
        raise ValueError(
            f"{path}: the file does not say how many experts a token selects; give top_k"
        )
    in_file = {"top_k": held.top_k, "num_experts": held.counts.shape[-1]}
    for name, given in (("top_k", top_k), ("num_experts", num_experts)):
        if None not in (given, in_file[name]) and given != in_file[name]:
            raise ValueError(
                f"{path}: {name}={in_file[name]} in the file, expected {given}; give the file's"
            )
    return Trace(
        name=str(path) if part is None else f"{path} ({part})",
        recorded=held.counts,
        top_k=held.top_k or top_k or 0,
        steps=held.steps,
        layers=held.layers,
        num_left_out=held.num_left_out,
    )


def write_trace(path: str | Path, trace: Trace) -> None:
    """Write a trace in feplb's own format; read_trace() gives it back."""
    document = {
        "format": OWN_FORMAT,
        "top_k": trace.top_k,
        "steps": trace.steps,
        "layers": trace.layers,
        "counts": trace.recorded.tolist(),
    }
    Path(path).write_text(json.dumps(document), encoding="utf-8")


def _contents(path: Path, part: str | None, num_experts: int | None) -> Contents:
    """What the file or folder holds, read as the format that its name says."""
    files = {
        ".jsonl": sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path],
        ".npz": sorted(path.glob("*.npz")) if path.is_dir() else [path],
        ".pt": sorted(path.glob("expert_distribution_recorder_*.pt")) if path.is_dir() else [path],
        ".json": [] if path.is_dir() else [path],
    }
    known = [suffix for suffix in files if files[suffix]] if path.is_dir() else [path.suffix]
    if part is not None and known != [".json"]:
        raise ValueError(f"{path}: part={part!r}, expected none: only a .json of domains has parts")
    if known == [".jsonl"]:
        return read_megatron(files[".jsonl"], num_experts)
    if known == [".npz"]:
        return read_ultra_ep(files[".npz"])
    if known == [".pt"]:
        return read_sglang(files[".pt"])
    if known == [".json"]:
        return read_json(path, part)
    raise ValueError(
        f"{path}: {' and '.join(known) or 'no trace'} found, expected a trace of one kind: "
        ".json, Megatron's .jsonl, UltraEP's .npz, SGLang's .pt, or a folder of one of the last 3"
    )
