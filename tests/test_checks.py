"""What each argument refuses: one error that names it, before anything is touched."""

import inspect
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sg_kernels
from sg_kernels import (
    GraftResult,
    SaliencyGraft,
    channel_saliency,
    graft,
    mix_criterion,
    mix_targets,
    saliency_graft,
)

REFUSALS = (TypeError, ValueError)
NOT_NUMBERS = [None, "1", True, [1.0], 1j, torch.tensor(1.0)]
NOT_INTS = ["1", True, 1.0, [1], torch.tensor(1)]

OPTIONS = {
    "temperature": [*NOT_NUMBERS, 0, -0.1, math.nan, math.inf, -math.inf],
    "normalize": [None, "l1", "MAX", "", 1, ["max"]],
    "threshold": [None, "max", True, -0.1, 1, 1.0, 7, math.nan, math.inf, [0.5]],
    "grid_size": [
        7,
        "77",
        (7,),
        (7, 7, 7),
        (0, 7),
        (7, -1),
        (1.0, 2),
        (True, 2),
        [],
        (),
        [(2, 2), (0, 1)],
        [(2, 2), 3],
        (17, 4),
        (4, 17),
        [(2, 2), (4, 17)],
        torch.tensor([2, 2]),
    ],
    "alpha": [*NOT_NUMBERS, 0, -1.0, math.nan, math.inf],
    "keep_prob": [*NOT_NUMBERS[1:], -0.1, 1.1, math.nan, math.inf],
    "selection": [None, "top", "TOPK", 1],
    "k": [3],
    "label": [None, "lam", 1],
    "norm": [None, "l3", "max", 1, "area"],
    "augmentations": [None, *NOT_INTS, 0, -1],
    "no_fixed_points": [None, 1, "yes"],
    "num_classes": [*NOT_INTS, 0, -1],
    "label_smoothing": [*NOT_NUMBERS, -0.1, 1.1, math.nan],
    "standardize": [
        1.0,
        "ab",
        (1.0,),
        (1.0, 2.0, 3.0),
        (None, 1.0),
        ((), ()),
        (0.0, 0.0),
        (0.0, -1.0),
        (0.0, math.nan),
        (math.inf, 1.0),
        (math.nan, 1.0),
        (0.0, 1e-60),
        (3e38, 1e-3),
        ((1.0, True, 0.0), 1.0),
        ((1.0, 2.0), (1.0, 1.0, 1.0)),
        ((1.0, 2.0), 1.0),
        (torch.zeros(3), torch.ones(3)),
    ],
    "dtype": [torch.float32, torch.float64, torch.uint8, "float32", 1],
    "channel_dim": [None, *NOT_INTS, 0, 4, -4],
    "token_grid": [3, (3,), (0, 5), (1.0, 2), "34", [(2, 2)]],
    "prefix_tokens": [None, *NOT_INTS, -1, 2],
    "backend": ["nonsense", "", 3, ["reference"]],
}
PAIRS = [(name, value) for name, values in OPTIONS.items() for value in values]


def ids(pairs):
    return [f"{name}-{value}".replace("\n", "") for name, value in pairs]


def named(argument):
    """The argument as a word of its own."""
    return rf"\b{argument}\b"


def inputs():
    return torch.randn(4, 3, 16, 16), torch.randn(4, 6, 4, 4)


@pytest.mark.parametrize(("name", "value"), PAIRS, ids=ids(PAIRS))
def test_saliency_graft_refuses_an_option(name, value):
    with pytest.raises(REFUSALS, match=named(name)):
        saliency_graft(*inputs(), **{name: value})


@pytest.mark.parametrize(("name", "value"), PAIRS, ids=ids(PAIRS))
def test_the_module_refuses_an_option(name, value):
    images, features = inputs()
    with pytest.raises(REFUSALS, match=named(name)):
        SaliencyGraft(**{name: value})(images, features=features)


@pytest.mark.parametrize("k", [None, *NOT_INTS, 0, -1, 17])
def test_top_k_refuses_a_k(k):
    with pytest.raises(REFUSALS, match=named("k")):
        saliency_graft(*inputs(), selection="topk", k=k)


