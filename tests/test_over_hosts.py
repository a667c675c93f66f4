"""A domain over several hosts: no shared board, flags in GPU memory, fabric handles, sockets.

Ranks are processes over the stand-in driver; which "host" a rank is on is what it is told to see as
its kernel. Tensors are this machine's, arenas and flags are the stand-in's GPU memory, and all else
between ranks goes through sockets. tests/cpp/test_relay.cpp has the relay by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from balancer_cases import PLAIN, TWO_LAYERS, Arm, Heard, build, differences, resources_in_use
from balancer_scenarios import attempt, call_and_check
from ranks import run_ranks
from test_ce_lane import on_a_machine_of_its_own, train

from feplb import connect, mesh, peers
from feplb.config import read_environment
from feplb.links import check_fabric
from feplb.observe.nvlink import Fabric, Gpu

NUM_RANKS, PER_HOST = 4, 2
NOTICE_S = 2.0
SHORT_S = 1.5
EXIT_OF_THE_STUCK = 70

pytestmark = pytest.mark.usefixtures("fabric_machine")


@pytest.fixture(scope="module")
def fabric_machine(stand_in_machine: None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_HAS_FABRIC", "1")
        patch.setenv("FEPLB_DOMAIN", "rack")
        yield


def go_to_host(rank: int, per_host: int = PER_HOST) -> None:
    """From here on this process sees itself on the host that its rank is on."""
    peers._kernel = lambda: f"kernel {rank // per_host}"  # type: ignore[assignment]


# ------------------------------------------------------------------------------------ same bits

CALLS = (
    {"copy_call": "batch", "flag_call": "memops"},
    {"copy_call": "plain", "flag_call": "write"},
    {"copy_call": "batch", "flag_call": "copy"},
)


def train_over_hosts(rank: int, num_ranks: int) -> list[tuple[list[str], int, int, str]]:
    """Per way: what differs from no Balancer, moves, moves to the other host, and the log."""
    expected = train(Arm(rank, num_ranks, TWO_LAYERS, None))
    go_to_host(rank)
    heard = Heard()
    logger = logging.getLogger("feplb")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    found = []
    for way in CALLS:
        with build(TWO_LAYERS, **way) as balancer:
            arm = Arm(rank, num_ranks, TWO_LAYERS, balancer)
            wrong = differences(train(arm), expected)
            to_others = 0
            for layer in range(2):
                record = balancer.last_call(layer)
                assert record is not None
                to_others += sum(
                    int(move[1]) // PER_HOST != int(move[2]) // PER_HOST for move in record.moves
                )
        found.append((wrong, arm.num_moves, to_others, heard.texts[-1]))
    return found


@pytest.fixture(scope="module")
def trained(fabric_machine: None) -> list[list[tuple[list[str], int, int, str]]]:
    return run_ranks(train_over_hosts, NUM_RANKS, timeout_s=120)


@pytest.mark.parametrize("way", range(len(CALLS)))
def test_a_domain_over_hosts_has_the_bits_of_no_balancer(
    trained: list[list[tuple[list[str], int, int, str]]], way: int
) -> None:
    for of_rank in trained:
        wrong, num_moves, to_others, logged = of_rank[way]
        assert wrong == []
        assert num_moves > 0
        assert to_others > 0
        assert "flags in GPU memory, fabric arena" in logged
        assert "domain of ranks (0, 1, 2, 3)" in logged


def train_in_unlike_domains(rank: int, num_ranks: int) -> tuple[list[str], int, tuple[int, ...]]:
    """Ranks 0 and 1 are a domain over two hosts, ranks 2 and 3 one on a third."""
    local = Arm(rank, num_ranks, TWO_LAYERS, None)
    expected = train(local)
    peers._kernel = lambda: f"kernel {min(rank, 2)}"  # type: ignore[assignment]
    os.environ["FEPLB_DOMAIN"] = f"rack {rank // 2}"
    with build(TWO_LAYERS) as balancer:
        arm = Arm(rank, num_ranks, TWO_LAYERS, balancer)
        return differences(train(arm), expected), arm.num_moves, balancer.global_ranks


def test_domains_of_one_group_connect_alike_if_one_of_them_spans_hosts() -> None:
    for rank, (wrong, num_moves, ranks) in enumerate(run_ranks(train_in_unlike_domains, 4)):
        assert wrong == []
        assert num_moves > 0
        assert ranks == ((0, 1) if rank < 2 else (2, 3))


# ------------------------------------------------------------------------------------- failures


def build_and_call(rank: int, num_ranks: int, **config: Any) -> Arm:
    """A Balancer over hosts that has made one call."""
    go_to_host(rank, 1)
    arm = Arm(rank, num_ranks, PLAIN, build(**config))
    assert call_and_check(arm) == "same bits"
    return arm


def fall_at(arm: Arm, point: str, sig: int, stamp: str, *, fork: bool = False) -> None:
    """Before the core's next ``point`` this process is killed or stopped."""
    assert arm.balancer is not None
    core = arm.balancer.domain.core

    class Falling:
        def __getattr__(self, name: str) -> Any:
            if name != point:
                return getattr(core, name)
            if fork and os.fork() == 0:
                time.sleep(8)
                os._exit(0)
            Path(stamp).write_text(str(time.monotonic()))
            os.kill(os.getpid(), sig)
            raise AssertionError("still alive")

    arm.balancer.domain.core = Falling()


