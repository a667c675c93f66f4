"""The protocol of design.md as an explicit-state model (tests/protocol), explored in full.

With every rule the protocol never gets stuck, overwrites nothing that is unread, and takes no
optimizer step on poisoned data. With any one sentence taken out it does, in the configuration named
here, which is one that holds with the sentence in place.

Run one by hand, with its shortest trace:
  g++ -O2 -std=c++17 tests/protocol/*.cpp -o /tmp/model
  /tmp/model --queue single --without handshake_including
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cpp_build import BUILD, FLAGS, compile_together

SOURCES = Path(__file__).parent / "protocol"

DEADLOCK = "deadlock"
OVERWRITTEN = "memory overwritten before it is read"
TOO_EARLY = "memory read before its data has arrived"
POISONED = "optimizer step on poisoned data"
FREED = "copy submitted after run_experts left its memory to be freed"
NOT_READY = "copy begins before its source is computed"

# 2 ranks, 2 layers forward and backward; a swap: both are owner and helper in every call.
SWAP = [
    f"--queue {queue} --blocking {blocking} --death {death}"
    for queue in ("separate", "single")
    for blocking in (0, 1)
    for death in (0, 1)
]
SWAP_SEPARATE = "--queue separate --blocking 0 --death 0"
SWAP_SINGLE = "--queue single --blocking 0 --death 0"
SWAP_BLOCKING = "--queue separate --blocking 1 --death 0"
# 2 ranks, 2 layers; one helps the other, in turn or always.
ALTERNATE = "--shape alternate"
ALTERNATE_DEATH = "--shape alternate --death 1 --blocking 1"
ONE_WAY_SINGLE = "--shape fan-in --queue single"
ONE_WAY_DEATH = "--shape fan-in --death 1"
ONE_WAY_BLOCKING_DEATH = "--shape fan-in --death 1 --blocking 1"
ONE_WAY_DEADLINE = "--shape fan-in --deadline 1 --queue single"
ONE_LAYER_DEATH = "--shape fan-in --layers 1 --death 1"
ONE_LAYER_SINGLE_DEATH = "--shape fan-in --layers 1 --death 1 --queue single"
ONE_LAYER_DEADLINE = "--shape fan-in --layers 1 --deadline 1"
# 3 ranks, 2 layers: one helps both others (one per layer), or is helped by both.
FAN_IN = "--ranks 3 --shape fan-in"
FAN_IN_BLOCKING = "--ranks 3 --shape fan-in --blocking 1"
# 4 ranks, backward of 3 layers: one helps the three others in turn.
FAN_IN_FOUR = "--ranks 4 --shape fan-in --layers 3 --backward-only 1"

HOLDS = [
    *SWAP,
    "--collective 1",
    "--collective 1 --queue single --blocking 1",
    ALTERNATE,
    ALTERNATE_DEATH,
    "--shape alternate --death 1 --blocking 1 --queue single",
    ONE_WAY_SINGLE,
    ONE_WAY_DEATH,
    ONE_WAY_BLOCKING_DEATH,
    ONE_WAY_DEADLINE,
    "--shape fan-in --deadline 1 --queue single --blocking 1",
    ONE_LAYER_DEATH,
    ONE_LAYER_SINGLE_DEATH,
    ONE_LAYER_DEADLINE,
    FAN_IN,
    "--ranks 3 --shape fan-in --queue single",
    FAN_IN_BLOCKING,
    "--ranks 3 --shape fan-in --queue single --blocking 1",
    "--ranks 3 --shape fan-out --blocking 1",
    "--ranks 3 --shape fan-out --queue single --blocking 1",
    FAN_IN_FOUR,
]

# What CI's time does not allow in full: nothing wrong among the first states, nearest first.
BOUNDED = [
    "--ranks 3 --layers 1",
    "--ranks 3 --layers 1 --queue single",
    "--ranks 3 --layers 1 --blocking 1",
    "--ranks 3 --layers 1 --queue single --blocking 1",
    "--ranks 3 --shape fan-in --death 1 --queue single --blocking 1",
    "--ranks 3 --shape fan-out --death 1 --blocking 1",
]
MAX_STATES = 500_000

# rule -> what happens without it, and where.
FAILS = {
    "handshake": [(DEADLOCK, SWAP_BLOCKING), (DEADLOCK, ONE_WAY_SINGLE)],
    "handshake_including": [(DEADLOCK, SWAP_BLOCKING), (DEADLOCK, SWAP_SINGLE)],
    "handshake_releases": [(DEADLOCK, SWAP_BLOCKING), (DEADLOCK, ONE_WAY_SINGLE)],
    "mover_blocks_on_none": [(DEADLOCK, ONE_WAY_DEATH)],
    "no_spinning_kernel": [(DEADLOCK, SWAP_SEPARATE)],
    "returns_after_submission": [(FREED, ALTERNATE)],
    "release_rows_after_reader": [(OVERWRITTEN, FAN_IN_FOUR)],
    "release_rows_after_wgrad": [(OVERWRITTEN, FAN_IN_FOUR)],
    "release_weights_after_reader": [(OVERWRITTEN, FAN_IN)],
    "release_returns_after_reader": [(OVERWRITTEN, ONE_WAY_DEADLINE)],
    "release_grads_after_reader": [(OVERWRITTEN, ONE_WAY_DEADLINE)],
    "release_directly_after": [(DEADLOCK, ALTERNATE)],
    "withhold_rows": [(OVERWRITTEN, FAN_IN_FOUR)],
    "withhold_weights": [(OVERWRITTEN, FAN_IN)],
    "withhold_returns": [(OVERWRITTEN, ONE_WAY_DEADLINE)],
    "withhold_grads": [(OVERWRITTEN, ONE_WAY_DEADLINE)],
    "withhold_on_host": [(DEADLOCK, ONE_WAY_DEATH)],
    "two_row_halves": [(OVERWRITTEN, FAN_IN)],
    "one_weight_slot": [(OVERWRITTEN, FAN_IN)],
    "two_return_halves": [(OVERWRITTEN, ONE_WAY_DEADLINE)],
    "one_grad_slot": [(OVERWRITTEN, ONE_WAY_DEADLINE)],
    "wait_rows": [(TOO_EARLY, ALTERNATE)],
    "wait_weights": [(TOO_EARLY, ALTERNATE)],
    "wait_returns": [(TOO_EARLY, ALTERNATE)],
    "wait_grads": [(TOO_EARLY, ALTERNATE)],
    "grads_before_publish": [(DEADLOCK, SWAP_SEPARATE)],
    "copy_after_event": [(NOT_READY, ALTERNATE)],
    "flag_after_data": [(TOO_EARLY, ALTERNATE)],
    "epoch_at_least": [(DEADLOCK, ONE_WAY_DEATH)],
    "host_waits_end": [(DEADLOCK, ONE_LAYER_DEATH)],
    "lift": [(DEADLOCK, ONE_LAYER_DEATH)],
    "mark_before_lift": [(POISONED, ONE_LAYER_SINGLE_DEATH)],
    "lift_repeated": [(DEADLOCK, ONE_WAY_DEATH)],
    "lift_until_call_ends": [(DEADLOCK, ONE_WAY_DEATH)],
    "lift_by_plain_store": [(DEADLOCK, ONE_WAY_BLOCKING_DEATH)],
    "error_stops_mover": [(FREED, ALTERNATE_DEATH)],
    "check_drains_first": [(POISONED, ONE_LAYER_DEATH)],
    "check_exchanges": [(POISONED, ONE_LAYER_DEADLINE)],
}

# Rules about time: without them the protocol is slower, and the model finds nothing wrong.
ONLY_TIME = {"withhold_per_job": [SWAP_SINGLE, FAN_IN_BLOCKING, ONE_WAY_DEADLINE]}

# The deadlock rule, the releases and the failure rule of the protocol (design), word for word,
# and what else of sections 4 to 6 the model can be run without.
DEADLOCK_RULE = """\
A device wait of (seq, level k) is enqueued only after the driver has accepted this rank's own \
submissions of every (seq, level) up to and including (seq, k), and every release posted so far. \
Python and mover shake hands for it. The mover polls its jobs and blocks on none. \
No spinning kernel of our own."""
RELEASES = """\
A release is enqueued by Python on the compute stream directly after the last reader: rows and \
slots after the received GEMMs (in backward, rows after wgrad), returned rows after placing, grads \
after the add. The mover withholds a job (not the whole call) until that job's releases are \
visible; never by a device wait. Rows and returned rows have two halves; weight slots and grad \
slots one."""
FAILURE = """\
A stream wait has none, so a watchdog, on deadline or a peer's death, first marks the call \
poisoned and stores the error, then lifts this rank's flags to epoch + 2^30 (the cyclic compare \
passes) by plain stores, again and again until the streams have drained (late pushes overwrite \
lifted flags). No driver call for it: that would wait for the lock, or behind the very wait it \
should free."""
OTHERS = """\
No wait without a deadline (host waits: condition with deadline). \
`run_experts` returns only after its level 2 and 3 copies are submitted, so DeepEP, NCCL and feplb \
have one program order on all ranks, and no memory can be freed under a copy not yet submitted. \
`wait_submitted(1)`, enqueue the inbound wait, received rows, event, post the return. \
Launch kept B, `wait_submitted(2)`, enqueue the return wait, place. \
`run_experts` records an event on the compute stream (after parameter hooks have run: Megatron's \
parameter gather finishes there) and posts the addresses of this call; never cached. \
Data first, in one batch; then its flag (batches have no order inside). \
Epochs count up, are never reset, and are compared as "at least" (cyclic). \
`check()` waits, with deadline, until this rank's last enqueued wait and placement have run, then \
exchanges the error bit over `group` (not only the domain): otherwise an optimizer step already \
enqueued behind a lifted wait would run on poison. \
A backward call that finds an earlier call's grads unconsumed awaits and takes them into a private \
buffer before publishing its header, and the node adds them if it runs."""

