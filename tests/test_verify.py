"""python -m sg_kernels: what a bug report brings along."""

import os
import subprocess
import sys

import pytest
import torch

import sg_kernels
from sg_kernels import ops, pipeline, verify
from sg_kernels.backends import reference
from sg_kernels.call import Outputs

COMPILED = "cpp" in sg_kernels.available_backends()


@pytest.fixture
def few_cases(monkeypatch):
    """One case of each group, which is enough to find a backend that is wrong."""
    every = list(verify.cases())
    first = {case.group: case for case in reversed(every)}
    monkeypatch.setattr(verify, "cases", lambda: iter(first.values()))
    return first


def test_every_group_of_cases_has_one_and_every_option_comes_up():
    options = {name for case in verify.cases() for name in case.options}
    assert len({case.group for case in verify.cases()}) == 10
    internal = {"prob", "backend", "num_classes", "channel_dim"}
    assert options == set(sg_kernels.options.TYPES) - internal


@pytest.mark.skipif(not COMPILED, reason="needs a backend to compare")
def test_backends_that_agree_pass(few_cases, capsys):
    assert verify.verify("cpu")
    text = capsys.readouterr().out
    assert text.endswith("all agree\n")
    assert all(group in text for group in few_cases)


def wrong_index(outputs):
    return outputs._replace(index=outputs.index.flip(0))


def wrong_mask(outputs):
    return outputs._replace(mask=~outputs.mask)


def wrong_images(outputs):
    return outputs._replace(images=outputs.images.flip(0))


def wrong_lam(outputs):
    return outputs._replace(lam=1 - outputs.lam)


def wrong_targets(outputs):
    return outputs._replace(targets=outputs.targets.flip(1))


def wrong_saliency(outputs):
    return outputs._replace(saliency=2 * outputs.saliency)


@pytest.mark.skipif(not COMPILED, reason="needs a backend to compare")
@pytest.mark.parametrize(
    "wrong", [wrong_index, wrong_mask, wrong_images, wrong_lam, wrong_targets, wrong_saliency]
)
def test_a_backend_that_differs_is_found_and_named(few_cases, capsys, monkeypatch, wrong):
    execute = pipeline.execute

    def differs(plan, call):
        outputs = Outputs(*execute(plan, call))
        return wrong(outputs) if plan.backend == "cpp" else outputs

    monkeypatch.setattr(pipeline, "execute", differs)
    assert not verify.verify("cpu")
    what = wrong.__name__.removeprefix("wrong_")
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cpp, ")]
    assert found
    assert all(line.startswith("cpp, ") for line in found)
    assert any(line.endswith(f": {what}") for line in found)


@pytest.mark.skipif(not COMPILED, reason="needs a backend to compare")
def test_a_wrong_gradient_is_found(few_cases, capsys, monkeypatch):
    overload = ops.overload

    def differs(name, backend):
        if (name, backend) == ("graft_backward", "cpp"):
            return lambda *args: 2 * reference.graft_backward(*args)
        return overload(name, backend)

    monkeypatch.setattr(ops, "overload", differs)
    assert not verify.verify("cpu")
    assert ": gradient" in capsys.readouterr().out


@pytest.mark.skipif(not COMPILED, reason="needs a backend to compare")
def test_a_backend_that_raises_is_found(few_cases, capsys, monkeypatch):
    overload = ops.overload

    def raises(name, backend):
        if backend == "cpp":
            raise RuntimeError("no kernel image")
        return overload(name, backend)

    monkeypatch.setattr(ops, "overload", raises)
    assert not verify.verify("cpu")
    assert "RuntimeError: no kernel image" in capsys.readouterr().out


def test_without_a_backend_to_compare_the_reasons_are_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert not verify.verify("cuda")
    assert "no backend to compare with the reference on cuda: triton: " in capsys.readouterr().out


def test_info_names_versions_and_backends():
    process = subprocess.run(
        [sys.executable, "-m", "sg_kernels", "info"],
        capture_output=True,
        text=True,
        env={**os.environ, "SG_KERNELS_BACKEND": "reference"},
        check=True,
    )
    for line in ("sg_kernels", "torch", "triton", "backend reference   runs, on cpu, cuda, mps"):
        assert f"\n{line}" in f"\n{process.stdout}"
