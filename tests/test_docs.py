"""The README and docs/: snippets run, links resolve, tables and names are those of the code."""

import ast
import inspect
import math
import re
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import library
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sg_kernels
from sg_kernels import SaliencyGraft, saliency_graft

ROOT = Path(__file__).parents[1]
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BATCH, CLASSES = 8, 1000


class Snippet(NamedTuple):
    page: Path
    line: int
    """Of the first line of code, from 1."""
    code: str

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def snippets_of(page):
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Snippet(page, text.count("\n", 0, match.start(1)) + 1, match[1])


SNIPPETS = [snippet for page in MANUAL for snippet in snippets_of(page)]


class ResNet(nn.Module):
    """The strides of a ResNet: layer3 has a sixteenth of the image's side."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Conv2d(8, 8, 3, 1, 1)
        self.layer2 = nn.Conv2d(8, 8, 3, 2, 1)
        self.layer3 = nn.Conv2d(8, 8, 3, 2, 1)
        self.layer4 = nn.Conv2d(8, 8, 3, 2, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images):
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return self.fc(nn.Sequential(self.stem, *layers)(images).mean((2, 3)))


class ViT(nn.Module):
    """With timm's names: a class token, then 4 x 4 patches."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.patch_embed.grid_size = (4, 4)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, images):
        tokens = self.patch_embed(images).flatten(2).mT
        return self.blocks(torch.cat([tokens[:, :1], tokens], 1))


