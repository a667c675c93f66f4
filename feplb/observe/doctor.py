"""feplb doctor: what this machine and job can do, each finding with what to do.

First everything is read and tried (facts.py), then judged for one lane, by pure functions.
"""

from __future__ import annotations

from feplb.observe.facts import Facts, Question
from feplb.observe.findings import Report
from feplb.observe.gpu_findings import gpu_findings
from feplb.observe.host_findings import limit_findings, software_findings
from feplb.observe.packages import package_findings


def judge(facts: Facts, question: Question) -> Report:
    """The findings, for the lane asked for. Pure."""
    lane, because = _lane(facts, question)
    return Report(
        lane=lane,
        because=because,
        findings=(
            *software_findings(facts),
            *gpu_findings(facts, question, lane),
            *limit_findings(facts, question, lane),
            *package_findings(facts.packages),
        ),
    )


def _lane(facts: Facts, question: Question) -> tuple[str, str]:
    """Which lane to judge for, and why that."""
    if question.lane is not None:
        return question.lane, "as asked"
    wanted = None if facts.environment is None else facts.environment.lane
    if wanted not in (None, "auto"):
        return wanted, "FEPLB_LANE"
    return ("ce", "a GPU is here") if facts.has_gpu else ("host", "no GPU is here")
