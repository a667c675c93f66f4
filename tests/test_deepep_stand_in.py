"""The contract of deep_ep that the adapter relies on: the stand-in keeps it, the real one has it.

Each program runs on every arm, on the real package too where there are GPUs, so that the stand-in
cannot drift from what it stands for.
"""

from __future__ import annotations

import sys
from typing import Any

import deepep_stand_in
import pytest
import torch
import torch.distributed as dist
from deepep_cases import HIDDEN, MOST_TOKENS, Case, Kit, Runs, make_arms, make_case, named
from deepep_wire import EventOverlap
from torch import Tensor

NUM_EXPERTS = 8
NUM_TOKENS = [7, 3, 0, 9]


def make_buffer(kit: Kit, **options: Any) -> Any:
    import deep_ep

    if kit.arm.api == "v2":
        options.setdefault("deterministic", True)
        return deep_ep.ElasticBuffer(
            kit.group, num_max_tokens_per_rank=MOST_TOKENS, hidden=HIDDEN, num_topk=3, **options
        )
    config = deep_ep.Buffer.get_dispatch_config(kit.num_ranks)
    size = 2 * config.get_nvl_buffer_size_hint(4 * HIDDEN, kit.num_ranks)
    return deep_ep.Buffer(kit.group, size, 0)


def send(
    kit: Kit, buffer: Any, case: Case, *, is_async: bool = False, alignment: int = 1, **options: Any
) -> dict[str, Any]:
    """One dispatch in bfloat16, by name."""
    x, idx, weights = (t.to(kit.device) for t in (case.tokens, case.topk_idx, case.topk_weights))
    if kit.arm.api == "v2":
        recv_x, recv_idx, recv_weights, handle, event = buffer.dispatch(
            x.bfloat16(), topk_idx=idx, topk_weights=weights, num_experts=NUM_EXPERTS,
            expert_alignment=alignment, async_with_compute_stream=is_async,
        )  # fmt: skip
        counts = handle.num_recv_tokens_per_expert_list
    else:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
        recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
            x.bfloat16(), topk_idx=idx, topk_weights=weights, num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
            expert_alignment=alignment, async_finish=is_async, **options,
        )  # fmt: skip
    received = {"x": recv_x, "idx": recv_idx, "weights": recv_weights}
    return {**received, "counts": counts, "handle": handle, "event": event}


def case_of(kit: Kit, rank: int | None = None) -> Case:
    return make_case(NUM_TOKENS[: kit.num_ranks], rank=kit.rank if rank is None else rank)


def again(kit: Kit, buffer: Any, x: Tensor, handle: Any) -> Tensor:
    options = {}
    if kit.arm.api == "v2":
        options = {"num_experts": handle.num_experts, "num_sms": handle.num_sms}
    received: Tensor = buffer.dispatch(x, handle=handle, **options)[0]
    return received


def expected_of(kit: Kit) -> dict[str, Tensor]:
    """What this rank receives, by (source rank, token), from the cases of all ranks."""
    num_local = NUM_EXPERTS // kit.num_ranks
    parts: dict[str, list[Tensor]] = {"x": [], "idx": [], "weights": []}
    for source in range(kit.num_ranks):
        case = case_of(kit, source)
        local = case.topk_idx - kit.rank * num_local
        is_here = (local >= 0) & (local < num_local)
        comes = is_here.any(1)
        parts["x"].append(case.tokens[comes])
        parts["idx"].append(local.masked_fill(~is_here, -1)[comes])
        parts["weights"].append(case.topk_weights[comes])
    return {name: torch.cat(part) for name, part in parts.items()}


