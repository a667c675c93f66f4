# Types of the compiled core; csrc/bindings.cpp is the implementation, one block per bind_*.

from typing import Any

import numpy as np
import numpy.typing as npt

# ---- plan

class PlanLimits:
    def __init__(
        self,
        *,
        num_dynamic: int,
        num_slots: int,
        num_grad_slots: int,
        min_tokens: int,
        max_recv_rows: int,
        max_return_rows: int,
        max_copies: int,
        target_ppm: int,
        grain_rows: int,
        search_steps: int,
    ) -> None: ...

def make_plan(
    policy: str,
    counts: npt.NDArray[np.int32],
    limits: PlanLimits,
    costs: dict[str, int] | None = None,
) -> tuple[npt.NDArray[np.int32], int]: ...
def plan_fault(
    counts: npt.NDArray[np.int32], limits: PlanLimits, moves: npt.NDArray[np.int32]
) -> str: ...
def predict(
    counts: npt.NDArray[np.int32], moves: npt.NDArray[np.int32], costs: dict[str, int]
) -> int: ...
def time_plans(
    policy: str,
    counts: npt.NDArray[np.int32],
    limits: PlanLimits,
    repeats: int,
    costs: dict[str, int] | None = None,
    evicted_bytes: int = 0,
) -> npt.NDArray[np.float64]: ...

# domain ------------------------------------------------------------------------------------------

class SharedMemory:
    @staticmethod
    def create(name: str, bytes: int) -> SharedMemory: ...  # noqa: A002
    @staticmethod
    def open(name: str, bytes: int) -> SharedMemory: ...  # noqa: A002
    @staticmethod
    def remove(name: str) -> None: ...
    def unlink(self) -> None: ...

class ArenaView: ...

def board_bytes(num_ranks: int, max_local_experts: int) -> int: ...
def arena_parts(
    layers: list[dict[str, Any]], num_slots: int, num_grad_slots: int
) -> dict[str, int]: ...

class Domain:
    def __init__(
        self,
        *,
        rank: int,
        config_hash: int,
        deadline_s: float,
        layers: list[dict[str, Any]],
        num_slots: int,
        num_grad_slots: int,
        pids: list[int],
        global_ranks: list[int],
        board: SharedMemory,
        arenas: list[SharedMemory],
    ) -> None: ...
    def open(self) -> None: ...
    def set_costs(self, layer: int, costs: dict[str, int]) -> None: ...
    def prove_lane(self, bytes: int) -> float: ...  # noqa: A002
    def close(self) -> None: ...
    def closed(self) -> bool: ...
    def begin(
        self,
        kind: int,
        layer: int,
        micro_batch: int,
        grad_bits: int,
        counts: list[int],
        error: str,
        moves: npt.NDArray[np.int32],
        plan_hash: int,
    ) -> int: ...
    def begin_forward(
        self, layer: int, micro_batch: int, grad_bits: int, counts: list[int]
    ) -> int: ...
    def wait_plan(
        self,
    ) -> tuple[
        int,
        str,
        npt.NDArray[np.int32],
        int,
        list[tuple[int, int, int, int, int, int]],
        list[tuple[int, int, int, int, int, int]],
        npt.NDArray[np.int32],
        int,
    ]: ...
    def post_rows(
        self, rows: list[int], weights: list[list[int]], first_row: list[int]
    ) -> None: ...
    def await_rows(self) -> None: ...
    def release_weights(self) -> None: ...
    def release_rows(self) -> None: ...
    def post_returns(self) -> None: ...
    def await_grad_outbox(self) -> None: ...
    def post_grads(self, tensors: list[int]) -> None: ...
    def await_returns(self) -> None: ...
    def release_returns(self) -> None: ...
    def finish(self) -> None: ...
    def await_grads(self, seq: int, helper_ranks: list[int]) -> None: ...
    def release_grads(self, seq: int) -> None: ...
    def fail(self, text: str) -> None: ...
    def failure_text(self) -> str: ...
    def drain(self) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def arena(self) -> ArenaView: ...
    def layer_offsets(self, layer: int) -> dict[str, list[int]]: ...
    def weight_slot(self, layer: int, slot: int, tensor: int) -> int: ...
    def grad_slot(self, layer: int, slot: int, tensor: int) -> int: ...
    def grad_outbox_slot(self, layer: int, slot: int, tensor: int) -> int: ...