def tensors():
    """Arguments that are tensors, and what is wrong with each."""
    images, features = inputs()
    saliency = torch.rand(4, 4, 4)
    meta = {"device": "meta"}
    yield (
        "images",
        [
            {"images": value}
            for value in (
                None,
                [[1.0]],
                np.zeros((4, 3, 16, 16)),
                images[0],
                images[0, 0],
                images.to_sparse(),
                images.to(torch.float8_e5m2).requires_grad_(),
                images.to(torch.float8_e8m0fnu),
            )
        ],
    )
    yield (
        "features",
        [
            {"features": value}
            for value in (
                [[1.0]],
                features.numpy(),
                features[0],
                features.flatten(2),
                features[None],
                features.int(),
                features.bool(),
                features.to(torch.complex64),
                features[:3],
                features[:, :, :0],
                features[..., :0],
                features.to_sparse(),
                features.to(**meta),
                None,
            )
        ],
    )
    yield (
        "saliency",
        [
            {"features": None, "saliency": value}
            for value in (
                saliency.numpy(),
                saliency[0],
                saliency[None],
                saliency.long(),
                saliency[:3],
                saliency[:, :0],
                saliency - 0.5,
                saliency.to_sparse(),
                saliency.to(**meta),
                None,
            )
        ]
        + [{"saliency": saliency}],
    )
    mask = torch.rand(4, 8, 8) < 0.5
    yield (
        "mask",
        [
            {"mask": value}
            for value in (
                mask.numpy(),
                mask.float(),
                mask.to(torch.uint8),
                mask[0],
                mask[:, None],
                mask[:3],
                mask.repeat(2, 1, 1),
                mask[:, :0],
                mask.repeat(1, 3, 1),
                mask.repeat(1, 1, 3),
                mask.to_sparse(),
                mask.to(**meta),
            )
        ]
        + [
            {"mask": mask, "augmentations": 2},
            {"mask": mask, "alpha": 0.5},
            {"mask": mask.float(), "features": None, "label": "area"},
        ],
    )
    index = torch.tensor([1, 0, 3, 2])
    yield (
        "index",
        [
            {"index": value}
            for value in (
                [1, 0, 3, 2],
                index.numpy(),
                index.int(),
                index.float(),
                index[None],
                index[:3],
                index.repeat(2),
                index + 1,
                index - 1,
                index * 2**60,
                index.to(**meta),
            )
        ]
        + [{"index": index, "augmentations": 2}, {"index": index, "no_fixed_points": True}],
    )
    classes, dense = torch.tensor([0, 1, 2, 4]), torch.rand(4, 5)
    yield (
        "targets",
        [
            {"targets": value, "num_classes": 5}
            for value in (
                [0, 1, 2, 4],
                classes.numpy(),
                torch.tensor(3),
                classes[:3],
                classes.repeat(2),
                classes.float(),
                classes.bool(),
                classes.to(torch.complex64),
                classes + 1,
                classes - 1,
                classes.to(torch.uint64) * 2**63,
                dense[:3],
                dense[None],
                dense.to(torch.complex64),
                dense.to_sparse(),
                classes.to(**meta),
            )
        ],
    )
    yield (
        "num_classes",
        [
            {"targets": classes},
            {"targets": dense, "num_classes": 4},
            {"targets": dense, "num_classes": 6},
        ],
    )
    yield (
        "generator",
        [{"generator": value} for value in (5, "cpu", np.random.default_rng())]
        + [{"generator": torch.Generator(), "seed": 1}],
    )
    yield (
        "seed",
        [
            {"seed": value}
            for value in (
                1.0,
                "1",
                True,
                [1],
                2**64,
                -(2**63) - 1,
                torch.tensor([1, 2]),
                torch.tensor([]).long(),
                torch.tensor([1.0]),
                torch.tensor([1], dtype=torch.int32),
                torch.tensor([1], **meta),
            )
        ],
    )
    out, twice = torch.zeros(4, 3, 16, 16), images.repeat(2, 1, 1, 1)
    rows = out.view(4, -1)
    yield (
        "out",
        [
            {"out": value}
            for value in (
                out.numpy(),
                out[0],
                out[:3],
                out[:, :2],
                out[:, :, :8],
                out.repeat(2, 1, 1, 1),
                out.double(),
                out.to(**meta),
                out.to_sparse(),
                out.clone().requires_grad_(),
                out[:1].expand(4, 3, 16, 16),
                torch.zeros(4096).as_strided((4, 3, 16, 16), (768, 256, 8, 1)),
            )
        ]
        + [
            {"out": out.to(torch.complex64).conj(), "images": images.to(torch.complex64)},
            {"out": out.to(torch.complex64).conj().imag},
            {"out": out, "augmentations": 2},
            {"out": out, "images": images.clone().requires_grad_()},
            {"out": images, "images": images},
            {"out": twice[2:6], "images": twice[:4]},
            {"out": out, "targets": rows},
            {"out": out, "mask": rows.view(torch.bool)[:, :64].view(4, 8, 8)},
            {"out": out, "features": rows[:, 3:99].view(4, 6, 4, 4)},
            {"out": out, "features": None, "saliency": rows[:, 99:115].view(4, 4, 4)},
        ],
    )
    yield (
        "token_grid",
        [
            {"token_grid": (4, 4), "saliency": saliency, "features": None},
            {"token_grid": (4, 3), "features": features.flatten(2).transpose(1, 2)},
            {"token_grid": (4, 4), "prefix_tokens": 1, "features": features.flatten(2).mT},
        ],
    )
    yield "prefix_tokens", [{"prefix_tokens": 1, "saliency": saliency, "features": None}]
    yield (
        "grid_size",
        [
            {"features": torch.randn(4, 6, 17, 4)},
            {"features": torch.randn(4, 6, 4, 17)},
        ],
    )


