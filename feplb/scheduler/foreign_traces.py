"""The routing traces of Megatron-LM, UltraEP and SGLang, each read into Contents.

Written from these programs' sources, at the version named at each reader; none of their code is
here. A reader checks what it must to sum the counts; Trace checks the counts themselves.
Nothing is ever unpickled: torch loads with weights_only, NumPy without pickle.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feplb.scheduler.shares import Rows
from feplb.scheduler.trace_formats import AnyRows, Contents, contents_of, parse_json

ULTRA_EP_SCHEMA = "ultra_ep_trace_v1"
MEGATRON_FIELDS = ("step", "layer", "rank", "num_tokens", "topk", "top_indices")
MAX_EXPERTS = 2**16  # an expert index beyond is damage, not a model, and would cost the memory


# ------------------------------------------------------------------------------- Megatron-LM


class _Routed(NamedTuple):
    """One record: the selections that one rank's tokens make in one layer."""

    step: int
    layer: tuple[str, int, int]  # block, index of the MTP head or -1, layer
    rank: int
    top_k: int
    counts: Rows  # [highest expert index + 1]


def read_megatron(paths: Sequence[Path], num_experts: int | None) -> Contents:
    """Megatron-LM's router_trace_rank<N>.jsonl of one or more ranks, summed over the ranks.

    A line is {"step", "stage": "pre_dispatch", "block": "decoder" or "mtp", "layer", "rank",
    "num_tokens", "topk", "top_indices": [num_tokens][topk]}, with "mtp_idx" in MTP layers
    (megatron/core/transformer/moe/router_trace.py at 059f0f5c). In training the records of a rank
    that share step and layer are its micro-batches in turn; each is a step here, named
    "<step>.<micro-batch>". (Under recompute Megatron records the second run of a router too.)
    """
    cells: dict[tuple[Any, Any], dict[int, Rows]] = defaultdict(dict)
    seen: Counter[Hashable] = Counter()
    top_k = None
    for where, line in (entry for path in paths for entry in _lines(path)):
        routed = _megatron_record(parse_json(line, where), where)
        top_k = top_k or routed.top_k
        if routed.top_k != top_k:
            raise ValueError(f"{where}: topk {routed.top_k}, expected {top_k} as before")
        batch = seen[routed.step, routed.layer, routed.rank]
        seen[routed.step, routed.layer, routed.rank] += 1
        cells[(routed.step, batch), routed.layer][routed.rank] = routed.counts
    if not cells:
        raise ValueError(f"{paths[0]}: no records, expected one a line; record again")
    _check_ranks(cells, paths[0])
    size = max(len(row) for by_rank in cells.values() for row in by_rank.values())
    if num_experts is not None and size > num_experts:
        raise ValueError(f"{paths[0]}: expert {size - 1} was chosen, expected below {num_experts}")
    size = num_experts or size
    summed = {
        cell: np.sum([np.pad(row, (0, size - len(row))) for row in by_rank.values()], axis=0)
        for cell, by_rank in cells.items()
    }
    return contents_of(
        summed,
        top_k=top_k,
        step_name=lambda step: f"{step[0]}.{step[1]}",
        layer_name=lambda layer: " ".join(str(part) for part in layer if part != -1),
    )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not empty, and where each is; one at a time, as traces can be large."""
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: no UTF-8 text ({error}), expected JSON lines") from error


def _megatron_record(record: Any, where: str) -> _Routed:
    """One line of a trace, checked."""
    if not isinstance(record, dict) or not set(MEGATRON_FIELDS) <= set(record):
        raise ValueError(f"{where}: expected an object with {', '.join(MEGATRON_FIELDS)}")
    for name in (*MEGATRON_FIELDS[:-1], "mtp_idx"):
        if type(record.get(name, 0)) is not int or record.get(name, 0) < 0:
            raise ValueError(f"{where}: {name}={record[name]!r}, expected an integer, 0 or more")
    num_tokens, top_k = record["num_tokens"], record["topk"]
    try:
        indices = np.asarray(record["top_indices"] or np.empty((0, top_k), dtype=np.int64))
    except ValueError:  # rows of different lengths
        indices = np.empty(0)
    if indices.shape != (num_tokens, top_k) or indices.dtype.kind != "i":
        raise ValueError(
            f"{where}: top_indices is no [{num_tokens}][{top_k}] of integers, as num_tokens and "
            "topk say; the file is damaged"
        )
    if indices.size and not 0 <= indices.min() <= indices.max() < MAX_EXPERTS:
        raise ValueError(
            f"{where}: experts {indices.min()} to {indices.max()}, expected 0 to {MAX_EXPERTS - 1}"
        )
    ordered = np.sort(indices, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if twice.size:
        token, slot = twice[0].tolist()
        raise ValueError(
            f"{where}: token {token} selects expert {ordered[token, slot]} twice, expected "
            f"{top_k} different experts"
        )
    layer = (str(record.get("block", "decoder")), record.get("mtp_idx", -1), record["layer"])
    counts = np.bincount(indices.ravel()).astype(np.int64)
    return _Routed(record["step"], layer, record["rank"], top_k, counts)


def _check_ranks(cells: Mapping[tuple[Any, Any], Mapping[int, Rows]], path: Path) -> None:
    """Every layer was recorded by the same ranks in every step, else a sum would be of some."""
    ranks_of: dict[Any, set[int]] = defaultdict(set)
    for (_, layer), by_rank in cells.items():
        ranks_of[layer] |= set(by_rank)
    for step in sorted({step for step, _ in cells}):
        for layer in sorted(ranks_of):
            ranks = set(cells.get((step, layer), {}))
            if ranks != ranks_of[layer]:
                raise ValueError(
                    f"{path}: step {step[0]}, micro-batch {step[1]}, {layer[0]} layer {layer[2]} "
                    f"has ranks {sorted(ranks)}, expected {sorted(ranks_of[layer])} as elsewhere; "
                    "a rank's file ends early: cut the others to its last step"
                )


# ----------------------------------------------------------------------------------- UltraEP


def read_ultra_ep(paths: Sequence[Path]) -> Contents:
    """UltraEP's load profile, <trace>.chunk<N>.npz: the loads before balancing, of one EP group.

    A chunk has metadata (a JSON text with schema "ultra_ep_trace_v1", trace_id, chunk_id,
    num_global_logical_experts), layers and microbatches [num_records], and pre_logical_loads
    [num_records, num_experts] (ExpertLoadProfiler of Dots-Infra/UltraEP
    v1.0.0). The profiler drops records when it is behind: micro-batches that lack a layer are left
    out.
    """
    cells: dict[tuple[Any, Any], Rows] = {}
    chunks: dict[str, list[int]] = defaultdict(list)
    for path in paths:
        metadata, layers, batches, loads = _ultra_ep_chunk(path)
        chunks[str(metadata.get("trace_id"))].append(metadata["chunk_id"])
        for record, (layer, batch) in enumerate(zip(layers, batches, strict=True)):
            cell = (int(batch), int(layer))
            if len(chunks) == 1 and cell in cells:
                raise ValueError(
                    f"{path}: record {record} is micro-batch {batch} of layer {layer}, expected "
                    "each once; the chunks are of different runs"
                )
            cells[cell] = loads[record]
    if len(chunks) > 1:
        raise ValueError(
            f"{paths[0].parent}: traces of {len(chunks)} EP groups or runs, {sorted(chunks)}, "
            "expected one; put each one's files into a folder of its own"
        )
    numbers = sorted(next(iter(chunks.values())))
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"{paths[0].parent}: chunks {numbers}, expected all without a gap")
    if len({row.size for row in cells.values()}) != 1:
        raise ValueError(f"{paths[0]}: no records, or of different numbers of experts")
    try:
        return contents_of(cells, top_k=None)
    except ValueError as error:
        raise ValueError(f"{paths[0]}: {error}") from error


def _ultra_ep_chunk(path: Path) -> tuple[dict[str, Any], AnyRows, AnyRows, AnyRows]:
    """metadata, layers, microbatches and pre_logical_loads of one chunk."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = [data[name] for name in ("layers", "microbatches", "pre_logical_loads")]
            metadata = parse_json(str(data["metadata"].item()), f"{path}, metadata")
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path}: not a whole UltraEP chunk of plain arrays ({error}); copy the file again"
        ) from error
    layers, batches, loads = arrays
    schema = metadata.get("schema") if isinstance(metadata, dict) else None
    if schema != ULTRA_EP_SCHEMA:
        raise ValueError(f"{path}: schema {schema!r}, expected {ULTRA_EP_SCHEMA!r}")
    experts = metadata.get("num_global_logical_experts", loads.shape[-1] if loads.ndim else 0)
    if loads.shape != (layers.size, experts) or batches.shape != layers.shape or layers.ndim != 1:
        raise ValueError(
            f"{path}: pre_logical_loads {list(loads.shape)}, layers {list(layers.shape)} and "
            f"microbatches {list(batches.shape)}, expected [n, {experts}], [n] and [n]"
        )
    if any(array.dtype.kind not in "iu" for array in arrays):
        raise ValueError(f"{path}: arrays of {[str(a.dtype) for a in arrays]}, expected integers")
    if type(metadata.get("chunk_id")) is not int:
        raise ValueError(f"{path}: chunk_id {metadata.get('chunk_id')!r}, expected an integer")
    return metadata, layers, batches, loads.astype(np.int64)


