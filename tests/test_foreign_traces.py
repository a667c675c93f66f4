"""The traces of Megatron-LM, UltraEP and SGLang, written here as these programs write them.

Every damage is named, and no pickle in one of them is ever executed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feplb.scheduler.traces import read_trace


class Opener:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# ------------------------------------------------------------------------------------ Megatron


def record(step: int, rank: int, indices: list[list[int]], **others: Any) -> dict[str, Any]:
    """As RouterTracer of Megatron-LM writes it, in its order of fields."""
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": 3,
        "rank": rank,
        "num_tokens": len(indices),
        "topk": 2,
        "top_indices": indices,
        **others,
    }


def megatron(folder: Path, rank: int, *records: dict[str, Any]) -> Path:
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return path


def test_megatron_ranks_are_summed_and_micro_batches_are_steps(tmp_path: Path) -> None:
    mtp = {"block": "mtp", "mtp_idx": 0, "layer": 1}
    megatron(
        tmp_path,
        0,
        record(0, 0, [[0, 1], [1, 2]]),
        record(0, 0, [[3, 0]]),  # the second micro-batch of step 0
        record(0, 0, [[0, 2]], **mtp),
        record(0, 0, [[0, 3]], **mtp),
        record(10, 0, [[2, 3]]),
        record(10, 0, [], **mtp, hs_offset=0),
    )
    megatron(
        tmp_path,
        1,
        *(record(0, 1, [[0, 1]]) for _ in range(2)),
        *(record(0, 1, [[1, 2]], **mtp) for _ in range(2)),
        record(10, 1, [[0, 1]]),
        record(10, 1, [[1, 3]], **mtp),
    )
    trace = read_trace(tmp_path)
    assert trace.top_k == 2
    assert trace.layers == ("decoder 3", "mtp 0 1")
    assert trace.steps == ("0.0", "0.1", "10.0")
    assert trace.recorded.tolist() == [
        [[2, 3, 1, 0], [1, 1, 2, 0]],
        [[2, 1, 0, 1], [1, 1, 1, 1]],
        [[1, 1, 1, 1], [0, 1, 0, 1]],
    ]
    one = read_trace(tmp_path / "router_trace_rank0.jsonl", num_experts=6)
    assert one.recorded[0, 0].tolist() == [1, 2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([], {}, "no records, expected one a line"),
        ([{"step": 0}], {}, "line 1: expected an object with step, layer, rank"),
        (
            [record(0, 0, [[0, 1]], num_tokens=2)],
            {},
            r"line 1: top_indices is no \[2\]\[2\] of int",
        ),
        ([record(0, 0, [[0, 1, 2]])], {}, r"line 1: top_indices is no \[1\]\[2\] of integers"),
        ([record(0, 0, [[0, 1], [1]])], {}, r"line 1: top_indices is no \[2\]\[2\] of integers"),
        ([record(0, 0, [[0, 0.5]])], {}, r"line 1: top_indices is no \[1\]\[2\] of integers"),
        ([record(0, 0, "ab")], {}, r"line 1: top_indices is no \[2\]\[2\] of integers"),
        ([record(0, 0, [[0, -1]])], {}, "line 1: experts -1 to 0, expected 0 to 65535"),
        ([record(0, 0, [[0, 10**9]])], {}, "line 1: experts 0 to 1000000000, expected 0 to"),
        ([record(0, 0, [[1, 0], [4, 4]])], {}, "line 1: token 1 selects expert 4 twice"),
        ([record(-1, 0, [[0, 1]])], {}, "line 1: step=-1, expected an integer, 0 or more"),
        ([record(0, 0, [[0, 1]], mtp_idx="a")], {}, "line 1: mtp_idx='a', expected an integer"),
        (
            [record(0, 0, [[0, 1]]), record(1, 0, [[0]], topk=1)],
            {},
            "line 2: topk 1, expected 2 as before",
        ),
        ([record(0, 0, [[0, 1]])], {"top_k": 4}, "top_k=2 in the file, expected 4"),
        ([record(0, 0, [[0, 7]])], {"num_experts": 4}, "expert 7 was chosen, expected below 4"),
        ([record(0, 0, [[0, 1]])], {"part": "a"}, "part='a', expected none"),
    ],
)
def test_a_wrong_megatron_trace_is_named(
    tmp_path: Path, lines: list[dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    path = megatron(tmp_path, 0, *lines)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        read_trace(path, **arguments)


def test_a_cut_off_megatron_trace_is_named(tmp_path: Path) -> None:
    path = megatron(tmp_path, 0, record(0, 0, [[0, 1]]), record(1, 0, [[0, 1]]))
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match="line 2: no whole JSON"):
        read_trace(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_trace(path)
    # Cut off at the end of a line, what the other rank has of step 1 would be half of it.
    megatron(tmp_path, 0, record(0, 0, [[0, 1]]))
    megatron(tmp_path, 1, record(0, 1, [[0, 1]]), record(1, 1, [[0, 1]]))
    message = r"step 1, micro-batch 0, decoder layer 3 has ranks \[1\], expected \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path)


# ------------------------------------------------------------------------------------- UltraEP


def ultra_ep(folder: Path, chunk: int = 0, **changed: Any) -> Path:
    """As UltraEP's profiler writes it: 3 records of 2 layers, 2 ranks x 2 experts."""
    metadata = {
        "schema": "ultra_ep_trace_v1",
        "trace_id": changed.pop("trace_id", "epg0_gr0_r0_1"),
        "chunk_id": chunk,
        "ep_size": 2,
        "num_global_logical_experts": 4,
    }
    arrays = {
        "metadata": np.asarray(json.dumps({**metadata, **changed.pop("metadata", {})})),
        "layers": np.array([5, 9, 5], dtype=np.int32),
        "virtual_layers": np.array([0, 1, 0], dtype=np.int32),
        "microbatches": np.array([0, 0, 1], dtype=np.int64),
        "pre_logical_loads": np.array([[4, 2, 1, 1], [2, 2, 2, 2], [0, 3, 3, 2]], dtype=np.int32),
        "post_physical_loads": np.zeros((3, 6), dtype=np.int32),
        **changed,
    }
    path = folder / f"epg0_gr0_r0_1.chunk{chunk:06d}.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_ultra_ep_steps_without_all_layers_are_left_out(tmp_path: Path) -> None:
    ultra_ep(tmp_path)
    loads = np.array([[1, 1, 1, 5], [3, 3, 1, 1]], dtype=np.int32)
    ultra_ep(
        tmp_path,
        chunk=1,
        layers=np.array([5, 9]),
        microbatches=np.array([2, 2]),
        pre_logical_loads=loads,
    )
    (tmp_path / "epg0_gr0_r0_1.manifest.json").write_text("{}")
    trace = read_trace(tmp_path, top_k=1)
    assert trace.recorded.tolist() == [[[4, 2, 1, 1], [2, 2, 2, 2]], loads.tolist()]
    assert (trace.steps, trace.layers, trace.num_left_out) == (("0", "2"), ("5", "9"), 1)
    assert read_trace(tmp_path / "epg0_gr0_r0_1.chunk000000.npz", top_k=2).num_steps == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metadata": {"schema": "v2"}}, "schema 'v2', expected 'ultra_ep_trace_v1'"),
        ({"metadata": np.asarray("{")}, "metadata: no whole JSON"),
        ({"metadata": np.asarray("[]")}, "schema None, expected"),
        ({"metadata": {"chunk_id": "x"}}, "chunk_id 'x', expected an integer"),
        ({"metadata": {"num_global_logical_experts": 8}}, r"pre_logical_loads \[3, 4\].*\[n, 8\]"),
        ({"pre_logical_loads": np.zeros((2, 4), int)}, r"pre_logical_loads \[2, 4\], layers \[3\]"),
        ({"pre_logical_loads": np.array(7)}, r"pre_logical_loads \[\]"),
        ({"pre_logical_loads": np.ones((3, 4))}, "arrays of .*float64.*, expected integers"),
        ({"pre_logical_loads": np.full((3, 4), -1)}, "step 0, layer 5: expert 0 has -1 selections"),
        ({"pre_logical_loads": None}, "not a whole UltraEP chunk of plain arrays"),
        ({"microbatches": np.zeros(3, int)}, "record 2 is micro-batch 0 of layer 5, expected each"),
        ({"microbatches": np.array([0, 1, 2])}, "none of 3 steps has all 2 layers"),
    ],
)
def test_a_wrong_ultra_ep_chunk_is_named(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    if isinstance(changed.get("metadata"), np.ndarray):
        path = ultra_ep(tmp_path)
        held = dict(np.load(path))
        np.savez(path, **{**held, **changed})
    else:
        path = ultra_ep(tmp_path, **changed)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        read_trace(path, top_k=1)


def test_ultra_ep_chunks_must_belong_together(tmp_path: Path) -> None:
    ultra_ep(tmp_path)
    ultra_ep(tmp_path, chunk=2, microbatches=np.array([2, 2, 3]))
    with pytest.raises(ValueError, match=r"chunks \[0, 2\], expected all without a gap"):
        read_trace(tmp_path, top_k=1)
    ultra_ep(tmp_path, chunk=1, trace_id="epg1_gr0_r8_1")
    with pytest.raises(ValueError, match="traces of 2 EP groups or runs"):
        read_trace(tmp_path, top_k=1)


@pytest.mark.parametrize("kept", [0, 4, 100, 900])
def test_a_cut_off_ultra_ep_chunk_is_named(tmp_path: Path, kept: int) -> None:
    path = ultra_ep(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a whole UltraEP chunk"):
        read_trace(path, top_k=1)


# -------------------------------------------------------------------------------------- SGLang


def saved(folder: Path, document: Any, name: str = "1.5") -> Path:
    path = folder / f"expert_distribution_recorder_{name}.pt"
    torch.save(document, path)
    return path


def stat(counts: torch.Tensor) -> dict[str, Any]:
    return {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}


def test_sglang_stat_leaves_out_what_was_not_used(tmp_path: Path) -> None:
    # Layer 0 is dense, and the last pass of the buffer was never filled.
    counts = torch.tensor([[[0, 0], [3, 2]], [[0, 0], [2, 3]], [[0, 0], [0, 0]]], dtype=torch.int32)
    trace = read_trace(saved(tmp_path, stat(counts)), top_k=1)
    assert trace.recorded.tolist() == [[[3, 2]], [[2, 3]]]
    assert (trace.steps, trace.layers) == (("0", "1"), ("1",))
    assert read_trace(tmp_path, top_k=1).num_steps == 2
    flat = read_trace(saved(tmp_path, stat(counts[0])), top_k=1)
    assert flat.recorded.tolist() == [[[3, 2]]]


def detail(rank: int, *passes: tuple[int, list[list[int]]]) -> dict[str, Any]:
    """Of 2 layers with 3 logical experts; one of them is there twice, another one per layer."""
    records = [
        {
            "forward_pass_id": step,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor(counts, dtype=torch.int32),
        }
        for step, counts in passes
    ]
    mapping = torch.tensor([[0, 1, 2, 0], [2, 0, 1, 2]])
    return {"records": records, "last_physical_to_logical_map": mapping}


def test_sglang_detail_is_summed_by_logical_expert_and_rank(tmp_path: Path) -> None:
    saved(tmp_path, detail(0, (7, [[1, 2, 3, 1], [1, 2, 3, 1]]), (9, [[1, 1, 1, 0]] * 2)), "1_0")
    saved(tmp_path, detail(1, (7, [[1, 1, 1, 1], [0, 0, 0, 0]])), "1_1")
    trace = read_trace(tmp_path, top_k=1)
    assert trace.recorded.tolist() == [[[4, 3, 4], [2, 3, 2]], [[1, 1, 1], [1, 1, 1]]]
    assert trace.steps == ("7", "9")


def broken(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    document = detail(0, (7, [[1, 1, 1, 1]] * 2))
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, 2], "holds a list, expected a dict"),
        ({"a": 1}, r"\['a'\], expected logical_count in a single file, or records"),
        (stat(torch.ones(1, 2, 4)), "logical_count: Tensor, expected a tensor of integers"),
        ({"logical_count": [[1, 2]]}, "logical_count: list, expected a tensor of integers"),
        (stat(torch.zeros(2, 2, 4, dtype=torch.int32)), "0 selections, expected some in"),
        (stat(torch.ones(4, dtype=torch.int32)), r"counts \[4\] of 4 selections, expected some in"),
        (stat(torch.tensor([[[3, -1, 3]]])), "expert 1 has -1 selections"),
        (detail(0), "no records, or of different shapes"),
        (detail(0, (7, [[1, 1]] * 2)), r"record 0: global_physical_count \[2, 2\].*\[2, 4\]"),
        (detail(0, (7, [[1, 1, 1, -1]] * 2)), "record 0: global_physical_count .* from -1"),
        (broken(lambda d: d["records"][0].pop("forward_pass_id")), "record 0: expected an object"),
        (broken(lambda d: d["records"][0].pop("global_physical_count")), "record 0, global_phys"),
        (broken(lambda d: d.update(records=3)), "records is no list"),
        (
            broken(lambda d: d.update(last_physical_to_logical_map=torch.tensor([[-1, 0]]))),
            "last_physical_to_logical_map is no map",
        ),
    ],
)
def test_a_wrong_sglang_file_is_named(tmp_path: Path, document: Any, message: str) -> None:
    path = saved(tmp_path, document)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        read_trace(path, top_k=1)


