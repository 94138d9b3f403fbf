"""What the tests share: the backends, inputs in every layout, and how two results may differ."""

import emulation
import numpy as np
import pytest
import torch
import truth
from ferry import ferried

import sg_kernels
from sg_kernels import backends, checks, ops, rng
from sg_kernels.call import NORM, NORMALIZE, Call

emulation.load_if_asked()  # before the tests ask which backends there are


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, help="run about this many cases of each test")
    parser.addoption("--shard", help="i/n: run the i-th, counted from 0, of n like parts")


LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    chosen = items
    if most := config.getoption("cases"):
        chosen = [case for cases in by_function(items) for case in few_of(cases, most)]
    config.stash[LEFT_OUT] = len(items) - len(chosen)
    if shard := config.getoption("shard"):
        i, n = map(int, shard.split("/"))
        chosen = in_shards(chosen, n)[i]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_report_collectionfinish(config):
    if left_out := config.stash.get(LEFT_OUT, 0):
        return f"--cases {config.getoption('cases')} left out {left_out} cases"


def by_function(cases):
    tests = {}
    for case in cases:
        tests.setdefault(case.nodeid.split("[")[0], []).append(case)
    return list(tests.values())


def in_shards(cases, count):
    """About as many cases in each. Tests stay whole, as their cases share compiled kernels."""
    shards = [[] for _ in range(count)]
    for test in sorted(by_function(cases), key=len, reverse=True):
        min(shards, key=len).extend(test)
    return shards


def label(callspec, name):
    """What tells a parameter's value from others, alike in every process; else its position."""
    value = callspec.params[name]
    return repr(value) if is_plain(value) else callspec.indices[name]


def is_plain(value):
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, (str, int, float, torch.dtype, type(None)))


