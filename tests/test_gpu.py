"""What only a GPU can show: graphs, streams, launches, syncs, memory, huge tensors.

Without one, `make gpu DRY=1` runs what of it also holds for interpreted and emulated kernels.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_fulfils_contract
from test_ops import ARGUMENTS
from torch import nn
from torch.nn import functional as F

import sg_kernels
from sg_kernels import SaliencyGraft, backends, label_ratio, ops, saliency_graft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    name
    for name in ("triton", "cuda")
    if name in sg_kernels.available_backends() and DEVICE in backends.DEVICES[name]
]
REHEARSED = backends.INTERPRETED and "SG_KERNELS_EMULATION" in os.environ

pytestmark = pytest.mark.gpu
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")


@pytest.mark.skipif(DEVICE != "cuda" and not REHEARSED, reason="no CUDA device")
def test_both_backends_run():
    assert BACKENDS == ["triton", "cuda"], backends.unavailable_backends()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def batch_of(batch=16, size=32, dtype=torch.float32, channels_last=False, channels=64):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(batch, 3, size, size, device=DEVICE).to(dtype)
    features = torch.randn(batch, channels, 7, 7, device=DEVICE).to(dtype)
    targets = torch.arange(batch, device=DEVICE) % 10
    return (
        images.contiguous(memory_format=memory_format),
        features.contiguous(memory_format=memory_format),
        targets,
    )


def moved(argument, device):
    return argument.to(device) if isinstance(argument, torch.Tensor) else argument


def assert_equal(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def seed_on_device(value):
    return torch.tensor([value], device=DEVICE)


def captured(call):
    """``call`` as a CUDA graph, after what it compiles and caches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@on_cuda
def test_a_replayed_graph_draws_what_eager_calls_draw(backend):
    images, features, targets = batch_of()
    module = SaliencyGraft(num_classes=10, seed=3, backend=backend).to(DEVICE)
    graph, (mixed, mixed_targets) = captured(lambda: module(images, targets, features=features))
    index, lam = module.result.index, module.result.lam
    eager = SaliencyGraft(num_classes=10, seed=3, backend=backend).to(DEVICE)
    eager.step.copy_(module.step)
    seen = set()
    for _ in range(4):
        graph.replay()
        expected, expected_targets = eager(images, targets, features=features)
        assert_equal(
            [mixed, mixed_targets, index, lam],
            [expected, expected_targets, eager.result.index, eager.result.lam],
        )
        seen.add(tuple(index.tolist()))
    assert len(seen) == 4
    assert torch.equal(module.step, eager.step)


@on_cuda
def test_a_replayed_training_step_has_the_gradient_of_its_own_draw(backend):
    images, features, targets = batch_of()
    images.requires_grad_()
    module = SaliencyGraft(num_classes=10, seed=3, backend=backend).to(DEVICE)

    def step():
        mixed, _ = module(images, targets, features=features)
        return mixed, torch.autograd.grad(mixed, images, torch.ones_like(mixed))[0]

    graph, (_, gradient) = captured(step)
    mask, index = module.result.mask, module.result.index
    for _ in range(3):
        graph.replay()
        up = F.interpolate(mask[:, None].float(), images.shape[2:], mode="nearest")
        expected = up.clone()
        expected[index] += 1 - up
        torch.testing.assert_close(gradient, expected.expand_as(gradient), rtol=0, atol=0)