class Swin(nn.Module):
    """With timm's names: maps are (B, h, w, K)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.layers = nn.Sequential(nn.Linear(8, 48), nn.Linear(48, 48))

    def forward(self, images):
        return self.layers(self.embed(images).permute(0, 2, 3, 1))


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the snippets take as given."""
    monkeypatch.chdir(tmp_path)  # some write files
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    whole = torch.compile  # Dynamo and autograd are ours to test; inductor takes minutes
    monkeypatch.setattr(
        torch, "compile", lambda *args, **more: whole(*args, **{**more, "backend": "aot_eager"})
    )
    torch.compiler.reset()
    images, targets = torch.randn(2 * BATCH, 3, 32, 32), torch.arange(2 * BATCH)
    model = ResNet()
    yield {
        "__name__": "snippet",
        "torch": torch,
        "nn": nn,
        "F": F,
        "model": model,
        "teacher": ResNet(),
        "vit": ViT(),
        "swin": Swin(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "device": torch.device("cpu"),
        "epochs": 2,
        "loader": DataLoader(TensorDataset(images, targets), BATCH),
        "dataset": TensorDataset(images, torch.rand(2 * BATCH, 4, 4), targets),
        "images": images[:BATCH],
        "targets": targets[:BATCH],
        "features": torch.randn(BATCH, 16, 4, 4),
        "patch_size": 8,
        "segmentation_maps": torch.randint(5, (BATCH, 32, 32)),
    }
    torch.compiler.reset()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_every_snippet_is_found():
    fences = [fence for page in MANUAL for fence in re.findall(r"^```py", page.read_text(), re.M)]
    assert len(SNIPPETS) == len(fences) > 10


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_a_snippet_runs_by_itself(snippet, names):
    if "sg_kernels.timm" in snippet.code:
        library("timm")
    code = "\n" * (snippet.line - 1) + snippet.code  # so that a traceback names the page's line
    exec(compile(code, str(snippet.page), "exec"), names)
    results = [value for value in names.values() if isinstance(value, sg_kernels.GraftResult)]
    for mixer in (value for value in names.values() if isinstance(value, SaliencyGraft)):
        assert mixer.step > 0, "it never grafts"
        results += [mixer.result] if mixer.result else []
    for result in results:
        assert result.mask[0].numel() > 1, "a map of one cell grafts nothing"
    if "loss" in names:
        assert math.isfinite(names["loss"].detach())


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_no_variable_hides_a_function_of_ours(page):
    for snippet in snippets_of(page):
        for node in ast.walk(ast.parse(snippet.code)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assert node.id not in sg_kernels.__all__, f"{snippet}: {node.id}"


def options_table():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (function|module|both) \|", method(), re.MULTILINE)
    return {name: (default.strip("`"), where) for name, default, where in rows}


def method():
    return (ROOT / "docs" / "method.md").read_text()


@pytest.mark.parametrize(
    ("public", "where"), [(saliency_graft, "function"), (SaliencyGraft, "module")]
)
def test_the_table_of_options_has_each_with_its_default(public, where):
    documented = {
        name: "required" if default == "required" else ast.literal_eval(default)
        for name, (default, place) in options_table().items()
        if place in (where, "both")
    }
    parameters = inspect.signature(public).parameters.values()
    assert documented == {
        parameter.name: "required" if parameter.default is parameter.empty else parameter.default
        for parameter in parameters
    }


def test_every_public_name_is_documented():
    manual = "".join(page.read_text() for page in MANUAL)
    missing = [name for name in sg_kernels.__all__ if not re.search(rf"\b{name}\b", manual)]
    assert missing == []


def test_every_environment_variable_is_documented():
    code = [ROOT / "setup.py", *(ROOT / "sg_kernels").rglob("*.py")]
    read = r"""(?:environ\.get\(|environ\[|getenv\()\s*["'](\w+)["']"""
    used = {name for path in code for name in re.findall(read, path.read_text())}
    assert "SG_KERNELS_BACKEND" in used
    backends = (ROOT / "docs" / "backends.md").read_text()
    assert [name for name in sorted(used) if f"`{name}`" not in backends] == []


def test_the_changelog_has_this_version():
    assert f"\n## [{sg_kernels.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


def test_every_target_of_make_that_is_named_exists():
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        named = re.findall(r"(?:^    |`)make ([a-z][\w.-]*)", page.read_text(), re.MULTILINE)
        assert [target for target in named if target not in targets] == [], page.name


def test_every_module_that_is_named_exists():
    for page in PAGES:
        for name in re.findall(
            r"python -m ((?:benchmarks|examples|sg_kernels)[\w.]*)", page.read_text()
        ):
            path = ROOT / name.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_every_path_of_the_map_exists_and_no_source_file_is_left_out():
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(
        r"`((?:sg_kernels|csrc|tests|benchmarks|examples|docs)/[\w./]*)`", contributing
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+)(?:\.\w+)?`", contributing))
    files = [*(ROOT / "sg_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    assert {path.stem for path in files} - {"__init__"} - named == set()


def test_a_stage_has_the_same_file_name_in_every_backend():
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    stages = re.findall(r"\| `(\w+)\.py` \| `\1` \|$", contributing, re.MULTILINE)
    assert len(stages) >= 5
    for stage in stages:
        for file in (
            f"sg_kernels/backends/triton/{stage}.py",
            f"csrc/cpu/{stage}.cpp",
            f"csrc/cuda/{stage}.cu",
        ):
            path = ROOT / file
            assert path.exists() or path.with_suffix(".cuh").exists(), file


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


GENERATED = re.compile(r"<!-- (\w+) -->.*?<!-- /\1 -->", re.DOTALL)
MEASURED = re.compile(
    r"[\d.]+ ?(?:x|times|ns|us|µs|ms|%|percent|[GT]B/s)(?! ?\d|[\w-])|[\d.]+ (?:micro|milli)seconds"
)


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.name)
def test_prose_quotes_no_measured_figure(page):
    prose = GENERATED.sub("", page.read_text())
    assert MEASURED.findall(prose) == []


def test_the_generated_tables_have_their_markers():
    pages = {
        "README.md": ["benchmarks", "host"],
        "docs/performance.md": ["targets", "model"],
        "docs/accuracy.md": ["recipes", "methods", "options"],
    }
    for page, names in pages.items():
        assert [match[1] for match in GENERATED.finditer((ROOT / page).read_text())] == names


def prose_of(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """As GitHub makes them: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_resolves(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_manual_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in MANUAL[1:] if f"(docs/{page.name})" not in readme] == []
