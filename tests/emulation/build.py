"""Builds csrc/cuda for the CPU: ``python tests/emulation/build.py LIBRARY``.

The library registers the operators of the backend cuda for CPU tensors; see cuda_runtime.h.
"""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILE = [
    *("g++", "-c", "-fPIC", "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", f"-I{HERE}"),
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", '-DSG_KERNELS_BACKEND="cuda"'),
    *("-DSG_KERNELS_DEVICE=CPU", "-x", "c++"),
]
LINK = [
    *("g++", "-shared", *(f"-L{path}" for path in cpp_extension.library_paths())),
    *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
]


def main(library: str) -> None:
    Path(library).parent.mkdir(parents=True, exist_ok=True)
    patterns = ("*.cpp", "cuda/*.cpp", "cuda/*.cu")
    sources = sorted(path for pattern in patterns for path in CSRC.glob(pattern))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def compiled(source: Path) -> str:
            target = f"{folder}/{source.name}.o"
            subprocess.run([*COMPILE, str(source), "-o", target], check=True)
            return target

        objects = list(pool.map(compiled, sources))
        subprocess.run([*LINK, *objects, "-o", library], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
