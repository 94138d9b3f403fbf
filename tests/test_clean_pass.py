"""The clean pass that the module makes itself leaves the loop as it was, in every kind of loop."""

import gc
import random
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import assert_same_bits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import batch_of

from sg_kernels import SaliencyGraft, channel_saliency, rng, saliency_graft


class Noisy(nn.Module):
    """Draws from Python's, NumPy's and torch's generators in training."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(1))


class Model(nn.Sequential):
    def __init__(self, noise=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.noise = Noisy() if noise else nn.Identity()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def features_of(net, images):
    """What the clean pass sees, without a trace: the layer's features in eval mode."""
    body = net.body.eval()
    with torch.no_grad():
        features = body[2](body[1](body[0](images)))
    body.train()
    return features


def hooks_of(net):
    return {
        (name, kind): list(hooks)
        for name, module in net.named_modules()
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks")
    }


def generators():
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    return states + [state.tolist() for state in torch.cuda.get_rng_state_all()]


def test_generators_hooks_and_gradients_are_as_before():
    net, (images, ids, _) = Model(), batch_of()
    module = SaliencyGraft("body", network=net, num_classes=5)
    seen = []
    net.head.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    F.cross_entropy(net(images), ids).backward()
    module.reset()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    before = generators(), hooks_of(net)
    mixed, _ = module(images, ids)
    assert seen == [True, False]
    assert (generators(), hooks_of(net)) == before
    assert torch.is_grad_enabled()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    net(mixed)
    assert generators() != before[0]


def test_the_draws_of_a_seed_do_not_depend_on_who_makes_the_pass():
    net = Model()
    given = SaliencyGraft(num_classes=5, prob=0.5, seed=2)
    makes_it = SaliencyGraft("body", network=net, num_classes=5, prob=0.5, seed=2)
    grafted = 0
    for step in range(12):
        images, ids, _ = batch_of(seed=step)
        mixed, targets = makes_it(images, ids)
        expected, expected_targets = given(images, ids, features=features_of(net, images))
        makes_it.reset()  # features_of did not go through the layer, and net made no mixed pass
        assert_same_bits(mixed, expected)
        assert torch.equal(targets, expected_targets)
        grafted += makes_it.result is not None
    assert 0 < grafted < 12
    assert int(makes_it.step) == int(given.step) == 12


