"""One call of the operator saliency_graft: what every backend is given, and what it gives back."""

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

NORMALIZE = ("max", "mean", "none")
"""What :attr:`Call.normalize` counts: the divisors of the map before the softmax."""
NORM = ("l1", "l2", "l2sq", "area")
"""What :attr:`Call.norm` counts: the norms of surviving saliency; "area" ignores saliency."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What :attr:`Call.dtype` counts: the dtypes that standardised images come out in."""


class Call(NamedTuple):
    """The arguments of the operator, in order; its schema is generated from these annotations.

    Shapes: B images, rows = augmentations * B outputs, grid_size = (gh, gw). The operator trusts
    them: :mod:`sg_kernels.pipeline` checks what a user gives.
    """

    images: Tensor
    """(B, C, depth * H, W)."""
    seed: Tensor
    """int64 (1,), on the CPU or on the device of the images."""
    grid_size: tuple[int, int]
    temperature: float
    threshold: float
    normalize: int
    """Index into NORMALIZE."""
    norm: int
    """Index into NORM."""
    features: Tensor | None = None
    """(B, K, h, w); either these or ``saliency``."""
    saliency: Tensor | None = None
    """float32 (B, h, w); what is not >= 0 counts as NaN. (B, 0, 0), no map, only where ``mask`` is
    given and ``norm`` is "area"."""
    mask: Tensor | None = None
    """bool (rows, gh, gw), in place of stages 3 to 5, whose arguments then count for nothing."""
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    """int64 (rows,); None: the pairing is drawn."""
    targets: Tensor | None = None
    """Class ids, int64 (B,), or dense rows, float32 (B, num_classes)."""
    out: Tensor | None = None
    """(rows, C, depth * H, W), of out_dtype(), where the images are written; None: to a fresh
    tensor."""
    step: Tensor | None = None
    """int64 (1,), advanced by one; the call's seed is then rng.call_seed(seed, step, rank)."""
    rank: int = 0
    quantiles: Tensor | None = None
    """rng.beta_quantiles, from which p is drawn; None: p is ``keep_prob``."""
    keep_prob: float = 1.0
    k: int | None = None
    """Keep the k largest cells instead of those above ``threshold``."""
    prob: float = 1.0
    """The probability that a draw grafts at all."""
    augmentations: int = 1
    no_fixed_points: bool = False
    num_classes: int = 0
    label_smoothing: float = 0.0
    depth: int = 1
    """How many planes of H lines, with a mask each, lie one above the other in an image."""
    affine: Tensor | None = None
    """float32 (2, C): scale and shift of each channel, by which images come out standardised."""
    dtype: int = 0
    """Index into DTYPES, of what images come out in with ``affine``; without it in their own."""

    def source(self) -> Tensor:
        """Features, or a ready map."""
        source = self.saliency if self.features is None else self.features
        assert source is not None
        return source

    def out_dtype(self) -> torch.dtype:
        return self.images.dtype if self.affine is None else DTYPES[self.dtype]


class Outputs(NamedTuple):
    """What the operator returns. No output shares memory with an input."""

    images: Tensor
    """(rows, C, depth * H, W), in the memory format of the input; empty, (0,), where ``out`` is
    given."""
    lam: Tensor
    """float32 (rows,)."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    """int64 (rows,)."""
    mask: Tensor
    """bool (rows, gh, gw)."""
    saliency: Tensor
    """float32 (B, h, w), or (B, 0, 0) where the call has no map."""
    targets: Tensor
    """float32 (rows, num_classes); (rows, 0) without targets."""


WRITTEN = {"out": "a", "step": "b"}
"""The arguments that the operator writes to, and what a schema calls their memory."""
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[int, int]: "int[2]",
    int: "int",
    int | None: "int?",
    float: "float",
    bool: "bool",
}


def parameters() -> str:
    """The operator's parameters, as a schema lists them."""
    listed = []
    for name, kind in get_type_hints(Call).items():
        written = f"Tensor({WRITTEN[name]}!)?" if name in WRITTEN else SCHEMA_TYPES[kind]
        listed.append(f"{written} {name}")
    return ", ".join(listed)


def schema() -> str:
    """The operator's schema, less its name."""
    results = [f"Tensor {name}" for name in Outputs._fields]
    return f"({parameters()}) -> ({', '.join(results)})"
