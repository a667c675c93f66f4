"""The synthetic routings: the figures they were fitted to, and that they come from names alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import feplb
from feplb.scheduler import load_imbalance, rank_loads, token_straggler
from feplb.scheduler.workloads import calibrated, calibrated_by_source, lognormal_loads


@pytest.mark.parametrize(
    ("ep_size", "paper", "first_fit"), [(2, 2278, 2190), (4, 4649, 4585), (8, 6666, 6603)]
)
def test_calibrated_has_the_papers_token_stragglers(
    ep_size: int, paper: float, first_fit: float
) -> None:
    # Mean over 100 layers x 10 micro-batches, before balancing: standard error about 1.7 %.
    stragglers = [
        token_straggler(rank_loads(calibrated(ep_size, seed=0, step=step, layer=layer)))
        for layer in range(100)
        for step in range(10)
    ]
    seen = float(np.mean(stragglers))
    print(f"EP {ep_size}: {seen:.0f}, paper {paper}: {seen / paper - 1:+.1%}")
    assert seen == pytest.approx(paper, rel=0.05)
    assert seen == pytest.approx(first_fit, rel=0.05)


def test_calibrated_conserves_selections() -> None:
    by_source = calibrated_by_source(4, seed=3, step=7, num_experts=32, num_tokens=100, top_k=6)
    assert by_source.shape == (4, 32)
    assert by_source.sum(axis=1).tolist() == [600, 600, 600, 600]
    counts = calibrated(4, seed=3, step=7, num_experts=32, num_tokens=100, top_k=6)
    assert counts.dtype == np.int64
    assert (counts == by_source.sum(axis=0).reshape(4, 8)).all()


def test_calibrated_clips_shares_at_one_selection_per_token() -> None:
    # As many experts as selections: each token selects all, so all shares are 1 / 8.
    by_source = calibrated_by_source(2, seed=0, step=0, num_experts=8, num_tokens=10_000)
    assert by_source == pytest.approx(10_000, rel=0.05)


def test_a_layer_keeps_its_bias_and_nothing_else() -> None:
    same = np.mean([calibrated(8, seed=0, step=step).ravel() for step in range(0, 400, 2)], axis=0)
    again = np.mean([calibrated(8, seed=0, step=step).ravel() for step in range(1, 400, 2)], axis=0)
    other = np.mean(
        [calibrated(8, seed=0, step=step, layer=1).ravel() for step in range(200)], axis=0
    )
    assert np.corrcoef(same, again)[0, 1] > 0.9
    assert abs(np.corrcoef(same, other)[0, 1]) < 0.3
    first, second = calibrated(8, seed=0, step=0), calibrated(8, seed=0, step=1)
    assert (first != second).any()
    assert (first != calibrated(8, seed=1, step=0)).any()


def test_calibrated_is_the_same_in_every_run_and_numpy_version() -> None:
    counts = calibrated(2, seed=5, step=6, layer=7, num_experts=6, num_tokens=50, top_k=2)
    assert counts.tolist() == [[46, 14, 29], [32, 49, 30]]


def test_calibrated_names_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="ep_size=3, expected a divisor of 128"):
        calibrated(3, seed=0, step=0)
    with pytest.raises(ValueError, match="top_k=9, expected 1 to num_experts=8"):
        calibrated(2, seed=0, step=0, num_experts=8, top_k=9)


@pytest.mark.parametrize("imbalance", [1.0, 1.25, 1.5, 1.75])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_lognormal_loads_have_the_wanted_imbalance(num_ranks: int, imbalance: float) -> None:
    counts = lognormal_loads(
        num_ranks, 16, rows_per_expert=64, sigma=1.0, imbalance=imbalance, seed=4
    )
    assert counts.shape == (num_ranks, 16)
    assert counts.sum() == num_ranks * 16 * 64
    assert counts.min() >= 0
    # mean 16 x 64 = 1024 rows per rank, so one row is 0.001
    assert load_imbalance(rank_loads(counts)) == pytest.approx(imbalance, abs=0.001)


def test_lognormal_loads_spread_within_a_rank_as_sigma_says() -> None:
    counts = lognormal_loads(4, 256, rows_per_expert=1000, sigma=0.5, imbalance=1.25, seed=0)
    assert np.log(counts).std(axis=1) == pytest.approx(0.5, rel=0.15)
    flat = lognormal_loads(4, 8, rows_per_expert=10, sigma=0.0, imbalance=1.0, seed=0)
    assert (flat == 10).all()


def test_lognormal_loads_come_from_the_arguments_alone() -> None:
    first, again, other = (
        lognormal_loads(4, 8, rows_per_expert=50, sigma=1.0, imbalance=1.5, seed=seed)
        for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(("num_ranks", "imbalance"), [(2, 2.0), (4, 0.9), (1, 1.5)])
def test_an_impossible_imbalance_is_named(num_ranks: int, imbalance: float) -> None:
    with pytest.raises(ValueError, match=f"imbalance={imbalance}, expected 1 or more, below"):
        lognormal_loads(num_ranks, 4, rows_per_expert=9, sigma=1.0, imbalance=imbalance, seed=0)


def test_scheduler_needs_no_torch() -> None:
    # The package around it is left out: feplb/__init__.py may well import torch.
    code = (
        "import sys, types; sys.modules['torch'] = None; import numpy;"
        "sys.modules['feplb'] = feplb = types.ModuleType('feplb');"
        f"feplb.__path__ = [{str(Path(feplb.__file__).parent)!r}];"
        "import feplb.scheduler, feplb.scheduler.workloads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
