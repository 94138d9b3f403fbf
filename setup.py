"""Builds the compiled backends, one library each for every CPython and every torch from 2.10 on.

SG_KERNELS_CPP: 1 builds the CPU library, and the one that repeats Triton's calls; 0 builds nothing:
a package of pure Python, whose CPU backend is the reference; auto (the default) builds them on
Linux for x86-64 and arm64.
SG_KERNELS_CUDA: 1 builds the CUDA library, 0 does not; auto (the default) builds it if this torch
could load it and there is an nvcc, and goes on without it if that fails. TORCH_CUDA_ARCH_LIST: the
GPUs to build for, such as "9.0;10.0+PTX". SG_KERNELS_SANITIZE: the sanitizers to build the CPU
library with.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"setuptools is {setuptools.__version__}: pip install --upgrade 'setuptools>=77'")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

CPU, CUDA = "sg_kernels.libsg_kernels_cpu", "sg_kernels.libsg_kernels_cuda"
TRITON = "sg_kernels.libsg_kernels_triton"
ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]
SANITIZE = os.environ.get("SG_KERNELS_SANITIZE", "")
LIBRARIES = ["torch", "torch_cpu", "c10"]
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")


def choice(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("0", "1", "auto"):
        raise SetupError(f"{variable} must be 0, 1 or auto; got {value!r}")
    return value


def files(*patterns: str) -> list[str]:
    """The files of csrc that match, relative to this one, as setuptools wants them."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def why_pure() -> str | None:
    """Why nothing is compiled; None if the CPU library is."""
    wanted, system, machine = choice("SG_KERNELS_CPP"), platform.system(), platform.machine()
    if wanted == "0":
        return "SG_KERNELS_CPP=0"
    if wanted == "1" or (system == "Linux" and machine in ("x86_64", "aarch64")):
        return None
    return (
        "the compiled backends are for Linux on x86-64 and arm64, and this is "
        f"{system} on {machine} (SG_KERNELS_CPP=1 tries all the same)"
    )


def why_no_cuda() -> str | None:
    """Why the CUDA library is not compiled; None if it is."""
    wanted = choice("SG_KERNELS_CUDA")
    if wanted == "0":
        return "SG_KERNELS_CUDA=0"
    if SANITIZE:
        return "SG_KERNELS_SANITIZE is set"
    if wanted == "auto" and torch.version.cuda is None:
        return "this PyTorch is built without CUDA (SG_KERNELS_CUDA=1 compiles it all the same)"
    if nvcc() is not None:
        return None
    if wanted == "1":
        raise SetupError("SG_KERNELS_CUDA=1, but nvcc is not found: set CUDA_HOME or PATH")
    return "nvcc is not found: set CUDA_HOME or PATH"


def torch_includes() -> list[str]:
    return [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]


def host_library(name: str, sources: list[str], headers: list[str], macros: list[Any]) -> Extension:
    """Compiled by the C++ compiler of the host."""
    extension = Extension(
        name,
        sources=sources,
        depends=headers,
        library_dirs=cpp_extension.library_paths(),
        libraries=LIBRARIES,
        define_macros=[TARGET, *macros],
        extra_compile_args=[
            *torch_includes(),
            "-std=c++17",
            "-O3",
            "-g0",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-fvisibility=hidden",
            "-fno-trapping-math",
            "-ffp-contract=off",  # a*b + c rounds twice on every processor, as in the reference
        ],
    )
    if SANITIZE:
        sanitized = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]
        extension.extra_compile_args += sanitized
        extension.extra_link_args += [f"-fsanitize={SANITIZE}"]
    return extension


def cpu_library() -> Extension:
    macros = [("SG_KERNELS_BACKEND", '"cpp"'), ("SG_KERNELS_DEVICE", "CPU")]
    return host_library(CPU, files("*.cpp", "cpu/*.cpp"), files("*.h", "cpu/*.h"), macros)


