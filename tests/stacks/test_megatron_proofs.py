"""That the comparison of test_megatron_bits can fail; checkpoints, metrics, order of calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from megatron_runs import (
    NUM_TOKENS,
    Outcome,
    Run,
    Trainer,
    build,
    start_megatron,
    train,
    transformer_config,
)
from ranks import run_ranks
from test_megatron_bits import CASES, RECOMPUTE, _prepare_flex

from feplb import BalancerConfig
from feplb.call import CallRecord
from feplb.integrations.megatron import load_metrics

GATHER = CASES["overlapped_param_gather"]

# ------------------------------------------------------------------- the test that the test works


def _flip_one_bit(patch: pytest.MonkeyPatch, rank: int) -> None:
    """In the first row that rank 1 or a later one receives, once."""
    from feplb.arena_views import ArenaViews

    received, flips = ArenaViews.received, [0]

    def flipped(views: Any, *args: Any) -> Any:
        seen = received(views, *args)
        if rank and not flips[0]:
            flips[0] = 1
            seen.rows[0].view(torch.int32)[0, 0] ^= 1
        return seen

    patch.setattr(ArenaViews, "received", flipped)


def _leave_out_parameter_hooks(patch: pytest.MonkeyPatch, _: int) -> None:
    from feplb.integrations import megatron_experts

    patch.setattr(megatron_experts, "run_parameter_hooks", lambda _: None)


MUTATIONS = {
    "a_flipped_bit_in_a_moved_row": (_flip_one_bit, {}),
    "weights_pushed_before_they_are_gathered": (_leave_out_parameter_hooks, GATHER),
}


def mutated(rank: int, num_ranks: int, name: str) -> list[str]:
    """How a run with something broken differs from the same without feplb."""
    mutate, case = MUTATIONS[name]
    run = {**case, "steps": 2}
    expected = train(Run(policy=None, **run))
    with pytest.MonkeyPatch.context() as patch:
        from feplb.integrations import megatron as _  # noqa: F401 - what is patched is loaded

        mutate(patch, rank)
        return train(Run(**run)).differences(expected)


@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_fails_with(name: str) -> None:
    assert any(run_ranks(mutated, 4, name))


# ------------------------------------------------------------------------------------ checkpoints


def saved_and_loaded(rank: int, num_ranks: int, folder: str) -> list[Outcome]:
    """Two steps with and without feplb, saved; each loaded by the other, and two steps more."""
    outcomes = []
    for name, policy in (("with", "greedy"), ("without", None)):
        outcomes.append(train(Run(policy=policy, steps=2, save_to=f"{folder}/{name}")))
    for name, policy in (("with", None), ("without", "greedy")):
        outcomes.append(train(Run(policy=policy, steps=2, load_from=f"{folder}/{name}")))
    return outcomes


def test_checkpoints_are_the_same_files_with_and_without_feplb(tmp_path: Path) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    outcomes = run_ranks(saved_and_loaded, 4, str(tmp_path), timeout_s=90)
    for with_feplb, without, off, on in outcomes:
        assert with_feplb.differences(without) == []
        assert off.differences(on) == []
        assert off.losses != with_feplb.losses  # it went on from what was loaded
    files = {name: _files(tmp_path / name) for name in ("with", "without")}
    assert len(files["with"]) > 4
    assert files["with"].keys() == files["without"].keys()
    assert [n for n, data in files["with"].items() if data != files["without"][n]] == []


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".metadata"}


# ------------------------------------------------------------------------------------------ order


def order_of_events(rank: int, num_ranks: int, settings: dict[str, Any]) -> list[str]:
    """What one forward of one layer does, in order."""
    if settings.get("moe_token_dispatcher_type") == "flex":
        _prepare_flex()
    run = Run(num_layers=1, settings=settings)
    events: list[str] = []
    start_megatron(run)
    with pytest.MonkeyPatch.context() as patch:
        from megatron.core.transformer.moe import token_dispatcher

        from feplb import Balancer

        trainer = Trainer(run, config := transformer_config(run), build(run, config))
        for owner, name in (
            (Balancer, "prepare_weights"),
            (Balancer, "begin"),
            (Balancer, "run_experts"),
            (token_dispatcher, "all_to_all"),
            (token_dispatcher, "fused_dispatch"),
            (token_dispatcher, "permute"),
        ):
            _record(patch, events, owner, name, trainer.balancer)
        layer = trainer.models[0].module.decoder.layers[0].mlp
        layer(torch.randn(NUM_TOKENS, 1, layer.config.hidden_size))
        trainer.balancer.close()
    return events


def _record(
    patch: pytest.MonkeyPatch, events: list[str], owner: Any, name: str, balancer: Any
) -> None:
    target = owner if isinstance(owner, ModuleType) else balancer
    original = getattr(target, name)

    def record(*args: Any, **kwargs: Any) -> Any:
        events.append(name)
        return original(*args, **kwargs)

    patch.setattr(target, name, record)


ORDERS = {
    # permute to the ranks, then the counts are on the host, then two payloads: rows, probabilities.
    "alltoall": (
        {},
        ["permute", "prepare_weights", "begin", "all_to_all", "all_to_all", "run_experts",
         "all_to_all"],
    ),
    # The host has the counts when the dispatch returns; the rows are permuted later.
    "flex": (
        CASES["flex_deepep"]["settings"],
        ["prepare_weights", "fused_dispatch", "begin", "permute", "run_experts"],
    ),
    # The counts come out of the gathered rows, so there is nothing to begin with.
    "allgather": (
        CASES["allgather"]["settings"],
        ["prepare_weights", "permute", "run_experts"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_planning_begins_as_soon_as_the_host_has_the_counts(name: str) -> None:
    settings, expected = ORDERS[name]
    for events in run_ranks(order_of_events, 4, settings):
        assert events == expected


# ---------------------------------------------------------------------------------------- metrics


class _Tracker:
    """As later versions of Megatron-Core have it: an object that records."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int, int]] = []

    def record(self, name: str, value: Any, layer_number: int, num_layers: int) -> None:
        self.seen.append((name, float(value), layer_number, num_layers))


