"""Tensors of the CPU through operators of another device, so that one suite tests them all."""

from typing import Any

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> Tensor:
    """All bytes of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def carry(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides, at the same offset of memory that holds the same."""
    storage = torch.empty_like(storage_of(tensor), device=device)
    storage.copy_(storage_of(tensor))
    view = torch.empty(0, dtype=tensor.dtype, device=device)
    return view.set_(storage.untyped_storage(), tensor.storage_offset(), *shape(tensor))


def shape(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.size(), tensor.stride()


def ferried(operator: torch._ops.OpOverload, device: str) -> Any:
    """The operator run on ``device``, its arguments there and its results back."""
    parameters = operator._schema.arguments

    def call(*args: Any) -> Any:
        carried, written = [], []
        for parameter, argument in zip(parameters, args, strict=True):
            # A seed may lie on the host, and here does.
            if not isinstance(argument, Tensor) or parameter.name == "seed":
                carried.append(argument)
                continue
            carried.append(carry(argument.detach(), device))
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                written.append((argument.detach(), carried[-1]))
        results = operator(*carried)
        for here, there in written:
            storage_of(here).copy_(storage_of(there))
        if isinstance(results, Tensor):
            return results.cpu()
        return results and tuple(result.cpu() for result in results)

    return call