def triton_library() -> Extension:
    """What repeats the Triton backend's calls; neither CUDA nor Triton is needed to build it."""
    return host_library(TRITON, files("triton/*.cpp", "glibc.cpp"), files("tensor.h"), [])


def check_compiler() -> None:
    # setuptools takes CXX, or the compiler of the interpreter, which is c++ or g++.
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None and shutil.which("c++") is None:
        raise SetupError(
            f"no C++ compiler: {compiler} is not found. Install g++, set CXX, or build without the "
            "compiled backends: SG_KERNELS_CPP=0"
        )


def cuda_library() -> Extension:
    """Compiled and linked by nvcc, as setuptools does not know .cu."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures()
    return Extension(
        CUDA,
        optional=choice("SG_KERNELS_CUDA") == "auto",
        sources=files("*.cpp", "cuda/*.cpp", "cuda/*.cu"),
        extra_compile_args=[
            *torch_includes(),
            f"-D{TARGET[0]}={TARGET[1]}",
            '-DSG_KERNELS_BACKEND="cuda"',
            "-DSG_KERNELS_DEVICE=CUDA",
            "-DSG_KERNELS_STATIC_CUDART",
            "-DUSE_CUDA",
            "-std=c++17",
            "-O3",
            "--fmad=false",  # a*b + c rounds twice, as in the reference
            "--threads=0",
            "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
            *gencode(architectures),
        ],
        extra_link_args=[
            "-shared",
            "--cudart=static",
            *(f"-L{path}" for path in cpp_extension.library_paths()),
            # Symbols are resolved in torch's libraries, so the linker must keep those that look
            # unused.
            "--linker-options=--no-as-needed",
            *(f"-l{name}" for name in LIBRARIES),
        ],
    )


def nvcc() -> str | None:
    # torch's CUDA_HOME is None if torch is built for the CPU.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def known_architectures() -> str:
    """The ARCHITECTURES that this nvcc supports, and PTX for newer GPUs."""
    listed = subprocess.run([str(nvcc()), "--list-gpu-arch"], stdout=subprocess.PIPE, text=True)
    known = listed.stdout.split()
    # If nvcc lists none, its own error message says what is wrong.
    found = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known] or ARCHITECTURES
    return ";".join(found) + "+PTX"


def gencode(architectures: str) -> list[str]:
    """The arguments of nvcc for a list in the format of TORCH_CUDA_ARCH_LIST."""
    arguments = []
    for entry in re.split(r"[;\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise SetupError(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not like 9.0 or 9.0+PTX")
        number, ptx = match[1] + match[2], match[3]
        arguments.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            arguments.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return arguments


class BuildLibrary(build_ext):
    """Builds shared libraries with plain names: torch loads them, Python does not import them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        check_compiler()
        # The library of an earlier build must not be packed or loaded if this build makes none.
        library = self.get_ext_filename(CUDA)
        Path(self.build_lib, library).unlink(missing_ok=True)
        if self.inplace:
            Path(library).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA:
            super().build_extension(ext)
            return
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        compiled = [str(nvcc()), *ext.extra_compile_args, *ext.sources, *ext.extra_link_args]
        self.spawn([*compiled, "-o", str(library)])


class BuildPackage(build_py):
    """Says what is compiled, and why the rest is not."""

    def run(self) -> None:
        print(f"sg_kernels: {PLAN}", flush=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    """One wheel for every CPython."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def description() -> str:
    """The README for an index, on which relative links and pictures lead nowhere."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


extensions = []
if reason := why_pure():
    PLAN = f"pure Python: {reason}"
else:
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError:
        sys.exit("sg_kernels is built against PyTorch: pip install 'torch>=2.10', then build again")
    PLAN = "compiling the CPU library"
    extensions += [cpu_library(), triton_library()]
    if reason := why_no_cuda():
        PLAN += f"; no CUDA library: {reason}"
    else:
        PLAN += " and the CUDA library"
        extensions.append(cuda_library())

setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPackage, "bdist_wheel": AnyPythonWheel},
)