# The first words of each sentence -> the switches that take it out.
SWITCHES = {
    "A device wait of": {"handshake", "handshake_including", "handshake_releases"},
    "Python and mover": {"handshake"},
    "The mover polls": {"mover_blocks_on_none"},
    "No spinning kernel": {"no_spinning_kernel"},
    "A release is": {
        "handshake_releases",
        "release_directly_after",
        "release_rows_after_reader",
        "release_weights_after_reader",
        "release_rows_after_wgrad",
        "release_returns_after_reader",
        "release_grads_after_reader",
    },
    "The mover withholds": {
        "withhold_rows",
        "withhold_weights",
        "withhold_returns",
        "withhold_grads",
        "withhold_on_host",
        "withhold_per_job",
    },
    "Rows and returned": {
        "two_row_halves",
        "two_return_halves",
        "one_weight_slot",
        "one_grad_slot",
    },
    "A stream wait": {"lift", "mark_before_lift", "lift_repeated", "lift_until_call_ends"},
    "No driver call": {"lift_by_plain_store"},
    "No wait without": {"host_waits_end"},
    "`run_experts` returns": {"returns_after_submission", "error_stops_mover"},
    "`wait_submitted(1)`, enqueue": {"wait_rows", "wait_weights"},
    "Launch kept B": {"wait_returns"},
    "`run_experts` records": {"copy_after_event"},
    "Data first, in": {"flag_after_data"},
    "Epochs count up": {"epoch_at_least"},
    "`check()` waits": {"check_drains_first", "check_exchanges"},
    "A backward call": {"grads_before_publish", "wait_grads"},
}

