"""Launches without a GPU, by Triton or repeated: a driver that records them, see cuda.c."""

import ctypes
import gc
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends import nvidia
from triton.backends.nvidia.driver import CudaDriver

from sg_kernels.backends.triton import repeat

SOURCE = Path(__file__).with_name("cuda.c")
LIBRARY = "libcuda.so.1"
MULTIPROCESSORS = 132
STREAM = 0x0123_4567_89AB_CDEF
"""The current stream: all 64 bits must arrive."""
PARAMETER = re.compile(r"\.param \.([a-z])(\d+)( \.ptr)?")


class Record(ctypes.Structure):
    """struct launch of cuda.c."""

    _fields_ = [
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("overlaps", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("values", ctypes.c_uint64 * 128),
    ]


class Kernel(NamedTuple):
    """What the compiler says of a kernel."""

    name: str
    types: list[str]
    """Of the parameters in PTX: ``pointer``, ``u64``, ``u32`` or ``f32``."""
    shared_bytes: int


class Launch(NamedTuple):
    """What arrived at the driver."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    attributes: int
    overlaps: bool
    """Whether it may start while the launch before it ends."""
    values: list[int]
    """The bits of each parameter."""


class Recorder:
    """The driver, from the side of a test."""

    def __init__(self, library: Path) -> None:
        self.kernels: dict[int, Kernel] = {}
        """Those loaded so far, by their handle."""
        self._driver = ctypes.CDLL(str(library))
        self._driver.recorder_launches.restype = ctypes.POINTER(Record)
        self._driver.recorder_set_stream(ctypes.c_uint64(STREAM))

    def describe(self, module: int, function: int, name: str, files: Any, hash: str) -> None:
        """Triton's hook for a kernel that has been loaded."""
        ptx = Path(files[f"{name}.ptx"]).read_text()
        start = ptx.index(f".entry {name}(")
        found = PARAMETER.findall(ptx[start : ptx.index(")\n", start)])
        types = ["pointer" if pointer else kind + bits for kind, bits, pointer in found]
        shared_bytes = json.loads(Path(files[f"{name}.json"]).read_text())["shared"]
        self.kernels[function] = Kernel(name, types, shared_bytes)
        sizes = bytes(int(bits) // 8 for _, bits, _ in found)
        self._driver.recorder_describe(ctypes.c_uint64(function), len(sizes), sizes)

    def functions(self) -> tuple[int, ...]:
        """What repeat.driver_functions() finds where there is a GPU."""
        driver = self._driver
        found = driver.cuLaunchKernelEx, driver.recorder_get_stream
        return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found)

    def refuse(self, launches: int) -> None:
        """Refuses one launch, after this many more."""
        self._driver.recorder_refuse(launches)

    def take(self) -> list[Launch]:
        """The launches since the last time, at most 64."""
        count = ctypes.c_int()
        records = self._driver.recorder_launches(ctypes.byref(count))
        launches = [self._launch(records[i]) for i in range(count.value)]
        self._driver.recorder_forget()
        return launches

    def _launch(self, record: Record) -> Launch:
        return Launch(
            self.kernels[record.function],
            tuple(record.grid),
            tuple(record.block),
            record.shared_bytes,
            record.stream,
            record.attributes,
            bool(record.overlaps),
            record.values[: record.parameters],
        )


def build(folder: Path) -> Path:
    """The library that answers to the driver's name."""
    library = folder / LIBRARY
    include = Path(nvidia.__file__).parent / "include"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O2", "-Wall", f"-I{include}"]
    subprocess.run([*command, f"-Wl,-soname,{LIBRARY}", SOURCE, "-o", library], check=True)
    return library


@contextmanager
def installed(folder: Path) -> Iterator[Recorder]:
    """Triton launches on the recorder, as if tensors of the CPU lay on the device 0, an H100.

    The process must not have loaded the real driver: whoever loads a library by the name of one
    that is there, as Triton does, gets that one. ``folder`` takes what is built and compiled.
    """
    recorder = Recorder(build(folder))
    loaded = triton.knobs.runtime.kernel_load_end_hook
    paths = {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    with (
        mock.patch.dict(os.environ, paths),
        mock.patch.object(torch.cuda, "current_device", current_device),
        mock.patch.object(triton.runtime.driver, "_active", hopper()),
        mock.patch.object(repeat, "driver_functions", recorder.functions),
    ):
        loaded.add(recorder.describe)
        try:
            yield recorder
        finally:
            torch.ops.sg_kernels.forget()
            repeat.is_plain.cache_clear()  # which holds kernels
            gc.collect()  # kernels unload themselves from the active driver
            loaded.remove(recorder.describe)


def current_device() -> int:
    return 0


def hopper() -> CudaDriver:
    driver = CudaDriver()
    driver.get_current_device = current_device
    driver.get_device_capability = lambda device: (9, 0)
    driver.get_current_stream = lambda device: STREAM
    return driver
