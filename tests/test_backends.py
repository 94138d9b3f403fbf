"""Which backends run, and which one a call gets."""

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import sg_kernels
from sg_kernels import backends

PACKAGE = Path(sg_kernels.__file__).parent
COMPILED = "cpp" in sg_kernels.available_backends()

CALL = """
import torch, sg_kernels
result = sg_kernels.saliency_graft(torch.randn(4, 3, 8, 8), torch.randn(4, 6, 4, 4), seed=1)
print(sg_kernels.available_backends(), result.index.tolist())
"""


@lru_cache
def run(code, path=PACKAGE.parent, **environment):
    """A process of its own, in which the package is imported from ``path``."""
    base = {name: value for name, value in os.environ.items() if not name.startswith("SG_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**base, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
    )


def copy_without_library(path):
    """A copy of the package as it is where nothing was compiled."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, path / "sg_kernels", ignore=ignore)
    return path


@pytest.fixture(scope="module")
def without_library(tmp_path_factory):
    return copy_without_library(tmp_path_factory.mktemp("bare"))


def test_the_reference_always_runs():
    assert "reference" in sg_kernels.available_backends()


def test_every_backend_is_available_or_says_why_not():
    available, unavailable = sg_kernels.available_backends(), sg_kernels.unavailable_backends()
    assert set(available) | set(unavailable) == set(backends.DEVICES)
    assert not set(available) & set(unavailable)
    assert all(unavailable.values())


def test_what_is_returned_is_the_callers_own():
    sg_kernels.unavailable_backends()["reference"] = "taken away"
    assert "reference" not in sg_kernels.unavailable_backends()


def test_the_preferred_backend_is_the_default(monkeypatch):
    monkeypatch.setattr(backends, "ENVIRONMENT_CHOICE", None)
    available = sg_kernels.available_backends()
    preferred = [name for name in backends.DEFAULTS["cpu"] if name in available]
    assert backends.choose(None, "cpu") == preferred[0]


def test_an_argument_goes_before_the_environment(backend, monkeypatch):
    monkeypatch.setattr(backends, "ENVIRONMENT_CHOICE", "nonsense")
    assert backends.choose(backend, "cpu") == backend


def test_a_call_runs_on_the_backend_it_names(backend, monkeypatch):
    called = []
    overload = sg_kernels.ops.overload

    def spy(name, backend):
        called.append(backend)
        return overload(name, backend)

    monkeypatch.setattr(sg_kernels.ops, "overload", spy)
    images = torch.randn(2, 3, 8, 8)
    sg_kernels.saliency_graft(images, images, grid_size=(2, 2), backend=backend)
    sg_kernels.channel_saliency(images, backend=backend)
    sg_kernels.graft(images, torch.ones(2, 1, 1).bool(), torch.tensor([1, 0]), backend=backend)
    sg_kernels.mix_targets(torch.rand(2, 3), torch.rand(2), torch.tensor([1, 0]), backend=backend)
    assert called == [backend] * 4


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"backend must be one of .*reference.*; got 'fpga'"):
        backends.choose("fpga", "cpu")


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(backends._UNLOADED, "cpp", "the dog ate it")
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run here: the dog ate it"):
        backends.choose("cpp", "cpu")


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(RuntimeError, match=r"backend 'reference' takes tensors on .*; got .* meta"):
        backends.choose("reference", "meta")


def test_a_device_without_a_backend_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "ENVIRONMENT_CHOICE", None)
    with pytest.raises(RuntimeError, match="no backend takes tensors on 'meta'"):
        backends.choose(None, "meta")


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_run_on_the_reference(monkeypatch, device):
    monkeypatch.setattr(backends, "ENVIRONMENT_CHOICE", None)
    assert backends.choose(None, device) == "reference"
    assert backends.choose("reference", device) == "reference"
    monkeypatch.setitem(backends._UNLOADED, "cpp", None)
    with pytest.raises(RuntimeError, match=f"backend 'cpp' .*got tensors on {device}"):
        backends.choose("cpp", device)


def test_where_neither_of_a_devices_backends_runs_both_reasons_are_given(monkeypatch):
    monkeypatch.setattr(backends, "ENVIRONMENT_CHOICE", None)
    monkeypatch.setitem(backends._UNLOADED, "triton", "no compiler")
    monkeypatch.setitem(backends._UNLOADED, "cuda", None)
    assert backends.choose(None, "cuda") == "cuda"
    monkeypatch.setitem(backends._UNLOADED, "cuda", "not built")
    with pytest.raises(RuntimeError, match="'cuda'; triton: no compiler; cuda: not built"):
        backends.choose(None, "cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_without_a_c_compiler_triton_says_so(tmp_path):
    code = "from sg_kernels import backends; print(backends.unavailable_backends()['triton'])"
    assert (
        "Triton needs a C compiler"
        in run(code, PATH=str(tmp_path), CC="", TRITON_INTERPRET="0").stdout
    )


WITHOUT_TRITON = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
"""


def test_without_triton_the_package_works_and_says_so():
    process = run(
        WITHOUT_TRITON
        + CALL
        + "import sys; print(sg_kernels.unavailable_backends()['triton'], 'triton' in sys.modules)"
    )
    assert process.returncode == 0, process.stderr
    reason = process.stdout.splitlines()[1]
    assert reason.startswith("Triton is not installed")
    assert reason.endswith("False")


def test_triton_is_imported_by_the_first_call_that_runs_on_it():
    code = "import sys, torch, sg_kernels; print('triton' in sys.modules)"
    assert run(code, TRITON_INTERPRET="1").stdout.split() == ["False"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("complaint", [None, "The NVIDIA driver on your system is too old"])
def test_without_a_device_a_backend_says_so_and_what_pytorch_complains_of(
    monkeypatch, name, complaint
):
    def is_available():
        if complaint:
            warnings.warn(complaint, stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setitem(backends.DEVICES, name, ("cuda",))
    monkeypatch.setitem(backends._UNLOADED, name, None)
    reason = sg_kernels.unavailable_backends()[name]
    assert reason.startswith("no CUDA device")
    assert complaint is None or complaint in reason
    assert name not in sg_kernels.available_backends()


@pytest.mark.operators
def test_the_environment_chooses(backend):
    if backend == "cuda":
        pytest.skip("another process does not emulate it")
    code = "from sg_kernels import backends; print(backends.choose(None, 'cpu'))"
    assert run(code, SG_KERNELS_BACKEND=backend).stdout.split() == [backend]


def test_an_empty_environment_variable_chooses_nothing():
    process = run(
        "from sg_kernels import backends; print(backends.ENVIRONMENT_CHOICE)", SG_KERNELS_BACKEND=""
    )
    assert process.stdout.split() == ["None"]


def test_an_unknown_name_in_the_environment_is_refused_by_the_call():
    process = run(CALL, SG_KERNELS_BACKEND="fpga")
    assert process.returncode != 0
    assert "ValueError: SG_KERNELS_BACKEND must be one of" in process.stderr
    assert "got 'fpga'" in process.stderr


def test_without_the_library_the_reference_runs_and_says_so_once(without_library):
    process = run(CALL * 2, without_library)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("('reference',)")
    assert process.stderr.count("Warning") == 1
    assert "sg_kernels runs on its slower PyTorch reference" in process.stderr
    assert "libsg_kernels_cpu.so is missing" in process.stderr


def test_a_source_folder_that_hides_an_installed_package_says_so(tmp_path):
    copy_without_library(tmp_path)
    (tmp_path / "setup.py").touch()
    process = run(CALL, tmp_path)
    assert process.returncode == 0, process.stderr
    assert "hides an installed sg_kernels: run from another folder" in process.stderr


def test_without_the_library_asking_for_it_is_refused_with_the_reason(without_library):
    process = run(CALL, without_library, SG_KERNELS_BACKEND="cpp")
    assert process.returncode != 0
    assert "RuntimeError: SG_KERNELS_BACKEND 'cpp' cannot run here: not built" in process.stderr


def test_a_library_that_does_not_load_is_reported_and_not_used(tmp_path):
    broken = copy_without_library(tmp_path) / "sg_kernels" / "libsg_kernels_cpu.so"
    broken.write_bytes(b"not a library")
    process = run(CALL, tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("('reference',)")
    assert "built, but does not load" in process.stderr
    assert "libsg_kernels_cpu.so: file too short" in process.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("undefined symbol: of_another_torch", []),
        ("libgone.so: cannot open shared object file", ["-Wl,--no-as-needed", "-L.", "-lgone"]),
    ],
)
def test_the_symbol_or_file_that_a_library_misses_is_named(tmp_path, missing, arguments):
    copy_without_library(tmp_path)
    source = "void of_another_torch(void); void call(void) { of_another_torch(); }"
    (tmp_path / "source.c").write_text(source)
    build = ["gcc", "-shared", "-fPIC", "source.c", "-o"]
    subprocess.run([*build, "libgone.so"], cwd=tmp_path, check=True)
    library = "sg_kernels/libsg_kernels_cpu.so"
    subprocess.run([*build, library, *arguments], cwd=tmp_path, check=True)
    (tmp_path / "libgone.so").unlink()
    process = run(CALL, tmp_path)
    assert process.returncode == 0, process.stderr
    assert "built, but does not load" in process.stderr
    assert missing in process.stderr


def test_off_linux_nothing_is_warned_of_and_asking_says_why(without_library):
    elsewhere = "import torch, platform; platform.system = lambda: 'Darwin'\n"
    process = run(elsewhere + CALL, without_library)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("('reference',)")
    assert not process.stderr
    process = run(elsewhere + CALL, without_library, SG_KERNELS_BACKEND="cpp")
    assert "'cpp' cannot run here: compiled for Linux only; this is Darwin" in process.stderr


@pytest.mark.skipif(not COMPILED, reason="needs a compiled backend")
def test_with_the_library_nothing_is_warned_of():
    process = run(CALL * 2)
    assert process.returncode == 0, process.stderr
    assert not process.stderr


@pytest.mark.skipif(not COMPILED, reason="needs a compiled backend")
def test_the_same_seed_pairs_alike_with_and_without_the_library(without_library):
    pairings = [
        run(CALL * 2, path).stdout.splitlines()[0].split(") ")[1]
        for path in (PACKAGE.parent, without_library)
    ]
    assert pairings[0] == pairings[1]
