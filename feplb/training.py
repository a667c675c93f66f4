"""What a training loop needs around experts that live on different ranks.

Data parallelism alone holds every parameter on every rank. Under EP each rank holds its own
experts, so gradients, the global norm and checkpoints must tell the two apart. A module marks its
stacked expert parameters; everything here finds them by that mark. (DistributedDataParallel does
not know it and would average different experts: use sync_gradients in its place.)
Called by the user's loop between backward and the optimizer, and to save and load.
Groups: `dp_group` = all ranks that see different tokens (the EP ranks among them), `ep_group` = the
ranks that hold one set of experts together, `expert_dp_group` = the ranks that hold the same
experts. None always means this rank alone. Example with 4 ranks, ep_size 2:
  dp_group [0 1 2 3]    ep_group [0 1] [2 3]    expert_dp_group [0 2] [1 3]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

_MARK = "feplb_expert_parameters"
_BUCKET_BYTES = 32 * 2**20

__all__ = [
    "ExpertGroups",
    "clip_grad_norm",
    "expert_parameter_names",
    "expert_state_dict",
    "is_expert_parameter",
    "load_expert_state_dict",
    "make_expert_groups",
    "mark_expert_parameters",
    "sync_gradients",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroups:
    """The two groups of this rank that EP adds to a data parallel group."""

    ep: dist.ProcessGroup | None
    expert_dp: dist.ProcessGroup | None


def make_expert_groups(ep_size: int) -> ExpertGroups:
    """Divide the default group into EP groups of ep_size consecutive ranks. Collective.

    Returns:
        This rank's EP group, and the group of the ranks that hold the same experts.
    Raises:
        ValueError: the number of ranks is not a multiple of ep_size.
    """
    num_ranks = dist.get_world_size()
    if ep_size < 1 or num_ranks % ep_size:
        raise ValueError(f"ep_size is {ep_size}, expected a divisor of the {num_ranks} ranks.")
    ranks = list(range(num_ranks))
    ep, _ = dist.new_subgroups_by_enumeration(
        [ranks[first : first + ep_size] for first in range(0, num_ranks, ep_size)]
    )
    expert_dp, _ = dist.new_subgroups_by_enumeration(
        [ranks[ep_rank::ep_size] for ep_rank in range(ep_size)]
    )
    return ExpertGroups(ep=ep, expert_dp=expert_dp)


def mark_expert_parameters(module: nn.Module, *names: str) -> None:
    """Declare parameters of `module` as experts of this rank, stacked along dimension 0.

    The mark lies on the module: it survives deepcopy, .to() and loading, which may all replace the
    parameter objects.

    Raises:
        ValueError: the module itself has no parameter of that name.
    """
    for name in names:
        if name not in dict(module.named_parameters(recurse=False)):
            raise ValueError(f"{type(module).__name__} has no parameter {name!r} to mark.")
    setattr(module, _MARK, (*getattr(module, _MARK, ()), *names))


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names of all expert parameters, as model.named_parameters() and state_dict() have them."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in getattr(module, _MARK, ())
    }


def is_expert_parameter(model: nn.Module, name: str) -> bool:
    """Whether the parameter of that name holds experts of this rank (else: one copy per rank)."""
    return name in expert_parameter_names(model)


def sync_gradients(
    model: nn.Module,
    dp_group: dist.ProcessGroup | None,
    ep_group: dist.ProcessGroup | None,
    expert_dp_group: dist.ProcessGroup | None = None,
) -> None:
    """Make .grad what one process would have computed on all ranks' tokens, with the mean loss.

    Collective over dp_group and expert_dp_group; call it once, after the last backward of a step.
    Each rank's loss is the mean over its own tokens, and all ranks have equally many (else weight
    the losses so that their mean over the ranks is the loss you want). Sums run in fp32 and in a
    fixed order. A gradient that is None on some ranks counts as zero there; None on all stays None.

    Args:
        model: with its trainable parameters in the same order on every rank.
        dp_group: all ranks that see different tokens.
        ep_group: the group the MoE layers were built with.
        expert_dp_group: ranks with the same experts; needed where ep_group is smaller than
            dp_group (see make_expert_groups).
    Raises:
        ValueError: the sizes of the three groups do not fit together.
    """
    # One process would minimise (1 / W) * sum over the W ranks of loss_r. Rank r runs backward
    # from loss_r. A replicated parameter's gradient there is d loss_r, so: sum, divide by W.
    # An expert's gradient already holds the sum of d loss_r over the ranks r of its EP group: the
    # all-to-all brought all their rows in forward, and all their row gradients in backward. The
    # rest of the sum lies with the expert's replicas in the other EP groups; so: sum over those
    # (none if EP spans all ranks), and divide by the same W.
    num_ranks = _size(dp_group)
    if num_ranks != _size(ep_group) * _size(expert_dp_group):
        raise ValueError(
            f"dp_group has {num_ranks} ranks, ep_group {_size(ep_group)} and expert_dp_group "
            f"{_size(expert_dp_group)}, expected dp = ep * expert_dp. Pass the groups of "
            "make_expert_groups(ep_size)."
        )
    experts, replicated = _split_parameters(model)
    _sum_and_divide(replicated, dp_group, num_ranks)
    _sum_and_divide(experts, expert_dp_group, num_ranks)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float, ep_group: dist.ProcessGroup | None) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm. Collective over ep_group.

    Call it after sync_gradients. The norm counts every expert once, whichever rank holds it, and
    replicated parameters once; it is the same number on all ranks and at every EP degree.

    Returns:
        The norm before clipping, fp64, zero-dimensional.
    """
    experts, replicated = _split_parameters(model)
    squares = [_square(param.grad).sum() for param in replicated if param.grad is not None]
    if experts:
        squares.append(_expert_squares(experts, ep_group).sum())
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    norm = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for param in (*replicated, *experts):
        if param.grad is not None:
            param.grad.mul_(scale.to(param.grad.device))
    return norm