# With reductions and without, on configurations small enough for both.
PLAIN = {
    "--shape fan-in --layers 1 --queue single --blocking 1": None,
    "--shape fan-in --layers 1": None,
    ONE_LAYER_SINGLE_DEATH: {
        "host_waits_end",
        "lift",
        "mark_before_lift",
        "lift_repeated",
        "lift_until_call_ends",
        "check_drains_first",
        "error_stops_mover",
    },
}


@dataclass(frozen=True)
class Outcome:
    """What one run of the model printed."""

    exit_status: int
    result: str
    is_exhaustive: bool
    text: str


@dataclass(frozen=True)
class ModelProgram:
    """The compiled model."""

    path: Path

    def run(self, config: str, *, without: str | None = None, extra: str = "") -> Outcome:
        command = [str(self.path), *config.split(), *extra.split()]
        if without is not None:
            command += ["--without", without]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode in (0, 1), f"{command}: {done.stderr}"
        figures, result = done.stdout.splitlines()[:2]
        print(f"{' '.join(command[1:])}: {figures}")
        return Outcome(
            exit_status=done.returncode,
            result=result.removeprefix("result: "),
            is_exhaustive=figures.endswith("exhaustive"),
            text=done.stdout,
        )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelProgram:
    assert shutil.which("g++") is not None, "the protocol model needs g++"
    path = tmp_path_factory.mktemp("protocol") / "model"
    flags, folder = [*FLAGS, "-O2"], BUILD / "tests-protocol"
    objects = compile_together(sorted(SOURCES.glob("*.cpp")), flags, folder)
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(path)], check=True)
    return ModelProgram(path)


