"""What setup.py builds and packs, with compilers that only record their arguments."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("setuptools", "77")

import sg_kernels
from sg_kernels import rng

ROOT = Path(__file__).parents[1]
LIBRARY = "sg_kernels/libsg_kernels_cuda.so"
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then
    printf 'compute_%s\\n' 80 90
    exit
fi
echo "$@" > "$CUDA_HOME/arguments"
for output; do :; done
cp "$CUDA_HOME/library" "$output"
"""


class Tree:
    """A copy of the packed files, beside an nvcc that knows sm_80 and sm_90."""

    def __init__(self, path):
        self.path, self.cuda = path / "tree", path / "cuda"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("csrc", "sg_kernels"):
            shutil.copytree(ROOT / name, self.path / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.path)
        nvcc = self.cuda / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)
        self.works()

    def works(self):
        (self.cuda / "library").write_text("a library")

    def fails(self):
        (self.cuda / "library").unlink()

    def pretend(self, code):
        """Runs ``code`` before setup.py, to give it another platform or another torch."""
        startup = self.path.parent / "startup"
        startup.mkdir(exist_ok=True)
        (startup / "sitecustomize.py").write_text(code)

    def setup(self, *arguments, **environment):
        without = ("SG_KERNELS_", "TORCH_CUDA_ARCH_LIST")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
        # Other tests cover the CPU library.
        compilers = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), "true")
        paths = {"CUDA_HOME": str(self.cuda), "PYTHONPATH": str(self.path.parent / "startup")}
        return subprocess.run(
            [sys.executable, "setup.py", *arguments],
            cwd=self.path,
            env={**kept, **compilers, **paths, **environment},
            capture_output=True,
            text=True,
        )

    def wheel(self, **environment):
        """The files in the wheel that is built."""
        process = self.setup("bdist_wheel", **environment)
        assert process.returncode == 0, process.stderr
        (wheel,) = (self.path / "dist").glob("*.whl")
        assert "-py3-none-" in wheel.name
        return zipfile.ZipFile(wheel).namelist()

    def arguments(self):
        """The arguments of the last compilation."""
        return (self.cuda / "arguments").read_text().split()

    def targets(self):
        words = self.arguments()
        return [word.rpartition("=")[2] for word in words if word.startswith("-gencode")]


CUDA_TORCH = "import torch; torch.version.cuda = '13.0'"
CPU_TORCH = "import torch; torch.version.cuda = None"


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    tree.pretend(CUDA_TORCH)
    return tree


def test_a_wheel_holds_the_cuda_library_unless_it_is_unwanted(tree):
    assert LIBRARY in tree.wheel()
    assert tree.targets() == ["sm_80", "sm_90", "compute_90"]
    files = tree.wheel(SG_KERNELS_CUDA="0")
    assert {"sg_kernels/functional.py", "sg_kernels/backends/triton/plan.py"} <= set(files)
    assert LIBRARY not in files


def test_the_environment_names_the_architectures(tree):
    tree.wheel()
    # Only the list has changed, and yet the library is compiled again.
    assert LIBRARY in tree.wheel(TORCH_CUDA_ARCH_LIST="10.0+PTX")
    assert tree.targets() == ["sm_100", "compute_100"]


def test_for_a_torch_without_cuda_the_library_is_compiled_only_on_demand(tree):
    tree.pretend(CPU_TORCH)
    assert LIBRARY not in tree.wheel()
    assert "compiling the CPU library; no CUDA library: this PyTorch" in tree.setup("build").stdout
    assert LIBRARY in tree.wheel(SG_KERNELS_CUDA="1")
    said = tree.setup("build", SG_KERNELS_CUDA="1").stdout
    assert "sg_kernels: compiling the CPU library and the CUDA library\n" in said


def test_a_failing_nvcc_is_a_warning_or_with_cuda_demanded_an_error(tree):
    tree.wheel()
    tree.fails()
    process = tree.setup("bdist_wheel", SG_KERNELS_CUDA="1")
    assert process.returncode != 0
    assert LIBRARY not in tree.wheel()
    process = tree.setup("build_ext")
    assert 'building extension "sg_kernels.libsg_kernels_cuda" failed' in process.stderr


