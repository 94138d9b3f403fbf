"""What is predicted of GPUs follows from bytes and the stated assumptions, and says so."""

import pytest

from benchmarks.speed import model, readme
from benchmarks.speed.cases import Case

CASE = Case("x", (4, 3, 8, 8), (4, 16, 4, 4))
FEATURES, IMAGES = 4 * 4 * 16 * 4 * 4, 4 * 4 * 3 * 8 * 8
FIXED = 2 * model.BOUNDARY - model.OVERLAP + 2 * model.CYCLES / model.CLOCK


def test_a_call_takes_its_bytes_and_two_launches_of_which_the_second_overlaps():
    assert model.call_time(CASE, 1e9) == pytest.approx(FIXED + (FEATURES + 2 * IMAGES) / 1e9)


def test_images_are_read_once_or_anew_for_each_augmentation():
    low, high = model.call_times(CASE._replace(augmentations=3), 1e9)
    assert low == pytest.approx(FIXED + (FEATURES + (1 + 3) * IMAGES) / 1e9)
    assert high == pytest.approx(FIXED + (FEATURES + (3 + 3) * IMAGES) / 1e9)


def test_every_prediction_is_of_a_target():
    targets = {
        (case, target.candidate, target.figure)
        for target in readme.TARGETS
        for case in target.where[1:]
        if target.where[0] == "gpu"
    }
    assert model.predictions(1e12).keys() <= targets


def test_with_slow_memory_only_the_bytes_count():
    figures = model.predictions(1e6)
    assert figures["imagenet", "triton", model.OVER_FLOOR] == pytest.approx((1, 1))
    pixels, features = 3 * 224 * 224, 2048 * 7 * 7
    # uint8 in and bfloat16 out: beside a conversion and two passes over what that has written, and
    # beside one pass and a graft of what that leaves.
    fused = 2 * features + 3 * pixels
    alone = figures["imagenet, standardised", "triton", model.OVER_STANDARDIZING]
    assert alone.low == pytest.approx(fused / (3 * pixels + 2 * 4 * pixels))
    apart = figures["imagenet, standardised", "standardising, then triton", "time / triton"]
    assert apart.low == pytest.approx((fused + 4 * pixels) / fused)
    one, once, anew = (2 * (features + n * pixels) for n in (1 + 1, 1 + 4, 4 + 4))
    four = figures["imagenet, four augmentations", "triton", model.N_CALLS]
    assert four == pytest.approx((once / (4 * one), anew / (4 * one)))


def test_a_call_is_two_launches():
    assert model.launches(model.IMAGENET) == model.launches(model.CIFAR) == 2
    fine = model.CIFAR._replace(features=(128, 8, 40, 40), images=(128, 3, 80, 80))
    assert model.launches(fine) == 3


def test_the_tables_say_what_is_predicted(tmp_path):
    """No figure of a model stands in the column of measurements."""
    table = readme.targets(tmp_path).splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert lines[0] == ["target", "bound", "measured", "predicted, H100", "predicted, H200", "met"]
    assert {(line[2], line[5]) for line in lines[2:]} == {("", "not measured")}
    predicted = {line[0]: line[3] for line in lines[2:]}
    assert predicted[f"GPU: `triton`, {model.LAUNCHES}"] == "imagenet: 2"
    assert predicted[readme.BANDWIDTH].startswith("imagenet: 1.")
    assert " to " in predicted[f"GPU: `triton`, {readme.FOUR_CALLS}"]
    assert predicted["eager reference over `cpp`"] == ""
