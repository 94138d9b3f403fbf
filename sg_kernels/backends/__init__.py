"""Which backends there are, which of them run here, and which one a call gets."""

import os
import shutil
import warnings
from pathlib import Path

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 runs the Triton kernels on the CPU, to test them without a GPU."""

DEVICES = {
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
    "cuda": ("cuda",),
    "cpp": ("cpu",),
    "reference": ("cpu", "cuda"),
}
"""Every backend, and the device types whose tensors it takes."""

DEFAULTS = {"cuda": ("triton", "cuda"), "cpu": ("cpp", "reference")}
"""Where none is asked for: the first of these that runs."""

CPP_LIBRARY = Path(__file__).with_name("libsg_kernels_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("libsg_kernels_cuda.so")


def _load(library: Path) -> str | None:
    """Loads a compiled backend; the reason where that fails."""
    if not library.exists():
        return f"not built: {library.name} is missing (pip install --no-build-isolation builds it)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"built, but does not load: {error}"
    return None


def _load_cuda() -> str | None:
    # Where PyTorch has no CUDA the library has nothing to bind to, and is not touched.
    return _load(CUDA_LIBRARY) if torch.version.cuda else "this PyTorch is built without CUDA"


def _no_compiler() -> str | None:
    if INTERPRETED or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler, and finds neither gcc nor clang; CC names another"


_UNLOADED = {"triton": _no_compiler(), "cpp": _load(CPP_LIBRARY), "cuda": _load_cuda()}

if _UNLOADED["cpp"]:
    warnings.warn(
        f"sg_kernels runs on its slower PyTorch reference. cpp: {_UNLOADED['cpp']}", stacklevel=2
    )

ENVIRONMENT_CHOICE = os.environ.get("SG_KERNELS_BACKEND") or None


def _no_device() -> str | None:
    """Why no CUDA tensor can exist here; None where one can."""
    if not (torch.version.cuda or torch.version.hip):
        return "this PyTorch is built without CUDA"
    with warnings.catch_warnings(record=True) as complaints:  # PyTorch's, of a driver too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    return "; ".join(["no CUDA device", *(str(complaint.message) for complaint in complaints)])


def unavailable_backends() -> dict[str, str]:
    """The names of the backends that do not run here, each with the reason."""
    reasons = dict(_UNLOADED)
    for name, devices in DEVICES.items():
        if "cpu" not in devices:
            reasons[name] = reasons.get(name) or _no_device()
    return {name: reason for name, reason in reasons.items() if reason}


def available_backends() -> tuple[str, ...]:
    """The names of the backends that run here."""
    unavailable = unavailable_backends()
    return tuple(name for name in DEVICES if name not in unavailable)


def choose(backend: str | None, device_type: str) -> str:
    """The backend of a call on tensors of ``device_type``.

    ``backend``, else SG_KERNELS_BACKEND, else the device's first that runs. One that was asked for
    and cannot run is refused, never replaced: ValueError for an unknown name, RuntimeError
    otherwise.
    """
    asked, origin = backend, "backend"
    if asked is None:
        asked, origin = ENVIRONMENT_CHOICE, "SG_KERNELS_BACKEND"
    if asked is None:
        # Tensors on the device exist, so only a library that did not load can be in the way.
        preferred = DEFAULTS.get(device_type, ())
        for name in preferred:
            if not _UNLOADED.get(name):
                return name
        reasons = "".join(f"; {name}: {_UNLOADED[name]}" for name in preferred)
        raise RuntimeError(f"no backend takes tensors on {device_type!r}{reasons}")
    if not isinstance(asked, str) or asked not in DEVICES:
        raise ValueError(f"{origin} must be one of {', '.join(DEVICES)}; got {asked!r}")
    if device_type in DEVICES[asked] and not _UNLOADED.get(asked):
        return asked
    if reason := unavailable_backends().get(asked):
        raise RuntimeError(f"{origin} {asked!r} cannot run here: {reason}")
    raise RuntimeError(
        f"{origin} {asked!r} takes tensors on {' or '.join(DEVICES[asked])}; "
        f"got tensors on {device_type}"
    )
