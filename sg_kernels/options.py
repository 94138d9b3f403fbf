"""The options of a call: names, types, defaults and checks, listed nowhere else in Python.

What they mean stands in :func:`sg_kernels.saliency_graft`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter
from typing import Annotated, Any, Literal, TypedDict, TypeGuard, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from sg_kernels.call import DTYPES, NORM, NORMALIZE

Normalize = Literal["max", "mean", "none"]
Selection = Literal["bernoulli", "topk"]
Label = Literal["saliency", "area"]
Norm = Literal["l1", "l2", "l2sq"]
GridSize = tuple[int, int] | Sequence[tuple[int, int]] | None
Threshold = float | Literal["mean"]
Numbers = float | Sequence[float]
Standardize = tuple[Numbers, Numbers] | None
TokenGrid = tuple[int, int] | Literal["square"] | Callable[[Tensor], tuple[int, int]] | None

TEMPERATURES = 1e-38, 1e38
"""Between these, float32 holds a number and its reciprocal."""
ALPHAS = 0.0, 1e6
"""Above, p is 1/2 to three digits: keep_prob=0.5 says so more plainly."""
MAX_ROWS = 2**31 - 1
"""Of rows and of classes, which the kernels count in 32 bits."""

REPLACED_BY_MASK = (
    *("temperature", "normalize", "threshold", "grid_size"),
    *("alpha", "keep_prob", "selection", "k"),
)
"""The options that a mask excludes: of stages 3 to 5, and the grid, which is the mask's own."""

SCALARS = (str, bool, int, float, type(None))
"""Types whose values can key a cache: equal type and value mean the same option."""

Check = Callable[[str, Any], None]
Function = TypeVar("Function", bound=Callable[..., Any])


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (float, int, np.floating, np.integer)) and not isinstance(value, bool)


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def is_size(value: Any) -> TypeGuard[tuple[int, int]]:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(is_int(extent) and extent >= 1 for extent in value)
    )


def check_probability(name: str, value: Any) -> None:
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number in [0, 1]; got {value!r}")


def check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not (is_int(value) and value >= least):
        raise ValueError(f"{name} must be an int >= {least}; got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}; got {value!r}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")


def _positive(least: float, most: float) -> Check:
    def check(name: str, value: Any) -> None:
        if not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a finite number > 0; got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least:g}; got {value!r}")
        if value > most:
            raise ValueError(f"{name} must be at most {most:g}; got {value!r}")

    return check


def _check_threshold(name: str, value: Any) -> None:
    named = isinstance(value, str) and value == "mean"
    if not (named or (is_number(value) and 0 <= value < 1)):
        raise ValueError(f"{name} must be 'mean' or in [0, 1); got {value!r}")


def _check_grid_size(name: str, value: Any) -> None:
    sizes = isinstance(value, Sequence) and len(value) > 0 and all(is_size(size) for size in value)
    if not (is_size(value) or sizes):
        raise ValueError(
            f"{name} must be (gh, gw), ints >= 1, a sequence of such sizes, or None; got {value!r}"
        )


def _check_channel_dim(name: str, value: Any) -> None:
    if not (is_int(value) and value in (1, 2, 3, -1, -2, -3)):
        raise ValueError(f"{name} must be 1, 2, 3, -1, -2 or -3; got {value!r}")


def _check_token_grid(name: str, value: Any) -> None:
    if not (is_size(value) or (isinstance(value, str) and value == "square") or callable(value)):
        raise ValueError(
            f"{name} must be (h, w), ints >= 1, 'square', or a function of the images; "
            f"got {value!r}"
        )


def numbers_of(value: Any) -> tuple[float, ...] | None:
    """A number or a sequence of numbers as a tuple; None for anything else."""
    several = [value] if is_number(value) else value
    if not (isinstance(several, Sequence) and several and all(map(is_number, several))):
        return None
    return tuple(float(number) for number in several)


def _check_standardize(name: str, value: Any) -> None:
    pair = value if isinstance(value, Sequence) and len(value) == 2 else (None, None)
    mean, std = numbers_of(pair[0]), numbers_of(pair[1])
    if mean is None or std is None or not all(0 < s < math.inf for s in std):
        raise ValueError(
            f"{name} must be (mean, std), each a number or a sequence of a number per channel, "
            f"std > 0; got {value!r}"
        )
    if not (len(mean) == len(std) or 1 in (len(mean), len(std))):
        raise ValueError(f"{name} must have as many means as stds; got {len(mean)} and {len(std)}")
    # A NaN among the means compares as false.
    most = min(std) * float(np.finfo(np.float32).max)
    if not all(abs(number) <= most for number in (1.0, *mean)):
        raise ValueError(f"{name}: 1 / std and mean / std must be finite in float32; got {value!r}")


def _check_dtype(name: str, value: Any) -> None:
    if value not in DTYPES:
        accepted = " or ".join(map(str, DTYPES))
        raise ValueError(f"{name} must be {accepted}, or None; got {value!r}")


