"""bench/node.sh and node.sbatch run their ranks here, on the host lane, and leave none behind.

No GPU and no SLURM: two nodes are two torchruns of this machine, and `srun` and `scontrol` are
small scripts that start what SLURM would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
NODE_SH, SBATCH = BENCH / "node.sh", BENCH / "node.sbatch"
sys.path.insert(0, str(BENCH))

import node_figures  # noqa: E402

TIMEOUT_S = 100  # of one command: two cores start its ranks, and share them with other tests
MARK = "NODE_TEST_MARK"  # in the environment of all processes of one command
SMALL = ("--quick", "--hidden", "32", "--ffn-hidden", "32", "--steps", "2")
Row = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A started command, and every process that came of it."""

    process: subprocess.Popen[bytes]
    mark: str
    output: Path

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def text(self) -> str:
        return self.output.read_text()

    def pids(self, also: str = "") -> list[int]:
        """Its live processes whose environment has `also`, NAME=VALUE, too."""
        wanted = {f"{MARK}={self.mark}".encode(), also.encode()} - {b""}
        return [pid for pid in all_pids() if wanted <= set(environment_of(pid))]

    def await_text(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def environment_of(pid: int) -> list[bytes]:
    """Empty for a process that has ended, or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _settle(cores: list[int]) -> None:
    """Of the child. A shell cannot trap a signal that was ignored when it began, and whoever runs
    the tests in the background has ignored SIGINT."""
    os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(
    command: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None
) -> Iterator[Command]:
    """Run it on two cores at most, so that four ranks always share them; all is ended after."""
    mark, output = uuid.uuid4().hex, folder / "output.txt"
    cores = sorted(os.sched_getaffinity(0))[:2]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    python = {"PYTHON": sys.executable, MARK: mark}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env={**inherited, **python, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: _settle(cores),  # noqa: PLW1509 - no threads here
        )  # fmt: skip
    run = Command(process, mark, output)
    try:
        yield run
    finally:
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)
        process.wait(10)


def run_to_end(command: Sequence[str | Path], folder: Path, **kwargs: Any) -> tuple[int, str]:
    with started(command, folder, **kwargs) as run:
        status = run.wait()
        assert run.pids() == []
        return status, run.text()


# ----------------------------------------------------------------------------------- dry runs


@dataclass(frozen=True)
class Result:
    text: str
    content: dict[str, Any]

    def of_scope(self, scope: str) -> list[Row]:
        return [row for row in self.content["rows"] if row["scope"] == scope]

    def arm(self, name: str) -> Row:
        return next(row for row in self.of_scope("arm") if row["arm"] == name)


def dry_run(folder: Path, *arguments: str) -> Result:
    file = folder / "rows.json"
    command = [NODE_SH, "--dry-run", *arguments, *SMALL, "--json", str(file)]
    status, text = run_to_end(command, folder)
    assert status == 0, text
    return Result(text, json.loads(file.read_text()))


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return dry_run(tmp_path_factory.mktemp("one"), "--ranks-per-node", "4")


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return dry_run(tmp_path_factory.mktemp("two"), "--nodes", "2", "--ranks-per-node", "2")


def test_one_node_is_one_domain(one_node: Result) -> None:
    assert [row["domain"] for row in one_node.of_scope("domain")] == ["0,1,2,3"]


def test_two_nodes_are_two_domains(two_nodes: Result) -> None:
    assert [row["domain"] for row in two_nodes.of_scope("domain")] == ["0,1", "2,3"]


@pytest.fixture(params=["one_node", "two_nodes"])
def result(request: pytest.FixtureRequest) -> Result:
    found: Result = request.getfixturevalue(request.param)
    return found


def test_bits_were_compared_and_loads_are_more_even(result: Result) -> None:
    assert (result.content["bench"], result.content["lane"]) == ("node_layer", "host")
    assert all(tuple(row) == node_figures.COLUMNS for row in result.content["rows"])
    assert [row["arm"] for row in result.of_scope("arm")] == ["none", "greedy", "ceiling"]
    greedy = result.arm("greedy")
    assert greedy["same_bits_as_none"] is True
    assert greedy["rows_moved_pct"] > 5
    assert result.arm("none")["max_mean"] == pytest.approx(1.5, abs=0.01)
    assert result.arm("ceiling")["max_mean"] == 1.0 < greedy["max_mean"] < 1.3
    for row in result.of_scope("domain"):
        assert row["max_mean_after"] < row["max_mean_before"]


def test_no_time_is_claimed_where_ranks_outnumber_cores(result: Result) -> None:
    for row in result.of_scope("arm"):
        assert row["cores"] < row["ranks"] == 4
        assert [row[name] for name in node_figures.TIMES] == [None] * 4
        assert row["samples"] == 0
    assert "no times: 4 ranks share" in result.text
    assert node_figures.LANE in result.text
    assert " ms" not in result.text


# ----------------------------------------------------------------------------- ends and failures

# No test waits for so many rounds.
ENDLESS = (NODE_SH, "--dry-run", "--ranks-per-node", "2", *SMALL, "--steps", "10000000")


def test_a_killed_rank_ends_both_nodes(tmp_path: Path) -> None:
    with started([*ENDLESS, "--nodes", "2"], tmp_path) as run:
        run.await_text("same bits on every rank")
        (victim,) = run.pids(also="RANK=3")
        os.kill(victim, signal.SIGKILL)
        assert run.wait() == 1, run.text()
        assert run.pids() == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_ranks(tmp_path: Path, number: signal.Signals, status: int) -> None:
    with started(ENDLESS, tmp_path) as run:
        run.await_text("same bits on every rank")
        assert len(run.pids(also="WORLD_SIZE=2")) == 2
        run.process.send_signal(number)
        assert run.wait() == status, run.text()
        assert run.pids() == []


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{text}")
    file.chmod(0o755)
    return file


def test_a_torchrun_that_does_not_end_is_killed_with_its_ranks(tmp_path: Path) -> None:
    deaf = script(
        tmp_path / "python",
        'if [[ $1 == -m ]]; then trap "" TERM; sleep 1000 & echo up; wait; fi\n',
    )
    environment = {"PYTHON": str(deaf), "NODE_STOP_S": "1"}
    with started([NODE_SH, "--dry-run"], tmp_path, environment) as run:
        run.await_text("up")
        assert len(run.pids()) == 3  # node.sh, "torchrun" and its "rank"
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130
        assert run.pids() == []


# ------------------------------------------------------------------------------------ what it runs


def launched(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """What node.sh gives the interpreter, a line per launch: settings, then arguments."""
    settings = "$FEPLB_DOMAIN|$OMP_NUM_THREADS|$CUDA_DEVICE_MAX_COPY_CONNECTIONS"
    told = script(
        folder / "python",
        f'if [[ $1 == -c ]]; then echo 12345; elif [[ $1 == -m ]]; then echo "{settings} $*"; fi\n',
    )
    environment = {"PYTHON": str(told), **environment}
    status, text = run_to_end([NODE_SH, *arguments], folder, environment=environment)
    assert status == 0, text
    return sorted(text.splitlines())


def test_one_node_is_a_torchrun_of_eight_ranks(tmp_path: Path) -> None:
    (line,) = launched(tmp_path, "--policy", "greedy")
    expected = "|1| -m torch.distributed.run --nproc-per-node 8 --standalone {}/node_layer.py {}"
    assert line == expected.format(BENCH, "--policy greedy")


def test_a_node_of_two_meets_the_other_at_the_head(tmp_path: Path) -> None:
    arguments = ("--nodes", "2", "--node-rank", "1", "--head", "first", "--quick")
    (line,) = launched(tmp_path, *arguments)
    assert "--rdzv-backend static --rdzv-endpoint first:29400 " in line
    assert "--nnodes 2 --node-rank 1 " in line
    assert line.endswith("/node_layer.py --quick")


def test_a_dry_run_has_both_nodes_in_domains_of_their_own(tmp_path: Path) -> None:
    lines = launched(tmp_path, "--nodes", "2", "--dry-run")
    assert [line.partition("|")[0] for line in lines] == ["node0", "node1"]
    for node, line in enumerate(lines):
        assert "--rdzv-endpoint 127.0.0.1:12345 " in line
        assert f"--node-rank {node} " in line
        assert line.endswith("/node_layer.py --cpu")


@pytest.mark.parametrize(
    ("connections", "copies", "expected"),
    [("1", None, "8"), ("1", "4", "4"), ("8", None, ""), (None, None, "")],
)
def test_copies_get_queues_of_their_own_where_there_is_one(
    tmp_path: Path, connections: str | None, copies: str | None, expected: str
) -> None:
    given = {"CUDA_DEVICE_MAX_CONNECTIONS": connections, "CUDA_DEVICE_MAX_COPY_CONNECTIONS": copies}
    (line,) = launched(tmp_path, **{name: value for name, value in given.items() if value})
    assert line.split()[0].split("|")[2] == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--nodes 3", "--nodes 3, expected 1 to 2"),
        ("--nodes", "--nodes needs a value"),
        ("--nodes 2 --node-rank 0", "--nodes 2 needs --head HOST"),
        ("--nodes 2 --head first", "--nodes 2 needs --head HOST"),
        ("--nodes 2 --head first --node-rank 2", "--node-rank 2, expected 0 to 1"),
        ("--dry-run --head first", "--dry-run starts all nodes"),
        ("--port 08", "--port 08, expected 1 to 65535"),
        ("--dry-run --ranks-per-node 3", "3 ranks, num_experts=64"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path: Path, arguments: str, text: str) -> None:
    status, output = run_to_end([NODE_SH, *arguments.split()], tmp_path)
    assert status != 0
    assert text in output
    assert output.count("\n") == 1


def test_help_names_every_option(tmp_path: Path) -> None:
    status, text = run_to_end([NODE_SH, "--help"], tmp_path)
    assert status == 0
    for option in ("nodes", "node-rank", "head", "port", "ranks-per-node", "dry-run", "help"):
        assert f"\n  --{option}" in text
    assert "set -euo" not in text


@pytest.mark.parametrize("file", [NODE_SH, SBATCH], ids=lambda file: file.name)
def test_scripts_are_bash(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True, timeout=10)


# ------------------------------------------------------------------------------------------ SLURM

# Takes the options of node.sbatch, and runs the command once per node, each a host of its own.
SRUN = """
while [[ $1 == --* ]]; do options+=("$1"); shift; done
[[ ${options[*]} == "--ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1" ]] || exit 9
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node FEPLB_DOMAIN=host$node "$@" &
done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do wait -n || exit; done
"""
SCONTROL = '[[ "$*" == "show hostnames local[1-2]" ]] && printf "localhost\\nelsewhere\\n"\n'


def under_slurm(folder: Path, num_nodes: int, submit_dir: Path, *arguments: str) -> tuple[int, str]:
    spooled = Path(shutil.copy(SBATCH, folder / "slurm_script"))  # as SLURM does
    script(folder / "bin" / "srun", SRUN)
    script(folder / "bin" / "scontrol", SCONTROL)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(submit_dir),
        "SLURM_JOB_NODELIST": "local[1-2]",
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return run_to_end(["bash", spooled, *arguments], folder, environment=environment)


@pytest.mark.parametrize(("num_nodes", "domains"), [(1, ["0,1"]), (2, ["0,1", "2,3"])])
def test_sbatch_runs_one_task_per_node(tmp_path: Path, num_nodes: int, domains: list[str]) -> None:
    file, port = tmp_path / "rows.json", free_port()
    arguments = ("--cpu", "--ranks-per-node", "2", "--port", port, *SMALL, "--json", str(file))
    status, text = under_slurm(tmp_path, num_nodes, ROOT, *arguments)
    assert status == 0, text
    result = Result(text, json.loads(file.read_text()))
    assert [row["domain"] for row in result.of_scope("domain")] == domains


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_sbatch_gives_back_what_node_sh_says(tmp_path: Path) -> None:
    status, text = under_slurm(tmp_path, 1, ROOT, "--ranks-per-node", "0")
    assert status == 2
    assert "--ranks-per-node 0, expected 1 to 64" in text


def test_sbatch_from_elsewhere_is_refused(tmp_path: Path) -> None:
    status, text = under_slurm(tmp_path, 1, tmp_path)
    assert status == 2
    assert "submit from the repository's root" in text
