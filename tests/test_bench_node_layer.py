"""bench/node_layer.py in parts: its routings, its check, and its figures by hand."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import node_figures
import node_layer
from node_figures import Loads, Measured, Place
from report import Report


def test_gpus_are_refused_in_one_sentence_unless_cpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="This bench runs the host lane only so far"):
        node_layer.choose_device(Namespace(cpu=False))
    assert node_layer.choose_device(Namespace(cpu=True)).type == "cpu"


@pytest.mark.parametrize(
    ("device", "deep_ep", "expected"),
    [("cpu", True, "all_to_all"), ("cuda", False, "all_to_all"), ("cuda", True, "deepep")],
)
def test_deepep_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, device: str, deep_ep: bool, expected: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if deep_ep else None)
    assert node_layer.dispatcher_for(torch.device(device)) == expected


@pytest.mark.parametrize("num_ranks", [2, 8, 16])
def test_choices_give_the_wanted_loads(num_ranks: int) -> None:
    sizes = node_layer.Sizes()
    skewed = node_layer.routings(num_ranks, sizes, imbalance=1.5, seed=7)
    again = node_layer.routings(num_ranks, sizes, imbalance=1.5, seed=7)
    for one, same in zip(skewed, again, strict=True):
        assert np.array_equal(one.choices, same.choices)
        loads = one.counts.sum(axis=1)
        assert loads.max() / loads.mean() == pytest.approx(1.5, abs=0.01)
        even = node_layer.level(one, seed=7)
        assert set(even.counts.sum(axis=1)) == {sizes.tokens * sizes.top_k}
        for routing in (one, even):
            assert routing.choices.shape == (num_ranks, sizes.tokens, sizes.top_k)
            chosen = np.bincount(routing.choices.reshape(-1), minlength=sizes.num_experts)
            assert np.array_equal(chosen, routing.counts.reshape(-1))
            tokens = np.sort(routing.choices.reshape(-1, sizes.top_k))
            assert (np.diff(tokens) > 0).all()


def check_with(rank: int, num_ranks: int, break_it: Callable[[int], None]) -> int:
    break_it(rank)
    options = Namespace(policy="greedy", imbalance=1.5, seed=0)
    layer = node_layer.NodeLayer(options, node_layer.QUICK, torch.device("cpu"))
    try:
        return len(node_layer.check(layer))
    finally:
        layer.close()


def nothing(rank: int) -> None:
    del rank


def flip_a_bit(rank: int) -> None:
    """In rank 1's gradient of w2, where feplb has run."""
    results_of, policy = node_layer.results_of, "greedy"

    def flipped(arm: Any) -> list[torch.Tensor]:
        results = results_of(arm)
        if rank == 1 and arm.balancer is not None and arm.balancer.policy == policy:
            results[3].view(torch.int32).view(-1)[-1] ^= 1
        return results

    node_layer.results_of = flipped


def test_the_check_passes_and_sees_one_bit_on_one_rank() -> None:
    assert run_ranks(check_with, 2, nothing) == [node_layer.NUM_ROUTINGS] * 2
    with pytest.raises(RuntimeError, match="Nothing was timed") as failure:
        run_ranks(check_with, 2, flip_a_bit)
    texts = str(failure.value).splitlines()
    expected = "rank 1: routing {}: grad of w2 of greedy has not the bits of none"
    assert texts[:-1] == [expected.format(idx) for idx in range(node_layer.NUM_ROUTINGS)]


# -------------------------------------------------------------------------------------- figures


def measured_on(places: list[Place], last_ceiling: int = 40) -> Measured:
    """Rows of 4 ranks before [30, 10 | 20, 20], after [20, 20 | 20, 20]; times by hand."""
    loads = [
        [Loads(before=30, after=20, moved=10)],
        [Loads(before=10, after=20, moved=0)],
        *[[Loads(before=20, after=20, moved=0)]] * 2,
    ]
    ns = {"none": [30, 31, 32], "greedy": [23, 22, 21], "ceiling": [19, 19, last_ceiling]}
    ns = {name: [each * 1_000_000 for each in of_arm] for name, of_arm in ns.items()}
    return Measured(policy="greedy", places=places, loads=loads, ns=ns)


def places_on(*cores_of_machines: int) -> list[Place]:
    """Two ranks on each machine, each machine a domain."""
    return [
        Place(kernel=f"boot {i}", cores=tuple(range(cores)), domain=(2 * i, 2 * i + 1))
        for i, cores in enumerate(cores_of_machines)
        for _ in range(2)
    ]


def test_figures_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    measured = measured_on(places_on(2, 3))
    rows = node_figures.report_rows(measured)
    none, greedy, ceiling, first, second = rows
    assert (none["ms_p50"], greedy["ms_p50"], ceiling["ms_p50"]) == (31, 22, 19)
    assert greedy["recovered_pct"] == pytest.approx(100 * 9 / 12)
    assert greedy["ratio"] == pytest.approx(22 / 31)
    assert (greedy["samples"], greedy["cores"], greedy["ranks"]) == (3, 5, 4)
    assert (none["max_mean"], greedy["max_mean"]) == (1.5, 1.0)
    assert greedy["rows_moved_pct"] == pytest.approx(100 * 10 / 80)
    assert (first["max_mean_before"], first["max_mean_after"]) == (1.5, 1.0)
    assert (second["max_mean_before"], second["rows_moved_pct"]) == (1.0, 0)
    node_figures.print_tables(Report(bench="node_layer", lane="host"), measured, rows)
    text = capsys.readouterr().out
    assert "no times" not in text
    assert "forward + backward, ms, median     31.00   22.00    19.00" in text
    assert "no share" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_no_share_of_a_gain_within_the_spread(capsys: pytest.CaptureFixture[str]) -> None:
    measured = measured_on(places_on(2, 3), last_ceiling=44)  # its middle half: 12.5 wide, gain 12
    rows = node_figures.report_rows(measured)
    assert rows[1]["recovered_pct"] is None
    node_figures.print_tables(Report(bench="node_layer", lane="host"), measured, rows)
    text = capsys.readouterr().out
    assert "no share of it is told" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_one_crowded_machine_takes_all_times(capsys: pytest.CaptureFixture[str]) -> None:
    measured = measured_on(places_on(1, 3))
    rows = node_figures.report_rows(measured)
    assert [row["ms_p50"] for row in rows] == [None] * 5
    node_figures.print_tables(Report(bench="node_layer", lane="host"), measured, rows)
    assert "no times: 2 ranks share 1 cores" in capsys.readouterr().out
