"""Recorded routing: every format read as its program writes it, and every damage named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import feplb
from feplb.scheduler.traces import Trace, read_trace, write_trace


def trace_of(counts: Any, top_k: int = 2, **names: Any) -> Trace:
    return Trace(name="mine", recorded=np.array(counts), top_k=top_k, **names)


# ----------------------------------------------------------------------------------- the trace


def test_counts_are_the_popularity_at_another_size() -> None:
    trace = trace_of([[[6, 3, 2, 1]], [[0, 5, 5, 0]]])
    assert (trace.num_steps, trace.num_layers, trace.num_experts) == (2, 1, 4)
    assert trace.counts(2, step=0, num_tokens=6).tolist() == [[12, 6], [4, 2]]
    assert trace.counts(2, step=0, num_tokens=None).tolist() == [[6, 3], [2, 1]]
    assert trace.counts(4, step=1, num_tokens=1).tolist() == [[0], [4], [4], [0]]
    assert trace.counts(1, step=0).sum() == 4096 * 2
    assert trace.popularity(1).tolist() == [0, 0.5, 0.5, 0]


@given(
    rows=st.lists(st.integers(0, 10**9), min_size=8, max_size=8).filter(any),
    top_k=st.integers(1, 8),
    ep_size=st.sampled_from([1, 2, 4, 8]),
    num_tokens=st.integers(1, 5000),
)
@settings(max_examples=200, deadline=None)
def test_scaled_counts_are_exact(
    rows: list[int], top_k: int, ep_size: int, num_tokens: int
) -> None:
    if max(rows) * top_k > sum(rows):
        with pytest.raises(ValueError, match="give the right top_k"):
            trace_of([[rows]], top_k)
        return
    trace = trace_of([[rows]], top_k)
    counts = trace.counts(ep_size, step=0, num_tokens=num_tokens)
    assert counts.shape == (ep_size, 8 // ep_size)
    assert counts.sum() == ep_size * num_tokens * top_k
    assert 0 <= counts.min() <= counts.max() <= ep_size * num_tokens
    wanted = np.array(rows) / sum(rows) * counts.sum()
    assert np.abs(counts.ravel() - wanted).max() <= 1 + 1e-6


def test_a_trace_at_its_own_size_is_as_recorded() -> None:
    chosen = np.random.RandomState(0).rand(4 * 512, 16).argsort(axis=1)[:, :2]
    counts = np.bincount(chosen.ravel(), minlength=16)
    trace = trace_of([[counts]])
    assert (trace.counts(4, step=0, num_tokens=512).ravel() == counts).all()


def test_a_trace_cannot_be_changed() -> None:
    counts = np.array([[[1, 1]]])
    trace = trace_of(counts)
    counts[0, 0, 0] = 9
    assert trace.recorded.tolist() == [[[1, 1]]]
    with pytest.raises(ValueError, match="read-only"):
        trace.recorded[0, 0, 0] = 9


@pytest.mark.parametrize(
    ("counts", "arguments", "message"),
    [
        (
            [[1, 1]],
            {},
            r"mine: counts of shape \[1, 2\] and type int64, expected integers \[num_st",
        ),
        (np.empty((0, 1, 2), int), {}, r"counts of shape \[0, 1, 2\]"),
        ([[[1.0, 1.0]]], {}, "type float64, expected integers"),
        (
            [[[1, 1]], [[1, -1]]],
            {},
            "mine: step 1, layer 0: expert 1 has -1 selections, expected 0",
        ),
        ([[[2**41, 2**41]]], {}, "expert 0 has 2199023255552 selections"),
        ([[[1, 1]]], {"top_k": 3}, "mine: top_k=3, expected 1 to num_experts=2"),
        ([[[1, 1]]], {"top_k": 0}, "mine: top_k=0, expected 1 to num_experts=2"),
        ([[[5, 4, 0]]], {}, "step 0, layer 0: one expert has 5 of 9 selections, expected at most"),
        ([[[1, 1]]], {"steps": ("a", "b")}, "2 names of steps, expected 1"),
        ([[[1, 1]]], {"layers": ("a", "b")}, "2 names of layers, expected 1"),
    ],
)
def test_wrong_counts_are_named(counts: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_of(counts, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ep_size": 3, "step": 0}, "mine: ep_size=3, expected a divisor of 2 experts"),
        ({"ep_size": 2, "step": 2}, "step=2, layer=0, expected step 0 to 1 and layer 0 to 0"),
        ({"ep_size": 2, "step": -1}, "step=-1, layer=0, expected"),
        ({"ep_size": 2, "step": 0, "layer": 1}, "step=0, layer=1, expected"),
        ({"ep_size": 2, "step": 1}, "mine: step b, layer x: no selections, expected some"),
        ({"ep_size": 2, "step": 0, "num_tokens": 0}, "num_tokens=0, expected 1 or more"),
    ],
)
def test_wrong_questions_are_named(arguments: dict[str, Any], message: str) -> None:
    trace = trace_of([[[1, 1]], [[0, 0]]], steps=("a", "b"), layers=("x",))
    with pytest.raises(ValueError, match=message):
        trace.counts(**arguments)


# ------------------------------------------------------------------------------- feplb's own


def test_own_format_round_trip(tmp_path: Path) -> None:
    counts = np.random.RandomState(0).randint(10, 15, size=(3, 2, 8))
    written = trace_of(counts, steps=("a", "b", "c"), layers=("0", "7"))
    write_trace(tmp_path / "routing.json", written)
    read = read_trace(tmp_path / "routing.json")
    assert (read.recorded == counts).all()
    assert (read.top_k, read.steps, read.layers) == (2, ("a", "b", "c"), ("0", "7"))
    assert read.name == str(tmp_path / "routing.json")
    assert json.loads((tmp_path / "routing.json").read_text())["format"] == "feplb_trace_v1"


OWN = {
    "format": "feplb_trace_v1",
    "top_k": 1,
    "steps": ["0"],
    "layers": ["0"],
    "counts": [[[1, 1]]],
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "v9"}, "format 'v9', expected 'feplb_trace_v1'"),
        ({"top_k": "2"}, "top_k='2', expected an integer"),
        ({"top_k": 9}, "top_k=9, expected 1 to num_experts=2"),
        ({"steps": ["0", "1"]}, "2 names of steps, expected 1"),
        ({"steps": 7}, "steps is no list, or an empty one"),
        ({"counts": []}, "counts is no list, or an empty one"),
        ({"counts": [7]}, "step 0: expected a list over layers"),
        ({"counts": [[[1, 1], [1]]]}, "step 0, layer 1: expected a list over the same experts"),
        (
            {"counts": [[[1, 1]], [[1, 1], [1, 1]]]},
            r"step 1: \[2, 2\] layers and experts, expected",
        ),
        ({"counts": [[[1, -4]]]}, "step 0, layer 0, expert 1: -4 selections, expected an integer"),
        ({"counts": [[[1, 1.5]]]}, "expert 1: 1.5 selections, expected an integer"),
        ({"counts": [[[1, True]]]}, "expert 1: True selections, expected an integer"),
        ({"counts": [[[1, 10**30]]]}, "expert 1: 10{30} selections, expected an integer"),
    ],
)
def test_a_wrong_own_file_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({**OWN, **changed}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}"):
        read_trace(path)


def test_an_own_file_without_a_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({name: OWN[name] for name in OWN if name != "layers"}))
    with pytest.raises(ValueError, match="expected top_k, steps, layers, counts"):
        read_trace(path)


# -------------------------------------------------------------------------------------- domains


DOMAINS = {
    "big/web": [[4, 2, 2, 0], [2, 2, 2, 2]],
    "big/code/c": [[0, 2, 2, 4], [1, 2, 2, 3]],
    "small/web": [[1, 1]],
}


def domains(tmp_path: Path, document: Any = DOMAINS) -> Path:
    path = tmp_path / "domains.json"
    path.write_text(json.dumps(document))
    return path


def test_domains_of_one_model_are_steps(tmp_path: Path) -> None:
    trace = read_trace(domains(tmp_path), part="big", top_k=2)
    assert trace.recorded.tolist() == [DOMAINS["big/web"], DOMAINS["big/code/c"]]
    assert trace.steps == ("web", "code/c")
    assert trace.name.endswith("domains.json (big)")
    alone = read_trace(domains(tmp_path, {"small/web": [[1, 1]]}), top_k=1)
    assert alone.num_experts == 2


@pytest.mark.parametrize(
    ("document", "arguments", "message"),
    [
        (DOMAINS, {"top_k": 2}, "part=None, expected one of big, small"),
        (DOMAINS, {"top_k": 2, "part": "huge"}, "part='huge', expected one of big, small"),
        (DOMAINS, {"part": "big"}, "does not say how many experts a token selects; give top_k"),
        (DOMAINS, {"part": "big", "top_k": 3}, "web, layer 0: one expert has 4 of 8 selections"),
        (
            DOMAINS,
            {"part": "big", "top_k": 2, "num_experts": 8},
            "num_experts=4 in the file, expected 8",
        ),
        ({"a/b": [[1, 1]], "a/c": [[1]]}, {"top_k": 1}, r"a/c: \[1, 1\] layers and experts"),
        ({"a/b": [[1, -1]]}, {"top_k": 1}, "a/b, layer 0, expert 1: -1 selections"),
        ({"a": [[1, 1]]}, {"top_k": 1}, 'expected "format": "feplb_trace_v1", or an object with'),
        ([[1, 1]], {"top_k": 1}, 'expected "format": "feplb_trace_v1", or an object with'),
        ({}, {"top_k": 1}, 'expected "format": "feplb_trace_v1", or an object with'),
        (OWN, {"part": "big"}, "part='big', expected none"),
        (OWN, {"top_k": 2}, "top_k=1 in the file, expected 2"),
    ],
)
def test_a_wrong_file_of_domains_is_named(
    tmp_path: Path, document: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(domains(tmp_path, document), **arguments)


@pytest.mark.parametrize("content", [b"", b'{"a/b": [[1, 2', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_cut_off_json_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cut.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: (no whole JSON|byte 0)"):
        read_trace(path)


# ----------------------------------------------------------------------------------- which kind


@pytest.mark.parametrize("suffix", ["json", "jsonl", "npz", "pt"])
def test_a_missing_file_is_a_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"missing.{suffix}"):
        read_trace(tmp_path / f"missing.{suffix}")


def test_traces_and_workloads_need_no_torch() -> None:
    code = (
        "import sys, types; sys.modules['torch'] = None; import numpy;"
        "sys.modules['feplb'] = feplb = types.ModuleType('feplb');"
        f"feplb.__path__ = [{str(Path(feplb.__file__).parent)!r}];"
        "import feplb.scheduler.traces, feplb.scheduler.named_workloads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