def test_two_sglang_stat_files_are_two_traces(tmp_path: Path) -> None:
    for name in ("1", "2"):
        saved(tmp_path, stat(torch.ones(1, 1, 2, dtype=torch.int32)), name)
    with pytest.raises(ValueError, match="expected logical_count in a single file"):
        read_trace(tmp_path, top_k=1)


@pytest.mark.parametrize("kept", [0, 4, 100, 900])
def test_a_cut_off_sglang_file_is_named(tmp_path: Path, kept: int) -> None:
    path = saved(tmp_path, stat(torch.ones(1, 2, 4, dtype=torch.int32)))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a whole file of plain"):
        read_trace(path, top_k=1)


# --------------------------------------------------------------------------------- nothing runs


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [
        lambda path, bad: torch.save({"records": [], "x": bad}, path.with_suffix(".pt")),
        lambda path, bad: torch.save(bad, path.with_suffix(".pt")),
        lambda path, bad: path.with_suffix(".pt").write_bytes(pickle.dumps(bad)),
        lambda path, bad: np.savez(path.with_suffix(".npz"), layers=np.array([bad], dtype=object)),
        lambda path, bad: path.with_suffix(".npz").write_bytes(pickle.dumps(bad)),
    ],
    ids=["in a dict", "torch.save", "a pickle as .pt", "in an array", "a pickle as .npz"],
)
def test_no_pickle_is_executed(tmp_path: Path, write: Callable[[Path, Any], Any]) -> None:
    opened = tmp_path / "opened"
    write(tmp_path / "evil", Opener(opened))
    (path,) = tmp_path.glob("evil.*")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a whole .* plain"):
        read_trace(path, top_k=1)
    assert not opened.exists()


def test_the_pickle_of_the_test_above_does_run_where_it_may(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Opener(tmp_path / "opened")))
    assert (tmp_path / "opened").exists()


# ----------------------------------------------------------------------------------- which kind


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace found, expected a trace of one kind"):
        read_trace(tmp_path)
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(ValueError, match=r"\.csv found, expected a trace of one kind"):
        read_trace(tmp_path / "a.csv")
    ultra_ep(tmp_path)
    megatron(tmp_path, 0)
    with pytest.raises(ValueError, match=r"\.jsonl and \.npz found, expected a trace of one kind"):
        read_trace(tmp_path)