TENSORS = [(name, i, change) for name, changes in tensors() for i, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, _, change in TENSORS],
    ids=[f"{name}-{i}" for name, i, _ in TENSORS],
)
def test_saliency_graft_refuses_a_tensor(name, change, backend):
    images, features = inputs()
    arguments = {"images": images, "features": features, "backend": backend, **change}
    with pytest.raises(REFUSALS, match=named(name)):
        saliency_graft(**arguments)


@pytest.mark.parametrize("seed", [1.0, "1", True, [1], 2**64, -(2**63) - 1, torch.tensor([1, 2])])
def test_the_module_refuses_a_seed(seed):
    with pytest.raises(REFUSALS, match=named("seed")):
        SaliencyGraft(seed=seed)


@pytest.mark.parametrize("prob", [*NOT_NUMBERS, -0.1, 1.1, math.nan])
def test_the_module_refuses_a_prob(prob):
    with pytest.raises(REFUSALS, match=named("prob")):
        SaliencyGraft(prob=prob)


@pytest.mark.parametrize("epochs", [None, *NOT_INTS, -1, 1.5])
def test_the_module_refuses_warmup_epochs(epochs):
    with pytest.raises(REFUSALS, match=named("warmup_epochs")):
        SaliencyGraft(warmup_epochs=epochs)


@pytest.mark.parametrize("epoch", [None, *NOT_INTS, -1])
def test_set_epoch_refuses_an_epoch(epoch):
    with pytest.raises(REFUSALS, match=named("epoch")):
        SaliencyGraft().set_epoch(epoch)


@pytest.mark.parametrize("layer", [5, "layer4", lambda images: images, nn.Linear])
def test_the_module_refuses_a_layer(layer):
    with pytest.raises(TypeError, match=named("layer")):
        SaliencyGraft(layer)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", {"images": None}),
        ("images", {"images": torch.zeros(3, 16, 16)}),
        ("features", {"features": torch.zeros(3, 6, 4, 4)}),
        ("features", {"features": None}),
        ("saliency", {"features": None, "saliency": -torch.ones(4, 4, 4)}),
        ("saliency", {"saliency": torch.ones(4, 4, 4)}),
        ("mask", {"mask": torch.ones(4, 4, 4)}),
        ("mask", {"mask": torch.ones(3, 4, 4) > 0}),
        ("targets", {"targets": torch.tensor([0, 1, 2, 5])}),
        ("targets", {"targets": torch.zeros(3, 5)}),
        ("num_classes", {"targets": torch.zeros(4, 6)}),
    ],
)
def test_a_call_of_the_module_refuses(name, change, backend):
    images, features = inputs()
    module = SaliencyGraft(num_classes=5, backend=backend)
    with pytest.raises(REFUSALS, match=named(name)):
        module(**{"images": images, "features": features, **change})
    assert int(module.step) == 0


