"""The command feplb. `feplb doctor` says what this machine and job can do.

`feplb simulate` answers: what would it bring me? It needs no GPU and no run: a workload's or a
recorded trace's counts go through the planner and the cost model. Every time it prints is modelled,
and the constants stand above it.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feplb.scheduler.machines import MACHINES, ExpertShape, Machine
from feplb.scheduler.microbatches import without_trace
from feplb.scheduler.paper_times import Cell, Constants, paper_cells
from feplb.scheduler.plan import PlanLimits
from feplb.scheduler.policies import POLICIES, core_limits
from feplb.scheduler.simulate import Arm
from feplb.scheduler.summary import MIB
from feplb.scheduler.traces import read_trace
from feplb.scheduler.what_if import Answer, Question, StepShape, answer

WIDTH = 100
NO_GO = 1  # exit status of doctor
WRONG_INPUT = 2  # exit status, as argparse's


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one sentence on stderr where the input is wrong.

    doctor: 1 where the lane that it judges for does not work here.
    """
    options = _parser().parse_args(arguments)
    try:
        status, lines = options.run(options)
    except (ValueError, OSError) as error:
        print(f"feplb {options.command}: {error}", file=sys.stderr)
        return WRONG_INPUT
    print("\n".join(lines))
    return int(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="feplb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_doctor(commands.add_parser("doctor", help="what can this machine and job do?"))
    _add_simulate(
        commands.add_parser(
            "simulate", help="what would balancing bring? modelled", description=__doc__
        )
    )
    return parser


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.description = "Exit status 0: go; 1: the lane does not work here; 2: bad usage."
    add = doctor.add_argument
    add(
        "--lane",
        choices=["host", "ce", "cupy"],
        help="judge for it; left out: ce where a GPU is here",
    )
    add("--arena-mib", type=float, metavar="N", help="of one rank: print(balancer.memory)")
    add("--ranks", type=int, metavar="N", help="of this host; left out: one per GPU, or 2")
    add("--json", action="store_true", help="the findings as JSON")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> tuple[int, list[str]]:
    from feplb.observe.doctor import judge
    from feplb.observe.facts import Question, read_facts

    for name, value in (("--arena-mib", options.arena_mib), ("--ranks", options.ranks)):
        if value is not None and not 1 <= value < MIB**2:
            raise ValueError(f"{name} {value}, expected 1 or more")
    arena = None if options.arena_mib is None else int(options.arena_mib * MIB)
    question = Question(lane=options.lane, arena_bytes=arena, ranks=options.ranks)
    report = judge(read_facts(lane=options.lane, cupy=_try_cupy), question)
    status = 0 if report.verdict == "go" else NO_GO
    return status, [json.dumps(report.as_json(), indent=1)] if options.json else report.lines()


def _try_cupy() -> Mapping[str, Any]:
    from feplb.cupy_trials import try_cupy

    return try_cupy()


def _simulate(options: argparse.Namespace) -> tuple[int, list[str]]:
    return 0, _paper_lines(options) if options.paper else _simulate_lines(options)


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    add = simulate.add_argument
    add("source", nargs="?", default="calibrated", metavar="TRACE|WORKLOAD",
        help=f"a file of recorded routing, or one of {', '.join(without_trace())}")  # fmt: skip
    add("--gpu", default="h100", metavar="PRESET", help=", ".join(MACHINES))
    add("--ep", type=int, default=8, metavar="N", help="ranks of the EP group")
    add("--ranks", type=int, metavar="N", help="of the whole job; one EP group if left out")
    add("--domain", type=int, metavar="N", help="ranks that reach each other (NVLink); at most 8")
    add("--policies", nargs="+", metavar="NAME", help="ours, or a rival's; all of ours if left out")
    add("--tokens", type=int, default=4096, help="per rank and micro-batch")
    add("--steps", type=int, default=100, help="micro-batches")
    add("--seed", type=int, default=1000)
    add("--experts", type=int, help="128, or the trace's")
    add("--top-k", type=int, help="8, or the trace's")
    add("--part", help="of a trace file of domains: which model")
    add("--hidden", type=int, default=6144)
    add("--ffn-hidden", type=int, default=2048)
    add("--layers", type=int, metavar="N", help="MoE layers that a rank runs")
    add("--rest-ms", type=float, metavar="MS", help="all else of a micro-batch, with --layers")
    add("--experts-share", type=float, metavar="PCT",
        help="of a step that is spent in experts, instead of --layers and --rest-ms")  # fmt: skip
    add("--paper", action="store_true", help="arXiv 2604.19654's layer times beside the model's")
    simulate.set_defaults(run=_simulate)


# ------------------------------------------------------------------------------ what would it bring


def _simulate_lines(options: argparse.Namespace) -> list[str]:
    question = _question(options)
    answers = answer(question)
    return [
        *_heading(question),
        *_constants(question),
        "",
        "modelled: one MoE layer's experts, forward and backward, mean of the slowest rank",
        *_table([_layer_row(each) for each in answers]),
        *_legend(),
        "",
        *_step_lines(question.step, answers),
        "",
        *_memory_lines(question, answers),
    ]


def _question(options: argparse.Namespace) -> Question:
    """What the options ask for; ValueError names what is wrong."""
    if options.gpu not in MACHINES:
        raise ValueError(f"--gpu {options.gpu}, expected one of {', '.join(MACHINES)}")
    workload, trace = options.source, None
    if workload not in without_trace():
        if not Path(workload).exists():
            raise ValueError(
                f"{workload} is neither a file nor a workload, expected a trace's path or one of "
                f"{', '.join(without_trace())}"
            )
        trace = read_trace(
            workload, part=options.part, top_k=options.top_k, num_experts=options.experts
        )
    return Question(
        workload="replay" if trace is not None else workload,
        trace=trace,
        machine=MACHINES[options.gpu],
        gpu=options.gpu,
        expert=ExpertShape(hidden=options.hidden, ffn_hidden=options.ffn_hidden),
        ep_size=options.ep,
        domain=options.domain,
        ranks=options.ranks,
        policies=tuple(options.policies or POLICIES),
        num_tokens=options.tokens,
        steps=options.steps,
        seed=options.seed,
        num_experts=None if trace is not None else options.experts,
        top_k=None if trace is not None else options.top_k,
        step=StepShape.of(options.layers, options.rest_ms, options.experts_share),
    )


def _heading(question: Question) -> list[str]:
    where = question.workload if question.trace is None else question.trace.name
    return textwrap.wrap(
        f"feplb simulate: {where}, seed {question.seed}; {question.steps} micro-batches of "
        f"{question.groups} EP groups of {question.ep_size} ranks, domains of "
        f"{question.domain_size}; {question.num_tokens} tokens "
        f"per rank, top-{question.selected} of {question.experts} experts of "
        f"{question.expert.hidden} x {question.expert.ffn_hidden}, bf16",
        WIDTH,
    )


def _constants(question: Question) -> list[str]:
    """Every constant of the model, with its source."""
    machine = question.machine
    lines = [f"modelled with the preset {question.gpu}; nothing here was measured on your machine:"]
    gemms = f"{machine.gemm_tflops:g} TFLOPS in tiles of {machine.tile_rows} rows"
    copies = f"{machine.lane_gbps:g} GB/s per source, {machine.copy_us:g} us each"
    lines += [
        f"  experts' GEMMs {gemms}, memory {machine.hbm_gbps:g} GB/s",
        f"  copies {copies}, the first {machine.start_us:g} us after the plan",
        f"  EP dispatch {machine.dispatch_gbps:g} GB/s (under its backward late weight grads hide)",
    ]
    return lines + textwrap.wrap(
        f"source: {machine.source}", WIDTH, initial_indent="  ", subsequent_indent="  "
    )


def _layer_row(each: Answer) -> dict[str, str]:
    figures = each.figures
    return {
        "policy": each.arm.label,
        "modelled ms": _number(figures["layer_ms"], 2),
        "un-balanced": _number(figures["none_ms"], 2),
        "saved %": _number(each.saved_pct, 1),
        "recovered %": _number(figures["layer_ceiling_recovered_pct"], 1),
        "worst 5 %": _number(figures["layer_ceiling_recovered_pct_worst5"], 1),
        "straggler removed %": _number(figures["removed_pct"], 1),
        "max/mean": _number(figures["max_over_mean_mean"], 3),
        "copies a rank": _number(figures["copies_per_rank"], 2),
    }


def _legend() -> list[str]:
    return textwrap.wrap(
        "recovered: of the way from un-balanced to all work spread evenly; worst 5 %: its 5th "
        "percentile. straggler: max - mean of the rows per rank. Attention, router, dispatch and "
        "combine are not in these times.",
        WIDTH,
    )


def _step_lines(step: StepShape | None, answers: Sequence[Answer]) -> list[str]:
    if step is None:
        return textwrap.wrap(
            "For percent of your step time give --layers N --rest-ms MS (MoE layers of a rank, and "
            "all else of a micro-batch), or --experts-share PCT (of the step spent in experts).",
            WIDTH,
        )
    rows = []
    for each in answers:
        none, plan = float(each.figures["none_ms"] or 0), float(each.figures["layer_ms"] or 0)
        rows.append({"policy": each.arm.label, **step.row(none, plan)})
    return [f"modelled: a whole step, {step}", *_table(rows)]


def _memory_lines(question: Question, answers: Sequence[Answer]) -> list[str]:
    """What the arena takes, from the core's own layout."""
    from feplb.memory import memory_report

    most = max((each.most_rows for each in answers if each.arm.is_ours), default=0)
    shape = {
        "num_local_experts": question.experts // question.ep_size,
        "row_bytes": question.expert.row_bytes,
        "side_row_bytes": [4],  # the router's probability
        "weight_bytes": [question.expert.num_parameters * question.expert.element_bytes],
        "max_rows": most,
        "policy": "none",  # neither it nor the limits change what is reserved
        "limits": core_limits(
            PlanLimits(
                num_dynamic=0, num_slots=0, num_grad_slots=0, max_recv_rows=0, max_return_rows=0
            )
        ),
    }
    slots = Arm(policy="auto").num_slots
    report = memory_report([shape], slots, slots, question.domain_size)
    return textwrap.wrap(
        f"memory: {report.arena_bytes / MIB:.0f} MiB per rank, once for all layers of this shape: "
        f"{slots} weight slots, {slots} grad slots, and room for max_rows={most}, the most rows "
        "that any plan above moved into or out of a rank. A smaller max_rows takes less, and plans "
        "keep to it.",
        WIDTH,
    )


# ----------------------------------------------------------------------------- the paper's figures


def _paper_lines(options: argparse.Namespace) -> list[str]:
    if options.gpu not in MACHINES:
        raise ValueError(f"--gpu {options.gpu}, expected one of {', '.join(MACHINES)}")
    machine: Machine = MACHINES[options.gpu]
    constants, cells = paper_cells(machine, steps=options.steps, seed=options.seed)
    rows = [
        {
            "EP": str(cell.ep_size),
            "arm": cell.arm,
            "pass": cell.direction,
            "paper ms": f"{cell.paper_ms:.1f}",
            "modelled ms": f"{cell.modelled_ms:.2f}",
            "off %": "fitted" if cell.is_fitted else f"{cell.off_pct:+.1f}",
        }
        for cell in cells
    ]
    return [
        *textwrap.wrap(
            "modelled: milliseconds per MoE layer of arXiv 2604.19654 (GLM-5, H100), mean of "
            f"{options.steps} calibrated micro-batches, seed {options.seed}; FEPLB is greedy with "
            "4 dynamic experts and 8 slots",
            WIDTH,
        ),
        *_fit_lines(constants),
        "",
        *_table(rows),
        "",
        _worst_line(cells),
    ]


def _fit_lines(constants: Constants) -> list[str]:
    """The five constants, and what they were fitted on."""
    forward, backward = constants.expert_ms
    rest = constants.rest_ms
    rows_per_ms = f"{1 / constants.row_ms:,.0f} rows per ms"
    each = f"{forward * 1e3:.0f} / {backward * 1e3:.0f} us per expert"
    return textwrap.wrap(
        "time = rows x row + experts x expert + rest, of the slowest rank. Constants, from the "
        f"paper's figures before balancing at EP 2 and 4 only: {rows_per_ms} (GEMM straggler over "
        f"token straggler; backward twice a row), {each} and {rest[0]:.2f} / {rest[1]:.2f} ms of "
        "rest in forward / backward. Copies at the preset's rates.",
        WIDTH,
    )


def _worst_line(cells: Sequence[Cell]) -> str:
    predicted = [cell for cell in cells if not cell.is_fitted]
    worst = max(predicted, key=lambda cell: abs(cell.off_pct))
    within = sum(abs(cell.off_pct) <= 10 for cell in predicted)
    return (
        f"{within} of {len(predicted)} predicted cells within 10 %; the worst is off by "
        f"{worst.off_pct:+.1f} % (EP {worst.ep_size}, {worst.arm}, {worst.direction})"
    )


# ----------------------------------------------------------------------------------------- tables


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Right-aligned columns under their names, each name over as many lines as it has words."""
    names = list(rows[0])
    words = {name: name.split() for name in names}
    height = max(map(len, words.values()))
    wide = {n: max(map(len, [*words[n], *(row[n] for row in rows)])) for n in names}
    lines = [
        [([""] * (height - len(words[n])) + words[n])[at].rjust(wide[n]) for n in names]
        for at in range(height)
    ]
    lines += [[row[n].rjust(wide[n]) for n in names] for row in rows]
    return ["  ".join(cells).rstrip() for cells in lines]
