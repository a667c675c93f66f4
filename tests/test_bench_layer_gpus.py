"""bench/layer_gpus.py over the stand-in driver: the whole run, small, and its figures by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import put
from ranks import run_ranks
from stand_in import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_layer_check
import gpu_ranks
import layer_gpus
import layer_time
from gpu_layer import GpuLayer, MicroBatch, Size, draw_expert, routing_of
from layer_gpus import Measured, Sample

from feplb.scheduler import Move, Plan

TINY = Size(
    hidden=16, ffn=32, num_experts=8, top_k=2, tokens=48, steps=2, rounds=2,
    dtype=torch.float32, device="cpu",
)  # fmt: skip
IDEALS = [f"plan_ideal_{policy}" for policy in layer_gpus.POLICIES]
OF_LAYER = ["no_balancer", "no_balancer_aa", "none", *layer_gpus.POLICIES, "ceiling"]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs over the stand-in driver")


@pytest.fixture
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, environment())


# ---------------------------------------------------------------------------------- the whole run


@no_gpu
@pytest.mark.usefixtures("_stand_in")
def test_two_gpus_run_the_real_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(layer_gpus, "gpu_facts", lambda: {"gpu": "a made-up H100", "gpus": 3})
    monkeypatch.setattr(layer_gpus, "QUICK", TINY)
    monkeypatch.setattr(layer_gpus, "BACKEND", "gloo")
    file = tmp_path / "rows.json"
    assert layer_time.main(["--quick", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert (content["bench"], content["lane"]) == ("layer_time", "ce")
    said, rows = capsys.readouterr().out, content["rows"]
    assert "ranks=2" in said
    seen = [(row["scope"], row["pass"], row["arm"]) for row in rows]
    assert len(seen) == len(set(seen))
    for name in layer_gpus.PASSES:
        of_pass = {arm for scope, each, arm in seen if (scope, each) == ("experts", name)}
        assert of_pass == {*OF_LAYER, *IDEALS}
        assert {arm for scope, each, arm in seen if (scope, each) == ("layer", name)} == {*OF_LAYER}
    for row in rows:
        assert row["samples"] == TINY.steps * TINY.rounds
        assert row["ms_p50"] > 0
    moved = {row["arm"]: row["rows_moved_pct"] for row in rows}
    assert all(moved[policy] > 0 for policy in ("greedy", "refine", "split"))
    assert moved["none"] == moved["no_balancer"] == moved["ceiling"] == 0
    assert moved["plan_ideal_split"] == moved["split"]


# ---------------------------------------------------------------------------------------- checks


def check_with(rank: int, num_ranks: int, break_it: Callable[[int], None]) -> list[int]:
    break_it(rank)
    layer = GpuLayer(TINY, layer_gpus.POLICIES)
    try:
        plans = gpu_layer_check.check(layer, MicroBatch(layer, 0))
        return [len(plan.moves) for plan in plans.values()]
    finally:
        layer.close()


def nothing(rank: int) -> None:
    del rank


def change(rank: int, *, when: Callable[[Any], bool], at: int) -> None:
    """One bit of one result on rank 1, where the arm is such a one."""
    results_of = gpu_layer_check.results_of

    def changed(arm: Any) -> list[torch.Tensor]:
        results = results_of(arm)
        if rank == 1 and when(arm):
            results[at].view(torch.int32).view(-1)[-1] ^= 1
        return results

    gpu_layer_check.results_of = changed


def in_greedy(rank: int) -> None:
    change(rank, at=3, when=lambda a: a.balancer is not None and a.balancer.policy == "greedy")


def in_an_ideal(rank: int) -> None:
    change(rank, at=0, when=lambda arm: arm.before.__name__ == "place")


def in_the_experts(rank: int) -> None:
    """Every arm computes the same wrong thing."""
    from feplb.compute import SwiGLU

    forward = SwiGLU.forward

    def scaled(self: Any, *args: Any, out: torch.Tensor, save: bool) -> Any:
        saved = forward(self, *args, out=out, save=save)
        out.mul_(1.01)
        return saved

    SwiGLU.forward = scaled  # type: ignore[method-assign]


@no_gpu
@pytest.mark.usefixtures("_stand_in")
def test_the_check_passes_where_all_is_right() -> None:
    found = run_ranks(check_with, 2, nothing)
    assert found[0] == found[1]
    assert all(moves > 0 for moves in found[0][:3])


@no_gpu
@pytest.mark.usefixtures("_stand_in")
@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (in_greedy, "rank 1: experts, greedy: the grad of w2 is not that of none"),
        (in_greedy, "rank 1: layer, greedy: the grad of w2 is not that of none"),
        (in_an_ideal, r"rank 1: the plan of \w+ in place: the output of Piece\(.*\) is not that"),
        (in_the_experts, "rank 0: none: the output of expert 0 is not SwiGLU's"),
    ],
)
def test_the_check_sees_what_is_wrong(break_it: Callable[[int], None], said: str) -> None:
    with pytest.raises(RuntimeError, match=said) as failure:
        run_ranks(check_with, 2, break_it)
    assert str(failure.value).endswith("Nothing was timed.")


def test_close_is_enough_only_where_an_expert_is_split() -> None:
    one = torch.tensor([1.0, 2.0])
    near = torch.tensor([1.0, 2.0 + 2**-22])
    assert gpu_layer_check.is_same(one, one.clone(), exact=True)
    assert gpu_layer_check.is_same(near, one, exact=False)
    assert not gpu_layer_check.is_same(near, one, exact=True)
    assert not gpu_layer_check.is_same(torch.tensor([1.0, 2.1]), one, exact=False)
    assert not gpu_layer_check.is_same(one[:1], one, exact=False)
    assert not gpu_layer_check.is_same(torch.tensor([1.0, float("nan")]), one, exact=False)
    counts = np.array([[4, 2], [1, 1]])
    whole = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=4)
    assert gpu_layer_check.is_whole(Plan.from_moves([whole]), counts)
    part = Move(expert_idx=0, owner_rank=0, dst_rank=1, row_start=2, row_end=4)
    assert not gpu_layer_check.is_whole(Plan.from_moves([part]), counts)


# ---------------------------------------------------------------------------- workload and memory


@pytest.mark.parametrize("ranks", [2, 4])
def test_choices_give_the_counts_and_no_token_has_an_expert_twice(ranks: int) -> None:
    size = replace(TINY, tokens=24, top_k=4)  # so few that draws exceed the tokens
    for step in range(6):
        routing = routing_of(size, ranks, step)
        assert routing.choices.shape == (ranks, size.tokens, size.top_k)
        chosen = np.bincount(routing.choices.reshape(-1), minlength=size.num_experts)
        assert np.array_equal(chosen, routing.counts.reshape(-1))
        tokens = np.sort(routing.choices.reshape(-1, size.top_k))
        assert (np.diff(tokens) > 0).all()


def test_an_expert_is_drawn_the_same_wherever() -> None:
    device = torch.device("cpu")
    one, again, other = (draw_expert(TINY.config(), idx, device) for idx in (3, 3, 4))
    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])
    assert [tuple(weight.shape) for weight in one] == [(64, 16), (16, 32)]


def test_glm5_fits_80_gib_whatever_the_number_of_ranks() -> None:
    policies = len(layer_gpus.POLICIES)
    needed = [layer_gpus.FULL.bytes_needed(ranks, policies) / 2**30 for ranks in (2, 4, 8)]
    assert needed == sorted(needed, reverse=True)
    assert 40 < needed[2] < needed[0] < 75


def fit(rank: int, num_ranks: int, gib: list[float]) -> int | str:
    torch.cuda.mem_get_info = lambda *_: (int(gib[rank] * 2**30), 0)  # type: ignore[assignment]
    try:
        return layer_gpus.fitting(layer_gpus.FULL, layer_gpus.POLICIES).tokens
    except RuntimeError as error:
        return str(error)


def test_the_fullest_gpu_decides_how_many_tokens_all_have() -> None:
    assert run_ranks(fit, 2, [79.0, 79.0]) == [4096] * 2
    fewer = run_ranks(fit, 2, [79.0, 50.0])
    assert fewer[0] == fewer[1]
    assert fewer[0] in layer_gpus.FEWER_TOKENS[1:]
    refused = run_ranks(fit, 2, [79.0, 1.0])
    assert all("a GPU has 1.0 GiB free" in str(text) for text in refused)


# --------------------------------------------------------------------------------- times, figures


def test_times_count_from_the_common_start_to_the_streams_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        """A GPU that takes 3 ms between any two."""

        made = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.made += 1
            self.at = 3.0 * Event.made

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, last: Any) -> float:
            return float(last.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(layer_gpus.time, "perf_counter_ns", lambda: 7_500_000)
    watch = layer_gpus.Stopwatch(torch.device("cuda"), start_ns=7_000_000)
    watch.mark()
    watch.mark()
    assert watch.read() == [3.5, 6.5]


def test_the_slowest_rank_counts_in_each_pass() -> None:
    first = [Sample("experts", 0, "none", (5.0, 9.0))]
    second = [Sample("experts", 0, "none", (6.0, 8.0))]
    assert layer_gpus.slowest([first, second]) == [Sample("experts", 0, "none", (6.0, 9.0))]


MS = {
    "no_balancer": 19.0, "no_balancer_aa": 19.5, "none": 20.0, "greedy": 14.0,
    "plan_ideal_greedy": 12.0, "ceiling": 10.0,
}  # fmt: skip


def measured(**changes: float) -> Measured:
    """Two micro-batches; the second one takes twice as long in every arm."""
    ms = {**MS, **changes}
    samples = [
        Sample(scope, step, arm, ((1 + step) * took / 2, (1 + step) * took))
        for scope in layer_gpus.SCOPES
        for step in range(2)
        for arm, took in ms.items()
        if scope == "experts" or not arm.startswith("plan_ideal")
    ]
    counts = routing_of(TINY, 2, 0).counts
    move = Move(
        expert_idx=0, owner_rank=0, dst_rank=1, row_start=0, row_end=int(counts[0, 0])
    )  # fmt: skip
    plans = [{"greedy": Plan.from_moves([move])}, {"greedy": Plan()}]
    return Measured(TINY, samples, plans)


def test_figures_by_hand() -> None:
    rows = layer_gpus.table_rows(measured(), 2)
    at = {(row["scope"], row["pass"], row["arm"]): row for row in rows}
    assert len(at) == 2 * (6 + 5)
    greedy = at["experts", "fwd_bwd", "greedy"]
    assert (greedy["samples"], greedy["ms_p50"]) == (2, 21.0)
    assert greedy["ratio"] == pytest.approx(14 / 19)
    assert greedy["ceiling_recovered_pct"] == pytest.approx(60.0)
    assert greedy["of_plan_ideal_pct"] == pytest.approx(75.0)
    assert greedy["moves"] == 0.5
    ideal = at["experts", "fwd", "plan_ideal_greedy"]
    assert ideal["ceiling_recovered_pct"] == pytest.approx(80.0)
    assert (ideal["rows_moved_pct"], ideal["max_mean"]) == (
        greedy["rows_moved_pct"], greedy["max_mean"],
    )  # fmt: skip
    assert at["layer", "fwd", "greedy"]["of_plan_ideal_pct"] is None
    assert at["layer", "fwd", "ceiling"]["max_mean"] == 1.0


def test_no_share_of_a_gain_within_the_noise() -> None:
    rows = layer_gpus.table_rows(measured(no_balancer_aa=30.0), 2)
    assert all(row["ceiling_recovered_pct"] is None for row in rows)


# ----------------------------------------------------------------------------------------- ranks


def fail_on_one(rank: int) -> int:
    if rank == 1:
        raise ValueError("not this one")
    return rank


def sum_of_ranks(rank: int, weight: int) -> int:
    total = torch.tensor([rank * weight])
    torch.distributed.all_reduce(total)
    return int(total)


def test_ranks_answer_in_their_order_and_a_failure_ends_all() -> None:
    assert gpu_ranks.over_ranks(sum_of_ranks, 2, 5, backend="gloo") == [5, 5]
    with pytest.raises(SystemExit, match=r"rank 1:\n(.|\n)*not this one"):
        gpu_ranks.over_ranks(fail_on_one, 2, backend="gloo")
    with pytest.raises(SystemExit, match="did not end in time"):
        gpu_ranks.over_ranks(sum_of_ranks, 1, 5, backend="gloo", timeout_s=0.0)


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 0), (1, 1), (3, 2), (7, 4), (16, 8)])
def test_the_largest_group(gpus: int, ranks: int) -> None:
    assert gpu_ranks.num_ranks(gpus) == ranks


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_quick_run_on_gpus(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert layer_time.main(["--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert all(row["ms_p50"] > 0 for row in rows)
