"""A finding: what was seen, what it means for feplb, what to do; and a report of them as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GO, NOTE, NO_GO = "go", "note", "no-go"
GPU_LANES = ("ce", "cupy")
WIDTH = 100
_NOTHING = "Nothing."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that doctor looked at.

    Attributes:
        name: what was looked at, the same on every machine.
        verdict: "go"; "note": it works, and there is something to know; "no-go": the lane judged
            for does not work here.
        seen: what was found.
        means: what follows for feplb.
        what_to_do: what to set, install or run; "Nothing." where all is well.
    """

    name: str
    verdict: str
    seen: str
    means: str
    what_to_do: str


def go(name: str, seen: str, means: str = "") -> Finding:
    """All is well."""
    return Finding(name=name, verdict=GO, seen=seen, means=means, what_to_do=_NOTHING)


def note(name: str, seen: str, means: str, what_to_do: str = _NOTHING) -> Finding:
    """Works; worth knowing."""
    return Finding(name=name, verdict=NOTE, seen=seen, means=means, what_to_do=what_to_do)


def no_go(name: str, seen: str, means: str, what_to_do: str) -> Finding:
    """The lane does not work here."""
    return Finding(name=name, verdict=NO_GO, seen=seen, means=means, what_to_do=what_to_do)


def no_go_if(condition: bool, name: str, seen: str, means: str, what_to_do: str) -> Finding:
    """A no-go on that condition, else a note in the same words."""
    verdict = NO_GO if condition else NOTE
    return Finding(name=name, verdict=verdict, seen=seen, means=means, what_to_do=what_to_do)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings, judged for one lane.

    Attributes:
        lane: "host", "ce" or "cupy".
        because: why that lane.
    """

    lane: str
    because: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """ "no-go" if any finding is, else "go"."""
        return NO_GO if any(finding.verdict == NO_GO for finding in self.findings) else GO

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {
            "lane": self.lane,
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def lines(self) -> list[str]:
        """The same for a terminal of 100 columns."""
        lines = [f"feplb doctor: judged for the {self.lane} lane ({self.because})", ""]
        wide = max(len(finding.name) for finding in self.findings)
        for finding in self.findings:
            lines += _lines_of(finding, wide)
        return [*lines, "", self._last_line()]

    def _last_line(self) -> str:
        stopping = [finding.name for finding in self.findings if finding.verdict == NO_GO]
        if stopping:
            return f"no-go for the {self.lane} lane: {', '.join(stopping)}"
        notes = sum(finding.verdict == NOTE for finding in self.findings)
        return f"go for the {self.lane} lane, {notes} {'note' if notes == 1 else 'notes'}"


def _lines_of(finding: Finding, wide: int) -> Iterator[str]:
    margin = " " * (len(NO_GO) + wide + 4)
    head = f"{finding.verdict:<{len(NO_GO)}}  {finding.name:<{wide}}  "
    meaning = f"{finding.seen}. {finding.means}" if finding.means else finding.seen
    yield from textwrap.wrap(
        meaning, WIDTH, initial_indent=head, subsequent_indent=margin, break_on_hyphens=False
    )
    if finding.what_to_do != _NOTHING:
        yield from textwrap.wrap(
            f"-> {finding.what_to_do}",
            WIDTH,
            initial_indent=margin,
            subsequent_indent=margin + "   ",
            break_on_hyphens=False,
        )


def names(some: Sequence[object], most: int = 4) -> str:
    """The first few of a list, and how many more there are."""
    first = ", ".join(str(each) for each in some[:most])
    return first if len(some) <= most else f"{first} and {len(some) - most} more"