def outlive(
    rank: int, num_ranks: int, point: str, sig: int, fork: bool, stamp: str
) -> tuple[str, float, list[Any]]:
    """What rank 0 hears of rank 1's fall, when, and what its Balancer leaves or has taken."""
    deadline_s = 20.0 if sig == signal.SIGKILL else SHORT_S
    first = build_and_call(rank, num_ranks).balancer
    assert first is not None
    first.close()
    before = resources_in_use(num_threads=0)
    arm = build_and_call(rank, num_ranks, deadline_s=deadline_s)
    pids: list[Any] = [None] * num_ranks
    dist.all_gather_object(pids, os.getpid())
    if rank == 1:
        fall_at(arm, point, sig, stamp, fork=fork)
    said = attempt(lambda: call_and_check(arm))
    raised = time.monotonic()
    assert arm.balancer is not None
    arm.balancer.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[1], signal.SIGKILL)
    after = resources_in_use(num_threads=0)
    # gloo lets go of its own socket to a rank that died, sooner or later.
    after["open files"] = max(after["open files"], before["open files"])
    return (
        said,
        raised,
        [(name, before[name], after[name]) for name in before if before[name] != after[name]],
    )


FALLS = {
    "killed": ("begin", signal.SIGKILL, False),
    "killed with a forked child": ("begin", signal.SIGKILL, True),
    "stopped": ("begin", signal.SIGSTOP, False),
}


@pytest.mark.parametrize("fall", FALLS)
def test_a_rank_of_another_host_that_falls_is_named(fall: str, tmp_path: Path) -> None:
    point, sig, fork = FALLS[fall]
    stamp = tmp_path / "fell_at"
    results = run_ranks(outlive, 2, point, sig, fork, str(stamp), may_die=[1])
    assert results[0] is not None
    said, raised, left = results[0]
    seconds = raised - float(stamp.read_text())
    if sig == signal.SIGKILL:
        assert re.search(r"while waiting for the counts.*peer rank 1 died; last seen: ", said)
        assert seconds < NOTICE_S
    else:
        assert re.search(r"no answer from rank 1 .* for 1\.5 s \(deadline_s\)", said)
        assert 0.9 * SHORT_S < seconds < SHORT_S + NOTICE_S
    assert left == []


def be_left_with_a_wait(rank: int, num_ranks: int, folder: str) -> None:
    """Rank 1's stream waits for rows that rank 0 cannot send any more."""
    arm = build_and_call(rank, num_ranks, deadline_s=SHORT_S)
    if rank == 0:
        fall_at(arm, "post_rows", signal.SIGKILL, f"{folder}/fell_at")
    else:
        err = os.open(f"{folder}/stderr", os.O_CREAT | os.O_WRONLY)
        os.dup2(err, 2)
    call_and_check(arm)
    raise AssertionError("the wait has ended")


def test_a_process_whose_stream_cannot_be_freed_is_ended_and_says_why(tmp_path: Path) -> None:
    results = run_ranks(be_left_with_a_wait, 2, str(tmp_path), may_die=[0, 1])
    assert results == [None, None]
    said = (tmp_path / "stderr").read_text()
    assert re.search(r"feplb \(rank 1\): peer rank 0 died; last seen: ", said)
    assert f"this process is ended (exit status {EXIT_OF_THE_STUCK})" in said


# ------------------------------------------------------------------------------------- start-up

