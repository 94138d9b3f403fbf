"""Builds the compiled backends, one library each for every CPython and every torch from 2.10 on.

SG_KERNELS_CPP: 0 builds nothing: a package of pure Python, whose CPU backend is the reference.
SG_KERNELS_CUDA: 1 builds the CUDA library, 0 does not; auto (the default) builds it if there is an
nvcc, and goes on without it if that fails. TORCH_CUDA_ARCH_LIST: the GPUs to build for, such as
"9.0;10.0+PTX". SG_KERNELS_SANITIZE: the sanitizers to build the CPU library with.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"setuptools is {setuptools.__version__}: pip install --upgrade 'setuptools>=77'")

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

try:
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    sys.exit("sg_kernels is built against PyTorch: pip install 'torch>=2.10', then build again")

PURE = os.environ.get("SG_KERNELS_CPP") == "0"
ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]
WANTED = os.environ.get("SG_KERNELS_CUDA", "auto")
SANITIZE = os.environ.get("SG_KERNELS_SANITIZE", "")


def files(*patterns: str) -> list[str]:
    """The files of csrc that match, relative to this one, as setuptools wants them."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


INCLUDES = [argument for path in cpp_extension.include_paths() for argument in ("-isystem", path)]
LIBRARY_DIRS = cpp_extension.library_paths()
LIBRARIES = ["torch", "torch_cpu", "c10"]
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")

CPU = Extension(
    "sg_kernels.libsg_kernels_cpu",
    sources=files("*.cpp", "cpu/*.cpp"),
    depends=files("*.h", "cpu/*.h"),
    library_dirs=LIBRARY_DIRS,
    libraries=LIBRARIES,
    define_macros=[TARGET, ("SG_KERNELS_BACKEND", '"cpp"'), ("SG_KERNELS_DEVICE", "CPU")],
    extra_compile_args=[
        *INCLUDES,
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
    CPU.extra_compile_args += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]
    CPU.extra_link_args += [f"-fsanitize={SANITIZE}"]


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


# nvcc compiles and links this one, as setuptools does not know .cu.
CUDA = Extension(
    "sg_kernels.libsg_kernels_cuda",
    sources=files("*.cpp", "cuda/*.cpp", "cuda/*.cu"),
    extra_compile_args=[
        *INCLUDES,
        f"-D{TARGET[0]}={TARGET[1]}",
        '-DSG_KERNELS_BACKEND="cuda"',
        "-DSG_KERNELS_DEVICE=CUDA",
        "-DUSE_CUDA",
        "-std=c++17",
        "-O3",
        "--fmad=false",  # a*b + c rounds twice, as in the reference
        "--threads=0",
        "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    ],
    extra_link_args=[
        "-shared",
        "--cudart=static",
        *(f"-L{path}" for path in LIBRARY_DIRS),
        # Symbols are resolved in torch's libraries, so the linker must keep those that look unused.
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


def wants_cuda() -> bool:
    if WANTED not in ("0", "1", "auto"):
        raise SetupError(f"SG_KERNELS_CUDA must be 0, 1 or auto; got {WANTED!r}")
    if WANTED == "1" and nvcc() is None:
        raise SetupError("SG_KERNELS_CUDA=1, but nvcc is not found: set CUDA_HOME or PATH")
    return WANTED != "0" and nvcc() is not None and not SANITIZE


def check_compiler() -> None:
    # setuptools takes CXX, or the compiler of the interpreter, which is c++ or g++.
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None and shutil.which("c++") is None:
        raise SetupError(
            f"no C++ compiler: {compiler} is not found. Install g++, set CXX, or build without the "
            "compiled backends: SG_KERNELS_CPP=0"
        )


class BuildLibrary(build_ext):
    """Builds shared libraries with plain names: torch loads them, Python does not import them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        check_compiler()
        # The library of an earlier build must not be packed or loaded if this build makes none.
        library = self.get_ext_filename(CUDA.name)
        Path(self.build_lib, library).unlink(missing_ok=True)
        if self.inplace:
            Path(library).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext is not CUDA:
            super().build_extension(ext)
            return
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        compiled = [str(nvcc()), *ext.extra_compile_args, *ext.sources, *ext.extra_link_args]
        self.spawn([*compiled, "-o", str(library)])


class AnyPythonWheel(bdist_wheel):
    """One wheel for every CPython."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


extensions = [] if PURE else [CPU]
if wants_cuda() and not PURE:
    CUDA.optional = WANTED == "auto"
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures()
    CUDA.extra_compile_args += gencode(architectures)
    extensions.append(CUDA)

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
