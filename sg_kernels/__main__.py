"""``python -m sg_kernels``: what a bug report needs.

``info`` prints the environment and the backends; ``verify`` compares the backends.
"""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Iterator

import torch

import sg_kernels
from sg_kernels import backends
from sg_kernels.verify import verify


def version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return "not installed"


def facts() -> Iterator[tuple[str, str]]:
    """The lines of the report: a name and its value."""
    yield "sg_kernels", sg_kernels.__version__
    yield "python", platform.python_version()
    for module in ("torch", "numpy", "triton"):
        yield module, version(module)
    yield "platform", platform.platform()
    yield "CPU", f"{os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield "CUDA", "no device"
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        yield f"CUDA {device}", f"{name}, compute capability {major}.{minor}"
    unavailable = sg_kernels.unavailable_backends()
    for backend, devices in backends.DEVICES.items():
        runs = f"runs, on {', '.join(devices)} tensors"
        yield f"backend {backend}", unavailable.get(backend, runs)
    yield "repeated calls", backends.load(backends.TRITON_LIBRARY) or "on the triton backend"
    for setting in ("BACKEND", "DEBUG", "OVERLAP", "REPEAT"):
        variable = f"SG_KERNELS_{setting}"
        yield variable, os.environ.get(variable, "not set")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sg_kernels")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    commands.add_parser("info", help="print versions, devices, backends and settings")
    comparing = commands.add_parser(
        "verify",
        help="compare every backend that runs here with the reference; exit 1 if any differs",
    )
    comparing.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    comparing.add_argument("--seed", type=int, default=0, help="of the random inputs")
    options = parser.parse_args()
    if options.command == "verify":
        sys.exit(0 if verify(options.device, options.seed) else 1)
    for name, value in facts():
        print(f"{name:<20}{value}")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