def few_of(cases, most):
    """At least ``most`` cases, evenly spread, in which every value of every parameter comes up."""
    values = [
        {(name, label(case.callspec, name)) for name in case.callspec.params}
        if hasattr(case, "callspec")
        else set()
        for case in cases
    ]
    rest, chosen, missing = list(range(len(cases))), [], set().union(*values)
    while missing:
        best = max(rest, key=lambda i: len(values[i] & missing))
        missing -= values[best]
        rest.remove(best)
        chosen.append(best)
    more = min(most - len(chosen), len(rest))
    chosen += [rest[i * len(rest) // more] for i in range(more)]
    return [cases[i] for i in sorted(chosen)]


def library(name):
    """A module of timm or torchvision; skips what needs it where it is not installed."""
    try:
        from benchmarks import rivals  # which the tests of the wheels do without

        return rivals.import_library(name)
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed", allow_module_level=True)


@pytest.fixture(params=sg_kernels.available_backends())
def backend(request, monkeypatch):
    """Each backend that runs here. CPU tensors are ferried to a backend that runs on a GPU only."""
    name = request.param
    if "cpu" not in backends.DEVICES[name]:
        if request.node.get_closest_marker("operators"):
            pytest.skip("needs the operators themselves, see test_gpu.py")
        overload = ops.overload
        monkeypatch.setitem(backends.DEVICES, name, ("cpu", "cuda"))
        monkeypatch.setattr(
            ops,
            "overload",
            lambda operator, backend: (
                ferried(overload(operator, backend), "cuda")
                if backend == name
                else overload(operator, backend)
            ),
        )
    return name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_warned_of_yet():
    checks.warn_once.cache_clear()


@pytest.fixture
def poisoned():
    """Fills fresh memory with NaN, or with the largest integer."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_deterministic_debug_mode(mode)


LAYOUTS = (
    "nchw",
    "channels_last",
    "sliced",
    "sliced_channels_last",
    "transposed",
    "stepped",
    "expanded",
)


def in_layout(tensor, layout):
    """The same values with other strides; ``expanded`` repeats the first channel."""
    match layout:
        case "nchw":
            return tensor.contiguous()
        case "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        case "sliced":
            b, c, h, w = tensor.shape
            return _into(tensor.new_zeros(b, c + 1, h + 3, w + 2)[:, 1:, 1 : h + 1, 2:], tensor)
        case "sliced_channels_last":
            b, c, h, w = tensor.shape
            return _into(
                tensor.new_zeros(b, h + 1, w, c + 3)[:, 1:, :, 2:-1].permute(0, 3, 1, 2), tensor
            )
        case "transposed":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        case "stepped":
            b, c, h, w = tensor.shape
            return _into(tensor.new_zeros(b, c, 2 * h, 3 * w)[:, :, ::2, ::3], tensor)
        case "expanded":
            return tensor[:, :1].contiguous().expand(tensor.shape)


def _into(view, tensor):
    return view.copy_(tensor)


def random_bits(shape, dtype, seed=0):
    """Random bytes: any bit pattern of the dtype, NaN payloads included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.flatten(-2).view(dtype)


def random_mask(rows, gh, gw, seed=0):
    return torch.rand(rows, gh, gw, generator=torch.Generator().manual_seed(seed)) > 0.5


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(truth.bits(actual), truth.bits(expected))


def assert_masks_agree(mask, expected, unsure):
    """Masks are equal except in ``unsure`` cells, which lie within float rounding of the threshold.

    See :func:`truth.select`.
    """
    mask, expected = np.asarray(mask), np.asarray(expected)
    assert mask.shape == expected.shape
    allowed = np.tile(unsure, (len(mask) // max(len(unsure), 1), 1, 1))
    assert not ((mask != expected) & ~allowed).any()


def assert_fulfils_contract(
    result,
    images,
    seed,
    *,
    features=None,
    saliency=None,
    temperature=0.2,
    normalize="max",
    threshold="mean",
    grid_size=None,
    alpha=1.0,
    keep_prob=None,
    selection="bernoulli",
    k=None,
    label="saliency",
    norm="l1",
    augmentations=1,
    mask=None,
    index=None,
    no_fixed_points=False,
    targets=None,
    num_classes=None,
    label_smoothing=0.0,
    prob=1.0,
):
    """Every output of a call against the truth, stage by stage."""
    batch = len(images)
    if features is None and saliency is None:
        assert result.saliency is None
        saliency = np.ones((batch, 1, 1))
    else:
        ready = saliency is not None
        saliency = saliency.double().numpy() if ready else truth.channel_saliency(features)
        np.testing.assert_allclose(result.saliency, saliency, rtol=1e-5, equal_nan=True)

    if index is None:
        index = [truth.pairing(seed, batch, a, no_fixed_points) for a in range(augmentations)]
    assert result.index.tolist() == np.ravel(index).tolist()

    if mask is None:
        grid = truth.resample(saliency, grid_size or saliency.shape[1:])
        keep, unsure = truth.select(grid, normalize, temperature, threshold, k)
        mask = truth.sample(keep, seed, alpha, keep_prob, prob, augmentations, sampled=k is None)
        assert_masks_agree(result.mask, mask, unsure)
    else:
        grid = truth.resample(saliency, mask.shape[1:])
        mask = truth.gate(mask.numpy(), seed, prob, augmentations)
        assert result.mask.tolist() == mask.tolist()

    assert_same_bits(result.images, truth.graft(images, result.mask, result.index))

    kind = "area" if label == "area" else norm
    lam = truth.label_ratio(grid, result.mask.numpy(), result.index.tolist(), kind)
    assert result.lam.dtype == torch.float32
    np.testing.assert_allclose(result.lam, lam, rtol=1e-5)
    assert ((result.lam >= 0) & (result.lam <= 1)).all()

    if targets is None:
        assert result.targets is None
        return
    width = targets.shape[1] if targets.dim() == 2 else num_classes
    mixed = truth.mix_targets(targets, result.lam, result.index.tolist(), width, label_smoothing)
    assert result.targets.dtype == torch.float32
    np.testing.assert_allclose(result.targets, mixed, rtol=1e-5, atol=1e-7)


def operator_call(**given):
    """A call of the operator saliency_graft on maps of 4x3 cells, of the defaults but ``given``."""
    arguments = {
        "seed": torch.tensor([5]),
        "quantiles": rng.beta_quantiles(1.0),
        "grid_size": (4, 3),
        "temperature": 0.2,
        "threshold": 1 / 12,
        "normalize": NORMALIZE.index("max"),
        "norm": NORM.index("l1"),
    }
    return Call(**arguments | given)
