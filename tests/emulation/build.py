"""Builds csrc/cuda for the CPU: ``python tests/emulation/build.py LIBRARY``.

The library registers the operators of the backend cuda for CPU tensors; see cuda_runtime.h.
"""

import subprocess
import sys
from pathlib import Path

from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def main(library: str) -> None:
    Path(library).parent.mkdir(parents=True, exist_ok=True)
    patterns = ("*.cpp", "cuda/*.cpp", "cuda/*.cu")
    sources = sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))
    command = ["g++", "-shared", "-fPIC", "-std=c++17", "-O2", "-ffp-contract=off", "-Wall"]
    command += ["-Wextra", "-Wno-unknown-pragmas", f"-I{HERE}"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DSG_KERNELS_BACKEND="cuda"']
    command += ["-DSG_KERNELS_DEVICE=CPU", "-x", "c++", *sources, "-o", library]
    command += [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
