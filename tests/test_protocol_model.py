"""Every interleaving of the protocol as a small explicit-state model (tests/protocol).

Two ranks, two layers forward and backward, separate and single hardware queue, a driver call that
may block holding the lock, one death: no deadlock, nothing overwritten before it is read, no
optimizer step on poisoned data. Without any one rule of MUTATIONS the model finds a violation; the
rules of `model --rules` that are not in it yet are not shown to be needed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "protocol").glob("*.cpp"))

# Rule taken out -> a configuration in which that is seen.
MUTATIONS = {
    "handshake": "--queue separate --blocking 1",
    "handshake_including": "--queue single",
    "handshake_releases": "--queue separate --blocking 1",
    "mover_blocks_on_none": "--queue separate --death 1",
    "no_spinning_kernel": "--queue separate",
    "returns_after_submission": "--queue separate",
    "wait_rows": "--queue separate",
    "wait_weights": "--queue separate",
    "wait_returns": "--queue separate",
    "wait_grads": "--queue separate",
    "grads_before_publish": "--queue separate",
    "copy_after_event": "--queue separate",
    "flag_after_data": "--queue separate",
    "epoch_at_least": "--queue separate --death 1",
    "release_weights_after_reader": "--shape fan-in --ranks 3 --layers 1 --death 1",
    "host_waits_end": "--queue separate --death 1",
    "lift": "--queue separate --death 1",
    "mark_before_lift": "--shape fan-in --queue separate --death 1",
    "lift_repeated": "--queue separate --death 1",
    "lift_until_call_ends": "--queue separate --death 1",
    "check_exchanges": "--shape fan-in --ranks 3 --layers 1 --death 1",
    "check_drains_first": "--queue separate --death 1",
    "error_stops_mover": "--queue separate --death 1",
    "lift_by_plain_store": "--queue single --blocking 1 --death 1",
}
CONFIGURATIONS = [
    f"--ranks 2 --layers 2 --queue {queue} --blocking {blocking} --death {death}"
    for queue in ("separate", "single")
    for blocking in (0, 1)
    for death in (0, 1)
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("protocol") / "model"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", *map(str, SOURCES)]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=300)
    return program


def explore(model: Path, options: str) -> subprocess.CompletedProcess[str]:
    command = [str(model), *options.split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_no_interleaving_breaks_the_protocol(model: Path, options: str) -> None:
    result = explore(model, options)
    assert result.returncode == 0, result.stdout
    assert "result: ok" in result.stdout


@pytest.mark.parametrize("rule", MUTATIONS)
def test_without_the_rule_a_violation_is_found(model: Path, rule: str) -> None:
    options = MUTATIONS[rule]
    assert explore(model, options).returncode == 0, "the same configuration holds with the rule"
    result = explore(model, f"{options} --without {rule}")
    assert result.returncode == 1, result.stdout
