"""The picture of a call: each axes holds what its title says."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from training import batch_of

from sg_kernels import saliency_graft, show

pyplot = pytest.importorskip("matplotlib.pyplot")
pyplot.switch_backend("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def grafted(images, **options):
    _, ids, features = batch_of(len(images))
    return saliency_graft(
        images, features, targets=ids, num_classes=5, seed=1, keep_prob=0.6, **options
    )


def rows_of(figure):
    axes = figure.axes
    return [axes[i : i + 6] for i in range(0, len(axes), 6)]


def image_of(axes):
    (image,) = axes.images
    return np.asarray(image.get_array())


IMAGES = {
    "uint8": torch.randint(0, 256, (4, 3, 16, 16)).byte(),
    "in 0 .. 1": torch.rand(4, 3, 16, 16),
    "normalised": torch.randn(4, 3, 16, 16) * torch.tensor([1.0, 2.0, 3.0])[:, None, None],
    "bfloat16": torch.randn(4, 3, 16, 16).bfloat16().requires_grad_(),
    "one channel": torch.rand(4, 1, 16, 16),
    "channels_last": torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("augmentations", [1, 2])
def test_each_axes_shows_what_its_title_says(images, augmentations):
    result = grafted(images, augmentations=augmentations)
    figure = show(result, images)
    assert isinstance(figure, pyplot.Figure)
    drawn = rows_of(figure)
    assert [axes.get_title() or axes.get_title("left") for axes in drawn[0]] == [
        "source $i$",
        "destination $j$",
        "saliency of $i$",
        "mask $M$",
        "graft",
        "target",
    ]
    assert len(drawn) == 4 * augmentations
    for row, axes in enumerate(drawn):
        source, destination, saliency, mask, graft = map(image_of, axes[:5])
        i, j = row % 4, int(result.index[row])
        np.testing.assert_array_equal(saliency, result.saliency[i])
        np.testing.assert_array_equal(mask, result.mask[row])
        large = np.kron(result.mask[row], np.ones((4, 4))).astype(bool)
        if source.ndim == 3:
            large = large[..., None]
        np.testing.assert_array_equal(graft, np.where(large, source, destination))
        np.testing.assert_array_equal(source, image_of(drawn[i][0]))
        np.testing.assert_array_equal(destination, image_of(drawn[j][0]))


@pytest.mark.parametrize("name", ["uint8", "in 0 .. 1", "one channel"])
def test_what_can_be_drawn_is_drawn_as_it_is(name):
    images = IMAGES[name]
    for i, row in enumerate(rows_of(show(grafted(images), images))):
        np.testing.assert_array_equal(image_of(row[0]), images[i].movedim(0, -1).squeeze(-1))
        assert row[0].images[0].get_clim() == (0, 255 if name == "uint8" else 1)


@pytest.mark.parametrize("name", ["normalised", "bfloat16"])
def test_other_images_are_scaled_by_the_range_of_each_channel_in_the_batch(name):
    images = IMAGES[name].detach().float().movedim(1, -1).numpy()
    low, high = images.min((0, 1, 2)), images.max((0, 1, 2))
    for i, row in enumerate(rows_of(show(grafted(IMAGES[name]), IMAGES[name]))):
        expected = (images[i] - low) / (high - low)
        np.testing.assert_allclose(image_of(row[0]), expected, atol=1e-6)


def test_a_channel_without_a_range_is_black():
    images = torch.full((4, 3, 16, 16), -2.0)
    assert not image_of(rows_of(show(grafted(images), images))[0][0]).any()


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_the_target_is_lam_and_the_named_classes():
    images = IMAGES["uint8"]
    result = grafted(images, label_smoothing=0.1)
    names = ["ant", "bee", "cat", "dog", "elk"]
    for row, axes in enumerate(rows_of(show(result, images, names))):
        lam, target = float(result.lam[row]), result.targets[row]
        *lams, classes = texts_of(axes[5])
        assert lams == [rf"$\lambda = {lam:.2f}$", rf"$1-\lambda = {1 - lam:.2f}$"]
        assert [bar.get_width() for bar in axes[5].patches] == pytest.approx([lam, 1 - lam])
        order = [c for c in target.argsort(descending=True) if target[c] > 0.05]
        assert classes.split("\n") == [f"{target[c]:.2f}  {names[c]}" for c in order]


def test_without_names_classes_have_numbers_and_without_targets_none_are_named():
    images = IMAGES["uint8"]
    axes = rows_of(show(grafted(images), images))[0][5]
    assert "class" in texts_of(axes)[-1]
    result = grafted(images)._replace(targets=None)
    assert len(texts_of(rows_of(show(result, images))[0][5])) == 2


def test_rows_and_figure_can_be_given():
    images = torch.rand(12, 3, 16, 16)
    result = grafted(images)
    assert len(rows_of(show(result, images))) == 8
    given = pyplot.figure(layout="constrained").subfigures(1, 1)
    assert show(result, images, rows=[11, 3], figure=given) is given
    for row, axes in zip([11, 3], rows_of(given), strict=True):
        np.testing.assert_array_equal(image_of(axes[3]), result.mask[row])
        np.testing.assert_array_equal(image_of(axes[0]), images[row].movedim(0, -1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"result": None}, "result must be a GraftResult; got NoneType"),
        ({"images": torch.rand(4, 3, 2, 16, 16)}, "choose a frame"),
        ({"images": torch.rand(4, 2, 16, 16)}, "1 or 3 channels"),
        ({"images": torch.rand(4, 3, 16, 16) * 1j}, "images must be real"),
        ({"images": torch.rand(5, 3, 16, 16)}, "images must be the 4 of result; got 5"),
        ({"images": [1]}, "images must be a tensor"),
        ({"names": ["ant"]}, "names must be of the 5 classes of result; got 1"),
        ({"rows": [4]}, r"rows must be some of 0 .. 3; got \[4\]"),
        ({"rows": []}, "rows must be some"),
    ],
)
def test_bad_arguments_are_refused_before_a_figure_is_made(given, message):
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises((TypeError, ValueError), match=message):
        show(**{"result": grafted(images), "images": images, **given})
    assert not pyplot.get_fignums()


def test_matplotlib_is_imported_by_the_call():
    code = "import sys, sg_kernels; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_result_without_saliency_leaves_its_place_empty():
    images = torch.rand(4, 3, 16, 16)
    mask = torch.ones(8, 2, 2, dtype=torch.bool)
    result = saliency_graft(images, mask=mask, label="area", augmentations=2, seed=1)
    for axes in rows_of(show(result, images)):
        assert [len(each.images) for each in axes] == [1, 1, 0, 1, 1, 0]
    with pytest.raises(ValueError, match="images must be the 8 of result; got 3"):
        show(result, images[:3])