FEATURES = torch.randn(2, 6, 4, 4)
CHANNEL_SALIENCY = [
    ("features", {"features": value})
    for value in (
        None,
        FEATURES.numpy(),
        FEATURES[0],
        FEATURES[None],
        FEATURES.int(),
        FEATURES.to(torch.complex64),
        FEATURES.to(torch.float8_e5m2),
        FEATURES.to_sparse(),
    )
] + [
    ("features", {"features": FEATURES, "token_grid": (4, 4)}),
    ("features", {"features": FEATURES.flatten(2)}),
    ("token_grid", {"features": FEATURES.flatten(2).mT, "token_grid": (4, 3)}),
    ("token_grid", {"features": FEATURES.flatten(2).mT, "token_grid": 16}),
    ("prefix_tokens", {"prefix_tokens": 1}),
    (
        "prefix_tokens",
        {"features": FEATURES.flatten(2).mT, "token_grid": (4, 4), "prefix_tokens": 1},
    ),
    ("prefix_tokens", {"prefix_tokens": -1}),
    ("backend", {"backend": "nonsense"}),
]


@pytest.mark.parametrize(("name", "change"), CHANNEL_SALIENCY)
def test_channel_saliency_refuses(name, change):
    with pytest.raises(REFUSALS, match=named(name)):
        channel_saliency(**{"features": FEATURES, **change})


IMAGES, MASK = torch.randn(4, 3, 8, 8), torch.rand(8, 4, 4) > 0.5
INDEX, OUT = torch.tensor([1, 0, 3, 2, 0, 0, 0, 0]), torch.zeros(8, 3, 8, 8)
GRAFT = [
    *[
        ("images", {"images": value})
        for value in (
            None,
            IMAGES.numpy(),
            IMAGES[0, 0],
            IMAGES[0, 0],
            IMAGES.to_sparse(),
            IMAGES.to(torch.float8_e4m3fn).requires_grad_(),
            IMAGES.to(torch.float8_e8m0fnu),
        )
    ],
    *[
        ("mask", {"mask": value})
        for value in (
            None,
            MASK.numpy(),
            MASK.float(),
            MASK.to(torch.uint8),
            MASK[0],
            MASK[:, None],
            MASK[:7],
            MASK[:0],
            MASK[:, :0],
            MASK.repeat(1, 3, 1),
            MASK.repeat(1, 1, 3),
            MASK.to("meta"),
        )
    ],
    ("mask", {"images": IMAGES[:0]}),
    *[
        ("index", {"index": value})
        for value in (
            None,
            INDEX.tolist(),
            INDEX.int(),
            INDEX.bool(),
            INDEX[:4],
            INDEX[None],
            INDEX + 1,
            INDEX - 1,
            INDEX * 2**60,
            INDEX.to("meta"),
        )
    ],
    *[
        ("out", {"out": value})
        for value in (
            OUT.numpy(),
            OUT[:4],
            OUT[0],
            OUT[:, :1],
            OUT.double(),
            OUT.to("meta"),
            OUT.clone().requires_grad_(),
            OUT[:1].expand(8, 3, 8, 8),
            torch.zeros(2048).as_strided((8, 3, 8, 8), (192, 64, 4, 1)),
        )
    ],
    ("out", {"out": OUT, "images": IMAGES.clone().requires_grad_()}),
    ("out", {"out": IMAGES, "mask": MASK[:4], "index": INDEX[:4]}),
    ("out", {"out": OUT, "images": IMAGES[:, 0]}),
    ("out", {"out": OUT[:, 0].double(), "images": IMAGES[:, 0]}),
    ("backend", {"backend": "nonsense"}),
]


@pytest.mark.parametrize(("name", "change"), GRAFT)
def test_graft_refuses(name, change, backend):
    arguments = {"images": IMAGES, "mask": MASK, "index": INDEX, "backend": backend, **change}
    with pytest.raises(REFUSALS, match=named(name)):
        graft(**arguments)


CLASSES, DENSE, LAM = torch.tensor([0, 1, 2, 4]), torch.rand(4, 5), torch.rand(8)
MIX_TARGETS = [
    *[
        ("targets", {"targets": value})
        for value in (
            None,
            CLASSES.tolist(),
            torch.tensor(1),
            CLASSES.float(),
            CLASSES.bool(),
            CLASSES.to(torch.complex64),
            CLASSES + 1,
            CLASSES - 1,
            DENSE[None],
            DENSE.to(torch.complex64),
            DENSE.to_sparse(),
        )
    ],
    *[
        ("lam", {"lam": value})
        for value in (None, 0.5, LAM.tolist(), LAM.double(), LAM[None], LAM[:7], LAM.to("meta"))
    ],
    ("lam", {"targets": CLASSES[:0]}),
    *[
        ("index", {"index": value})
        for value in (
            None,
            INDEX.tolist(),
            INDEX.int(),
            INDEX[:4],
            INDEX + 1,
            INDEX - 1,
            INDEX[None],
        )
    ],
    *[("num_classes", {"num_classes": value}) for value in (None, 0, -1, 5.0, True, "5")],
    ("num_classes", {"targets": DENSE, "num_classes": 6}),
    *[
        ("label_smoothing", {"label_smoothing": value})
        for value in (None, -0.1, 1.1, "0", math.nan)
    ],
    ("backend", {"backend": "nonsense"}),
]


