"""The table of docs/habits.md that says which layer to tap, and what its options do."""

import ast
import re
from pathlib import Path

import pytest
import torch
from digits import CLASSES, digits
from torch.nn import functional as F

from sg_kernels import SaliencyGraft

pytest.importorskip("timm")

import timm
import torchvision

HABITS = Path(__file__).parents[2] / "docs" / "habits.md"


def table():
    """network, layer, {image side: map side}, options"""
    text = HABITS.read_text()
    header = re.search(r"^\| network, as timm names it \|(.*)\|$", text, re.MULTILINE)[1]
    sides = [
        {int(side): int(map_side) for map_side, side in re.findall(r"(\d+)x\1 at (\d+)", column)}
        for column in header.split("|")[:-1]
    ]
    for name, *layers, options in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", text, re.M):
        options = ast.literal_eval(f"dict({options.strip(' `')})") if options.strip() else {}
        for layer, sizes in zip(layers, sides):
            if layer := layer.strip(" `"):
                for size, side in sizes.items():
                    yield name, layer, size, side, options


print(list(table()))