LACKS: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "host lane": (
        {"FEPLB_LANE": "host"}, {},
        r"ValueError: lane='host': FEPLB_DOMAIN gives ranks of several hosts one name.*ce lane",
    ),
    "descriptors": (
        {}, {"arena_handle": "vmm"},
        r"ValueError: arena_handle='vmm' ends at the host.*\"fabric\" or \"auto\"",
    ),
    "no fabric": (
        {"STAND_IN_HAS_FABRIC": "0"}, {},
        r"RuntimeError: GPU 0 has no fabric handles.*NVL72.*nvidia-imex.*FEPLB_DOMAIN",
    ),
    "no imex channel": (
        {"STAND_IN_FAIL": "cuMemCreate:800"}, {},
        r"RuntimeError: an arena that is shared by a fabric .* refused: .*\(800\).*imex-channels",
    ),
    "a peer's handle is refused": (
        {"STAND_IN_FAIL": "cuMemImportFromShareableHandle:800"}, {},
        r"RuntimeError: opening a peer's arena by a fabric handle was refused: .*\(800\)",
    ),
    "no such address": (
        {"FEPLB_HOST_ADDRESS": "192.0.2.1"}, {},
        r"RuntimeError: (rank \d could not build its Balancer: )?.*FEPLB_HOST_ADDRESS=192\.0\.2\.1",
    ),
    "memory behind the sockets": (
        {"STAND_IN_FAIL": "cuMemHostRegister:2"}, {},
        r"RuntimeError: .*pinning .* bytes of the count board",
    ),
}  # fmt: skip


def lack(rank: int, num_ranks: int, folder: str) -> dict[str, tuple[str, list[str]]]:
    """What each lack is called, and of what this process then holds more or less than before."""
    given = dict(os.environ)
    arm = build_and_call(rank, num_ranks)
    assert arm.balancer is not None
    arm.balancer.close()
    found = {}
    for name, (variables, config, _) in LACKS.items():
        on_a_machine_of_its_own(folder, rank, {"STAND_IN_HAS_FABRIC": "1", **variables})
        before = resources_in_use(num_threads=0)
        said = attempt(lambda config=config: build(**config))
        after = resources_in_use(num_threads=0)
        found[name] = said, [what for what in before if before[what] != after[what]]
        os.environ.clear()
        os.environ.update(given)
    return found


@pytest.fixture(scope="module")
def lacking(
    fabric_machine: None, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, tuple[str, list[str]]]]:
    return run_ranks(lack, 2, str(tmp_path_factory.mktemp("drivers")))


@pytest.mark.parametrize("name", LACKS)
def test_what_a_domain_over_hosts_needs_is_said(
    lacking: list[dict[str, tuple[str, list[str]]]], name: str
) -> None:
    for of_rank in lacking:
        said, left = of_rank[name]
        assert re.match(LACKS[name][2], said, re.DOTALL), said
        assert left == []


def lack_alone(rank: int, num_ranks: int, folder: str) -> tuple[str, list[str]]:
    """Rank 1 cannot build what rank 0 has built, with a relay that runs."""
    arm = build_and_call(rank, num_ranks)
    assert arm.balancer is not None
    arm.balancer.close()
    before = resources_in_use(num_threads=0)
    fails = {"STAND_IN_FAIL": "cuMemHostRegister:2"} if rank == 1 else {}
    on_a_machine_of_its_own(folder, rank, {"STAND_IN_HAS_FABRIC": "1", **fails})
    said = attempt(build)
    after = resources_in_use(num_threads=0)
    return said, [what for what in before if before[what] != after[what]]


def test_a_domain_that_one_rank_cannot_build_is_let_go_of_by_the_others(tmp_path: Path) -> None:
    results = run_ranks(lack_alone, 3, str(tmp_path))
    for rank, (said, left) in enumerate(results):
        by = "" if rank == 1 else "rank 1 could not build its Balancer: "
        assert said.startswith(f"RuntimeError: {by}pinning"), said
        assert left == []