@pytest.mark.parametrize(("name", "change"), MIX_TARGETS)
def test_mix_targets_refuses(name, change, backend):
    arguments = {"targets": CLASSES, "lam": LAM, "index": INDEX, "num_classes": 5}
    with pytest.raises(REFUSALS, match=named(name)):
        mix_targets(**{**arguments, "backend": backend, **change})


RESULT = saliency_graft(*inputs(), augmentations=2, seed=1, backend="reference")


LOGITS = torch.randn(8, 5)


def one_loss_a_row(logits, targets):
    return nn.functional.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("criterion", {"criterion": F.cross_entropy}),
        ("criterion", {"criterion": lambda logits, targets: 1.0}),
        ("criterion", {"criterion": lambda logits, targets: None}),
        ("criterion", {"criterion": lambda logits, targets: logits[:3].sum(1)}),
        ("criterion", {"criterion": None}),
        ("criterion", {"criterion": "cross_entropy"}),
        ("logits", {"logits": None}),
        ("logits", {"logits": torch.randn(4, 5)}),
        ("logits", {"logits": torch.tensor(1.0)}),
        ("targets", {"targets": [0, 1, 2, 3]}),
        ("targets", {"targets": torch.arange(8) % 5}),
        ("targets", {"targets": torch.tensor(1)}),
        ("result", {"result": tuple(RESULT)}),
        ("result", {"result": RESULT.lam}),
        ("result", {"result": RESULT._replace(lam=RESULT.lam.to("meta"))}),
        ("logits", {"result": None, "logits": torch.tensor(1.0)}),
        ("targets", {"result": None}),
        ("criterion", {"result": None, "criterion": F.cross_entropy, "logits": LOGITS[:4]}),
        ("targets", {"result": (RESULT.lam, RESULT.index), "targets": torch.arange(3)}),
        ("result", {"result": GraftResult(*[None] * 6)}),
        ("result", {"result": (RESULT.lam,)}),
    ],
)
def test_mix_criterion_refuses(name, change):
    arguments = {
        "criterion": one_loss_a_row,
        "logits": LOGITS,
        "targets": torch.arange(4),
        "result": RESULT,
    }
    with pytest.raises(REFUSALS, match=named(name)):
        mix_criterion(**{**arguments, **change})


WRONG = [
    {"temperature": 0},
    {"features": torch.randn(3, 6, 4, 4)},
    {"index": torch.tensor([0, 1, 2, 4])},
    {"targets": torch.tensor([0, 1, 2, 3]), "num_classes": 3},
    {"grid_size": (17, 1)},
    {"backend": "nonsense"},
    {"images": torch.zeros(4, 3, 16, 16, dtype=torch.float8_e8m0fnu)},
]


@pytest.mark.parametrize("change", WRONG, ids=[next(iter(change)) for change in WRONG])
def test_a_refused_call_touches_neither_out_nor_inputs(change):
    images, features = inputs()
    out = torch.full_like(images, torch.nan)
    before = images.clone(), features.clone()
    with pytest.raises(REFUSALS):
        saliency_graft(**{"images": images, "features": features, "out": out, **change})
    assert out.isnan().all()
    assert torch.equal(images, before[0])
    assert torch.equal(features, before[1])


@pytest.mark.parametrize("change", WRONG, ids=[next(iter(change)) for change in WRONG])
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "torch's"])
def test_a_refused_call_draws_nothing(change, own):
    images, features = inputs()
    generator = torch.Generator() if own else torch.default_generator
    before = generator.get_state()
    arguments = {"generator": generator} if own else {}
    with pytest.raises(REFUSALS):
        saliency_graft(**{"images": images, "features": features, **arguments, **change})
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.uint4, torch.float4_e2m1fn_x2, torch.bits8])
def test_images_that_pack_numbers_are_refused(dtype):
    images = torch.empty(4, 3, 16, 16, dtype=dtype)
    with pytest.raises(TypeError, match=f"images must hold plain numbers; got {dtype}"):
        saliency_graft(images, torch.randn(4, 6, 4, 4))
    with pytest.raises(TypeError, match=f"images must hold plain numbers; got {dtype}"):
        graft(images, torch.rand(4, 2, 2) > 0.5, torch.arange(4))


