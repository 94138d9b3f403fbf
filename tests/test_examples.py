"""The training script: a run that was stopped ends as one that was not, in one process and two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import library
from torch.utils.data import DistributedSampler

library("torchvision")
image = pytest.importorskip("PIL.Image")

from examples.train import Idx, correct, main  # noqa: E402  # torchvision is there

ROOT = Path(__file__).parents[1]
NETWORK = ("--model", "shufflenet_v2_x0_5", "--layer", "stage2", "--size", "32", "--lr", "0.05")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 12 pictures for training and 5 for validation."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in {"train": 12, "val": 5}.items():
        for name, top in {"dark": 120, "light": 256}.items():
            where = root / split / name
            where.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, top, (40, 44, 3), dtype=np.uint8)
                image.fromarray(pixels).save(where / f"{i}.png")
    return root


def arguments(data, output, *options):
    given = ("--data", data, "--output", output, "--epochs", 2, "--batch", 4, "--workers", 0)
    return ["train.py", *map(str, given), *NETWORK, *options]


def runs(data, output, *options):
    """A whole run, one that stops after an epoch, and one that goes on from there."""
    return [
        arguments(data, output / "whole", *options),
        arguments(data, output / "parts", *options, "--stop-after", "1"),
        arguments(data, output / "parts", *options),
    ]


@pytest.fixture
def run(monkeypatch, capsys):
    # On a GPU bits repeat only with --deterministic, and two processes need two.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(command):
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        try:
            main()
        finally:
            torch.use_deterministic_algorithms(False)
        return capsys.readouterr().out

    return run


def checkpoint(output):
    epoch, model, mixer, optimizer, schedule = torch.load(output / "checkpoint.pt")
    momenta = {str(i): s["momentum_buffer"] for i, s in optimizer["state"].items()}
    steps = {key: torch.tensor(schedule[key]) for key in ("last_epoch", "_last_lr")}
    return {**model, **mixer, **momenta, **steps, "epoch": torch.tensor(epoch)}


def assert_same_checkpoints(one, other):
    one, other = checkpoint(one), checkpoint(other)
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("half", []),
        ("half", ["--amp", "--pass-scale", "0.75", "--workers", "1"]),
        ("paper", ["--deterministic"]),
        ("none", []),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_a_whole_one(recipe, options, folder, run, tmp_path):
    whole, first, second = map(run, runs(folder, tmp_path, "--recipe", recipe, *options))
    assert whole == first + second
    assert len(whole.splitlines()) == 2
    assert_same_checkpoints(tmp_path / "whole", tmp_path / "parts")
    steps = 0 if recipe == "none" else 2 * 24 // 4
    assert int(checkpoint(tmp_path / "whole")["step"]) == steps
    assert run(arguments(folder, tmp_path / "whole", "--recipe", recipe)) == ""


# One start of two processes for all runs, and one group, as torchrun's store serves no second.
UNDER_TORCHRUN = """
import json, sys
import torch.distributed as dist
from benchmarks.rivals import import_library
import_library("torchvision")
from examples.train import main

end = dist.destroy_process_group
dist.init_process_group("gloo")
dist.init_process_group = lambda backend: None
dist.destroy_process_group = lambda: None
for sys.argv in json.loads(sys.argv[1]):
    main()
    dist.barrier()  # the next run reads the checkpoint that the first process writes
end()
"""


def test_two_processes_of_torchrun_resume_too(folder, tmp_path):
    script = tmp_path / "runs.py"
    script.write_text(UNDER_TORCHRUN)
    recipes = ("half", "paper")
    commands = [c for r in recipes for c in runs(folder, tmp_path / r, "--recipe", r)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*torchrun, "--standalone", str(script), json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        assert process.wait(timeout=300) == 0
    finally:
        process.terminate()  # it then ends its own
    for recipe in recipes:
        assert_same_checkpoints(tmp_path / recipe / "whole", tmp_path / recipe / "parts")
        assert int(checkpoint(tmp_path / recipe / "whole")["step"]) == 2 * 24 // (4 * 2)


def test_a_compiled_run_gives_the_losses_of_an_eager_one(folder, run, tmp_path, monkeypatch):
    compile_ = torch.compile  # Dynamo is what a step can break; inductor takes minutes
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    torch.compiler.reset()
    eager = run(arguments(folder, tmp_path / "eager"))
    assert run(arguments(folder, tmp_path / "compiled", "--compile")) == eager
    torch.compiler.reset()


def test_each_epoch_has_an_order_of_its_own(folder, run, tmp_path, monkeypatch):
    orders, iterate = [], DistributedSampler.__iter__

    def recorded(sampler):
        orders.append(list(iterate(sampler)))
        return iter(orders[-1])

    monkeypatch.setattr(DistributedSampler, "__iter__", recorded)
    run(arguments(folder, tmp_path, "--recipe", "none"))
    assert len(orders) == 2
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))


def test_idx_files_are_read(run, tmp_path):
    for split, count in {"train": 16, "t10k": 6}.items():
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        for name, values in {"images-idx3": images, "labels-idx1": labels}.items():
            header = np.array([0x800 + values.ndim, *values.shape], ">i4").tobytes()
            (tmp_path / f"{split}-{name}-ubyte").write_bytes(header + values.tobytes())
    data = Idx(tmp_path, "t10k", lambda picture: picture)
    assert all(torch.equal(data[i][0], torch.tensor(images[i]).expand(3, -1, -1)) for i in range(6))
    assert [target for _, target in data] == labels.tolist()
    assert "epoch 2: loss" in run(arguments(tmp_path, tmp_path / "out"))
    assert len(checkpoint(tmp_path / "out")["fc.bias"]) == 3


def test_mixed_rows_count_by_the_weight_of_the_predicted_class():
    logits = torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert int(correct(logits, torch.tensor([1, 1, 2]))) == 2
    mixed = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.0, 0.4], [1.0, 0.0, 0.0]])
    assert float(correct(logits, mixed)) == pytest.approx(0.7 + 0.6)


def test_data_that_is_not_there_is_named_with_what_would_do(run, tmp_path):
    with pytest.raises(SystemExit, match=rf"--data must be .*dataset-fashion-mnist.*{tmp_path}"):
        run(arguments(tmp_path, tmp_path / "out"))
