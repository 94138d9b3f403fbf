"""Builds the compiled backend: one library for every CPython and every torch from 2.10 on."""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from torch.utils import cpp_extension

SANITIZE = os.environ.get("SG_KERNELS_SANITIZE", "")

CPU = Extension(
    "sg_kernels.libsg_kernels_cpu",
    sources=[
        "csrc/library.cpp",
        "csrc/cpu/saliency.cpp",
        "csrc/cpu/cells.cpp",
        "csrc/cpu/graft.cpp",
    ],
    depends=["csrc/philox.h", "csrc/graft.h", "csrc/kernels.h", "csrc/cpu/cells.h"],
    library_dirs=cpp_extension.library_paths(),
    libraries=["torch", "torch_cpu", "c10"],
    define_macros=[
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ("SG_KERNELS_BACKEND", '"cpp"'),
        ("SG_KERNELS_DEVICE", "CPU"),
    ],
    extra_compile_args=[
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        "-std=c++17",
        "-O3",
        "-g0",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-fvisibility=hidden",
        "-fno-trapping-math",
        "-ffp-contract=off",  # a*b + c rounds twice on every instruction set, as the reference does
    ],
)
if SANITIZE:
    CPU.extra_compile_args += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]
    CPU.extra_link_args += [f"-fsanitize={SANITIZE}"]


class BuildLibrary(build_ext):
    """A shared library under its plain name: it is loaded by torch, not imported by Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class AnyPythonWheel(bdist_wheel):
    """One wheel for every CPython."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[CPU], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel})