def test_a_build_without_the_library_removes_that_of_an_earlier_build(tree):
    library, arguments = tree.path / LIBRARY, ("build_ext", "--inplace", "--build-lib", "build/lib")
    # Where the compiler would leave it.
    built = tree.path / "build/lib/sg_kernels"
    built.mkdir(parents=True)
    for name in ("cpu", "triton"):
        (built / f"libsg_kernels_{name}.so").touch()
    assert tree.setup(*arguments).returncode == 0
    assert library.read_text() == "a library"
    tree.fails()
    assert tree.setup(*arguments).returncode == 0
    assert not library.exists()
    tree.works()
    tree.setup(*arguments)
    assert library.exists()
    assert tree.setup(*arguments, SG_KERNELS_CUDA="0").returncode == 0
    assert not library.exists()


def test_a_new_source_is_compiled_without_being_listed(tree):
    (tree.path / "csrc/cuda/new.cu").touch()
    tree.wheel()
    sources = {str(path.relative_to(tree.path)) for path in tree.path.glob("csrc/cuda/*.c*")}
    sources = {path for path in sources if not path.endswith(".cuh")}
    assert {"csrc/operators.cpp", "csrc/cuda/new.cu", *sources} <= set(tree.arguments())
    assert not any("csrc/cpu" in argument for argument in tree.arguments())


def test_an_unknown_choice_is_refused(tree):
    process = tree.setup("--version", SG_KERNELS_CUDA="perhaps")
    assert "SG_KERNELS_CUDA must be 0, 1 or auto; got 'perhaps'" in process.stderr
    process = tree.setup("--version", SG_KERNELS_CPP="perhaps")
    assert "SG_KERNELS_CPP must be 0, 1 or auto; got 'perhaps'" in process.stderr


def test_an_old_setuptools_is_refused_in_one_line(tree, tmp_path):
    old = tmp_path / "old" / "setuptools" / "__init__.py"
    old.parent.mkdir(parents=True)
    old.write_text("__version__ = '65.5.0'")
    process = tree.setup("--version", PYTHONPATH=str(old.parents[1]))
    assert process.returncode != 0
    assert process.stderr == "setuptools is 65.5.0: pip install --upgrade 'setuptools>=77'\n"


NO_TORCH = """
import sys
sys.modules["torch"] = None
"""
MACOS = """
import platform
platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
"""


@pytest.mark.parametrize(
    ("code", "choice", "reason"),
    [("", "0", "SG_KERNELS_CPP=0"), (MACOS, "auto", "the compiled backends are for Linux")],
    ids=["on demand", "on macOS"],
)
def test_a_pure_build_needs_no_torch_and_is_a_wheel_for_every_platform(tree, code, choice, reason):
    tree.pretend(NO_TORCH + code)
    process = tree.setup("bdist_wheel", CXX="/no/such/compiler", SG_KERNELS_CPP=choice)
    assert process.returncode == 0, process.stderr
    assert f"sg_kernels: pure Python: {reason}" in process.stdout
    (wheel,) = tree.path.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "sg_kernels/backends/reference.py" in archive.namelist()


@pytest.mark.parametrize(
    ("machine", "choice"), [("x86_64", "auto"), ("aarch64", "auto"), ("riscv64", "1")]
)
def test_linux_compiles_and_other_machines_on_demand(tree, machine, choice):
    tree.pretend(f"import platform; platform.machine = lambda: {machine!r}")
    process = tree.setup("build", SG_KERNELS_CPP=choice)
    assert "sg_kernels: compiling the CPU library" in process.stdout


def test_the_description_has_no_relative_pictures_or_links(tree):
    process = tree.setup("--long-description")
    assert process.returncode == 0, process.stderr
    text = process.stdout
    assert "![" not in text
    assert "](docs/" not in text
    assert "[Park et al., AAAI 2022](https://doi.org/" in text
    assert "| method.md | the stages" in text


