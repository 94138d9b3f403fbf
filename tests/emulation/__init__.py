"""The kernels of csrc/cuda on the CPU: the library that build.py makes."""

import os

import torch

from sg_kernels import backends


def load_if_asked() -> None:
    """The backend cuda takes tensors of the CPU, where SG_KERNELS_EMULATION names the library."""
    if library := os.environ.get("SG_KERNELS_EMULATION"):
        torch.ops.load_library(library)
        backends.DEVICES["cuda"] = ("cuda", "cpu")
        backends._UNLOADED["cuda"] = None