def _one_of(*names: str) -> Check:
    accepted = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"

    def check(name: str, value: Any) -> None:
        if value not in names:
            raise ValueError(f"{name} must be {accepted}; got {value!r}")

    return check


def _at_least(least: int, most: int | None = None) -> Check:
    return lambda name, value: check_int(name, value, least, most)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


@dataclass(slots=True, frozen=True)
class Options:
    """The options of a call, checked."""

    temperature: Annotated[float, _positive(*TEMPERATURES)] = 0.2
    normalize: Annotated[Normalize, _one_of(*NORMALIZE)] = "max"
    threshold: Annotated[Threshold, _check_threshold] = "mean"
    grid_size: Annotated[GridSize, _or_none(_check_grid_size)] = None
    alpha: Annotated[float, _positive(*ALPHAS)] = 1.0
    keep_prob: Annotated[float | None, _or_none(check_probability)] = None
    selection: Annotated[Selection, _one_of("bernoulli", "topk")] = "bernoulli"
    k: Annotated[int | None, _or_none(_at_least(1))] = None
    label: Annotated[Label, _one_of("saliency", "area")] = "saliency"
    norm: Annotated[Norm, _one_of("l1", "l2", "l2sq")] = "l1"
    augmentations: Annotated[int, _at_least(1, MAX_ROWS)] = 1
    no_fixed_points: Annotated[bool, check_bool] = False
    num_classes: Annotated[int | None, _or_none(_at_least(1, MAX_ROWS))] = None
    label_smoothing: Annotated[float, check_probability] = 0.0
    channel_dim: Annotated[int, _check_channel_dim] = 1
    token_grid: Annotated[TokenGrid, _or_none(_check_token_grid)] = None
    prefix_tokens: Annotated[int, _at_least(0)] = 0
    standardize: Annotated[Standardize, _or_none(_check_standardize)] = None
    dtype: Annotated[torch.dtype | None, _or_none(_check_dtype)] = None
    backend: str | None = None
    """Checked by backends.choose, as what can run depends on the tensors of a call."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS:
            check(name, getattr(self, name))
        if (self.selection == "topk") != (self.k is not None):
            raise ValueError(f"k goes with selection='topk'; got k={self.k!r}, {self.selection!r}")
        if self.dtype is not None and self.standardize is None:
            raise ValueError(
                "dtype goes with standardize=(mean, std): grafting alone copies images as they are"
            )

    def norm_position(self) -> int:
        """What :attr:`sg_kernels.call.Call.norm` is for these options."""
        return NORM.index("area" if self.label == "area" else self.norm)

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Those of ``standardize``, as many of one as of the other: one, or one per channel."""
        assert self.standardize is not None
        mean, std = map(numbers_of, self.standardize)
        assert mean is not None
        assert std is not None
        count = max(len(mean), len(std))
        return mean * (count // len(mean)), std * (count // len(std))

    def out_dtype(self, images: Tensor) -> torch.dtype:
        """What images come out in."""
        if self.standardize is None or (self.dtype is None and images.is_floating_point()):
            return images.dtype
        return self.dtype or torch.float32

    def sizes(self, map_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The grid sizes of a call: the map's own, the one given, or those to draw from."""
        if self.grid_size is None:
            return (map_size,)
        given: Any = self.grid_size
        return tuple((gh, gw) for gh, gw in ([given] if is_size(given) else given))


class OptionTypes(TypedDict, total=False):
    """The fields of :class:`Options` once more, for type checkers and editors."""

    temperature: float
    normalize: Normalize
    threshold: Threshold
    grid_size: GridSize
    alpha: float
    keep_prob: float | None
    selection: Selection
    k: int | None
    label: Label
    norm: Norm
    augmentations: int
    no_fixed_points: bool
    num_classes: int | None
    label_smoothing: float
    channel_dim: int
    token_grid: TokenGrid
    prefix_tokens: int
    standardize: Standardize
    dtype: torch.dtype | None
    backend: str | None


TYPES = get_type_hints(Options)
"""The names of all options, with their types."""
_CHECKS = [
    (name, kind.__metadata__[0])
    for name, kind in get_type_hints(Options, include_extras=True).items()
    if hasattr(kind, "__metadata__")
]
DEFAULTS = Options()


# Typed, as 1 == True and 1 == 1.0.
_kept = lru_cache(maxsize=128, typed=True)(Options)


def options_of(caller: str, given: OptionTypes) -> Options:
    """The options from the keyword arguments of ``caller``; checked once where they come again."""
    if not given:
        return DEFAULTS
    for name in given:
        if name not in TYPES:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    if torch.compiler.is_compiling() or not all(isinstance(v, SCALARS) for v in given.values()):
        return Options(**given)
    return _kept(**given)


def lists_options(function: Function) -> Function:
    """Lists the options in the signature of a function that takes them as ``**options``."""
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=getattr(DEFAULTS, name), annotation=kind)
        for name, kind in TYPES.items()
    ]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function
