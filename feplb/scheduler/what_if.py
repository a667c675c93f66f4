"""What `feplb simulate` is asked and answers: a workload on a machine, policy by policy.

Pure mathematics: nothing is read, printed or measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from feplb.scheduler.machines import ExpertShape, Machine, unit_costs
from feplb.scheduler.microbatches import Source
from feplb.scheduler.simulate import Arm, Sample, arms_of, samples_of
from feplb.scheduler.summary import Value, figures
from feplb.scheduler.traces import Trace

USUAL_DOMAIN = 8  # GPUs that NVLink joins in a server
HISTORY = frozenset({"eplb_previous", "lplb"})  # who looks at the micro-batch before


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a training step holds beside the experts of one layer.

    Args:
        layers, rest_ms: MoE layers of a rank, and milliseconds of all else, per micro-batch.
        experts_share: of the un-balanced step, in percent; instead of the two above.
    """

    layers: int = 1
    rest_ms: float = 0.0
    experts_share: float | None = None

    @classmethod
    def of(
        cls, layers: int | None, rest_ms: float | None, experts_share: float | None
    ) -> StepShape | None:
        """From options, None where nothing is given; ValueError where they do not fit together."""
        if experts_share is not None:
            if layers is not None or rest_ms is not None:
                raise ValueError("--experts-share, expected without --layers and --rest-ms")
            if not 0 < experts_share <= 100:
                raise ValueError(
                    f"--experts-share {experts_share:g}, expected above 0, at most 100"
                )
            return cls(experts_share=experts_share)
        if layers is None and rest_ms is None:
            return None
        if layers is None or rest_ms is None:
            raise ValueError("--layers and --rest-ms, expected both or neither")
        if layers < 1 or not 0 <= rest_ms < 1e9:
            raise ValueError(
                f"--layers {layers} --rest-ms {rest_ms:g}, expected 1 or more, and >= 0"
            )
        return cls(layers=layers, rest_ms=rest_ms)

    def row(self, none_ms: float, plan_ms: float) -> dict[str, str]:
        """Columns of a table, given the layer's time un-balanced and under the plan."""
        if self.experts_share is not None:
            saved = self.experts_share * (1 - plan_ms / none_ms) if none_ms else 0.0
            return {"modelled step time saved %": f"{saved:.2f}"}
        before = self.layers * none_ms + self.rest_ms
        after = self.layers * plan_ms + self.rest_ms
        saved = 100 * (1 - after / before) if before else 0.0
        return {
            "modelled ms un-balanced": f"{before:.1f}",
            "modelled ms": f"{after:.1f}",
            "modelled step time saved %": f"{saved:.2f}",
        }

    def __str__(self) -> str:
        if self.experts_share is not None:
            return f"{self.experts_share:g} % of which are experts"
        return f"per micro-batch: {self.layers} MoE layers and {self.rest_ms:g} ms of all else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A workload on a machine.

    Args:
        gpu: the machine's name.
        domain: ranks that reach each other; None: all of the EP group, USUAL_DOMAIN at most.
        ranks: of the whole job, in EP groups that each have micro-batches of their own; None: one
            group.
        num_experts, top_k: None: as Source has it.
    Raises:
        ValueError: sizes that do not fit together.
    """

    workload: str
    machine: Machine
    gpu: str
    expert: ExpertShape
    ep_size: int
    policies: tuple[str, ...]
    trace: Trace | None = None
    domain: int | None = None
    ranks: int | None = None
    num_tokens: int = 4096
    steps: int = 100
    seed: int = 0
    num_experts: int | None = None
    top_k: int | None = None
    step: StepShape | None = None

    def __post_init__(self) -> None:
        shape = self.expert
        for name, value in (
            ("ep", self.ep_size), ("steps", self.steps), ("tokens", self.num_tokens),
            ("hidden", shape.hidden), ("ffn-hidden", shape.ffn_hidden),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"--{name} {value}, expected 1 or more")
        if self.experts < 1 or self.experts % self.ep_size:
            raise ValueError(f"--ep {self.ep_size}, expected a divisor of {self.experts} experts")
        if self.domain_size < 1 or self.ep_size % self.domain_size:
            raise ValueError(
                f"--domain {self.domain_size}, expected a divisor of --ep {self.ep_size}"
            )
        if self.ranks is not None and (self.ranks < 1 or self.ranks % self.ep_size):
            raise ValueError(f"--ranks {self.ranks}, expected a multiple of --ep {self.ep_size}")

    @property
    def domain_size(self) -> int:
        return min(USUAL_DOMAIN if self.domain is None else self.domain, self.ep_size)

    @property
    def groups(self) -> int:
        """EP groups of the job."""
        return 1 if self.ranks is None else self.ranks // self.ep_size

    @property
    def experts(self) -> int:
        if self.trace is not None:
            return self.trace.num_experts
        return 128 if self.num_experts is None else self.num_experts

    @property
    def selected(self) -> int:
        """Experts that a token selects."""
        if self.trace is not None:
            return self.trace.top_k
        return 8 if self.top_k is None else self.top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One policy's figures (summary.figures).

    Args:
        most_rows: the most that its plans moved into or out of one rank.
    """

    arm: Arm
    figures: Mapping[str, Value]
    most_rows: int

    @property
    def saved_pct(self) -> float:
        """Of the un-balanced layer's modelled time."""
        none, plan = float(self.figures["none_ms"] or 0), float(self.figures["layer_ms"] or 0)
        return 100 * (1 - plan / none) if none else 0.0


def answer(question: Question) -> list[Answer]:
    """Every policy on every micro-batch; modelled."""
    arms = arms_of(question.policies)
    source = Source(
        workload=question.workload,
        ep_size=question.ep_size,
        seed=question.seed,
        num_experts=question.num_experts,
        num_tokens=question.num_tokens,
        top_k=question.top_k,
        trace=question.trace,
    )
    costs = unit_costs(
        question.machine, question.expert, rows_per_rank=question.num_tokens * question.selected
    )
    history = bool(HISTORY & {arm.policy for arm in arms})
    samples: list[list[Sample]] = []
    for index in range(question.steps * question.groups):
        batch = source.make(index, history=history)
        samples.append(samples_of(batch, arms, costs, domain=question.domain_size))
    return [
        Answer(
            arm=arm,
            figures=figures(of_arm, question.ep_size, question.expert),
            most_rows=max(sample.most_rows for sample in of_arm),
        )
        for arm, of_arm in zip(arms, zip(*samples, strict=True), strict=True)
    ]