def test_without_a_compiler_the_pure_build_is_named(tree, tmp_path):
    process = tree.setup("build_ext", CXX="/no/such/compiler", PATH=str(tmp_path))
    assert process.returncode != 0
    assert "no C++ compiler: /no/such/compiler is not found" in process.stderr
    assert "SG_KERNELS_CPP=0" in process.stderr


def test_without_torch_a_build_says_what_to_install(tree):
    tree.pretend(NO_TORCH)
    process = tree.setup("--version")
    assert process.returncode != 0
    assert process.stderr == (
        "sg_kernels is built against PyTorch: pip install 'torch>=2.10', then build again\n"
    )


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_the_libraries_load_with_glibc_2_28(name):
    library = Path(sg_kernels.__file__).with_name(f"libsg_kernels_{name}.so")
    if not library.exists():
        pytest.skip(f"{library.name} is not built here")
    versions = re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
    assert versions
    assert max(map(int, versions)) <= 28


ARM64 = "aarch64-linux-gnu-g++"
needs_arm64 = pytest.mark.skipif(
    shutil.which(ARM64) is None, reason=f"needs {ARM64}: apt-get install g++-aarch64-linux-gnu"
)


@needs_arm64
def test_the_cpu_library_builds_for_arm64_without_a_warning(tree):
    tree.pretend(CPU_TORCH + "; import platform; platform.machine = lambda: 'aarch64'")
    compiler = tree.path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {ARM64} "$@" -O0')  # takes a third of the time
    compiler.chmod(0o755)
    for name in ("torch", "torch_cpu", "c10"):
        stub = [ARM64, "-shared", "-x", "c++", "/dev/null", "-o", tree.path / f"lib{name}.so"]
        subprocess.run(stub, check=True)
    process = tree.setup("build", CXX=str(compiler), LDCXXSHARED=f"{ARM64} -shared -L.")
    assert process.returncode == 0, process.stderr
    assert ": warning:" not in process.stderr
    (library,) = tree.path.glob("build/lib*/sg_kernels/libsg_kernels_cpu.so")
    aarch64 = 183
    assert int.from_bytes(library.read_bytes()[18:20], "little") == aarch64


SHARED_HEADERS = """
#include <cstdio>
#include <initializer_list>
#include "cells.h"
#include "philox.h"
using namespace sg_kernels;
int main() {
  const std::uint64_t seed = 0xDEADBEEF12345678;
  for (std::uint32_t i = 0; i < 6; ++i) std::printf("%u ", stream_word(i, 3, 2, kSampling, seed));
  std::printf("%llu ", static_cast<unsigned long long>(call_seed(seed, 1ull << 40, 5)));
  const float kept = share(0.1, 0.7), left = share(0.3, 0.9);
  for (Norm norm : {Norm::kL1, Norm::kL2, Norm::kArea})
    std::printf("%a ", label_ratio(kept, left, 0.3f, norm));
  std::printf("%a ", mix_target(0.1f, 0.9f, 0.37f, 0.1f, 7.0f));
  std::printf("%d %d", std::isnan(checked_saliency(-1.0f)), std::isnan(share(0.0, 0.0)));
}
"""


def printed_by(compiler, emulator, path):
    source, program = path / "program.cpp", path / compiler
    source.write_text(SHARED_HEADERS)
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-static", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    return subprocess.run([*emulator, program], capture_output=True, text=True, check=True).stdout


@needs_arm64
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs qemu-aarch64: qemu-user")
def test_the_shared_headers_compute_the_same_on_arm64(tmp_path):
    words = printed_by(ARM64, ["qemu-aarch64"], tmp_path)
    assert words == printed_by("g++", [], tmp_path)
    seed = 0xDEADBEEF12345678
    signed = torch.tensor([seed - (1 << 64)])
    expected = rng.words(signed, rng.Stream.SAMPLING, 6, rows=4, draws=3)[2, 3].tolist()
    assert words.split()[:7] == [str(word) for word in (*expected, rng.call_seed(seed, 1 << 40, 5))]
