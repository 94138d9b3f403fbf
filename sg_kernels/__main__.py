"""``python -m sg_kernels info``: the environment and the backends, as a bug report needs them."""

import argparse
import importlib
import os
import platform
from collections.abc import Iterator

import torch

import sg_kernels
from sg_kernels import backends


def version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return "not installed"


def facts() -> Iterator[tuple[str, str]]:
    """Each line of the report: what it is about, and what holds here."""
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
        runs = f"runs, on {' and '.join(devices)} tensors"
        yield f"backend {backend}", unavailable.get(backend, runs)
    for variable in ("SG_KERNELS_BACKEND", "SG_KERNELS_DEBUG"):
        yield variable, os.environ.get(variable, "not set")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sg_kernels")
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("info", help="print versions, devices, backends and settings")
    parser.parse_args()
    for name, value in facts():
        print(f"{name:<20}{value}")


if __name__ == "__main__":
    main()
