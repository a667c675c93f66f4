"""How much of the imbalance does each policy remove, ours and the rivals', and at what price?

Every policy meets the same micro-batches. Loads and copies are counted; layer times come from the
cost model and are modelled, not measured (feplb/scheduler/cost_model.py, rates of --gpu's preset).
A rival that reroutes rows before the dispatch moves none twice: only its weight copies and grads
are costed (feplb/scheduler/simulate.py says how). Plan times are measured.

EP groups wider than --domain are balanced inside each domain only; what remains is between them.
An EP group of 72 is one domain, an NVL72 rack, unless --domain says otherwise, and has 288 experts.
Every plan is checked (plan_violations, outcome_violations) before anything is printed.
"""

from __future__ import annotations

import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report import Cell, Report, Row, arguments
from straggler_pareto import Point, pareto_points, print_pareto
from straggler_tables import LEGEND, print_balance, print_paper
from straggler_timing import Optima, plan_us
from tqdm import tqdm

from feplb.scheduler import POLICIES
from feplb.scheduler.baselines import BASELINES
from feplb.scheduler.machines import GLM5, MACHINES, unit_costs
from feplb.scheduler.microbatches import MicroBatch, Source
from feplb.scheduler.named_workloads import WORKLOADS
from feplb.scheduler.simulate import Arm, arms_of, samples_of
from feplb.scheduler.summary import JSON_COLUMNS, figures
from feplb.scheduler.traces import Trace, read_trace
from feplb.scheduler.what_if import HISTORY

RACK = 72  # ranks of an NVL72, and of an EP group there
DEGREES = (2, 4, 8, 16, 32, 64, RACK)
PAPER_TOKENS = 4096  # per rank; fits the paper's figures

Figures = dict[str, Cell]


def parser() -> ArgumentParser:
    options = arguments(str(__doc__).splitlines()[0])
    everyone = list(dict.fromkeys((*POLICIES, *BASELINES)))
    options.add_argument("--workloads", nargs="+", metavar="NAME", help=", ".join(WORKLOADS))
    options.add_argument("--ep", nargs="+", type=int, default=[2, 4, 8], help=f"of {DEGREES}")
    options.add_argument("--policies", nargs="+", metavar="NAME", default=everyone)
    options.add_argument("--trace", type=Path, metavar="FILE", help="recorded routing to replay")
    options.add_argument("--part", help="of a trace file of domains: which model")
    options.add_argument("--top-k", type=int, help="where the trace does not say")
    options.add_argument("--gpu", default="h100", help=f"preset: {', '.join(MACHINES)}")
    options.add_argument("--tokens", type=int, default=4096, help="per rank")
    options.add_argument("--steps", type=int, help="micro-batches; 300, or 5 with --quick")
    options.add_argument("--seed", type=int, default=1000)
    options.add_argument(
        "--domain", type=int, help="ranks that reach each other; 8, or a rack's 72"
    )
    options.add_argument(
        "--optimum", type=float, metavar="SECONDS", help="per program, for the gap"
    )
    options.add_argument("--pareto", action="store_true", help="max / mean against copies")
    options.add_argument("--plot", type=Path, metavar="FOLDER", help="PNGs; implies --pareto")
    return options


def micro_batches(
    options: Namespace, workload: str, ep: int, trace: Trace | None
) -> list[MicroBatch]:
    """The workload's micro-batches at this size, with history where a policy reads it."""
    replays = WORKLOADS[workload].needs_trace if workload in WORKLOADS else False
    source = Source(
        workload=workload,
        ep_size=ep,
        seed=options.seed,
        num_experts=None if replays else (288 if ep == RACK else 128),
        num_tokens=options.tokens,
        trace=trace if replays else None,
    )
    history = bool(HISTORY & set(options.policies))
    return [source.make(index, history=history) for index in range(options.steps)]


def evaluate(
    options: Namespace,
    workload: str,
    batches: Sequence[MicroBatch],
    arms: Sequence[Arm],
    optima: Optima | None,
) -> list[Figures]:
    """One row of figures per arm; every plan checked."""
    ep = len(batches[0].counts)
    domain = domain_of(options, ep)
    costs = unit_costs(MACHINES[options.gpu], GLM5, rows_per_rank=batches[0].counts.sum() / ep)
    best_load = None if optima is None else optima.best_load
    shown = tqdm(batches, desc=f"{workload} EP {ep}", unit="batch", disable=None, leave=False)
    samples = [
        samples_of(one, arms, costs, domain=domain, with_engines=True, best_load=best_load)
        for one in shown
    ]
    domains = [each for batch in batches for each in batch.domains(domain)]
    rows: list[Figures] = []
    for arm, of_arm in zip(arms, zip(*samples, strict=True), strict=True):
        budget = arm.copies_per_rank
        rows.append(
            {
                "workload": workload,
                "ep": ep,
                "policy": arm.policy,
                "label": arm.label,
                "copy_budget": None if budget is None else budget * ep,
                "grain_rows": arm.grain_rows,
                **figures(of_arm, ep, GLM5),
                "plan_us_p50": plan_us(arm, domains, costs),
            }
        )
    return rows


