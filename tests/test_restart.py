"""The life of a job: `torchrun --max-restarts=1`, and one of four ranks is killed in mid-training.

The survivors name the rank that died and end by themselves. The job restarts from its checkpoint,
finds nothing of its first life (no process, mapping, or name in shared memory), and ends with the
bits of a job that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from restart_training import (
    CHECKPOINT_EVERY,
    KILL_STEP,
    NUM_RANKS,
    NUM_STEPS,
    names_in_shared_memory,
    processes_of,
)

SCRIPT = Path(__file__).with_name("restart_training.py")
TIMEOUT_S = 120.0
RANKS = range(NUM_RANKS)
KILLED = 2
SURVIVORS = [rank for rank in RANKS if rank != KILLED]
CHECKPOINT = KILL_STEP // CHECKPOINT_EVERY * CHECKPOINT_EVERY


@dataclass(frozen=True)
class Job:
    """A job that has ended, and what it left."""

    name: str
    folder: Path
    status: int
    processes: list[int]
    in_shared_memory: list[str]

    def told(self, what: str, life: int) -> list[dict[str, Any]]:
        """What every rank of a life wrote down."""
        files = [self.folder / f"{what}-{life}-{rank}.json" for rank in RANKS]
        return [json.loads(file.read_text()) for file in files]

    def losses(self, life: int, rank: int) -> list[str]:
        return (self.folder / f"losses-{life}-{rank}").read_text().splitlines()

    def error(self, life: int, rank: int) -> str:
        """What a rank said on its standard error."""
        (file,) = self.folder.glob(f"logs/*/attempt_{life}/{rank}/stderr.log")
        return file.read_text()


def run_job(name: str, folder: Path, *arguments: str) -> Job:
    """Run the training under torchrun, with up to one restart. No process outlives the call."""
    folder.mkdir()
    job = f"{name}-{os.getpid()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1"]
    command += [f"--nproc-per-node={NUM_RANKS}", f"--rdzv-id={job}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--master-port=0"]
    command += [f"--log-dir={folder}/logs", "--redirects=3", str(SCRIPT), str(folder), *arguments]
    # Shared, torchrun's own store would hand the second life the first one's gloo addresses.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own_store, "OMP_NUM_THREADS": "1"}
    agent = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = agent.wait(TIMEOUT_S)
        if status != 0:
            for file in sorted(folder.glob("logs/*/*/*/stderr.log")):
                print(file, file.read_text(), sep="\n")
        return Job(job, folder, status, processes_of(job), names_in_shared_memory(job))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
        for pid in processes_of(job):  # torchrun gives each rank a process group of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("restart") / "restarted"
    return run_job("restarted", folder, f"--kill-rank={KILLED}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return run_job("whole", tmp_path_factory.mktemp("restart") / "whole")


def test_job_ends_well_after_one_restart(restarted: Job, whole: Job) -> None:
    assert (restarted.status, whole.status) == (0, 0)
    lives = [sorted(path.name for path in job.folder.glob("ended-*")) for job in (restarted, whole)]
    assert lives == [[f"ended-{life}-{rank}.json" for rank in RANKS] for life in (1, 0)]


def test_rank_was_killed_inside_a_call_that_moved_rows_to_it(restarted: Job) -> None:
    fell = json.loads((restarted.folder / "fell.json").read_text())
    assert fell["pid"] == restarted.told("started", 0)[KILLED]["pid"]
    assert KILLED in fell["helpers"]


def test_every_survivor_names_the_killed_rank_and_ends_by_itself(restarted: Job) -> None:
    pid = restarted.told("started", 0)[KILLED]["pid"]
    for rank in SURVIVORS:
        assert f"peer rank {KILLED} (pid {pid}) died" in restarted.error(0, rank)
    left = sorted(path.name for path in restarted.folder.glob("left-0-*"))
    assert left == [f"left-0-{rank}" for rank in SURVIVORS]


def test_second_life_starts_from_the_checkpoint(restarted: Job) -> None:
    assert 0 < CHECKPOINT < KILL_STEP
    assert [seen["start_step"] for seen in restarted.told("started", 0)] == [0] * NUM_RANKS
    assert [seen["start_step"] for seen in restarted.told("started", 1)] == [CHECKPOINT] * NUM_RANKS


def test_both_lives_have_the_bits_of_an_undisturbed_job(restarted: Job, whole: Job) -> None:
    for rank in RANKS:
        losses = whole.losses(0, rank)
        assert [int(line.split()[0]) for line in losses] == list(range(NUM_STEPS))
        assert restarted.losses(0, rank) == losses[:KILL_STEP]
        assert restarted.losses(1, rank) == losses[CHECKPOINT:]
    for seen, expected in zip(restarted.told("ended", 1), whole.told("ended", 0), strict=True):
        assert seen["parameters"] == expected["parameters"]
        assert seen["optimizer"] == expected["optimizer"]
        assert min(seen["num_moves"], expected["num_moves"]) > 0


@pytest.mark.parametrize("when", ["started", "ended"])
def test_second_life_finds_nothing_of_the_first(restarted: Job, when: str) -> None:
    for seen in restarted.told(when, 1):
        assert seen["earlier"] == NUM_RANKS
        assert seen["alive"] == []
        assert seen["in /dev/shm"] == []


@pytest.mark.parametrize(("when", "life"), [("started", 0), ("started", 1), ("ended", 1)])
def test_shared_memory_is_mapped_under_the_names_of_its_own_life(
    restarted: Job, when: str, life: int
) -> None:
    for seen in restarted.told(when, life):
        own = f"feplb-{restarted.name}-{life}-"
        assert [name for name in seen["mapped"] if not name.startswith(own)] == []
        assert len(seen["mapped"]) == NUM_RANKS + 1  # an arena per rank, and the board


def test_nothing_is_left_when_the_job_has_ended(restarted: Job, whole: Job) -> None:
    for job in (restarted, whole):
        assert job.processes == []
        assert job.in_shared_memory == []
