"""Types of the compiled core; csrc/bindings.cpp is the implementation, one block per bind_*."""

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
    ) -> None: ...

def make_plan(
    policy: str, counts: npt.NDArray[np.int32], limits: PlanLimits
) -> tuple[npt.NDArray[np.int32], int]: ...
def time_plans(
    policy: str, counts: npt.NDArray[np.int32], limits: PlanLimits, repeats: int
) -> npt.NDArray[np.float64]: ...
