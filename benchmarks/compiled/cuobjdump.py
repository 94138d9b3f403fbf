"""Reads NVIDIA machine code with the cuobjdump that Triton brings."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/", re.MULTILINE)


def dump(option: str, path: str) -> str:
    command = [str(CUOBJDUMP), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dump_kernel(option: str, kernel: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return dump(option, file.name)


def count_instructions(sass: str) -> int:
    return len(INSTRUCTION.findall(sass))