def rules(model: ModelProgram) -> list[str]:
    done = subprocess.run([str(model.path), "--rules"], capture_output=True, text=True, check=True)
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("config", HOLDS)
def test_no_interleaving_breaks_the_protocol(model: ModelProgram, config: str) -> None:
    outcome = model.run(config)
    assert outcome.result == "ok", outcome.text
    assert outcome.is_exhaustive


@pytest.mark.parametrize("config", BOUNDED)
def test_no_interleaving_breaks_it_among_the_first_states(model: ModelProgram, config: str) -> None:
    outcome = model.run(config, extra=f"--max-states {MAX_STATES}")
    assert outcome.result == "ok", outcome.text
    assert outcome.is_exhaustive or f"bounded: {MAX_STATES} states" in outcome.text


@pytest.mark.parametrize(
    ("rule", "violation", "config"),
    [(rule, *case) for rule, cases in FAILS.items() for case in cases],
)
def test_without_the_rule_a_violation_is_found(
    model: ModelProgram, rule: str, violation: str, config: str
) -> None:
    outcome = model.run(config, without=rule)
    assert outcome.exit_status == 1
    assert outcome.result.startswith(violation)
    assert "\n  1. rank " in outcome.text  # a trace to read
    assert "\nThen:\n  rank 0" in outcome.text


@pytest.mark.parametrize(
    ("rule", "config"),
    [(rule, config) for rule, configs in ONLY_TIME.items() for config in configs],
)
def test_without_the_rule_the_protocol_is_only_slower(
    model: ModelProgram, rule: str, config: str
) -> None:
    assert model.run(config, without=rule).result == "ok"


def test_every_failure_is_shown_where_the_protocol_holds() -> None:
    used = {config for cases in FAILS.values() for _, config in cases}
    assert used <= set(HOLDS)


def test_every_switch_is_tried(model: ModelProgram) -> None:
    assert sorted(rules(model)) == sorted([*FAILS, *ONLY_TIME])


def test_every_sentence_has_a_switch_that_fails(model: ModelProgram) -> None:
    texts = (DEADLOCK_RULE, RELEASES, FAILURE, OTHERS)
    sentences = [part for text in texts for part in re.split(r"(?<=\.) (?=[A-Z`])", text)]
    found = [[first for first in SWITCHES if part.startswith(first)] for part in sentences]
    assert [len(firsts) for firsts in found] == [1] * len(SWITCHES), sentences
    assert all(switches & FAILS.keys() for switches in SWITCHES.values())
    assert set().union(*SWITCHES.values()) == set(rules(model))


@pytest.mark.parametrize("config", PLAIN)
def test_reductions_change_no_verdict(model: ModelProgram, config: str) -> None:
    for rule in [None, *(PLAIN[config] or rules(model))]:
        reduced = model.run(config, without=rule)
        plain = model.run(config, without=rule, extra="--plain 1")
        assert plain.result.split(":")[0] == reduced.result.split(":")[0], rule


@pytest.mark.parametrize(
    "arguments",
    [
        ["--without", "nonsense"],
        ["--ranks", "9"],
        ["--queue"],
        ["--collective", "1", "--death", "1"],
        ["--shape", "alternate", "--ranks", "3"],
    ],
)
def test_model_refuses_what_it_does_not_know(model: ModelProgram, arguments: list[str]) -> None:
    done = subprocess.run([str(model.path), *arguments], capture_output=True, check=False)
    assert done.returncode == 2
