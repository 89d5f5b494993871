"""Cosine logits as normalise-and-matmul: one ``[frames, classes]`` product, not a ``[classes + 1, frames, dim]`` broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
from torch import Tensor

from hubert_fast import cpu
from hubert_fast.reference.cosine_logits import NORM_MIN, TEMPERATURE

if TYPE_CHECKING:
    from hubert_fast.ops.cosine_logits import Arguments


class Unit(NamedTuple):
    """Rows over their clamped norms."""

    direction: Tensor  # [rows, dim]
    norm: Tensor  # [rows, 1]


def unit_rows(x: Tensor) -> Unit:
    """Each row over its norm, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=NORM_MIN)
    return Unit(x / norm, norm)


def unit_rows_backward(grad: Tensor, unit: Unit) -> Tensor:
    """d(x / |x|): what of the gradient is orthogonal to the direction, over the norm.

    For a row of zeros the direction is 0 and so is the projection: the gradient passes over the clamped norm, as autograd's.
    """
    along = (grad * unit.direction).sum(1, keepdim=True)
    return torch.addcmul(grad, unit.direction, along, value=-1).div_(unit.norm)


def class_groups(label_embeddings: Tensor) -> Optional[Tensor]:
    """For each class a number that classes with an equal embedding, and no others, share: [classes] int64.

    None on a CPU where no two are equal, as their norms mostly tell. Where these do not, and on other devices, a 64-bit hash of
    their bits brings equal rows together, and each is compared with its neighbour. That is linear in the size of the embeddings,
    and the host waits for nothing.
    """
    if cpu.is_cpu(label_embeddings.device) and _differ(label_embeddings):
        return None
    x = (label_embeddings + 0.0).contiguous()  # -0.0 equals 0.0 but has other bits
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32).long()
    multipliers = torch.arange(1, 2 * bits.shape[1], 2, device=x.device) * 0x1E3779B97F4A7C15
    mixed = (bits ^ (bits << 29)) * multipliers  # odd multipliers, and products wrap modulo 2^64
    order = torch.argsort((mixed ^ (mixed >> 31)).sum(1), stable=True)
    ordered = x[order]
    starts = torch.ones(len(x), dtype=torch.int64, device=x.device)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(1)
    groups = torch.empty_like(order)
    groups[order] = starts.cumsum(0)
    return groups


def _differ(rows: Tensor) -> bool:
    """Whether norms tell that no two ``rows`` are equal.

    Equal rows are added up in one order, so their norms are equal. In float64 the norms of rows in float32 or 16 bits are next to
    exact: two rows that differ hardly ever have the same.
    """
    norms = torch.linalg.vector_norm(rows.contiguous(), dim=1, dtype=torch.float64).tolist()
    return len(set(norms)) == len(norms)


def fill_equal_(scores: Tensor, labels: Tensor, groups: Optional[Tensor], value: float) -> Tensor:
    """``scores`` ([frames, classes]) with ``value`` at the classes that equal a frame's own, which is one of them."""
    if groups is None:
        return scores.scatter_(1, labels[:, None], value)
    return scores.masked_fill_(groups[labels][:, None] == groups, value)


def forward(arguments: Arguments, save: bool) -> tuple[tuple[Tensor], list[Tensor]]:
    frames, label_embeddings, labels = arguments
    embeddings = unit_rows(label_embeddings)
    similarity = cpu.product(unit_rows(frames).direction, embeddings.direction, None).div_(TEMPERATURE)
    positive, groups = similarity.gather(1, labels[:, None]), class_groups(label_embeddings)
    logits = torch.cat([positive, fill_equal_(similarity, labels, groups, float("-inf"))], 1)
    return (logits.to(frames.dtype),), []


def backward(
    arguments: Arguments, saved: list[Tensor], gradients: tuple[Tensor], wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    (grad,), (frames, label_embeddings, labels) = gradients, arguments
    x, embeddings = unit_rows(frames), unit_rows(label_embeddings)
    groups = class_groups(label_embeddings)
    similarity_grad = fill_equal_(grad[:, 1:].to(x.direction.dtype, copy=True), labels, groups, 0.0)
    similarity_grad.scatter_(1, labels[:, None], grad[:, :1].to(x.direction.dtype))
    similarity_grad.div_(TEMPERATURE)
    frames_grad = unit_rows_backward(cpu.product_with(similarity_grad, embeddings.direction), x)
    embeddings_grad = unit_rows_backward(cpu.product_over_rows(similarity_grad, x.direction), embeddings)
    return frames_grad.to(frames.dtype).contiguous(), embeddings_grad.to(label_embeddings.dtype).contiguous()
