"""The raw operators: opcheck, values that nobody checked, torch.compile and torch.export."""

from collections import OrderedDict

import pytest
import torch
from conftest import assert_same_bits, operator_call
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import sg_kernels
from sg_kernels import SaliencyGraft, ops, rng, saliency_graft
from sg_kernels.backends import reference
from sg_kernels.call import NORM, NORMALIZE, Outputs

pytestmark = pytest.mark.operators

IMAGES = torch.randn(4, 3, 8, 6)
FEATURES = torch.randn(4, 5, 4, 3)
MASK = torch.rand(8, 4, 3) > 0.5
INDEX = torch.tensor([1, 0, 3, 3, 2, 1, 0, 0])


def call(**changes):
    return operator_call(**{"images": IMAGES, "features": FEATURES} | changes)


CALLS = {
    "plain": call(),
    "step": call(step=torch.tensor([3]), rank=2),
    "saliency": call(features=None, saliency=torch.rand(4, 4, 3)),
    "index and ids": call(
        index=INDEX, augmentations=2, targets=torch.tensor([0, 1, 2, 0]), num_classes=3
    ),
    "dense": call(
        targets=torch.rand(4, 7), num_classes=7, label_smoothing=0.1, norm=NORM.index("l2")
    ),
    "grid": call(grid_size=(2, 5), quantiles=None, keep_prob=0.5, norm=NORM.index("area")),
    "topk": call(k=4, prob=0.5, augmentations=2, step=torch.tensor([0])),
    "channels_last": call(
        images=IMAGES.contiguous(memory_format=torch.channels_last),
        features=FEATURES.bfloat16().contiguous(memory_format=torch.channels_last),
        normalize=NORMALIZE.index("mean"),
        no_fixed_points=True,
    ),
}


def run(backend, call):
    return Outputs(*ops.overload("saliency_graft", backend)(*call))