def test_a_tangent_is_refused_as_none_would_come_out():
    images, features = inputs()
    mask, index = torch.rand(4, 2, 2) > 0.5, torch.arange(4)

    for mixed in (
        lambda images: saliency_graft(images, features, seed=1).images,
        lambda images: graft(images, mask, index),
    ):
        with pytest.raises(TypeError, match="images must not carry a tangent"):
            torch.func.jvp(mixed, (images,), (images,))


def test_what_was_given_and_what_is_accepted_are_told():
    with pytest.raises(ValueError, match=r"temperature must be .* > 0; got -2"):
        saliency_graft(*inputs(), temperature=-2)
    with pytest.raises(ValueError, match=r"index must lie in 0 .. 3; got -1 .. 7"):
        saliency_graft(*inputs(), index=torch.tensor([0, -1, 7, 1]))
    with pytest.raises(TypeError, match=r"features must be .*float16.*; got torch.int32"):
        saliency_graft(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2, dtype=torch.int32))


@pytest.mark.slow
def test_edge_values_are_accepted(backend):
    images, features = inputs()
    for change in (
        {"threshold": 0.0},
        {"keep_prob": 1},
        {"label_smoothing": 1},
        {"temperature": 1e-30},
        {"temperature": 1e30},
        {"alpha": 1e-3},
        {"alpha": 1e5},
        {"grid_size": (16, 16)},
        {"selection": "topk", "k": 16},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
    ):
        result = saliency_graft(images, features, backend=backend, **change)
        assert not result.lam.isnan().any()


def test_every_argument_has_a_refusal_here():
    tested = {*OPTIONS, *(name for name, _, _ in TENSORS)}
    assert tested == set(inspect.signature(sg_kernels.saliency_graft).parameters)