def differences_of_a_dispatch(kit: Kit) -> list[str]:
    """Tokens, choices, weights and counts against the cases of all ranks; sentences."""
    expected = expected_of(kit)
    foreign = expected["idx"] < 0
    if kit.arm.api == "v1":
        expected["weights"] = expected["weights"].masked_fill(foreign, 0)
    wrong = []
    for alignment in (1, 16):
        got = send(kit, make_buffer(kit), case_of(kit), alignment=alignment)
        for name, tensor in expected.items():
            if not torch.equal(got[name].cpu().float(), tensor.float()):
                wrong.append(f"{name}: {got[name]}, expected {tensor}")
        real = [int((expected["idx"] == e).sum()) for e in range(NUM_EXPERTS // kit.num_ranks)]
        counts = [-(-count // alignment) * alignment for count in real]
        if got["counts"] != counts:
            wrong.append(f"counts: {got['counts']}, expected {counts}")
    return wrong


def weights_unmasked(kit: Kit) -> bool:
    """Does a weight arrive where the choice is another rank's?"""
    got = send(kit, make_buffer(kit), case_of(kit))
    return bool((got["weights"][got["idx"] < 0] != 0).any())


def combined_weights(kit: Kit) -> tuple[list[float], list[float]]:
    """What combine makes of weights that are 1 + rank in every slot; and what one API gives."""
    buffer, case = make_buffer(kit), case_of(kit)
    got = send(kit, buffer, case)
    ours = torch.full_like(got["weights"], 1.0 + kit.rank)
    weights = buffer.combine(got["x"], got["handle"], topk_weights=ours)[1]
    owner = case.topk_idx.div(NUM_EXPERTS // kit.num_ranks, rounding_mode="floor")
    if kit.arm.api == "v1":  # the sum over all ranks that have the token
        ranks = torch.arange(kit.num_ranks)
        has = (owner[:, :, None] == ranks).any(1)
        expected = (has * (1.0 + ranks)).sum(1, keepdim=True).expand(-1, 3)
    else:  # that of the slot's owner
        expected = (owner + 1.0) * (case.topk_idx >= 0)
    return weights.flatten().tolist(), expected.flatten().tolist()


def adjoint(kit: Kit) -> tuple[float, float]:
    """<combine(y), g> and <y, dispatch(g)>, summed over ranks; exact in small integers."""
    buffer, case = make_buffer(kit), case_of(kit)
    got = send(kit, buffer, case)
    generator = torch.Generator().manual_seed(kit.rank)
    y = torch.randint(-2, 3, got["x"].shape, generator=generator).bfloat16().to(kit.device)
    g = case.grad.bfloat16().to(kit.device)
    combined = buffer.combine(y, got["handle"])[0]
    received = again(kit, buffer, g, got["handle"])
    products = torch.stack([(combined.double() * g).sum(), (y.double() * received).sum()])
    dist.all_reduce(products, group=kit.group)
    first, second = products.tolist()
    return first, second


def cached_dispatch_differs(kit: Kit) -> bool:
    buffer, case = make_buffer(kit), case_of(kit)
    got = send(kit, buffer, case)
    x = case.tokens.bfloat16().to(kit.device)
    return not torch.equal(again(kit, buffer, x, got["handle"]), got["x"])


def orders_without_determinism(kit: Kit) -> tuple[bool, bool, bool]:
    """V2 as it comes: rows are those expected, but not in that order; its own combine copes."""
    if kit.arm.api == "v1":
        return True, False, True
    case = make_case([9] * kit.num_ranks, rank=kit.rank, masked=False)
    buffer, sorting = make_buffer(kit, deterministic=False), make_buffer(kit)
    got, expected = send(kit, buffer, case), send(kit, sorting, case)
    same_rows = torch.equal(got["x"].sort(0).values, expected["x"].sort(0).values)
    home = [b.combine(r["x"], r["handle"])[0] for b, r in ((buffer, got), (sorting, expected))]
    return same_rows, torch.equal(got["x"], expected["x"]), torch.equal(*home)


def before_and_after_the_wait(kit: Kit) -> tuple[bool, bool, bool]:
    """(counts are right at once, rows are unreadable until the wait, right after it)."""
    if kit.arm.is_real:
        return True, True, True  # what memory holds before the wait is undefined there
    got = send(kit, make_buffer(kit), case_of(kit), is_async=True)
    expected = expected_of(kit)
    counts = [int((expected["idx"] == e).sum()) for e in range(NUM_EXPERTS // kit.num_ranks)]
    unreadable = bool(got["x"].isnan().all()) and bool((got["idx"] < -1).all())
    got["event"].current_stream_wait()
    return got["counts"] == counts, unreadable, torch.equal(got["x"].float(), expected["x"])


def padded_to_the_worst(kit: Kit) -> tuple[list[int], bool, bool]:
    if kit.arm.api == "v2":
        return [], True, True
    got = send(kit, make_buffer(kit), case_of(kit), num_worst_tokens=40)
    count = len(expected_of(kit)["x"])
    tail = bool((got["idx"][count:] == -1).all()) and len(got["x"]) == 40
    return got["counts"], tail, torch.equal(got["x"][:count].cpu().float(), expected_of(kit)["x"])


PROGRAMS = named(
    differences_of_a_dispatch, weights_unmasked, combined_weights, adjoint,
    cached_dispatch_differs, orders_without_determinism, before_and_after_the_wait,
    padded_to_the_worst,
)  # fmt: skip


@pytest.fixture(scope="module", params=make_arms())
def runs(request: pytest.FixtureRequest) -> Runs:
    return Runs(request.param, PROGRAMS)


def test_tokens_arrive_by_source_rank_and_token_with_local_choices(runs: Runs) -> None:
    for differences in runs.of(differences_of_a_dispatch):
        assert differences == []


def test_v1_zeroes_the_weights_of_foreign_choices_and_v2_does_not(runs: Runs) -> None:
    assert any(runs.of(weights_unmasked)) == (runs.arm.api == "v2")


def test_combine_adds_weights_in_v1_and_takes_the_owners_in_v2(runs: Runs) -> None:
    for weights, expected in runs.of(combined_weights):
        assert weights == expected


def test_combine_and_cached_dispatch_are_adjoint(runs: Runs) -> None:
    for first, second in runs.of(adjoint):
        assert first == second != 0


def test_a_cached_dispatch_lands_as_the_first_did(runs: Runs) -> None:
    assert not any(runs.of(cached_dispatch_differs))


def test_v2_orders_inside_a_source_rank_only_if_deterministic(runs: Runs) -> None:
    same_rows, same_order, same_home = zip(*runs.of(orders_without_determinism), strict=True)
    assert all(same_rows)
    assert all(same_home)
    assert runs.arm.is_real or not any(same_order)


def test_counts_are_there_before_the_payload(runs: Runs) -> None:
    assert runs.of(before_and_after_the_wait) == [(True, True, True)] * runs.arm.num_ranks


def test_the_worst_case_is_padded_without_counts(runs: Runs) -> None:
    assert runs.of(padded_to_the_worst) == [([], True, True)] * runs.arm.num_ranks


@pytest.mark.parametrize("version", deepep_stand_in.VERSIONS)
def test_event_overlap_lies_in_utils_up_to_1_2(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("deep_ep", "deep_ep.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    package = deepep_stand_in.install(version)
    from deep_ep.utils import EventHandle

    assert package.EventHandle is EventHandle
    assert hasattr(sys.modules["deep_ep.utils"], "EventOverlap") == (version == "1.2.1")
    assert hasattr(package, "ElasticBuffer") == (version == "2.1.0")


def test_an_event_of_a_synchronous_call_cannot_be_waited_for() -> None:
    with pytest.raises(AssertionError):
        EventOverlap(None).current_stream_wait()