def test_under_autocast_the_pass_is_made_in_its_dtype():
    net, (images, ids, _) = Model(), batch_of()
    module = SaliencyGraft("body", network=net, num_classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        features = features_of(net, images)
        mixed, targets = module(images, ids)
        loss = F.cross_entropy(net(mixed), targets)
    loss.backward()
    assert mixed.dtype == torch.float32
    assert features.dtype == torch.bfloat16
    assert torch.equal(module.result.saliency, channel_saliency(features))
    assert not torch.equal(module.result.saliency, channel_saliency(features_of(net, images)))


def test_channels_last_goes_through():
    net, (images, ids, _) = Model(), batch_of()
    plain = SaliencyGraft("body", network=net, num_classes=5, seed=3)
    expected = plain(images, ids)[0]
    plain.untap()
    net.to(memory_format=torch.channels_last)
    module = SaliencyGraft("body", network=net, num_classes=5, seed=3)
    mixed, _ = module(images.contiguous(memory_format=torch.channels_last), ids)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(mixed, expected)


def test_gradients_accumulate_over_calls():
    net = Model()
    module = SaliencyGraft("body", network=net, num_classes=5, seed=3)
    total = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for step in range(3):
        images, ids, _ = batch_of(seed=step)
        seed = rng.call_seed(3, step, 0)
        expected = saliency_graft(images, features_of(net, images), seed=seed)
        mixed, targets = module(images, ids)
        assert_same_bits(mixed, expected.images)
        loss = F.cross_entropy(net(mixed), targets)
        each = torch.autograd.grad(loss, net.parameters(), retain_graph=True)
        total = [sum_ + gradient for sum_, gradient in zip(total, each, strict=True)]
        loss.backward()
    for parameter, gradient in zip(net.parameters(), total, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_activation_checkpointing_recomputes_is_no_clean_pass(reentrant, recwarn):
    net = Model(noise=False)
    module = SaliencyGraft("body", network=net, num_classes=5, seed=3)
    for step in range(3):
        images, ids, _ = batch_of(seed=step)
        features = features_of(net, images)
        mixed, targets = module(images, ids)
        torch.testing.assert_close(module.result.saliency, channel_saliency(features))
        logits = checkpoint(net, mixed.requires_grad_(), use_reentrant=reentrant)
        F.cross_entropy(logits, targets).backward()
    assert not recwarn.list


def steps_of(step, module):
    """Mixed images, losses and whether each of eight batches was grafted."""
    results = []
    for seed in range(8):
        images, ids, _ = batch_of(seed=seed)
        results.append((*step(images, ids), module.result is not None))
    return results


def assert_same_steps(actual, expected):
    for (mixed, loss, grafted), (images, other, wanted) in zip(actual, expected, strict=True):
        assert_same_bits(mixed, images)
        torch.testing.assert_close(loss, other)
        assert grafted == wanted


@pytest.mark.parametrize("prob", [0.5, 1.0])
def test_the_network_may_be_compiled(prob):
    torch.compiler.reset()
    net = Model(noise=False)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    results, frames = [], []
    for network in (net, compiled):
        net.body[1].reset_running_stats()
        module = SaliencyGraft("body", network=network, num_classes=5, prob=prob, seed=2)

        def step(images, ids, module=module, network=network):
            mixed, targets = module(images, ids)
            loss = F.cross_entropy(network(mixed), targets)
            frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            return mixed, loss

        results.append(steps_of(step, module))
        module.untap()
    assert_same_steps(*results[::-1])
    assert frames[7] < frames[-4] == frames[-1], "it compiles in every step"
    torch.compiler.reset()


@pytest.mark.parametrize("prob", [0.5, 1.0])
def test_a_step_that_holds_the_pass_compiles_whole(prob):
    torch.compiler.reset()
    net, results = Model(noise=False), []
    for compiles in (False, True):
        net.body[1].reset_running_stats()
        module = SaliencyGraft(
            "body", network=net, num_classes=5, prob=prob, seed=2, backend="reference"
        )

        def step(images, ids, module=module):
            mixed, targets = module(images, ids)
            return mixed, F.cross_entropy(net(mixed), targets)

        if compiles:
            step = torch.compile(step, backend="aot_eager", fullgraph=True)
        results.append([(*each[:2], True) for each in steps_of(step, module)])
        assert net.training
        assert int(module.step) == 8
        module.untap()
    assert_same_steps(*results[::-1])
    torch.compiler.reset()


STEPS = 6
LOOPS = [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]


def train_rank(rank, store):
    """One of two processes, each with batches of its own: saves what each loop leaves."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.save({loop: train_with_others(rank, *loop) for loop in LOOPS}, f"{store}-{rank}")
    torch.distributed.destroy_process_group()


def train_with_others(rank, kind, shared_stream):
    torch.manual_seed(0)
    net = Model(noise=False)
    net.body[1].momentum = 0.0  # as DDP gives all ranks the statistics of the first
    if kind == "fsdp":
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        fully_shard(net.body, mesh=mesh)
        network, layer = fully_shard(net, mesh=mesh), "body"
    else:
        network, layer = DistributedDataParallel(net), "module.body"
    module = SaliencyGraft(
        layer, network=network, num_classes=5, prob=0.5, seed=2, rank=0 if shared_stream else None
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    coins, passes = [], []
    net.head.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for step in range(STEPS):
        images, ids, _ = batch_of(seed=2 * step + rank)
        coins.append(module.needs_pass())
        mixed, targets = module(images, ids)
        F.cross_entropy(network(mixed), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.full_tensor() if kind == "fsdp" else p.data for p in net.parameters()]
    return coins, passes.count(False), weights


def train_alone(shared_stream):
    """What the two processes together compute, in one: the gradients are averaged."""
    nets, modules, optimizers = [], [], []
    for rank in range(2):
        torch.manual_seed(0)
        nets.append(Model(noise=False))
        nets[-1].body[1].momentum = 0.0
        stream = 0 if shared_stream else rank
        modules.append(SaliencyGraft(num_classes=5, prob=0.5, seed=2, rank=stream))
        optimizers.append(torch.optim.SGD(nets[-1].parameters(), 0.1))
    coins = [[], []]
    for step in range(STEPS):
        for rank, (net, module) in enumerate(zip(nets, modules, strict=True)):
            images, ids, _ = batch_of(seed=2 * step + rank)
            coins[rank].append(module.needs_pass())
            mixed, targets = module(images, ids, features=features_of(net, images))
            F.cross_entropy(net(mixed), targets).backward()
        for pair in zip(*(net.parameters() for net in nets), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return coins, [parameter.data for parameter in nets[0].parameters()]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    store, end = tmp_path_factory.mktemp("ranks") / "store", time.monotonic() + 300
    ranks = mp.spawn(train_rank, (str(store),), nprocs=2, join=False)
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(f"{store}-{rank}") for rank in range(2)]


@pytest.mark.parametrize("loop", LOOPS)
def test_two_processes_train_as_one(loop, two_processes):
    kind, shared_stream = loop
    coins, expected = train_alone(shared_stream)
    assert (coins[0] == coins[1]) == shared_stream
    for rank, process in enumerate(two_processes):
        own_coins, passes, weights = process[loop]
        assert own_coins == coins[rank]
        # FSDP gathers weights in each pass, so all ranks must make it, unless they draw alike.
        assert passes == (STEPS if loop == ("fsdp", False) else sum(coins[rank]))
        for weight, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight, wanted)


def alive():
    """Tensors, and bytes of Python objects."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return tensors, tracemalloc.get_traced_memory()[0]


@pytest.mark.slow
def test_memory_stays_constant_over_a_thousand_steps():
    net = Model()
    module = SaliencyGraft("body", network=net, num_classes=5, prob=0.5)
    images, ids, _ = batch_of()

    def run(steps):
        for _ in range(steps):
            mixed, targets = module(images, ids)
            F.cross_entropy(net(mixed), targets).backward()
            net.zero_grad()
        module.result = None

    tracemalloc.start()
    try:
        run(100)
        tensors, before = alive()
        run(1000)
        later, after = alive()
    finally:
        tracemalloc.stop()
    assert later <= tensors
    assert after - before < 10_000  # bytes; a leak of ten a step would show