@on_cuda
@pytest.mark.parametrize("augmentations", [1, 3])
def test_no_call_waits_for_the_device(backend, augmentations):
    images, features, targets = batch_of()
    images.requires_grad_()
    index = torch.randperm(16, device=DEVICE).repeat(augmentations)
    mask = torch.rand(16 * augmentations, 5, 5, device=DEVICE) < 0.5
    saliency = sg_kernels.channel_saliency(features)
    options = {"targets": targets, "num_classes": 10, "augmentations": augmentations}
    module = SaliencyGraft(num_classes=10, augmentations=augmentations, backend=backend).to(DEVICE)

    def calls():
        for seed in (None, 5, seed_on_device(5)):
            result = saliency_graft(images, features, seed=seed, backend=backend, **options)
            result.images.sum().backward()
        saliency_graft(images, features, index=index, backend=backend, **options)
        saliency_graft(
            images, features, mask=mask, seed=seed_on_device(5), backend=backend, **options
        )
        module(images, targets, features=features)[0].sum().backward()
        label_ratio(saliency, mask, index)

    calls()  # what is compiled, and the tables that are copied to the device once
    seeds = seed_on_device(5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = saliency_graft(images, features, seed=seeds, backend=backend, **options)
        result.images.sum().backward()
        saliency_graft(images, features, index=index, backend=backend, **options)
        saliency_graft(images, features, mask=mask, seed=seeds, backend=backend, **options)
        module(images, targets, features=features)[0].sum().backward()
        label_ratio(saliency, mask, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(call):
    call()
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_device]


@on_cuda
@pytest.mark.parametrize("batch", [16, 512])
@pytest.mark.parametrize("given", ["features", "mask", "mask alone"])
def test_a_call_takes_two_launches_and_its_gradient_one(backend, batch, given):
    images, features, targets = batch_of(batch, size=64)
    options = {"targets": targets, "num_classes": 10, "seed": seed_on_device(1)}
    if given != "features":
        options["mask"] = torch.rand(batch, 8, 8, device=DEVICE) < 0.5
    if given == "mask alone":
        features, options["label"] = None, "area"
    forward = launches(lambda: saliency_graft(images, features, backend=backend, **options))
    assert len(forward) == 2 or (backend == "cuda" and len(forward) == 1), forward
    result = saliency_graft(images, features, backend=backend, **options)
    backward = ops.overload("graft_backward", backend)
    gradient = launches(lambda: backward(result.images, result.mask, result.index, 1))
    assert len(gradient) == 1, gradient


@on_cuda
@pytest.mark.parametrize("batch", [32, 256])
def test_memory_beyond_the_outputs_is_bounded(backend, batch):
    images, features, _ = batch_of(batch, size=64)

    def call():
        return saliency_graft(images, features, seed=1, backend=backend)

    outputs = call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()

    def requested(which):  # not rounded up to the allocator's blocks
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    before = requested("current")
    again = call()
    kept = sum(t.numel() * t.element_size() for t in again if t is not None)
    assert kept <= requested("peak") - before <= kept + (1 << 20) + 8 * outputs.mask.numel()


def free_memory():
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


needs_memory = pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GiB")


@needs_memory
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_more_than_two_to_the_32_bytes(backend, channels_last):
    batch, size = 1500, 1024  # 4.7e9 bytes, images past 2**32 among them
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.empty(
        batch, 3, size, size, dtype=torch.uint8, device=DEVICE, memory_format=memory_format
    )
    images.copy_(torch.arange(batch, device=DEVICE, dtype=torch.uint8)[:, None, None, None])
    images[:, 1] += 100
    mask = torch.rand(batch, 4, 4, device=DEVICE) < 0.5
    index = torch.randperm(batch, device=DEVICE)
    out = sg_kernels.graft(images, mask, index, backend=backend)
    up = mask.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    for row in (0, 1, 682, 683, 1365, 1366, batch - 1):
        expected = torch.where(up[row], images[row], images[index[row]])
        assert torch.equal(out[row], expected), row


@needs_memory
@pytest.mark.parametrize("channels_last", [False, True])
def test_features_of_more_than_two_to_the_31_elements(backend, channels_last):
    batch, channels = 2200, 1024  # 2.3e9
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.empty(
        (batch, channels, 32, 32), dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format
    )
    values = torch.arange(batch * 32, device=DEVICE).view(batch, 32, 1) % 100 - 50
    features.copy_(values[:, None])
    saliency = sg_kernels.channel_saliency(features, backend=backend)
    assert torch.equal(saliency, (channels * values.abs()).float().expand(-1, -1, 32))


@needs_memory
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_more_than_two_to_the_31_elements(backend, channels_last):
    batch, size = 720, 1024  # 2.3e9
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    grad = torch.empty(
        (batch, 3, size, size), dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format
    )
    grad.copy_((1 + torch.arange(batch, device=DEVICE) % 100)[:, None, None, None])
    mask = torch.rand(batch, 4, 4, device=DEVICE) < 0.5
    index = torch.randperm(batch, device=DEVICE)
    out = ops.overload("graft_backward", backend)(grad, mask, index, 1)
    up = mask.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    for row in (0, 1, 341, 342, 682, 683, batch - 1):
        from_row = index.argsort()[row]
        expected = grad[row] * up[row] + grad[from_row] * ~up[from_row]
        assert torch.equal(out[row], expected), row


def fetched(result):
    """The result on the CPU, where the truth is."""
    return type(result)(*[moved(value, "cpu") for value in result])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("batch", "size"), [(12, 32), (12, 33), (2, 224)])