# ------------------------------------------------------------------------------------ SGLang


def read_sglang(paths: Sequence[Path]) -> Contents:
    """SGLang's expert_distribution_recorder_<time>.pt, of one of its two kinds.

    Modes stat and stat_approx (one file, of all ranks): {"logical_count": [num_passes, num_layers,
    num_experts]}; passes and layers without a selection (the unfilled part of its buffer, dense
    layers) are left out. Modes per_pass and per_token (a file per rank): {"records":
    [{"forward_pass_id", "rank", "global_physical_count": [num_layers, num_physical]}],
    "last_physical_to_logical_map": [num_layers, num_physical]}; summed over the ranks' files
    (sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py at 02295fe5).
    """
    files = [_torch_file(path) for path in paths]
    if len(files) == 1 and "logical_count" in files[0]:
        counts = _array(files[0]["logical_count"], f"{paths[0]}, logical_count")
        counts = counts[None] if counts.ndim == 2 else counts
        return _without_empty(counts, [str(i) for i in range(len(counts))], paths[0])
    passes: dict[int, AnyRows] = {}
    for path, file in zip(paths, files, strict=True):
        if "records" not in file or "last_physical_to_logical_map" not in file:
            raise ValueError(
                f"{path}: {sorted(map(str, file))}, expected logical_count in a single file, or "
                "records and last_physical_to_logical_map; give one stat file, or one run's folder"
            )
        for step, counts in _sglang_passes(file, path):
            if step in passes and passes[step].shape != counts.shape:
                raise ValueError(
                    f"{path}: forward pass {step} has counts {list(counts.shape)}, expected "
                    f"{list(passes[step].shape)} as on other ranks"
                )
            passes[step] = passes[step] + counts if step in passes else counts
    if not passes or len({counts.shape for counts in passes.values()}) > 1:
        raise ValueError(f"{paths[0]}: no records, or of different shapes, expected some alike")
    steps = sorted(passes)
    return _without_empty(np.stack([passes[i] for i in steps]), [str(i) for i in steps], paths[0])