def metrics(rank: int, num_ranks: int, is_newer: bool) -> tuple[Outcome, Any]:
    """One step of two micro-batches with recompute, and what the tracker holds after it."""
    tracker = _Tracker()
    if is_newer:
        logging = ModuleType("megatron.core.transformer.moe.moe_logging")
        logging.__dict__["get_moe_metrics_tracker"] = lambda: tracker
        sys.modules[logging.__name__] = logging
    outcome = train(Run(steps=1, settings=RECOMPUTE))
    if is_newer:
        return outcome, tracker.seen
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    old = get_moe_layer_wise_logging_tracker()
    return outcome, {name: entry["values"].tolist() for name, entry in old.items()}


def test_the_old_tracker_has_the_imbalance_of_every_layer() -> None:
    for outcome, values in run_ranks(metrics, 4, False):
        before, after = values["load_imbalance"], values["load_imbalance_after"]
        assert len(before) == len(after) == 2
        assert all(sum_of_two >= 2.0 for sum_of_two in before + after)  # each at least 1
        assert sum(after) < sum(before)
        assert sum(before) < 4 * 4  # a recompute is not counted again
        floor = values["load_imbalance_floor"]
        assert len(floor) == 2
        assert all(2.0 <= low <= high + 1e-6 for low, high in zip(floor, after, strict=True))
        assert "load_imbalance_target" not in values
        assert outcome.moved > 0


def test_the_new_tracker_has_the_imbalance_of_every_call() -> None:
    for _, seen in run_ranks(metrics, 4, True):
        assert len(seen) == 3 * 2 * 2  # metrics, layers, micro-batches
        assert {(name, layer, num_layers) for name, _, layer, num_layers in seen} == {
            (name, layer, 2)
            for name in ("load_imbalance", "load_imbalance_after", "load_imbalance_floor")
            for layer in (1, 2)
        }


def test_the_metrics_of_a_call_by_hand() -> None:
    # Rank loads 12 and 4, mean 8. Rank 0's expert 1 of 2 rows goes away: 10 and 6. The hottest
    # expert has 10 rows: whole experts cannot get below 10 / 8.
    record = CallRecord(np.array([[10, 2], [3, 1]]), np.array([[1, 0, 1, 0, 2]]), plan_us=0.0)
    seen = {"load_imbalance": 1.5, "load_imbalance_after": 1.25, "load_imbalance_floor": 1.25}
    assert load_metrics(record, BalancerConfig()) == seen
    wanted = BalancerConfig(policy="refine", target_imbalance=1.3)
    assert load_metrics(record, wanted) == {**seen, "load_imbalance_target": 1.3}


@pytest.fixture(autouse=True)
def _tracker_is_not_left() -> Iterator[None]:
    yield
    sys.modules.pop("megatron.core.transformer.moe.moe_logging", None)
