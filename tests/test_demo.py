"""The demo: its text, its arithmetic, its picture, what it checks, and a short run of each kind."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import demo
import demo_picture
import demo_report
from byte_text import Windows, read_bytes, standard_library
from demo_report import Death, balances, imbalance, judge, moved_share
from train_moe_lm import RunRecord

# 2 ranks, 1 layer, 2 steps, mean 10 rows. Step 0: rank 0 sends 6 rows. Step 1: balanced already.
RECORD = RunRecord(
    policy="greedy",
    memory="feplb reserves 1 MiB:\n  rows  1 MiB",
    loss=[5.5, 3.25],
    seconds=1.0,
    parameters_sha256="ab" * 32,
    loads_before=[[[18, 2]], [[10, 10]]],
    loads_after=[[[12, 8]], [[10, 10]]],
    hottest_expert=[[12], [5]],
    num_moves=[[1], [0]],
    rows_moved=[[6], [0]],
    plan_us=[[1.0], [3.0]],
    lane={"copies": 4, "rows_bytes": 2**20, "weights_bytes": 0, "returns_bytes": 0},
)
NAMED = "feplb failed: peer rank 2 (pid 7) died"
DEATHS = [Death(survivor=r, seconds=0.25 * (r + 1), error=NAMED) for r in (0, 1, 3)]


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"second ",
        "a/c.txt": b"first ",
        "a/picture.png": b"\0\1",
        ".git/config": b"hidden",
        "site-packages/x.py": b"installed",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert bytes(read_bytes(tmp_path).tolist()) == b"first second "
    assert bytes(read_bytes(tmp_path, max_bytes=8).tolist()) == b"first se"
    assert bytes(read_bytes(tmp_path / "b.txt").tolist()) == b"second "


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text under"):
        read_bytes(tmp_path)


def test_the_standard_library_is_text_enough() -> None:
    text = read_bytes(standard_library(), max_bytes=2**20)
    assert len(text) == 2**20
    assert text.dtype == torch.uint8


def test_windows_are_followed_by_their_next_bytes() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    first, second = (Windows(text, num_windows=3, length=8, seed=5).draw() for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[0].shape == (3, 8)
    assert torch.equal(first[0] + 1, first[1])


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 8 bytes, expected more than 8"):
        Windows(torch.zeros(8, dtype=torch.uint8), num_windows=1, length=8, seed=0)


def test_balance_of_a_layer_by_hand() -> None:
    (layer,) = balances(RECORD)
    assert layer.before == pytest.approx((1.8 + 1.0) / 2)
    assert layer.after == pytest.approx((1.2 + 1.0) / 2)
    assert layer.floor == pytest.approx((1.2 + 1.0) / 2)  # 12 rows of one expert; 5 set no floor
    assert layer.moved == pytest.approx(6 / 40)
    assert layer.moves == pytest.approx(0.5)
    assert layer.plan_us[0] == pytest.approx(2.0)
    assert moved_share(RECORD) == pytest.approx(6 / 40)


def test_the_demo_judges_what_it_claims() -> None:
    none = dataclasses.replace(RECORD, policy="none")
    checks = judge(none, RECORD, DEATHS, killed_rank=2)
    assert [check.holds for check in checks] == [True] * 4
    assert "15.0% of the rows" in checks[2].text
    assert "the last after 1000 ms" in checks[3].text


@pytest.mark.parametrize(
    ("broken", "change"),
    [
        (0, {"parameters_sha256": "cd" * 32}),
        (0, {"loss": [5.5, 3.5]}),
        (1, {"loads_after": [[[18, 2]], [[10, 10]]]}),
        (2, {"rows_moved": [[1], [0]]}),
    ],
    ids=["hash", "loss", "balance", "moved"],
)
def test_a_claim_that_does_not_hold_is_seen(broken: int, change: dict[str, object]) -> None:
    checks = judge(RECORD, dataclasses.replace(RECORD, **change), DEATHS, killed_rank=2)
    assert [check.holds for check in checks] == [i != broken for i in range(4)]


@pytest.mark.parametrize(("seconds", "error"), [(3.0, NAMED), (0.1, "gloo: connection closed")])
def test_a_death_named_late_or_never_is_seen(seconds: float, error: str) -> None:
    deaths = [*DEATHS, Death(survivor=4, seconds=seconds, error=error)]
    assert not judge(RECORD, RECORD, deaths, killed_rank=2)[3].holds


def test_the_report_fits_a_screen() -> None:
    lines = demo_report.describe(RECORD, RECORD, DEATHS, killed_rank=2).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 24


def test_the_picture_has_its_size(tmp_path: Path) -> None:
    demo_picture.draw_loads(RECORD, tmp_path / "loads.png")
    assert demo_picture.plt.imread(tmp_path / "loads.png").shape[:2] == (800, 1200)


def test_what_stays_in_shared_memory_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SHARED_MEMORY", tmp_path)
    (tmp_path / "feplb-other").touch()
    before = demo.shared_memory_names()
    (tmp_path / "psm_unrelated").touch()
    assert demo.left_in_shared_memory(before) == []
    (tmp_path / "feplb-leaked").touch()
    assert demo.left_in_shared_memory(before) == ["feplb-leaked"]


def test_a_process_of_the_job_is_seen_while_it_lives() -> None:
    job = f"demo-test-{os.getpid()}"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": job}
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert demo.processes_of(job) == [process.pid]
        process.kill()
    assert demo.processes_of(job) == []


def arguments(out: Path) -> list[str]:
    return [f"--text={Path(__file__).parent}", f"--out={out}", "--steps=2", "--windows=1"]


def test_two_steps_train_and_record_every_layer(tmp_path: Path) -> None:
    record = demo.train("greedy", arguments(tmp_path), f"demo-test-{os.getpid()}", tmp_path)
    before, after = torch.tensor(record.loads_before), torch.tensor(record.loads_after)
    assert before.shape == (2, 3, demo.NUM_RANKS)
    assert torch.equal(before.sum(-1), torch.full((2, 3), demo.NUM_RANKS * 128 * 2))
    assert torch.equal(after.sum(-1), before.sum(-1))
    assert (imbalance(after.numpy()) <= imbalance(before.numpy())).all()
    assert moved_share(record) > 0
    assert len(record.loss) == 2
    assert len(record.parameters_sha256) == 64


def test_survivors_name_the_rank_that_was_killed(tmp_path: Path) -> None:
    job = f"demo-test-{os.getpid()}"
    killed_first = [*arguments(tmp_path), "--kill-step=0"]
    deaths = demo.kill_one(killed_first, job, tmp_path)
    assert [death.survivor for death in deaths] == [0, 1, 3]
    for death in deaths:
        assert f"peer rank {demo.KILLED_RANK} " in death.error
        assert 0 < death.seconds < demo_report.SLOWEST_NOTICE_S
    assert demo.processes_of(job) == []


def test_a_rank_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ranks ended with \{0: 2, 1: 2, 2: 2, 3: 2\}"):
        demo.run_ranks("demo-test", ["--no-such-option"], timeout_s=60)