def test_the_backends_fulfil_the_contract(backend, dtype, channels_last, batch, size):
    images, features, targets = batch_of(batch, size, dtype, channels_last)
    features = features.to(torch.bfloat16 if dtype == torch.uint8 else dtype)
    options = {"num_classes": 10, "augmentations": 2}
    result = saliency_graft(images, features, targets=targets, seed=7, backend=backend, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.images.is_contiguous(memory_format=layout)
    given = {"features": features.cpu(), "targets": targets.cpu(), **options}
    assert_fulfils_contract(fetched(result), images.cpu(), 7, **given)


@pytest.mark.slow
def test_the_same_call_gives_the_same_bits(backend):
    images, features, targets = batch_of(64, channels=512)
    images.requires_grad_()

    def call():
        result = saliency_graft(
            images, features, targets=targets, num_classes=10, seed=2, backend=backend
        )
        gradient = torch.autograd.grad(result.images.square().sum(), images)[0]
        return [*[t.detach().clone() for t in result], gradient]

    first = call()
    for _ in range(20):
        assert_equal(call(), first)


def test_nothing_is_written_around_out(backend):
    images, features, _ = batch_of(6, 30)
    around = torch.full((8, 3, 30, 30), 7.0, device=DEVICE)
    result = saliency_graft(images, features, seed=1, out=around[1:7], backend=backend)
    fresh = saliency_graft(images, features, seed=1, backend=backend)
    assert torch.equal(around[1:7], fresh.images)
    assert result.images.data_ptr() == around[1].data_ptr()
    assert (around[[0, 7]] == 7).all()


@on_cuda
def test_a_call_runs_on_the_current_stream(backend):
    images, features, _ = batch_of(64, 64)
    expected = saliency_graft(images, features, seed=1, backend=backend).images
    stream = torch.cuda.Stream()
    late = torch.zeros_like(images)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what is not ordered behind it reads zeros
        late.copy_(images)
        result = saliency_graft(late, features, seed=1, backend=backend).images
    stream.synchronize()
    assert torch.equal(result, expected)


@on_cuda
def test_a_repeated_call_is_the_one_that_python_makes(monkeypatch):
    operators = pytest.importorskip("sg_kernels.backends.triton.operators")
    if not operators.repeat.AVAILABLE:
        pytest.skip("libsg_kernels_triton.so is not built")
    images, features, targets = batch_of(64, 64)

    def call(seed):
        options = {"targets": targets, "num_classes": 10, "backend": "triton"}
        return saliency_graft(images.clone(), features.clone(), seed=seed, **options)

    call(1)
    launched = []
    with monkeypatch.context() as patched:
        patched.setattr(operators, "launch", launched.append)
        with ThreadPoolExecutor(1) as threads:
            repeated = threads.submit(call, 2).result()
    assert not launched
    monkeypatch.setattr(operators.repeat, "AVAILABLE", False)
    assert_equal(repeated, call(2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_call_runs_on_the_device_of_its_tensors(backend):
    images, features, _ = batch_of()
    expected = saliency_graft(images, features, seed=1, backend=backend)
    elsewhere = saliency_graft(images.to("cuda:1"), features.to("cuda:1"), seed=1, backend=backend)
    assert elsewhere.images.device == torch.device("cuda:1")
    assert_equal([elsewhere.images, elsewhere.mask], [expected.images, expected.mask])


@on_cuda
def test_an_index_out_of_range_shows_as_nan(backend):
    images, features, targets = batch_of(4)
    index = torch.tensor([1, 9, -1, 0], device=DEVICE)
    result = saliency_graft(
        images, features, index=index, targets=targets, num_classes=10, seed=1, backend=backend
    )
    assert result.lam.isnan().tolist() == [False, True, True, False]
    assert result.targets.isnan().all(1).tolist() == [False, True, True, False]
    ids = torch.tensor([0, 1, 10, 3], device=DEVICE)
    result = saliency_graft(
        images,
        features,
        index=torch.arange(4, device=DEVICE),
        targets=ids,
        num_classes=10,
        seed=1,
        backend=backend,
    )
    assert result.lam.isnan().tolist() == [False, False, True, False]


@on_cuda
def test_debugging_pays_the_sync_and_raises(backend):
    code = (
        "import torch, sg_kernels\n"
        "images = torch.rand(2, 3, 8, 8, device='cuda')\n"
        "index = torch.tensor([0, 2], device='cuda')\n"
        f"sg_kernels.saliency_graft(images, images, grid_size=(2, 2), index=index, "
        f"backend={backend!r})"
    )
    environment = {**os.environ, "SG_KERNELS_DEBUG": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90
    )
    assert process.returncode != 0
    assert "ValueError: index" in process.stderr


@pytest.mark.parametrize(
    ("name", "arguments"), ARGUMENTS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(ARGUMENTS)]
)
def test_opcheck(backend, name, arguments):
    torch.library.opcheck(
        ops.overload(name, backend), tuple(moved(argument, DEVICE) for argument in arguments)
    )


def test_a_compiled_step_is_the_eager_one(backend):
    images, features, targets = batch_of()
    images.requires_grad_()

    def step(images, features, targets, seed):
        result = saliency_graft(
            images, features, targets=targets, num_classes=10, seed=seed, backend=backend
        )
        return result.images * 2, result.targets

    compiled = torch.compile(step, fullgraph=True)
    arguments = (images, features, targets, seed_on_device(4))
    results = [compiled(*arguments), step(*arguments)]
    assert_equal(*[[t.detach() for t in result] for result in results])
    gradients = [torch.autograd.grad(mixed.sum(), images)[0] for mixed, _ in results]
    assert_equal([gradients[0]], [gradients[1]])


@on_cuda
def test_data_parallel_training_with_nccl(backend, tmp_path):
    code = f"""
import torch
from torch import nn
import sg_kernels
torch.distributed.init_process_group("nccl", init_method="file://{tmp_path}/group", rank=0,
                                     world_size=1)
body = nn.Conv2d(3, 8, 3, stride=4)
net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).cuda()
graft = sg_kernels.SaliencyGraft(body, num_classes=5, seed=1, backend={backend!r}).cuda()
net = nn.parallel.DistributedDataParallel(net, device_ids=[0])
optimizer = torch.optim.SGD(net.parameters(), 0.1)
for _ in range(3):
    images, ids = torch.randn(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda") % 5
    with torch.no_grad():
        net(images)
    mixed, targets = graft(images, ids)
    loss = nn.functional.cross_entropy(net(mixed), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert graft.step.item() == 3 and loss.isfinite()
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert process.returncode == 0, process.stderr


def test_training_on_the_device_of_a_layer_that_is_tapped(backend):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, stride=4)
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(DEVICE)
    graft = SaliencyGraft(body, num_classes=10, backend=backend).to(DEVICE)
    images, _, targets = batch_of()
    with torch.no_grad():
        net(images)
    mixed, mixed_targets = graft(images, targets)
    F.cross_entropy(net(mixed), mixed_targets).backward()
    assert body.weight.grad.isfinite().all()
    assert body.weight.grad.abs().sum() > 0
    expected = sg_kernels.channel_saliency(body(images), backend="reference")
    torch.testing.assert_close(graft.result.saliency, expected, rtol=1e-4, atol=1e-5)


SMALL = {
    "plain": {"features": (5, 96, 7, 7)},
    "splits": {"features": (5, 1024, 7, 7)},
    "one grid of several": {"features": (70, 8, 7, 7), "grid_size": (3, 5)},
    "topk": {"features": (5, 96, 7, 7), "selection": "topk", "k": 5},
    "augmentations": {"features": (5, 96, 7, 7), "augmentations": 3, "no_fixed_points": True},
    "repeated indices": {"features": (5, 96, 7, 7), "index": torch.tensor([3, 3, 3, 1, 1])},
    "tokens": {"features": (5, 17, 96), "token_grid": (4, 4), "prefix_tokens": 1},
    "large windows": {"features": (5, 8, 40, 40), "grid_size": (3, 3)},
    "fine grid": {"features": (5, 8, 40, 40)},
    "map given": {"saliency": (5, 7, 7)},
    "mask": {"features": (5, 96, 7, 7), "mask": torch.rand(5, 3, 9) < 0.5},
    "fine mask": {"features": (5, 8, 7, 7), "mask": torch.rand(5, 42, 45) < 0.5},
    "large windows of a map": {"saliency": (5, 40, 40), "grid_size": (3, 3)},
}

LARGE = {"one grid of several": pytest.mark.slow}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "options", [pytest.param(SMALL[name], id=name, marks=LARGE.get(name, ())) for name in SMALL]
)
def test_a_small_case_of_every_kernel(backend, options, dtype):
    options = dict(options)
    memory_format = torch.channels_last if dtype == torch.uint8 else torch.contiguous_format
    kind = "features" if "features" in options else "saliency"
    given = torch.rand(options.pop(kind))
    if given.dim() == 4:
        given = given.contiguous(memory_format=memory_format)
    batch = len(given)
    images = torch.randint(0, 256, (batch, 3, 42, 45)).to(dtype, memory_format=memory_format)
    options |= {kind: given, "targets": torch.arange(batch) % 10, "num_classes": 10}
    rows = batch * options.get("augmentations", 1)
    out = torch.empty_like(images[:1].expand(rows, -1, -1, -1), device=DEVICE)
    there = {name: moved(value, DEVICE) for name, value in options.items()}
    result = saliency_graft(images.to(DEVICE), seed=3, out=out, backend=backend, **there)
    for name in ("token_grid", "prefix_tokens"):
        options.pop(name, None)
    if given.dim() == 3 and kind == "features":  # tokens, as the map that they are
        options["features"] = given[:, 1:].mT.unflatten(2, (4, 4))
    assert_fulfils_contract(fetched(result), images, 3, **options)


@pytest.mark.sanitize
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_small_case_of_standardising(backend, memory_format, dtype):
    if backend == "triton" and backends.INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter rounds to bfloat16 towards zero")
    images = torch.randint(0, 256, (5, 3, 42, 45), dtype=torch.uint8, device=DEVICE)
    images = images.contiguous(memory_format=memory_format)
    features = torch.rand(5, 96, 7, 7, device=DEVICE)
    constants = {"standardize": ((124, 116, 104), (58, 57.1, 57.4)), "dtype": dtype}
    result = saliency_graft(images, features, seed=3, backend=backend, **constants)
    expected = saliency_graft(
        images.cpu(),
        mask=result.mask.cpu(),
        index=result.index.cpu(),
        label="area",
        backend="reference",
        **constants,
    )
    assert_equal([result.images], [expected.images])


@pytest.mark.sanitize
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [32, 33])
def test_the_operators_by_themselves_and_out_of_range(backend, size, channels_last):
    images, features, ids = batch_of(5, size, channels_last=channels_last, channels=1024)
    mask = torch.rand(5, 3, 4, device=DEVICE) < 0.5
    lam = torch.rand(5, device=DEVICE)

    def both(name, *arguments):
        actual = ops.overload(name, backend)(*arguments).cpu()
        there = [moved(argument, "cpu") for argument in arguments]
        return actual, ops.overload(name, "reference")(*there)

    for one in (images, (images * 50).to(torch.uint8), images.transpose(2, 3)):
        for index in ([4, 4, 0, 0, 0], [1, 9, -1, 2**40, 0]):
            index = torch.tensor(index, device=DEVICE)
            known = (index >= 0) & (index < 5)
            grafted = ops.overload("graft", backend)(one, mask, index)
            within = torch.where(known, index, torch.arange(5, device=DEVICE))
            expected = ops.overload("graft", "reference")(one.cpu(), mask.cpu(), within.cpu())
            assert torch.equal(grafted.cpu(), expected)
            mixed = ops.overload("mix_targets", backend)(ids, lam, index, 10, 0.1)
            assert mixed.isnan().all(1).tolist() == (~known).tolist()
            if known.all() and one.is_floating_point():
                torch.testing.assert_close(*both("graft_backward", one, mask, index, 1))
    unknown = torch.tensor([0, 10, -1, 3, 2**40], device=DEVICE)
    mixed = ops.overload("mix_targets", backend)(
        unknown, lam, torch.arange(5, device=DEVICE), 10, 0.0
    )
    assert mixed.isnan().all(1).tolist() == [False, True, True, False, True]
    dense = torch.rand(5, 7, device=DEVICE)
    torch.testing.assert_close(*both("mix_targets", dense, lam, index * 0, 7, 0.1))
    torch.testing.assert_close(*both("channel_saliency", features))


def test_the_fallback_is_chosen_where_asked_for():
    assert backends.choose(None, "cuda") == "triton"
    if "cuda" in BACKENDS:
        assert backends.choose("cuda", "cuda") == "cuda"


@on_cuda
@pytest.mark.parametrize("module", [False, True])
def test_reduce_overhead_draws_anew(backend, module):
    images, features, _ = batch_of()
    mixer = SaliencyGraft(backend=backend).to(DEVICE)

    def call(images, features):
        if module:
            mixer(images, features=features)
            return mixer.result.index.clone()
        return saliency_graft(images, features, backend=backend).index.clone()

    torch.compiler.reset()
    compiled = torch.compile(call, mode="reduce-overhead")
    pairings = {tuple(compiled(images, features).tolist()) for _ in range(6)}
    assert len(pairings) == 6


@on_cuda
def test_a_capture_with_a_seed_on_the_host_is_refused(backend):
    images, features, _ = batch_of()
    with pytest.raises(RuntimeError, match="seed: a CUDA graph would replay one draw"):
        captured(lambda: saliency_graft(images, features, seed=3, backend=backend))
