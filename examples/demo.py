"""What `make demo` runs: trains with and without feplb, kills a rank, and says what came out.

  python examples/demo.py [--text PATH] [--steps N] [--out FOLDER]

Starts train_moe_lm.py on 4 processes of this machine three times: policy none, policy greedy with
the same seed, and a short run in which one rank dies. Prints one screen, draws one picture, and
ends with status 1 if anything it claims did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from byte_text import standard_library
from demo_picture import draw_loads
from demo_report import Check, Death, describe, judge, machine
from train_moe_lm import RunRecord

NUM_RANKS = 4
KILLED_RANK = 2
TRAINING = Path(__file__).with_name("train_moe_lm.py")
SHARED_MEMORY = Path("/dev/shm")
STRAGGLER_S = 20.0  # what ranks get to end by themselves once one of them has failed


@contextmanager
def started_ranks(job: str, arguments: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process per rank of train_moe_lm.py; none of them outlives the block.

    They find each other as torchrun's do, through a store that this process keeps.
    """
    import torch.distributed as dist  # slow to import: --help and wrong arguments need none of it

    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, NUM_RANKS, is_master=True, wait_for_workers=False
    )
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(NUM_RANKS),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": job,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(NUM_RANKS):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(TRAINING), *arguments]
            processes.append(subprocess.Popen(command, env=environment))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_ranks(job: str, arguments: Sequence[str], *, timeout_s: float, dies: int = -1) -> None:
    """Run train_moe_lm.py on all ranks and wait until they have ended.

    Args:
        dies: the rank that SIGKILL is expected to end.
    Raises:
        RuntimeError: a rank ended in another way than expected, or not in time.
    """
    with started_ranks(job, arguments) as processes:
        deadline = time.monotonic() + timeout_s
        while running := [rank for rank, p in enumerate(processes) if p.poll() is None]:
            statuses = {rank: p.returncode for rank, p in enumerate(processes)}
            if any(s not in (0, None) for rank, s in statuses.items() if rank != dies):
                deadline = min(deadline, time.monotonic() + STRAGGLER_S)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        expected = {rank: -signal.SIGKILL if rank == dies else 0 for rank in range(NUM_RANKS)}
        seen = {rank: "still running" if rank in running else p.returncode
                for rank, p in enumerate(processes)}  # fmt: skip
    if seen != expected:
        raise RuntimeError(f"ranks ended with {seen}, expected {expected}; their errors are above")


def train(policy: str, arguments: Sequence[str], job: str, out: Path) -> RunRecord:
    """A whole training run; its progress bar is rank 0's."""
    print(f"starting {NUM_RANKS} processes, policy {policy}", file=sys.stderr)
    run_ranks(job, [*arguments, "--policy", policy], timeout_s=600)
    return RunRecord(**json.loads((out / f"{policy}.json").read_text()))


def kill_one(arguments: Sequence[str], job: str, out: Path) -> list[Death]:
    """A short run in which one rank dies in the middle of a layer; what each survivor said."""
    print(f"starting {NUM_RANKS} processes, of which rank {KILLED_RANK} will die", file=sys.stderr)
    files = {r: out / f"survivor{r}.json" for r in range(NUM_RANKS) if r != KILLED_RANK}
    for file in files.values():
        file.unlink(missing_ok=True)
    run_ranks(
        job,
        [*arguments, "--policy", "greedy", "--kill-rank", str(KILLED_RANK)],
        timeout_s=120,
        dies=KILLED_RANK,
    )
    killed_at = float((out / "killed_at").read_text())
    deaths = []
    for rank, file in files.items():
        story = json.loads(file.read_text())
        seconds = story["named_at"] - killed_at
        deaths.append(Death(survivor=rank, seconds=seconds, error=story["error"]))
    return deaths


def shared_memory_names() -> set[str]:
    """feplb's names in shared memory, of any job. A Balancer has some only while it is built."""
    return {path.name for path in SHARED_MEMORY.glob("feplb-*")}


def left_in_shared_memory(before: set[str]) -> list[str]:
    """Names that are new since `before` and stay. Another job's come and go: they get a second."""
    left = shared_memory_names() - before
    if left:
        time.sleep(1.0)
    return sorted(left & shared_memory_names())


def processes_of(job: str) -> list[int]:
    """Every living process that was started for this job, or by one that was."""
    mark = f"TORCHELASTIC_RUN_ID={job}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # another user's, or gone in the meantime
            continue
    return sorted(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=standard_library(), help="a file or folder")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written")
    args = parser.parse_args()
    if "RANK" in os.environ:
        parser.error(f"demo.py starts its ranks itself; give torchrun {TRAINING.name} instead")
    if not args.text.exists():
        parser.error(f"--text: there is no {args.text}")
    return args


def _end(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _end)  # so that no rank is left behind
    start, names_before, job = time.monotonic(), shared_memory_names(), f"demo-{os.getpid()}"
    common = [f"--{name}={getattr(args, name)}" for name in ("text", "seed", "out", "steps")]
    none = train("none", common, job, args.out)
    greedy = train("greedy", common, job, args.out)
    deaths = kill_one(common, job, args.out)
    picture = args.out / "load_per_rank.png"
    draw_loads(greedy, picture)

    stray, left = processes_of(job), left_in_shared_memory(names_before)
    checks = [
        *judge(none, greedy, deaths, killed_rank=KILLED_RANK),
        Check(not stray, f"all processes are gone{f'; running: {stray}' if stray else ''}"),
        Check(not left, f"nothing is left in {SHARED_MEMORY}{f': {left}' if left else ''}"),
    ]
    print(f"\nfeplb demo: {machine()}; text: {args.text}\n")
    print(describe(none, greedy, deaths, killed_rank=KILLED_RANK))
    print(f"\npicture   {picture}")
    for check in checks:
        print(f"{'ok' if check.holds else 'FAILED':<9} {check.text}")
    print(f"\n{time.monotonic() - start:.0f} s for all three runs")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
