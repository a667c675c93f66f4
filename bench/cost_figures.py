"""What bench/cost_check.py makes of its samples: rows of errors, phases and choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cost_samples import CEILING, MODELS, Constants, Routing, Sample, predicted_ms
from cost_timeline import AGREE, FINISH, MODELLED, PASSES
from layer_arms import NONE, NUM_RANKS, Shape
from report import Row, iqr, median

from feplb.scheduler import POLICIES, Move
from feplb.scheduler.cost_model import CallTime, predict

ROUTING = ("rows_per_expert", "spread", "imbalance")
ARM_COLUMNS = (
    *("table", *ROUTING, "arm", "samples", "copies", "measured_ms", "iqr_ms", "core_ms"),
    *("startup_ms", "startup_err_pct", "startup_core_err_pct"),
    *("fitted_ms", "fitted_err_pct", "fitted_core_err_pct", "recovered_pct"),
    *("core_recovered_pct", "startup_recovered_pct", "fitted_recovered_pct"),
)
PHASE_COLUMNS = (
    *("table", "rows_per_expert", "pass", "rank", "phase", "samples", "measured_ms", "iqr_ms"),
    *("startup_ms", "startup_err_pct", "fitted_ms", "fitted_err_pct"),
)
CHOICE_COLUMNS = (
    *("table", *ROUTING, "seed", "fastest", "startup_choice", "startup_regret_pct"),
    *("startup_core_regret_pct", "startup_rank_correlation", "fitted_choice"),
    *("fitted_regret_pct", "fitted_core_regret_pct", "fitted_rank_correlation"),
    *("auto_regret_pct", "auto_core_regret_pct"),
)
COLUMNS = tuple(dict.fromkeys(ARM_COLUMNS + PHASE_COLUMNS + CHOICE_COLUMNS))


def error_pct(predicted: float, measured: float) -> float:
    return 100 * (predicted / measured - 1)


# ---------------------------------------------------------------------------------------- arms


def arm_rows(samples: Sequence[Sample], constants: Constants, shape: Shape) -> list[Row]:
    """Per configuration and arm: medians over rounds, then over seeds."""
    rows: list[Row] = []
    for key in _distinct(_configuration(s.routing) for s in samples):
        mine = [s for s in samples if _configuration(s.routing) == key]
        seeds = [[s for s in mine if s.routing.seed == seed]
                 for seed in _distinct(s.routing.seed for s in mine)]  # fmt: skip
        for arm in _distinct(s.arm for s in mine):
            rows.append({**key_row("arms", key), "arm": arm,
                         **_of_arm(arm, seeds, constants, shape)})  # fmt: skip
    return rows


def key_row(table: str, key: tuple[int, float, float]) -> dict[str, Any]:
    return {"table": table, **dict(zip(ROUTING, key, strict=True))}


def _of_arm(
    arm: str, seeds: Sequence[Sequence[Sample]], constants: Constants, shape: Shape
) -> dict[str, Any]:
    ms = [s.ms for of_seed in seeds for s in of_seed if s.arm == arm]
    measured = [_times(of_seed, arm, "ms") for of_seed in seeds]
    core = [_times(of_seed, arm, "core_ms") for of_seed in seeds]
    found: dict[str, Any] = {
        "samples": len(ms),
        "copies": median([len(_first(of_seed, arm).moves) for of_seed in seeds]),
        "measured_ms": median([times[0] for times in measured]),
        "iqr_ms": iqr(ms),
        "core_ms": median([times[0] for times in core]),
        "recovered_pct": _recovered(measured),
        "core_recovered_pct": _recovered(core),
    }
    for model, costs in constants.costs.items():
        predicted = [
            tuple(
                predicted_ms(_first(of_seed, name), costs, shape) for name in (arm, NONE, CEILING)
            )
            for of_seed in seeds
        ]
        for name, truth in (("err", measured), ("core_err", core)):
            errors = [error_pct(p[0], m[0]) for p, m in zip(predicted, truth, strict=True)]
            found[f"{model}_{name}_pct"] = median(errors)
        found[f"{model}_ms"] = median([times[0] for times in predicted])
        found[f"{model}_recovered_pct"] = _recovered(predicted)
    if seeds[0][0].routing.imbalance == 1.0:  # no gain to have a share of
        for name in (
            "recovered_pct",
            "core_recovered_pct",
            *(f"{model}_recovered_pct" for model in MODELS),
        ):
            found[name] = None
    return found


def _times(samples: Sequence[Sample], arm: str, what: str) -> tuple[float, ...]:
    """Medians over rounds of the arm, of none and of the ceiling."""
    return tuple(
        median([getattr(s, what) for s in samples if s.arm == name])
        for name in (arm, NONE, CEILING)
    )


def _recovered(times: Sequence[tuple[float, ...]]) -> float:
    """Percent of the way from none to the ceiling, median over (arm, none, ceiling) times."""
    return median(
        [100 * (none - arm) / (none - best) if none != best else 100.0 for arm, none, best in times]
    )


def _first(samples: Sequence[Sample], arm: str) -> Sample:
    return next(s for s in samples if s.arm == arm)


def _configuration(routing: Routing) -> tuple[int, float, float]:
    return routing.rows_per_expert, routing.spread, routing.imbalance


def _distinct(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


# -------------------------------------------------------------------------------------- phases


def predicted_phases(call: CallTime, rank: int) -> dict[str, float]:
    """How long each phase of a rank takes, ms, by the names of cost_timeline."""
    at = call.phases[rank]
    ends = (
        *(0, at.kept_a, at.arrived, at.received, at.wgrad, at.kept_b, at.home, at.placed, at.end),
    )
    return {name: (end - begin) / 1e9
            for name, begin, end in zip(MODELLED, ends[:-1], ends[1:], strict=True)}  # fmt: skip


def phase_rows(samples: Sequence[Sample], constants: Constants, shape: Shape) -> list[Row]:
    """Per size, pass, rank and phase, over all calls that moved something.

    owner is the rank with most rows as routed, helper the other one.
    """
    rows: list[Row] = []
    moving = [s for s in samples if s.moves]
    for size in _distinct(s.routing.rows_per_expert for s in moving):
        mine = [s for s in moving if s.routing.rows_per_expert == size]
        cells = [cell for s in mine for cell in _phase_cells(s, constants, shape)]
        for key in _distinct(cell[0] for cell in cells):
            of_key = [times for other, times in cells if other == key]
            rows.append(_phase_row(size, key, of_key))
    return rows


# (pass, rank, phase), (measured, startup, fitted) in ms; NaN where the model has no such phase.
_Cell = tuple[tuple[str, str, str], tuple[float, ...]]


def _phase_cells(sample: Sample, constants: Constants, shape: Shape) -> list[_Cell]:
    """All cells of one sample."""
    counts = sample.routing.counts(shape)
    owner = int(counts.sum(axis=1).argmax())
    layers = [predict(counts, sample.moves, constants.costs[model]) for model in MODELS]
    cells: list[_Cell] = []
    for at, pass_name in enumerate(PASSES):
        for rank in range(NUM_RANKS):
            calls = [(layer.forward, layer.backward)[at] for layer in layers]
            predicted = [predicted_phases(call, rank) for call in calls]
            for name in (AGREE, *MODELLED, FINISH):
                key = pass_name, "owner" if rank == owner else "helper", name
                measured = sample.of_ranks[rank].phases[at][name] / 1e6
                cells.append((key, (measured, *(phases.get(name, np.nan) for phases in predicted))))
    return cells


def _phase_row(
    size: int, key: tuple[str, str, str], times: Sequence[tuple[float, ...]]
) -> dict[str, Any]:
    measured = median([cell[0] for cell in times])
    row: dict[str, Any] = {
        "table": "phases",
        "rows_per_expert": size,
        **dict(zip(("pass", "rank", "phase"), key, strict=True)),
        "samples": len(times),
        "measured_ms": measured,
        "iqr_ms": iqr([cell[0] for cell in times]),
    }
    for at, model in enumerate(MODELS):
        predicted, is_modelled = median([cell[1 + at] for cell in times]), key[2] in MODELLED
        row[f"{model}_ms"] = predicted if is_modelled else None
        tells = is_modelled and measured > 0.05  # ms; below, a percentage says nothing
        row[f"{model}_err_pct"] = error_pct(predicted, measured) if tells else None
    return row


# ------------------------------------------------------------------------------------- choices


def choice_rows(samples: Sequence[Sample], constants: Constants, shape: Shape) -> list[Row]:
    """Per routing: which plan is fastest, which the model would take, and what that costs.

    Policies with the same plan count as one arm; auto's own arm is compared, not chosen from.
    """
    rows: list[Row] = []
    for routing in _distinct(s.routing for s in samples):
        mine = [s for s in samples if s.routing == routing and s.arm != CEILING]
        of_plan: dict[tuple[Move, ...], list[Sample]] = {}
        for sample in mine:
            of_plan.setdefault(sample.moves, []).append(sample)
        plans = {m: found for m, found in of_plan.items() if {s.arm for s in found} != {"auto"}}
        names = [min((s.arm for s in found), key=POLICIES.index) for found in plans.values()]
        measured = [median([s.ms for s in found]) for found in plans.values()]
        core = [median([s.core_ms for s in found]) for found in plans.values()]
        row = {
            **key_row("choices", _configuration(routing)),
            "seed": routing.seed,
            "fastest": names[int(np.argmin(measured))],
        }
        for model, costs in constants.costs.items():
            predicted = [predicted_ms(found[0], costs, shape) for found in plans.values()]
            chosen = int(np.argmin(predicted))
            row[f"{model}_choice"] = names[chosen]
            row[f"{model}_regret_pct"] = error_pct(measured[chosen], min(measured))
            row[f"{model}_core_regret_pct"] = error_pct(core[chosen], min(core))
            row[f"{model}_rank_correlation"] = rank_correlation(predicted, measured)
        auto = [found for found in of_plan.values() if any(s.arm == "auto" for s in found)]
        for name, values in (("ms", measured), ("core_ms", core)):
            column = f"auto_{name.removesuffix('ms')}regret_pct"
            mine_ms = [getattr(s, name) for s in auto[0]] if auto else []
            row[column] = error_pct(median(mine_ms), min(values)) if auto else None
        rows.append(row)
    return rows


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float | None:
    """Spearman's, ties sharing their mean rank; None where one side is all the same."""
    ranks = [_mean_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    if any(np.ptp(each) == 0 for each in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    less = (values[:, None] > values[None, :]).sum(axis=1)
    same = (values[:, None] == values[None, :]).sum(axis=1)
    ranks: npt.NDArray[np.float64] = less + (same - 1) / 2
    return ranks
