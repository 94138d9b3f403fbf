"""The backends: which there are, which of them run here, and which one a call gets.

Nothing here imports Triton: its backend does so at the first call.
"""

import importlib.util
import os
import platform
import shutil
import warnings
from pathlib import Path

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets its kernels on the CPU, to test them without a GPU; its own rule."""

DEVICES = {
    "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
    "cuda": ("cuda",),
    "cpp": ("cpu",),
    "reference": ("cpu", "cuda", "mps", "xpu"),
}
"""Every backend, and the device types it accepts."""

DEFAULTS = {
    "cuda": ("triton", "cuda"),
    "cpu": ("cpp", "reference"),
    "mps": ("reference",),
    "xpu": ("reference",),
}
"""The backends tried, in order, when the caller names none."""

CPP_LIBRARY = Path(__file__).parents[1] / "libsg_kernels_cpu.so"
CUDA_LIBRARY = CPP_LIBRARY.with_name("libsg_kernels_cuda.so")
TRITON_LIBRARY = CPP_LIBRARY.with_name("libsg_kernels_triton.so")
"""Only makes the Triton backend's calls take less time on the host."""


def load(library: Path) -> str | None:
    """Loads a compiled backend. Returns the reason where that fails."""
    if not library.exists():
        if platform.system() != "Linux":
            return f"compiled for Linux only; this is {platform.system()}"
        reason = f"not built: {library.name} is missing"
        if (library.parents[1] / "setup.py").exists():
            return (
                f"{reason} in this source folder, which hides an installed sg_kernels: run from "
                "another folder, or build it here with pip install --no-build-isolation -e ."
            )
        return f"{reason} (pip install --no-build-isolation builds it)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        # torch says only which library; its cause names the missing symbol or file.
        return f"built, but does not load: {error.__cause__ or error}"
    return None


def _load_cuda() -> str | None:
    # Without CUDA, torch lacks the symbols that the library needs.
    return load(CUDA_LIBRARY) if torch.version.cuda else "this PyTorch is built without CUDA"


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch's builds for GPUs bring the one that fits)"
    if INTERPRETED or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler: install gcc or clang, or set CC"


_UNLOADED = {"triton": _no_triton(), "cpp": load(CPP_LIBRARY), "cuda": _load_cuda()}
"""Why a backend's code cannot be used, whatever devices there are; None where it can."""

# Elsewhere there is no library to install, so nothing to warn of.
if _UNLOADED["cpp"] and (platform.system() == "Linux" or CPP_LIBRARY.exists()):
    warnings.warn(
        f"sg_kernels runs on its slower PyTorch reference. cpp: {_UNLOADED['cpp']}", stacklevel=2
    )

ENVIRONMENT_CHOICE = os.environ.get("SG_KERNELS_BACKEND") or None


def _no_device() -> str | None:
    """Why no CUDA tensor can exist here; None where one can."""
    if not (torch.version.cuda or torch.version.hip):
        return "this PyTorch is built without CUDA"
    with warnings.catch_warnings(record=True) as complaints:  # PyTorch warns of an old driver
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    return "; ".join(["no CUDA device", *(str(complaint.message) for complaint in complaints)])


def unavailable_backends() -> dict[str, str]:
    """The backends that do not run here, each with the reason."""
    reasons = dict(_UNLOADED)
    for name, devices in DEVICES.items():
        if "cpu" not in devices:
            reasons[name] = reasons.get(name) or _no_device()
    return {name: reason for name, reason in reasons.items() if reason}


def available_backends() -> tuple[str, ...]:
    """The backends that run here."""
    unavailable = unavailable_backends()
    return tuple(name for name in DEVICES if name not in unavailable)


def check_name(origin: str, backend: object) -> None:
    if not isinstance(backend, str) or backend not in DEVICES:
        raise ValueError(f"{origin} must be one of {', '.join(DEVICES)}; got {backend!r}")


def choose(backend: str | None, device_type: str) -> str:
    """The backend of a call on tensors of ``device_type``.

    ``backend`` if given, else SG_KERNELS_BACKEND, else the first of the device's DEFAULTS that
    runs. A backend that was asked for and cannot run is refused, never replaced: ValueError for an
    unknown name, RuntimeError otherwise.
    """
    asked, origin = backend, "backend"
    if asked is None:
        asked, origin = ENVIRONMENT_CHOICE, "SG_KERNELS_BACKEND"
    if asked is None:
        # The device exists, since tensors do: only code that did not load can be in the way.
        preferred = DEFAULTS.get(device_type, ())
        for name in preferred:
            if not _UNLOADED.get(name):
                return name
        reasons = "".join(f"; {name}: {_UNLOADED[name]}" for name in preferred)
        raise RuntimeError(f"no backend takes tensors on {device_type!r}{reasons}")
    check_name(origin, asked)
    if device_type in DEVICES[asked] and not _UNLOADED.get(asked):
        return asked
    if reason := unavailable_backends().get(asked):
        raise RuntimeError(f"{origin} {asked!r} cannot run here: {reason}")
    raise RuntimeError(
        f"{origin} {asked!r} takes tensors on {' or '.join(DEVICES[asked])}; "
        f"got tensors on {device_type}"
    )