def _sglang_passes(file: Mapping[Any, Any], path: Path) -> list[tuple[int, AnyRows]]:
    """(forward_pass_id, [num_layers, num_experts]) of each record of one rank."""
    logical = _array(file["last_physical_to_logical_map"], f"{path}, last_physical_to_logical_map")
    if (
        logical.ndim != 2
        or not logical.size
        or not 0 <= logical.min() <= logical.max() < MAX_EXPERTS
    ):
        raise ValueError(f"{path}: last_physical_to_logical_map is no map of [layers, experts]")
    if not isinstance(file["records"], list):
        raise ValueError(f"{path}: records is no list")
    result = []
    for number, record in enumerate(file["records"]):
        where = f"{path}, record {number}"
        if not isinstance(record, dict) or type(record.get("forward_pass_id")) is not int:
            raise ValueError(f"{where}: expected an object with forward_pass_id")
        physical = _array(record.get("global_physical_count"), f"{where}, global_physical_count")
        if physical.shape != logical.shape or physical.min() < 0:
            raise ValueError(
                f"{where}: global_physical_count {list(physical.shape)} from {physical.min()}, "
                f"expected {list(logical.shape)} as last_physical_to_logical_map, 0 or more"
            )
        counts = np.zeros((len(logical), int(logical.max()) + 1), dtype=np.int64)
        np.add.at(counts, (np.arange(len(logical))[:, None], logical), physical)
        result.append((record["forward_pass_id"], counts))
    return result


def _torch_file(path: Path) -> dict[Any, Any]:
    """A file of torch.save() that holds a dict of plain tensors and values."""
    import torch

    with path.open("rb"):  # a missing file says so itself
        pass
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch promises no type for a damaged file
        raise ValueError(
            f"{path}: not a whole file of plain tensors ({str(error).splitlines()[:1]}), expected "
            "what SGLang's recorder saves; it was not unpickled"
        ) from error
    if not isinstance(held, dict):
        raise ValueError(f"{path}: holds a {type(held).__name__}, expected a dict")
    return held


def _array(tensor: Any, where: str) -> AnyRows:
    """A tensor of integers as an array."""
    try:
        array: AnyRows = tensor.numpy()
    except (AttributeError, TypeError, RuntimeError):  # no tensor, or none with plain values
        array = np.empty(0)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: {type(tensor).__name__}, expected a tensor of integers")
    return array.astype(np.int64)


def _without_empty(counts: AnyRows, steps: list[str], path: Path) -> Contents:
    """Without the steps and layers in which nothing was selected."""
    if counts.ndim != 3 or not counts.any():
        raise ValueError(
            f"{path}: counts {list(counts.shape)} of {int(counts.sum())} selections, expected some "
            "in [num_passes, num_layers, num_experts]"
        )
    used = (counts != 0).any(axis=2)
    at, layers = np.flatnonzero(used.any(axis=1)), np.flatnonzero(used.any(axis=0))
    return Contents(
        counts=counts[np.ix_(at, layers)],
        top_k=None,
        steps=tuple(steps[i] for i in at),
        layers=tuple(str(i) for i in layers),
    )