def domain_of(options: Namespace, ep: int) -> int:
    if options.domain is not None:
        return min(int(options.domain), ep)
    return ep if ep == RACK else min(8, ep)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """The Pareto points of one workload at one EP degree, and the comparison with the rivals."""

    title: str
    points: list[Point]
    rows: list[Row]


def run(options: Namespace, trace: Trace | None) -> None:
    arms = arms_of(options.policies)
    optima = None if options.optimum is None else Optima(seconds=options.optimum)
    rows: list[Figures] = []
    curves: list[Curves] = []
    for workload in options.workloads:
        for ep in options.ep:
            batches = micro_batches(options, workload, ep, trace)
            rows += evaluate(options, workload, batches, arms, optima)
            if options.pareto:
                points, table = pareto_points(batches, domain_of(options, ep))
                curves.append(Curves(title=f"{workload}, EP {ep}", points=points, rows=table))
    report = Report(bench="straggler", lane="none")
    show(report, options, arms, rows)
    print(LEGEND if optima is None else f"{LEGEND}\n{optima}")
    for each in curves:
        print(f"\n{each.title}: max / mean against weight copies")
        print_pareto(report, each.rows)
    if options.plot is not None:
        draw(options.plot, rows, curves)
    report.write(options.json, [{name: row[name] for name in JSON_COLUMNS} for row in rows])


def show(report: Report, options: Namespace, arms: Sequence[Arm], rows: Sequence[Figures]) -> None:
    report.header(
        gpu=options.gpu, steps=options.steps, tokens=options.tokens, seed=options.seed
    )  # fmt: skip
    print("check=ok: plan_violations and outcome_violations found nothing in any plan")
    for line in textwrap.wrap(f"modelled with {MACHINES[options.gpu].source}", 100):
        print(line)
    for first in range(0, len(rows), len(arms)):
        block = rows[first : first + len(arms)]
        one = block[0]
        domain = domain_of(options, int(str(one["ep"])))
        print(
            f"\n{one['workload']}, EP {one['ep']} in domains of {domain}: straggler before "
            f"{one['straggler_before']:.0f} rows,"
        )
        print(
            f"modelled layer (experts, forward and backward) "
            f"{one['none_ms']:.2f} ms, ceiling {one['ceiling_ms']:.2f} ms"
        )
        print_balance(report, block, arms)
    if options.tokens == PAPER_TOKENS:
        print_paper(report, rows)


def draw(folder: Path, rows: Sequence[Figures], curves: Sequence[Curves]) -> None:
    from straggler_plots import plot_pareto, plot_removed

    groups: dict[str, list[Figures]] = {}
    for row in rows:
        groups.setdefault(f"{row['workload']}, EP {row['ep']}", []).append(row)
    paths = [plot_removed(folder, title, of_title) for title, of_title in groups.items()]
    paths += [plot_pareto(folder, each.title, each.points) for each in curves]
    print("\nwritten:", *paths)


def checked(options: Namespace) -> Trace | None:
    """Fill in what depends on other options; the trace, if there is one.

    Raises:
        ValueError, OSError: an option, or the trace, is not as it should be.
    """
    trace = None
    if options.trace is not None:
        trace = read_trace(options.trace, part=options.part, top_k=options.top_k)
    usual = "calibrated" if trace is None else "replay"
    options.workloads = options.workloads or [usual]
    options.steps = (5 if options.quick else 300) if options.steps is None else options.steps
    options.pareto = options.pareto or options.plot is not None
    for name in options.workloads:
        if name not in WORKLOADS:
            raise ValueError(f"workload {name!r}, expected one of {', '.join(WORKLOADS)}")
        if WORKLOADS[name].needs_trace and trace is None:
            raise ValueError(f"workload {name} replays a trace; give one with --trace FILE")
    if options.gpu not in MACHINES:
        raise ValueError(f"--gpu {options.gpu}, expected one of {', '.join(MACHINES)}")
    for name, value in (
        ("steps", options.steps),
        ("tokens", options.tokens),
        *(("ep", e) for e in options.ep),
    ):
        if value < 1:
            raise ValueError(f"--{name} {value}, expected 1 or more")
    if options.optimum is not None and not options.optimum > 0:
        raise ValueError(f"--optimum {options.optimum:g}, expected seconds above 0")
    arms_of(options.policies)
    return trace


def main(arguments_given: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments_given)
    try:
        run(options, checked(options))
    except (ValueError, OSError) as error:
        print(f"straggler: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a plan that breaks an invariant: nothing has been printed
        print(f"straggler: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