ARGUMENTS = [
    ("channel_saliency", (FEATURES,)),
    ("channel_saliency", (FEATURES.half().contiguous(memory_format=torch.channels_last),)),
    ("channel_saliency", (torch.randn(2, 12, 5).unflatten(1, (4, 3)).permute(0, 3, 1, 2),)),
    ("graft", (IMAGES, MASK, INDEX)),
    ("graft", (IMAGES.to(torch.uint8).contiguous(memory_format=torch.channels_last), MASK, INDEX)),
    ("graft", (IMAGES.transpose(2, 3), MASK[:4, :1, :1], INDEX[:4])),
    ("graft", (IMAGES, MASK, INDEX, torch.empty(8, 3, 8, 6))),
    ("graft", (IMAGES, MASK, INDEX, torch.empty(8, 8, 6, 3).permute(0, 3, 1, 2))),
    ("graft_backward", (torch.randn(8, 3, 8, 6), MASK, INDEX, 2)),
    ("graft_backward", (torch.randn(8, 8, 6, 3).permute(0, 3, 1, 2), MASK, INDEX % 8, 1)),
    ("mix_targets", (torch.tensor([0, 1, 2, 0]), torch.rand(8), INDEX, 3, 0.1)),
    ("mix_targets", (torch.rand(4, 5), torch.rand(4), INDEX[:4], 5, 0.0)),
    *[("saliency_graft", given) for given in CALLS.values()],
    ("saliency_graft", call(out=torch.empty(4, 3, 8, 6))),
    (
        "saliency_graft",
        call(out=torch.empty(4, 8, 6, 3).permute(0, 3, 1, 2), step=torch.tensor([1])),
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments"), ARGUMENTS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(ARGUMENTS)]
)
def test_opcheck(backend, name, arguments):
    torch.library.opcheck(ops.overload(name, backend), arguments)


def test_opcheck_draw_seed():
    # its values are random, so the eager and the traced one have no reason to be the same
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    blank = torch.empty(1, dtype=torch.int64)
    torch.library.opcheck(torch.ops.sg_kernels.draw_seed.default, (blank,), test_utils=checks)


def test_opcheck_quantiles():
    torch.library.opcheck(torch.ops.sg_kernels.quantiles.default, (0.7, CPU))


def test_step_goes_up_by_one_and_nothing_else_changes(backend):
    given = call(step=torch.tensor([41]))
    before = [value.clone() for value in given if isinstance(value, torch.Tensor)]
    run(backend, given)
    after = [value for value in given if isinstance(value, torch.Tensor)]
    assert int(given.step) == 42
    changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert sum(changed) == 1


@pytest.mark.parametrize("name", CALLS)
def test_with_out_the_operator_writes_there_and_returns_no_images(backend, name):
    given = CALLS[name]
    both = [
        given._replace(step=None if given.step is None else given.step.clone()) for _ in range(2)
    ]
    fresh = run(backend, both[0])
    out = torch.full_like(fresh.images, torch.nan)
    written = run(backend, both[1]._replace(out=out))
    assert_same_bits(out, fresh.images)
    assert written.images.shape == (0,)
    assert written.images.dtype == out.dtype
    assert all(map(torch.equal, written[1:], fresh[1:]))


def test_with_out_graft_writes_there_and_returns_no_images(backend):
    fresh = ops.overload("graft", backend)(IMAGES, MASK, INDEX)
    out = torch.full_like(fresh, torch.nan)
    assert ops.overload("graft", backend)(IMAGES, MASK, INDEX, out).shape == (0,)
    assert_same_bits(out, fresh)


BAD_INDEX = [-1, 4, 2**31, 2**40, -(2**63), 2**63 - 1]


def surrounded(*shape):
    """Ones amid NaN, so that a read out of bounds shows."""
    base = torch.full((shape[0] + 2, *shape[1:]), torch.nan)
    base[1:-1] = 1.0
    return base[1:-1]


@pytest.mark.parametrize("bad", BAD_INDEX)
@pytest.mark.parametrize("kind", ["ids", "dense"])
def test_a_row_whose_index_is_out_of_range_is_nan_and_no_other_is(backend, bad, kind):
    targets = torch.tensor([0, 1, 2, 0]) if kind == "ids" else surrounded(4, 3)
    given = call(
        images=surrounded(4, 3, 8, 6),
        index=torch.tensor([1, bad, 3, 0]),
        targets=targets,
        num_classes=3,
    )
    images, lam, _, _, _, mixed = run(backend, given)
    assert (images == 1).all()
    assert lam.isnan().tolist() == [False, True, False, False]
    assert mixed.isnan().all(1).tolist() == [False, True, False, False]
    assert mixed.isnan().sum() == 3


@pytest.mark.parametrize("bad", BAD_INDEX)
def test_graft_of_an_index_out_of_range_takes_the_source(backend, bad):
    images, index = surrounded(4, 3, 8, 6), torch.tensor([1, bad, 3, 0])
    mask = torch.zeros(4, 2, 2, dtype=torch.bool)
    assert (ops.overload("graft", backend)(images, mask, index) == 1).all()
    grad = ops.overload("graft_backward", backend)(images, mask, index, 1)
    assert grad[:, 0, 0, 0].tolist() == [1.0, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [-1, 3, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_a_class_id_out_of_range_makes_the_rows_that_meet_it_nan(backend, bad):
    given = call(
        index=torch.tensor([1, 2, 3, 3]), targets=torch.tensor([0, bad, 2, 0]), num_classes=3
    )
    _, lam, _, _, _, mixed = run(backend, given)
    assert lam.isnan().tolist() == [True, True, False, False]
    assert mixed.isnan().all(1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_mix_targets_is_nan_where_an_index_or_a_class_id_is_out_of_range(backend, bad):
    mix = ops.overload("mix_targets", backend)
    index = torch.tensor([1, bad, 3, 0])
    mixed = mix(surrounded(4, 5), torch.rand(4), index, 5, 0.1)
    assert mixed.isnan().all(1).tolist() == [False, True, False, False]
    ids = torch.tensor([0, 1, bad, 3])
    mixed = mix(ids, torch.rand(4), torch.tensor([1, 2, 3, 0]), 4, 0.1)
    assert mixed.isnan().all(1).tolist() == [False, True, True, False]


def test_negative_saliency_that_nobody_checked_counts_as_nan(backend):
    saliency = torch.rand(4, 4, 3)
    saliency[1, 0, 0] = -1.0
    given = call(features=None, saliency=saliency, index=INDEX[:4])
    _, lam, _, mask, returned, _ = run(backend, given)
    assert returned.isnan().nonzero().tolist() == [[1, 0, 0]]
    assert not mask[1].any()
    assert not lam.isnan().any()


@pytest.mark.parametrize("name", sg_kernels.ops.SCHEMAS)
def test_every_backend_has_every_operator(backend, name):
    assert isinstance(ops.overload(name, backend), torch._ops.OpOverload)


class Step(nn.Module):
    """A training step's mixing, as a user would compile it."""

    def __init__(self, backend, **options):
        super().__init__()
        self.options = {"backend": backend, **options}

    def forward(self, images, features, ids):
        result = saliency_graft(images, features, targets=ids, num_classes=7, **self.options)
        loss = (result.images**2).sum() + result.targets.sum()
        return loss, *result


CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    """As in a process that has neither compiled nor called anything yet."""
    torch.compiler.reset()
    ops._tables.clear()


def inputs(batch=5):
    return torch.randn(batch, 3, 16, 16), torch.randn(batch, 8, 4, 4), torch.arange(batch) % 7


def assert_same_step(compiled, eager, batch):
    images, features, ids = inputs(batch)
    grads = []
    outputs = []
    for step in (compiled, eager):
        leaf = images.clone().requires_grad_()
        torch.manual_seed(7)
        results = step(leaf, features, ids)
        grads.append(torch.autograd.grad(results[0], leaf)[0])
        outputs.append(results[1:])
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(*grads)


def test_compiled_is_eager_forward_and_backward(backend, fresh):
    step = Step(backend, augmentations=2, grid_size=(3, 5))
    assert_same_step(torch.compile(step, fullgraph=True), step, 5)


def test_compiled_with_a_dynamic_batch_compiles_once(backend, fresh):
    step = Step(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    assert_same_step(compiled, step, 5)
    frames = counter.frame_count
    for batch in (3, 6, 2):
        assert_same_step(compiled, step, batch)
    assert counter.frame_count == frames


def test_compiled_draws_anew_each_call(backend, fresh):
    step = torch.compile(Step(backend), fullgraph=True, backend="aot_eager")
    arguments = inputs()
    masks = [step(*arguments)[4] for _ in range(3)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_two_calls_in_one_compiled_step_draw_apart(backend, fresh):
    images, features, _ = inputs()

    def step(weight, alpha):
        first = saliency_graft(images * weight, features, backend=backend)
        second = saliency_graft(images * weight, features, alpha=0.5, backend=backend)
        return (first.images + second.images).sum(), first, second

    results = []
    for call in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        weight = torch.ones((), requires_grad=True)
        torch.manual_seed(3)
        loss, first, second = call(weight, 0.5)
        assert not torch.equal(first.mask, second.mask)
        results.append((*first[:5], *second[:5], *torch.autograd.grad(loss, weight)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_traced_leaves_nothing_behind(backend, fresh):
    images, features, ids = inputs()
    step = Step(backend, alpha=0.7)
    with torch._subclasses.FakeTensorMode() as mode:
        step(*(mode.from_tensor(tensor) for tensor in (images, features, ids)))
    assert torch.isfinite(step(images, features, ids)[0])


@pytest.mark.parametrize("whole", [False, True])
def test_a_graph_that_saved_out_is_refused_once_it_is_written(backend, whole):
    images, features, _ = inputs()
    out, weight = torch.ones(5, 3, 16, 16), torch.ones((), requires_grad=True)
    loss = (weight * out).sum()
    if whole:
        saliency_graft(images, features, out=out, backend=backend)
    else:
        mask, index = torch.ones(5, 2, 2, dtype=torch.bool), torch.arange(5)
        sg_kernels.graft(images, mask, index, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_gradients_are_those_of_backward(backend):
    images, features, _ = inputs()

    def loss(images):
        mask, index = torch.rand(5, 2, 2) < 0.5, torch.tensor([1, 2, 0, 0, 4])
        grafted = sg_kernels.graft(images, mask, index, backend=backend)
        whole = saliency_graft(grafted, features, seed=1, backend=backend).images
        return (whole**3).sum()

    torch.manual_seed(0)
    gradient = torch.func.grad(loss)(images)
    leaf = images.clone().requires_grad_()
    torch.manual_seed(0)
    torch.testing.assert_close(gradient, *torch.autograd.grad(loss(leaf), leaf))


def test_compiled_graft_and_mix_targets(backend, fresh):
    def both(images, mask, index, targets):
        grafted = sg_kernels.graft(images, mask, index, backend=backend)
        saliency = sg_kernels.channel_saliency(images, backend=backend)
        lam = saliency.mean((1, 2)).repeat(2)
        return grafted, sg_kernels.mix_targets(targets, lam, index, backend=backend)

    arguments = (IMAGES, MASK, INDEX, torch.rand(4, 5))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments)
    for one, other in zip(compiled, both(*arguments), strict=True):
        torch.testing.assert_close(one, other)


EVERY_OPTION = {
    "sampled": {
        "temperature": 0.05,
        "normalize": "mean",
        "threshold": 0.02,
        "grid_size": (3, 2),
        "alpha": 0.3,
        "norm": "l2",
        "augmentations": 3,
        "no_fixed_points": True,
        "label_smoothing": 0.1,
    },
    "area": {"normalize": "none", "temperature": 50.0, "keep_prob": 0.5, "label": "area"},
    "topk": {"selection": "topk", "k": 9, "norm": "l2sq", "channel_dim": 1},
}


@pytest.mark.parametrize("options", EVERY_OPTION.values(), ids=EVERY_OPTION)
def test_every_option_compiles_in_dynamic_shapes(backend, fresh, options):
    def call(images, features, ids, out):
        return saliency_graft(
            images,
            features,
            seed=3,
            targets=ids,
            num_classes=7,
            out=out,
            backend=backend,
            **options,
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, dtype in ((5, torch.float32), (3, torch.uint8)):
        images, features, ids = (tensor[:batch] for tensor in inputs())
        images = (images * 50).to(dtype)
        rows = options.get("augmentations", 1) * batch
        outs = images.new_zeros(2, rows, *images.shape[1:])
        results = [f(images, features, ids, out) for f, out in zip((compiled, call), outs)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_compiled_criterion_is_eager(fresh, reduction):
    criterion = torch.nn.CrossEntropyLoss(torch.rand(7), reduction=reduction)

    def loss(logits, ids, lam):
        return sg_kernels.mix_criterion(criterion, logits, ids, (lam, INDEX))

    logits, ids, lam = torch.randn(8, 7), torch.tensor([1, 6, 0, 3]), torch.rand(8)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, ids, lam), loss(logits, ids, lam))
    assert criterion.reduction == reduction


def test_compiled_square_tokens_have_any_size(backend, fresh):
    def saliency(tokens):
        return sg_kernels.channel_saliency(
            tokens, token_grid="square", prefix_tokens=1, backend=backend
        )

    compiled = torch.compile(saliency, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (4, 5, 7):
        tokens = torch.randn(2, 1 + side * side, 8)
        assert torch.equal(compiled(tokens), saliency(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_into_out_is_eager(backend, fresh, dtype, dynamic):
    images, features, ids = inputs()
    images = (images * 50).to(dtype)

    def whole(images, features, ids, out):
        result = saliency_graft(
            images, features, seed=3, targets=ids, num_classes=7, out=out, backend=backend
        )
        return result.images, result.lam, result.targets

    def alone(images, mask, index, out):
        return sg_kernels.graft(images, mask, index, out=out, backend=backend)

    mask, index = torch.rand(5, 4, 4) < 0.5, torch.tensor([1, 2, 3, 4, 0])
    for call, given in ((whole, (images, features, ids)), (alone, (images, mask, index))):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        outs = [torch.zeros_like(images) for _ in range(2)]
        results = [f(*given, out) for f, out in zip((compiled, call), outs, strict=True)]
        assert_same_bits(*outs)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_compiled_module_advances_its_step(backend, fresh):
    images, features, ids = inputs()
    eager = SaliencyGraft(num_classes=7, seed=3, backend=backend)
    module = SaliencyGraft(num_classes=7, seed=3, backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for one, other in zip(
            compiled(images, ids, features=features),
            eager(images, ids, features=features),
            strict=True,
        ):
            assert torch.equal(one, other)
        assert int(module.step) == step + 1


def test_compiled_network_with_a_tapped_layer(backend, fresh):
    images, _, ids = inputs()
    layer = nn.Conv2d(3, 8, 4, stride=4)
    module = SaliencyGraft(layer, num_classes=7, seed=3, backend=backend)

    def step(images, ids):
        with torch.no_grad():
            layer(images)
        mixed, targets = module(images, ids)
        return F.cross_entropy(layer(mixed)[:, :7, 0, 0], targets), mixed

    _, expected = step(images, ids)
    module.step.zero_()
    _, mixed = torch.compile(step, backend="aot_eager")(images, ids)
    assert_same_bits(mixed, expected)


def test_a_compiled_network_may_write_over_the_tapped_output(backend, fresh):
    images, _, ids = inputs()
    layer = nn.Conv2d(3, 8, 4, stride=4)
    module = SaliencyGraft(layer, num_classes=7, seed=3, backend=backend)

    def step(images, ids):
        with torch.no_grad():
            layer(images).relu_()
        module(images, ids)
        return module.result.saliency

    saliency = torch.compile(step, backend="aot_eager")(images, ids)
    torch.testing.assert_close(saliency, layer(images).abs().sum(1))


def graph_of(function, *tensors):
    """The names of what Dynamo makes of a call."""
    found = []

    def record(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op != "placeholder")
        return graph

    torch.compile(function, fullgraph=True, backend=record)(*tensors)
    return found


@pytest.fixture
def on_a_gpu_that_is_not_there(fresh):
    """Images and features on one."""
    with torch._subclasses.FakeTensorMode():
        yield [torch.empty(shape, device="cuda") for shape in ((4, 3, 8, 8), (4, 5, 4, 4))]


def test_compiled_for_a_gpu_the_seed_is_read_on_the_device(on_a_gpu_that_is_not_there):
    def call(images, features):
        return saliency_graft(images, features, backend="reference").mask

    found = graph_of(call, *on_a_gpu_that_is_not_there)
    drawn, operator = (
        next(i for i, name in enumerate(found) if wanted in name)
        for wanted in ("draw_seed", "saliency_graft")
    )
    assert "to" in found[drawn:operator]  # from the host to the device


def test_compiled_for_a_gpu_the_module_copies_nothing_from_the_host(on_a_gpu_that_is_not_there):
    module = SaliencyGraft(seed=torch.tensor([3]), backend="reference")
    for name, buffer in module.named_buffers():
        setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))

    def call(images, features):
        return module(images, features=features)[0]

    found = graph_of(call, *on_a_gpu_that_is_not_there)
    assert any("saliency_graft" in name for name in found)
    assert "to" not in found
    assert not any("draw_seed" in name or "quantiles" in name for name in found)


def test_a_seed_on_the_host_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch._subclasses.FakeTensorMode():
        images, features = (torch.empty(4, 3, 8, 8, device="cuda") for _ in range(2))
        for seed in (None, 3, torch.empty(1, dtype=torch.int64)):
            with pytest.raises(RuntimeError, match="seed: a CUDA graph would replay one draw"):
                saliency_graft(images, features, seed=seed, backend="reference")
        on_device = torch.empty(1, dtype=torch.int64, device="cuda")
        saliency_graft(images, features, seed=on_device, backend="reference")


def test_a_table_that_is_not_there_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Make one call before capturing"):
        ops.quantiles(0.28125, torch.device("cuda"))


def test_exported_is_eager(backend, fresh):
    step = Step(backend, seed=5)
    arguments = inputs()
    program = torch.export.export(step, arguments)
    for one, other in zip(program.module()(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_exported_with_a_dynamic_batch(backend, fresh):
    step = Step(backend, seed=5)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"images": {0: batch}, "features": {0: batch}, "ids": {0: batch}}
    program = torch.export.export(step, inputs(), dynamic_shapes=shapes)
    arguments = inputs(6)
    for one, other in zip(program.module()(*arguments), step(*arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_exported_module_keeps_counting_its_steps(backend, fresh):
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.graft = SaliencyGraft(num_classes=7, seed=3, backend=backend)

        def forward(self, images, features, ids):
            return self.graft(images, ids, features=features)

    eager, arguments = Mix(), inputs()
    program = torch.export.export(Mix(), arguments).module()
    for _ in range(2):
        for one, other in zip(program(*arguments), eager(*arguments), strict=True):
            assert torch.equal(one, other)


def test_fake_tensors_take_the_memory_format_of_the_images():
    mode = torch._subclasses.FakeTensorMode()
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    with mode:
        fakes = [mode.from_tensor(tensor) for tensor in (images, MASK, INDEX)]
        grafted = ops.overload("graft", "reference")(*fakes)
    assert grafted.stride() == reference.graft(images, MASK, INDEX).stride()


def test_fake_tensors_are_taken_for_out_though_they_lie_nowhere():
    # Whether or not real ones have left a table of p behind.
    sg_kernels.saliency_graft(IMAGES, FEATURES, seed=1)
    with torch._subclasses.FakeTensorMode():
        images, features = torch.empty(4, 3, 8, 8), torch.empty(4, 6, 4, 4)
        out = torch.empty_like(images)
        assert sg_kernels.saliency_graft(images, features, out=out, seed=1).images is out


def test_real_tensors_under_a_mode_of_fake_ones_leave_no_fake_table_behind():
    alpha = 0.3125  # of no other test
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        sg_kernels.saliency_graft(IMAGES, FEATURES, alpha=alpha, seed=1)
    result = sg_kernels.saliency_graft(IMAGES, FEATURES, alpha=alpha, seed=1)
    assert type(result.images) is torch.Tensor


def test_a_table_made_inside_a_transform_outlives_it():
    alpha = 0.3125  # of no other test
    torch.func.grad(
        lambda images: sg_kernels.saliency_graft(images, FEATURES, alpha=alpha, seed=1).images.sum()
    )(IMAGES)
    table = ops.quantiles(alpha, IMAGES.device)
    assert torch.equal(table, rng.beta_quantiles(alpha))
    assert torch.func.debug_unwrap(table) is table


def test_a_table_is_kept_on_a_device_as_a_captured_graph_may_point_at_it(monkeypatch):
    monkeypatch.setattr(ops, "_tables", OrderedDict())
    meta = torch.device("meta")
    table = ops.quantiles(0.4375, meta)
    for alpha in range(1, 200):
        ops.quantiles(float(alpha), meta)
    assert ops.quantiles(0.4375, meta) is table


def test_of_the_tables_on_the_cpu_the_last_used_are_kept(monkeypatch):
    monkeypatch.setattr(ops, "_tables", OrderedDict())
    table = ops.quantiles(0.4375, CPU)
    for alpha in range(1, 200):
        ops.quantiles(float(alpha), CPU)
        assert ops.quantiles(0.4375, CPU) is table
        assert len(ops._tables) <= ops.MAX_TABLES
    assert torch.equal(ops.quantiles(1.0, CPU), rng.beta_quantiles(1.0))


@pytest.mark.parametrize("given", [torch.rand(4, 3, 4).mT, torch.rand(4, 3, 4).mT.half()])
def test_a_ready_map_comes_back_contiguous(backend, given):
    result = saliency_graft(IMAGES, saliency=given, seed=1, backend=backend)
    assert result.saliency.is_contiguous()
    torch.library.opcheck(
        ops.overload("saliency_graft", backend), call(features=None, saliency=given.float())
    )
