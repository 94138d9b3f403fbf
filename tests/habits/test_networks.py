"""The table of docs/training-loops.md that says which layer to tap."""

import ast
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from digits import CLASSES, digits
from torch.nn import functional as F

from sg_kernels import SaliencyGraft

pytest.importorskip("timm")

import timm
from torchvision.models import densenet121

PAGE = Path(__file__).parents[2] / "docs" / "training-loops.md"


class Row(NamedTuple):
    network: str
    layers: dict[str, dict[int, int]]
    """The side of each layer's map, by that of the images."""
    options: dict


def rows():
    page = PAGE.read_text()
    header = re.search(r"^\| network \|(.*)\| options \|$", page, re.MULTILINE)[1]
    columns = [
        {int(side): int(map_side) for map_side, side in re.findall(r"(\d+)x\1 at (\d+)", column)}
        for column in header.split("|")
    ]
    for network, cells, options in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", page, re.MULTILINE):
        layers = {cell.strip(" `"): sides for cell, sides in zip(cells.split("|"), columns)}
        layers.pop("", None)
        call = ast.parse(f"dict({options.strip(' `')})", mode="eval").body
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        yield Row(network, layers, named)


def batch(side):
    images, classes = digits(2)
    return F.interpolate(images, (side, side)), classes


def saliency_of(output, prefix_tokens=0, channel_dim=1, token_grid=None):
    if token_grid is None:
        return output.abs().sum(channel_dim)
    tokens = output[:, prefix_tokens:].abs().sum(2)
    return tokens.unflatten(1, (round(tokens.shape[1] ** 0.5), -1))


def test_the_table_is_found():
    assert len(list(rows())) >= 8
    assert {side for row in rows() for sides in row.layers.values() for side in sides} == {224, 32}


@pytest.mark.parametrize("side", [224, 32])
@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.network)
def test_a_layer_of_the_table_gives_the_map_that_it_says(row, side):
    sized = {"img_size": side} if row.options else {}  # transformers are made for one size
    network = timm.create_model(row.network, num_classes=CLASSES, **sized)
    images, classes = batch(side)
    for name, sides in row.layers.items():
        outputs, cells = [], sides[side]
        layer = network.get_submodule(name)
        handle = layer.register_forward_hook(lambda *args, seen=outputs: seen.append(args[2] + 0))
        mixer = SaliencyGraft(
            name, network=network, num_classes=CLASSES, keep_prob=1.0, seed=0, **row.options
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*a grid of one cell")
            mixed, _ = mixer(images, classes)
        saliency = mixer.result.saliency
        assert saliency.shape == (2, cells, cells)
        torch.testing.assert_close(saliency, saliency_of(outputs[0], **row.options))
        assert mixer.result.mask.any() == (cells > 1)
        handle.remove()
        mixer.untap()


def half_size_map(**sized):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sized)
    tokens = {"token_grid": "square", "prefix_tokens": 1}
    mixer = SaliencyGraft(
        "blocks.11", network=network, pass_scale=0.5, num_classes=CLASSES, **tokens
    )
    mixer(*batch(64))
    return mixer.result.saliency


def test_pass_scale_needs_a_vit_of_any_size():
    with pytest.raises(AssertionError, match="doesn't match model"):
        half_size_map(img_size=64)
    assert half_size_map(dynamic_img_size=True).shape == (2, 2, 2)


def test_a_map_that_a_function_changes_in_place_is_copied():
    """torchvision's DenseNet applies a ReLU in place to what its features return."""
    network = densenet121(num_classes=CLASSES)
    images, classes = batch(64)
    seen = []
    network.features.register_forward_hook(lambda *args: seen.append(args[2].clone()))
    options = {"network": network, "num_classes": CLASSES, "seed": 0}
    with pytest.raises(RuntimeError, match=r"to_features=torch\.clone"):
        SaliencyGraft("features", **options)(images, classes)
    mixer = SaliencyGraft("features", to_features=torch.clone, **options)
    mixer(images, classes)
    torch.testing.assert_close(mixer.result.saliency, seen[-1].abs().sum(1))