def expert_state_dict(
    model: nn.Module, ep_group: dist.ProcessGroup | None, *, rank0_only: bool = False
) -> dict[str, Tensor]:
    """The state_dict of the model without EP: experts are [num_experts, ...] in logical order.

    Collective over ep_group. Names, shapes and bytes are those of an unsharded model, so the file
    loads at any EP degree, and without feplb.

    Args:
        rank0_only: only EP rank 0 keeps the tensors (in host memory), the others get an empty dict.
    Returns:
        Tensors on the CPU, copies: later steps do not change them.
    """
    keeps = not rank0_only or _rank(ep_group) == 0
    experts = expert_parameter_names(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = _gather(tensor, ep_group) if name in experts else tensor
        if keeps:
            state[name] = whole.detach().to("cpu", copy=True)
    return state


def load_expert_state_dict(
    model: nn.Module, state: dict[str, Tensor], ep_group: dist.ProcessGroup | None
) -> None:
    """Load what expert_state_dict saved, or an unsharded model's state_dict, at any EP degree.

    Each rank takes its own experts out of [num_experts, ...]. Not collective. Nothing is loaded if
    anything does not fit.

    Raises:
        ValueError: names that are missing or unknown, or a tensor of another shape (the message
            has name, seen and expected).
    """
    own, experts = model.state_dict(), expert_parameter_names(model)
    if missing := sorted(own.keys() - state.keys()):
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}. Nothing was loaded.")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"the model has no {', '.join(unknown)}. Nothing was loaded.")
    ep_rank, ep_size = _rank(ep_group), _size(ep_group)
    part: dict[str, Tensor] = {}
    for name, tensor in own.items():
        expected = list(tensor.shape)
        if name in experts:
            expected[0] *= ep_size
        if list(state[name].shape) != expected:
            raise ValueError(
                f"{name} is {list(state[name].shape)} in the checkpoint, expected {expected} "
                f"(EP size {ep_size}). Nothing was loaded."
            )
        part[name] = state[name]
        if name in experts:
            part[name] = state[name].narrow(0, ep_rank * len(tensor), len(tensor))
    model.load_state_dict(part)


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters: (experts, replicated), each once, in the model's order."""
    names = expert_parameter_names(model)
    experts: list[nn.Parameter] = []
    replicated: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (experts if name in names else replicated).append(param)
    return experts, replicated


@torch.no_grad()
def _sum_and_divide(
    params: list[nn.Parameter], group: dist.ProcessGroup | None, divisor: int
) -> None:
    if _size(group) > 1:
        _fill_missing(params, group)
    for bucket in _buckets([param.grad for param in params if param.grad is not None]):
        if _size(group) == 1:
            for grad in bucket:
                grad.div_(divisor)
            continue
        flat = torch.cat([grad.reshape(-1).to(_sum_dtype(grad)) for grad in bucket])
        dist.all_reduce(flat, group=group)
        sizes = [grad.numel() for grad in bucket]
        for grad, total in zip(bucket, flat.div_(divisor).split(sizes), strict=True):
            grad.copy_(total.view_as(grad))


def _fill_missing(params: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Give a zero gradient to each parameter that has none here but has one on another rank."""
    if not params:
        return
    has_grad = torch.tensor([param.grad is not None for param in params], dtype=torch.int32)
    has_grad = has_grad.to(params[0].device)
    dist.all_reduce(has_grad, op=dist.ReduceOp.MAX, group=group)
    for param, anywhere in zip(params, has_grad.tolist(), strict=True):
        if anywhere and param.grad is None:
            param.grad = torch.zeros_like(param)


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients that fit into one message; of one device and dtype of the sum."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for grad in grads:
        size = grad.numel() * _sum_dtype(grad).itemsize
        is_alike = not bucket or (
            bucket[0].device == grad.device and _sum_dtype(bucket[0]) == _sum_dtype(grad)
        )
        if bucket and (num_bytes + size > _BUCKET_BYTES or not is_alike):
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(grad)
        num_bytes += size
    if bucket:
        yield bucket


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _square(grad: Tensor, *, dims: tuple[int, ...] | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, dim=dims, dtype=torch.float64)
    return norm.square()


def _expert_squares(experts: list[nn.Parameter], ep_group: dist.ProcessGroup | None) -> Tensor:
    """Squared norm of every single expert of all EP ranks, fp64, in logical order.

    One number per expert, summed only after the exchange: so the total does not depend, in any
    bit, on how the experts are spread.
    """
    ep_rank, ep_size = _rank(ep_group), _size(ep_group)
    parts = []
    for param in experts:
        part = torch.zeros(ep_size, len(param), dtype=torch.float64, device=param.device)
        if param.grad is not None:
            part[ep_rank] = _square(param.grad.flatten(1), dims=(1,))
        parts.append(part.view(-1))
    squares = torch.cat(parts)
    if ep_size > 1:
        dist.all_reduce(squares, group=ep_group)
    return squares


def _gather(tensor: Tensor, ep_group: dist.ProcessGroup | None) -> Tensor:
    if _size(ep_group) == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(_size(ep_group))]
    dist.all_gather(parts, tensor.contiguous(), group=ep_group)
    return torch.cat(parts)
