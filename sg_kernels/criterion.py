"""Mixes losses instead of targets, for criteria that take no dense targets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sg_kernels import checks
from sg_kernels.pipeline import GraftResult


def mix_criterion(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    result: GraftResult | tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The mean of lam * criterion(logits, y_i) + (1 - lam) * criterion(logits, y_j).

    For criteria that take no dense targets. ``lam`` differs from row to row, so the criterion must
    give one loss per row: a function that does, or a module with a ``reduction``, which is called
    with ``"none"``. The mixed losses are then reduced as the module would, with ``ignore_index``
    and class weights.

    Args:
        criterion: called with ``logits`` and one target per row.
        logits: (n * B, ...), of ``result.images``.
        targets: (B, ...), of the images that were grafted, in whatever form ``criterion`` takes.
        result: of :func:`saliency_graft` or a module, or its (lam, index). None, which a module's
            is if it mixed nothing, gives criterion(logits, y_i).

    Returns:
        A scalar, with gradient to ``logits``.

    Raises:
        TypeError, ValueError: a bad argument, by its name, or a loss that is not one per row.
    """
    if not callable(criterion):
        raise TypeError(f"criterion must be callable; got {type(criterion).__name__}")
    checks.check_tensor("logits", logits, "(n * B, ...)")
    checks.check_tensor("targets", targets, "(B, ...)", device=logits.device)
    per_row, reduction = _per_row(criterion)
    if result is None:
        _check_row_counts(logits, targets, None, None)
        loss, weight = _losses(criterion, per_row, logits, targets)
    else:
        lam, index = _lam_and_index(result, logits.device)
        saliency = result.saliency if isinstance(result, GraftResult) else None
        expected = None if saliency is None else len(saliency)
        _check_row_counts(logits, targets, len(lam), expected)
        batch = len(targets)
        own = targets.repeat(len(logits) // max(batch, 1), *[1] * (targets.dim() - 1))
        # Where an index is out of range lam is NaN, so any row will do.
        other = targets[index.clamp(0, max(batch - 1, 0))]
        own_loss, own_weight = _losses(criterion, per_row, logits, own)
        other_loss, other_weight = _losses(criterion, per_row, logits, other)
        lam = lam.reshape(-1, *[1] * (own_loss.dim() - 1))
        loss = lam * own_loss + (1 - lam) * other_loss
        weight = lam * own_weight + (1 - lam) * other_weight
    return loss.sum() if reduction == "sum" else loss.sum() / weight.expand_as(loss).sum()


def _per_row(criterion: Any) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """The criterion without its reduction, and that reduction."""
    reduction = getattr(criterion, "reduction", None)
    if not isinstance(criterion, nn.Module) or reduction not in ("mean", "sum"):
        return criterion, "mean"
    # As copy.copy does, which torch.compile cannot trace.
    per_row: Any = type(criterion).__new__(type(criterion))
    per_row.__dict__.update(criterion.__dict__)
    per_row.reduction = "none"
    return per_row, str(reduction)


def _losses(
    criterion: Any,
    per_row: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the weight of each in the mean."""
    loss = per_row(logits, targets)
    if not isinstance(loss, Tensor):
        raise TypeError(f"criterion must return a tensor; got {type(loss).__name__}")
    if loss.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"criterion must give one loss a row (reduction='none'), ({len(logits)}, ...); "
            f"got {tuple(loss.shape)}"
        )
    ids = not (targets.is_floating_point() or targets.is_complex())
    if not (ids and isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))):
        return loss, torch.ones_like(loss)
    counts = targets != criterion.ignore_index
    if criterion.weight is None:
        return loss, counts.to(loss.dtype)
    return loss, criterion.weight[torch.where(counts, targets, 0)] * counts


def _lam_and_index(result: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(result, GraftResult):
        lam, index = result.lam, result.index
    elif isinstance(result, tuple) and len(result) == 2:
        lam, index = result
    else:
        raise TypeError(
            f"result must be a GraftResult, (lam, index) or None; got {type(result).__name__}"
        )
    checks.check_tensor("result: lam", lam, "(n * B,)", 1, device=device)
    checks.check_tensor("result: index", index, "(n * B,)", 1, device=device)
    return lam, index


def _check_row_counts(logits: Tensor, targets: Tensor, rows: int | None, batch: int | None) -> None:
    """Checks against the ``rows`` and the ``batch`` of the result; None: unknown."""
    if logits.dim() == 0 or (rows is not None and len(logits) != rows):
        expected = "one row per image" if rows is None else f"{rows} rows, as result has"
        raise ValueError(f"logits must have {expected}; got {tuple(logits.shape)}")
    count, given = len(logits), len(targets) if targets.dim() else 0
    if rows is None:
        fits, expected = given == count, f"{count} rows, as logits has"
    elif batch is not None:
        fits, expected = given == batch, f"B = {batch} rows, as the images of result"
    else:
        fits = given == count or (given > 0 and count % given == 0)
        expected = f"B rows, where n * B = {rows}"
    if not fits:
        raise ValueError(f"targets must have {expected}; got {tuple(targets.shape)}")