@pytest.mark.parametrize(
    ("shape", "size", "channel_dim"),
    [
        ((2, 56, 56, 96), (224, 224), -1),
        ((2, 7, 7, 768), (224, 224), -1),
        ((2, 4, 32, 512), (128, 1024), -1),
        ((2, 2, 2, 64), (33, 31), 3),
    ],
)
def test_a_map_with_its_channels_last_is_refused_with_the_way_out(shape, size, channel_dim):
    images, features = torch.rand(2, 3, *size), torch.rand(shape)
    with pytest.raises(ValueError, match=r"features .*channel_dim=-1"):
        saliency_graft(images, features)
    result = saliency_graft(images, features, channel_dim=channel_dim, seed=1)
    assert result.mask.shape == shape[:3]
    expected = saliency_graft(images, features.movedim(-1, 1), seed=1)
    assert torch.equal(result.saliency, expected.saliency)
    assert torch.equal(result.images, expected.images)
    with pytest.raises(ValueError, match=r"features .*channel_dim=1"):
        saliency_graft(images, features.movedim(-1, 1).contiguous(), channel_dim=-1)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 2048, 7, 7), (224, 224)),
        ((2, 512, 1, 32), (128, 1024)),  # frequencies pooled away
        ((2, 9, 9, 8), (33, 31)),
        ((2, 64, 1, 1), (32, 32)),
        ((2, 1, 1, 6), (16, 16)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*give a grid of one cell")
def test_a_map_with_its_channels_first_is_taken_as_it_is(shape, size):
    result = saliency_graft(torch.rand(2, 3, *size), torch.rand(shape), seed=1)
    assert result.mask.shape == (2, *shape[2:])


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_channel_saliency_sums_over_the_channel_dim(dim, backend):
    features = torch.randn(2, 5, 3, 4)
    moved = features.movedim(1, dim)
    for given in (dim, dim - 4):
        saliency = channel_saliency(moved, channel_dim=given, backend=backend)
        torch.testing.assert_close(saliency, features.abs().sum(1))


@pytest.mark.parametrize(
    "grid", ["square", lambda images: (images.shape[2] // 8, images.shape[3] // 8), (4, 4)]
)
def test_the_grid_of_tokens_may_follow_from_them_or_from_the_images(grid, backend):
    images, tokens = torch.rand(2, 3, 32, 32), torch.randn(2, 17, 5)
    options = {"token_grid": grid, "prefix_tokens": 1, "seed": 1, "backend": backend}
    result = saliency_graft(images, tokens, **options)
    torch.testing.assert_close(result.saliency, tokens[:, 1:].abs().sum(2).view(2, 4, 4))
    larger = torch.rand(2, 3, 48, 48), torch.randn(2, 37, 5)
    if grid == (4, 4):
        with pytest.raises(ValueError, match="token_grid"):
            saliency_graft(*larger, **options)
    else:
        assert saliency_graft(*larger, **options).mask.shape == (2, 6, 6)


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (16, {}),
        (15, {"token_grid": "square"}),
        (16, {"token_grid": lambda images: 4}),
        (16, {"token_grid": lambda images: (4, 5)}),
    ],
)
def test_tokens_that_make_no_grid_are_refused_by_token_grid(tokens, options):
    with pytest.raises(ValueError, match="token_grid"):
        saliency_graft(torch.rand(2, 3, 32, 32), torch.randn(2, tokens, 5), **options)


def test_a_grid_of_tokens_from_images_needs_images():
    with pytest.raises(ValueError, match="token_grid"):
        channel_saliency(torch.randn(2, 16, 5), token_grid=lambda images: (4, 4))


@pytest.mark.parametrize(
    "options", [{"features": (4, 6, 1, 1)}, {"features": (4, 6, 4, 4), "grid_size": (1, 1)}]
)
def test_a_grid_of_one_cell_is_warned_of_once(options):
    features = torch.randn(options.pop("features"))
    with pytest.warns(UserWarning, match=r"features \(4, 6, .*one cell.* earlier layer") as warned:
        saliency_graft(torch.rand(4, 3, 16, 16), features, **options)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saliency_graft(torch.rand(4, 3, 16, 16), features, **options)


def test_one_hot_maps_with_the_classes_last_are_warned_of(recwarn):
    mask, index = torch.ones(2, 4, 6, dtype=torch.bool), torch.tensor([1, 0])
    graft(torch.zeros(2, 5, 8, 12), mask, index)
    graft(torch.zeros(2, 8, 8, 7), mask[:, :1, :1], index)
    assert not recwarn.list
    graft(torch.zeros(2, 8, 12, 7), mask, index)
    assert re.search(r"images \(2, 8, 12, 7\).*movedim\(-1, 1\)", str(recwarn.pop().message))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 10**400),
        ("temperature", 1e-39),
        ("temperature", 1e39),
        ("alpha", 10**400),
        ("alpha", 2e6),
        ("augmentations", 2**40),
        ("augmentations", 2**61 + 1),
        ("augmentations", 2**64),
        ("augmentations", 2**30),
        ("num_classes", 2**62),
        ("num_classes", 2**64),
    ],
)
def test_what_no_backend_can_count_is_refused_before_the_generator_moves(name, value):
    images, features = inputs()
    before = torch.get_rng_state()
    given = {"targets": torch.arange(4), "num_classes": 5, name: value}
    with pytest.raises(ValueError, match=named(name)):
        saliency_graft(images, features, **given)
    assert torch.equal(torch.get_rng_state(), before)


def test_nested_tensors_are_refused():
    images, features = inputs()
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([features[0], features[1]], layout=layout)
        with pytest.raises(TypeError, match=r"features must be a dense tensor .*nested"):
            saliency_graft(images[:2], nested)


def test_a_seed_inside_out_is_refused():
    images, features = inputs()
    out = torch.zeros_like(images, dtype=torch.int64)
    with pytest.raises(ValueError, match="out must not lie in the memory that seed spans"):
        saliency_graft(images.long(), features, out=out, seed=out.view(-1)[5:6])


def test_vmap_is_refused():
    images, features = inputs()
    with pytest.raises(TypeError, match=r"images must not be under torch\.vmap"):
        torch.vmap(lambda images: saliency_graft(images, features).images)(images[None])


def test_the_module_refuses_a_backend_that_there_is_not():
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'typo'"):
        SaliencyGraft(backend="typo")


def test_the_module_refuses_a_seed_without_a_value():
    with pytest.raises(ValueError, match="seed must be an int or one int64"):
        SaliencyGraft(seed=torch.empty(1, dtype=torch.int64, device="meta"))
