"""Which backends there are, which of them run here, and which one a call gets."""

import os
import warnings
from pathlib import Path

import torch

DEVICES = {
    "cpp": ("cpu",),
    "reference": ("cpu", "cuda"),
}
"""Every backend, the preferred first, and the device types whose tensors it takes."""

CPP_LIBRARY = Path(__file__).with_name("libsg_kernels_cpu.so")


def _load(library: Path) -> str | None:
    """Loads a compiled backend; the reason where that fails."""
    if not library.exists():
        return f"not built: {library.name} is missing (pip install --no-build-isolation builds it)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"built, but does not load: {error}"
    return None


UNAVAILABLE = {
    name: reason for name, reason in (("cpp", _load(CPP_LIBRARY)),) if reason is not None
}
"""The backends that cannot run here, and why."""

if "cpp" in UNAVAILABLE:
    warnings.warn(
        f"sg_kernels runs on its slower PyTorch reference. cpp: {UNAVAILABLE['cpp']}", stacklevel=2
    )

ENVIRONMENT_CHOICE = os.environ.get("SG_KERNELS_BACKEND") or None


def available_backends() -> tuple[str, ...]:
    """The names of the backends that run here, the preferred first."""
    return tuple(name for name in DEVICES if name not in UNAVAILABLE)


def unavailable_backends() -> dict[str, str]:
    """The names of the backends that do not run here, each with the reason."""
    return dict(UNAVAILABLE)


def choose(backend: str | None, device_type: str) -> str:
    """The backend of a call on tensors of ``device_type``.

    ``backend``, else SG_KERNELS_BACKEND, else the first that runs. One that was asked for and
    cannot run is refused, never replaced: ValueError for an unknown name, RuntimeError otherwise.
    """
    asked, origin = backend, "backend"
    if asked is None:
        asked, origin = ENVIRONMENT_CHOICE, "SG_KERNELS_BACKEND"
    if asked is None:
        for name, devices in DEVICES.items():
            if name not in UNAVAILABLE and device_type in devices:
                return name
        raise RuntimeError(f"no backend takes tensors on {device_type!r}")
    if not isinstance(asked, str) or asked not in DEVICES:
        raise ValueError(f"{origin} must be one of {', '.join(DEVICES)}; got {asked!r}")
    if asked in UNAVAILABLE:
        raise RuntimeError(f"{origin} {asked!r} cannot run here: {UNAVAILABLE[asked]}")
    if device_type not in DEVICES[asked]:
        raise RuntimeError(
            f"{origin} {asked!r} takes tensors on {' or '.join(DEVICES[asked])}; "
            f"got tensors on {device_type}"
        )
    return asked