def meet_strangers(rank: int, num_ranks: int) -> tuple[bool, int]:
    """Others connect first: most say nothing, one goes at once, one is no rank, one would be."""
    strangers: list[socket.socket] = []
    real = socket.create_server

    def create_server(*args: Any, **options: Any) -> socket.socket:
        listener = real(*args, **options)
        for _ in range(8):
            stranger = socket.socket(listener.family)
            stranger.setblocking(False)
            stranger.connect_ex(listener.getsockname())
            strangers.append(stranger)
        strangers[0].send(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
        strangers[1].send(b"GET /")
        strangers[3].send(mesh._HELLO.pack(b"not its token", rank + 1))
        strangers[2].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        strangers.pop(2).close()
        return listener

    socket.create_server = create_server
    arm = build_and_call(rank, num_ranks, deadline_s=5.0)
    assert arm.balancer is not None
    arm.balancer.close()
    turned_away = 0
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        turned_away += 1
    return True, turned_away


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_strangers_at_the_door_are_turned_away(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEPLB_HOST_ADDRESS", address)
    assert run_ranks(meet_strangers, 3) == [(True, 7)] * 3


def see_sockets(rank: int, num_ranks: int) -> list[dict[str, int]]:
    """Options of the sockets that the core is given."""
    real = mesh.connect_mesh
    seen = []

    def connect_mesh(*args: Any) -> list[int]:
        fds = real(*args)
        for fd in fds[:rank] + fds[rank + 1 :]:
            with socket.socket(fileno=os.dup(fd)) as one:
                options = {
                    name: one.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                    for name in ("TCP_NODELAY", "TCP_USER_TIMEOUT", "TCP_KEEPIDLE")
                }
                options["SO_KEEPALIVE"] = one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                seen.append({**options, "blocks": int(os.get_blocking(fd))})
        return fds

    vars(connect)["connect_mesh"] = connect_mesh
    arm = build_and_call(rank, num_ranks)
    assert arm.balancer is not None
    arm.balancer.close()
    return seen


def test_a_host_without_a_word_is_noticed_whether_or_not_something_is_on_its_way() -> None:
    # Keepalive does not ask while sent bytes are without an answer; that has a time of its own.
    for sockets in run_ranks(see_sockets, 3):
        assert len(sockets) == 2
        for options in sockets:
            assert options["TCP_NODELAY"] == options["SO_KEEPALIVE"] == 1
            assert options["blocks"] == 0
            assert 0 < options["TCP_USER_TIMEOUT"] <= 10_000  # milliseconds
            assert 0 < options["TCP_KEEPIDLE"] <= 10  # seconds


def test_a_master_that_nothing_is_known_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    with pytest.raises(RuntimeError, match=r"no\.such\.host\.invalid.*Set FEPLB_HOST_ADDRESS"):
        mesh.own_address(read_environment())


def test_a_master_that_one_protocol_does_not_reach_is_tried_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resolve(_host: str, port: int, **_: Any) -> list[Any]:
        kind = socket.SOCK_DGRAM
        return [
            (socket.AF_INET6, kind, 17, "", ("not an address", port, 0, 0)),
            (socket.AF_INET, kind, 17, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert mesh.own_address(read_environment()) == "127.0.0.1"


def test_the_address_is_the_one_that_is_set_or_the_way_to_the_master(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert mesh.own_address(read_environment()) == "127.0.0.1"
    monkeypatch.setenv("FEPLB_HOST_ADDRESS", "10.1.2.3")
    assert mesh.own_address(read_environment()) == "10.1.2.3"


def in_fabric(cluster: str = "a" * 32, clique: int = 1, state: str = "completed") -> Gpu:
    fabric = Fabric(state=state, cluster=cluster, clique=clique)
    return Gpu(asked="GPU-1", fabric=fabric)


def test_gpus_of_one_fabric_may_be_a_domain() -> None:
    check_fabric([in_fabric(), in_fabric()], [4, 5])


@pytest.mark.parametrize(
    ("gpu", "text"),
    [
        (in_fabric(cluster="b" * 32), "ranks 4 and 5 are in different NVLink fabrics"),
        (in_fabric(clique=2), "clique 1, and cluster a+, clique 2"),
        (in_fabric(cluster="0" * 32), "fabric of the GPU of rank 5 .* is its host's alone"),
        (in_fabric(state="in progress"), "rank 5 .* in no NVLink fabric: its state is in progress"),
        (Gpu(asked="GPU-1"), "its state is not said by NVML, expected completed"),
        (Gpu(asked="GPU-1", problem="NVML does not start"), "its state is NVML does not start"),
    ],
)
def test_gpus_of_no_fabric_or_of_two_are_refused(gpu: Gpu, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        check_fabric([in_fabric(), gpu], [4, 5])
