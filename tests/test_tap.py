"""The tapped layer: which pass its features are taken from, and what copies tap."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import truth
from conftest import assert_fulfils_contract
from torch import nn
from torch.nn import functional as F
from training import Net, batch_of, by_pickle, by_torch_save

from sg_kernels import SaliencyGraft


def test_the_layers_output_is_the_feature_map(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, seed=3, backend=backend)
    net(images)
    module(images, ids)
    features = net.body(images).detach()
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))
    assert_fulfils_contract(
        module.result,
        images,
        truth.call_seed(3, 0, 0),
        features=features,
        targets=ids,
        num_classes=5,
    )


def test_the_pass_of_the_mixed_images_is_not_the_next_clean_one(backend):
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, seed=3, backend=backend)
    for seed in range(3):
        images, ids, _ = batch_of(seed=seed)
        with torch.no_grad():
            net(images)
        mixed, targets = module(images, ids)
        F.cross_entropy(net(mixed), targets).backward()
        with torch.no_grad():
            # through the layer's children, as the layer itself is tapped
            features = net.body[1](net.body[0](images))
        torch.testing.assert_close(module.result.saliency, features.abs().sum(1))


def test_a_second_call_on_one_pass_is_refused(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend)
    net(images)
    mixed, _ = module(images, ids)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)
    net(mixed)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)


def test_a_call_before_any_pass_is_refused(backend):
    images, ids, _ = batch_of()
    with pytest.raises(RuntimeError, match="layer"):
        SaliencyGraft(Net().body, num_classes=5, backend=backend)(images, ids)


def test_a_pass_of_another_batch_is_refused(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend)
    net(images[:3])
    with pytest.raises(ValueError, match="images"):
        module(images, ids)


def test_the_tap_keeps_no_graph(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend)
    net(images)
    assert not module._tap.features.requires_grad
    module(images, ids)
    assert module._tap.features is None


def test_features_given_take_precedence_over_the_layer(backend):
    images, ids, features = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend)
    net(images)
    module(images, ids, features=features)
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))


def test_untap_lets_go_of_the_layer(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend)
    module.untap()
    assert not net.body._forward_hooks
    with pytest.raises(ValueError, match="features"):
        module(images, ids)
    module.untap()


def test_a_layer_that_returns_no_tensor_is_refused():
    class Two(nn.Module):
        def forward(self, images):
            return images, images

    images, ids, features = batch_of()
    layer = Two()
    module = SaliencyGraft(layer, num_classes=5)
    layer(images)
    with pytest.raises(TypeError, match="layer must return a tensor; got tuple"):
        module(images, ids)
    module(images, ids, features=features)
    layer(images)


@pytest.mark.parametrize("own_pass", [False, True])
def test_a_layer_without_a_map_is_refused_by_its_name(own_pass):
    images, ids, _ = batch_of()
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    module = SaliencyGraft("2", network=network, num_classes=5)
    if not own_pass:
        network(images)
    step = module.step.clone()
    with pytest.raises(ValueError, match=r"layer must return a map .*Linear returned \(\d+, 5\)"):
        module(images, ids)
    assert torch.equal(module.step, step)


class Last(nn.Module):
    """Gives what some transformers do: a tuple, of which the first is (B, h, w, K)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, images):
        return self.patches(images).permute(0, 2, 3, 1), None


def test_to_features_makes_a_map_of_what_the_layer_returns():
    images, ids, _ = batch_of()
    layer = Last()
    module = SaliencyGraft(
        layer, to_features=lambda output: output[0].permute(0, 3, 1, 2), num_classes=5
    )
    features = layer(images)[0]
    module(images, ids)
    torch.testing.assert_close(module.result.saliency, features.abs().sum(-1))
    assert not module.result.saliency.requires_grad
    layer(images)
    layer(images)[0].relu_()
    with pytest.raises(RuntimeError, match="layer: its output was changed in place"):
        module(images, ids)


@pytest.mark.parametrize("to_features", [0, "0", torch.zeros(1)])
def test_to_features_is_callable(to_features):
    with pytest.raises(TypeError, match="to_features must be callable"):
        SaliencyGraft(nn.ReLU(), to_features=to_features)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_output_changed_in_place_is_refused(mode):
    images, ids, _ = batch_of()
    layer = nn.Conv2d(3, 8, 3, stride=4)
    net = nn.Sequential(layer, nn.ReLU(inplace=True))
    module = SaliencyGraft(layer, num_classes=5)
    with mode():
        net(images)
    with pytest.raises(RuntimeError, match="layer: its output was changed in place"):
        module(images, ids)


def test_an_output_changed_in_place_does_not_matter_in_inference_mode():
    images, ids, _ = batch_of()
    layer = nn.Conv2d(3, 8, 3, stride=4)
    features = layer(images)
    module = SaliencyGraft(layer, num_classes=5)
    with torch.inference_mode():
        layer(images).relu_()
    module(images, ids)
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))


def test_a_pass_in_inference_mode_will_do():
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    with torch.inference_mode():
        features = net.body(images)
    module(images.requires_grad_(), ids)[0].sum().backward()
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))


def test_a_frozen_teacher_in_eval_mode_sees_no_mixed_images():
    teacher = Net().eval()
    module = SaliencyGraft(teacher.body, num_classes=5, mixed_pass=False)
    for seed in range(3):
        images, ids, _ = batch_of(seed=seed)
        features = teacher.body(images)
        module(images, ids)
        torch.testing.assert_close(module.result.saliency, features.abs().sum(1))
    with pytest.raises(RuntimeError, match="layer has seen no pass of these images"):
        module(images, ids)


def test_the_clean_pass_may_be_in_eval_mode_without_the_mixed_one():
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, mixed_pass=False)
    for seed in range(3):
        images, ids, _ = batch_of(seed=seed)
        features = net.eval().body(images)
        mixed, _ = module(images, ids)
        torch.testing.assert_close(module.result.saliency, features.abs().sum(1))
        net.train()(mixed)


def test_the_clean_pass_may_be_in_eval_mode_with_the_module_inside_the_network():
    net = Net()
    net.graft = SaliencyGraft(net.body, num_classes=5, mixed_pass=False)
    images, ids, _ = batch_of()
    net.eval()(images)
    net.train().graft(images, ids)
    torch.testing.assert_close(net.graft.result.saliency, net.body(images).abs().sum(1))


def test_passes_of_a_layer_in_eval_mode_do_not_count():
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net.eval()(images)
    with pytest.raises(RuntimeError, match="mixed_pass=False"):
        module(images, ids)
    features = net.train().body(images)
    net.eval()(images + 1)
    mixed, _ = module(images, ids)
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))
    net.eval()(images)
    net.train()(mixed)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)


@pytest.mark.parametrize("mixed_pass", [None, 1, "yes"])
def test_mixed_pass_is_a_bool(mixed_pass):
    with pytest.raises(TypeError, match="mixed_pass must be a bool"):
        SaliencyGraft(mixed_pass=mixed_pass)


def test_a_refused_call_leaves_the_pass_to_the_next(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend)
    features = net.body(images)
    with pytest.raises(ValueError, match="targets"):
        module(images, ids + 3)
    module(images, ids)
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))


def test_a_call_with_features_spends_the_pass_too():
    images, ids, features = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    module(images, ids, features=features)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)


def test_evaluation_needs_no_pass_and_taps_none(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, backend=backend).eval()
    net(images)
    assert module(images, ids) == (images, ids)
    module.train()
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)


def test_warm_up_taps_no_layer(backend):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, warmup_epochs=1, backend=backend)
    net(images)
    module(images, ids)
    module.set_epoch(1)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)
    net(images)
    module(images, ids)
    torch.testing.assert_close(module.result.saliency, net.body(images).abs().sum(1))


def test_a_copied_network_taps_its_own_layer(backend):
    images, ids, _ = batch_of()
    parent = nn.Module()
    parent.net = Net()
    parent.graft = SaliencyGraft(parent.net.body, num_classes=5, seed=1, backend=backend)
    twin = copy.deepcopy(parent)
    twin.net(images)
    with pytest.raises(RuntimeError, match="layer"):
        parent.graft(images, ids)
    twin.graft(images, ids)
    torch.testing.assert_close(twin.graft.result.saliency, parent.net.body(images).abs().sum(1))


@pytest.mark.parametrize("order", [1, -1])
def test_copies_in_either_order_tap_the_copied_layer_until_they_untap_or_go(order):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    twins = copy.deepcopy([net, module][::order])[::order]
    assert twins[1]._tap.features is None
    twins[0](images)
    twins[1](images, ids)
    twins[1].untap()
    assert not twins[0].body._forward_hooks
    twins = copy.deepcopy([net, module][::order])[::order]
    layer = twins[0].body
    assert len(layer._forward_hooks) == 1
    del twins
    gc.collect()
    assert not layer._forward_hooks
    assert len(net.body._forward_hooks) == 1
    module(images, ids)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_without_its_layer_taps_none(duplicate):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    with pytest.raises(ValueError, match="taps no layer"):
        duplicate(module)(images, ids)
    module(images, ids)


def test_a_copy_made_after_a_call_starts_with_a_clean_pass():
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    module(images, ids)
    twin_net, twin = copy.deepcopy([net, module])
    features = twin_net.body(images)
    twin(images, ids)
    torch.testing.assert_close(twin.result.saliency, features.abs().sum(1))


def test_a_copy_of_the_layer_is_not_tapped():
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    twin = copy.deepcopy(net)
    gc.collect()
    assert not twin.body._forward_hooks
    twin(images)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)


@pytest.mark.parametrize("duplicate", [by_pickle, by_torch_save])
def test_a_pickle_keeps_no_tap_and_taps_again_when_told(backend, duplicate):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5, seed=1, backend=backend)
    twin_net, twin = duplicate([net, module])
    features = twin_net.body(images)
    with pytest.raises(ValueError, match=r"taps no layer.*tap\(\)"):
        twin(images, ids)
    twin.tap("body", network=twin_net)
    twin(images, ids)
    torch.testing.assert_close(twin.result.saliency, features.abs().sum(1))


def test_a_saved_network_loads_without_the_package(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    module = SaliencyGraft(net[0], to_features=lambda output: output)
    torch.save(net, tmp_path / "net.pt")
    code = (
        "import sys, torch; sys.modules['sg_kernels'] = None; "
        "net = torch.load('net.pt', weights_only=False); "
        "print(net(torch.ones(1, 3, 4, 4)).sum().item(), "
        "torch.compile(net, backend='eager', fullgraph=True)(torch.ones(1, 3, 4, 4)).sum().item())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = net(torch.ones(1, 3, 4, 4)).sum().item()
    assert [float(value) for value in process.stdout.split()] == pytest.approx([expected] * 2)
    assert len(net[0]._forward_hooks) == 1
    assert module._tap is not None


def test_tap_moves_to_another_layer():
    images, ids, _ = batch_of()
    net, other = Net(), Net()
    module = SaliencyGraft(net.body, num_classes=5)
    module.tap(other.body)
    assert not net.body._forward_hooks
    features = other.body(images)
    module(images, ids)
    torch.testing.assert_close(module.result.saliency, features.abs().sum(1))
    with pytest.raises(TypeError, match=r"layer must be a torch.nn.Module.*NoneType"):
        module.tap(None)
    assert len(other.body._forward_hooks) == 1


def test_the_layer_does_not_keep_the_module_alive():
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    module(images, ids)
    gone = weakref.ref(module)
    del module
    assert gone() is None
    assert not net.body._forward_hooks
    net(images)


def test_the_module_does_not_keep_the_layer_alive():
    net = Net()
    module = SaliencyGraft(net.body)
    gone = weakref.ref(net.body)
    del net
    gc.collect()
    assert gone() is None
    module.untap()


@pytest.mark.parametrize(
    ("passes", "cause"),
    [
        ([], "has not run since it was tapped"),
        (["eval"], "in eval mode"),
        (["clean", "call"], "has not run since the last call"),
        (["clean", "call", "clean"], "last call's mixed images"),
        (["clean", "reset"], "has not run since it was tapped"),
    ],
)
def test_an_error_names_why_there_are_no_features(passes, cause):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    for step in passes:
        match step:
            case "clean":
                net.train()(images)
            case "eval":
                net.eval()(images)
            case "call":
                module(images, ids)
            case "reset":
                module.reset()
    with pytest.raises(RuntimeError, match=f"layer has seen no pass of these images: .*{cause}"):
        module(images, ids)


def test_after_a_skipped_mixed_pass_reset_starts_anew():
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    module(images, ids)
    module.reset()
    net(images)
    module(images, ids)
    torch.testing.assert_close(
        module.result.saliency, net.body[1](net.body[0](images)).abs().sum(1)
    )


def test_two_passes_before_one_call_are_warned_of():
    images, ids, _ = batch_of()
    layer = nn.Conv2d(3, 8, 3, stride=4)
    module = SaliencyGraft(layer, num_classes=5)
    layer(images)
    with pytest.warns(UserWarning, match="run twice since the last call"):
        layer(images)
    module(images, ids)


def test_scripting_a_tapped_network_is_refused_with_the_way_out():
    net = Net()
    module = SaliencyGraft(net.body)
    with pytest.raises(RuntimeError, match="untap"):
        torch.jit.script(net)
    module.untap()
    torch.jit.script(net)


def test_repr_names_the_layer():
    net = Net()
    module = SaliencyGraft(net.body, prob=0.5)
    assert repr(module) == "SaliencyGraft(layer=Sequential, prob=0.5)"
    module.untap()
    assert repr(module) == "SaliencyGraft(prob=0.5)"


class Normalized(nn.Module):
    """With what a careless pass would change: statistics, generators, modes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.body.append(nn.Dropout(0.5))
        self.frozen = nn.BatchNorm2d(8).eval()
        self.head = nn.Linear(8, 5)
        self.passes = []

    def forward(self, images):
        self.passes.append((tuple(images.shape), self.training, torch.is_grad_enabled()))
        return self.head(self.frozen(self.body(images)).mean((2, 3)))


@pytest.mark.parametrize("layer", ["body", "body.1", 0])
def test_with_its_network_the_module_makes_the_clean_pass(layer, backend):
    net = Normalized()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    module = SaliencyGraft(
        layer or net.body[0], network=net, num_classes=5, seed=3, backend=backend
    )
    before = torch.get_rng_state()
    for seed in range(3):
        images, ids, _ = batch_of(seed=seed)
        module(images, ids)
        assert module.result is not None
    assert net.passes == [((4, 3, 16, 16), False, False)] * 3
    assert net.training
    assert net.body[1].training
    assert not net.frozen.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_features_of_its_own_pass_are_those_of_eval_mode(backend):
    net = Normalized()
    images, ids, _ = batch_of()
    expected = net.body.eval()(images).abs().sum(1)
    net.train()
    module = SaliencyGraft("body", network=net, num_classes=5, backend=backend)
    mixed, targets = module(images, ids)
    torch.testing.assert_close(module.result.saliency, expected)
    F.cross_entropy(net(mixed), targets).backward()
    module(images, ids)  # the mixed pass was not taken for a clean one
    torch.testing.assert_close(module.result.saliency, net.body.eval()(images).abs().sum(1))


@pytest.mark.parametrize(("scale", "side"), [(1.0, 8), (0.5, 4), (0.25, 2)])
def test_the_pass_is_made_at_a_share_of_the_resolution(scale, side):
    net = Normalized()
    images, ids, _ = batch_of()
    module = SaliencyGraft("body", network=net, num_classes=5, pass_scale=scale)
    mixed, _ = module(images, ids)
    assert module.result.mask.shape == (4, side, side)
    assert mixed.shape == images.shape
    height = round(16 * scale)
    smaller = F.interpolate(images, (height, height), mode="area")
    torch.testing.assert_close(module.result.saliency, net.body.eval()(smaller).abs().sum(1))


def test_no_pass_is_made_where_none_is_needed():
    net = Normalized()
    module = SaliencyGraft("body", network=net, num_classes=5, prob=0.5, seed=2)
    needed = 0
    for seed in range(20):
        images, ids, features = batch_of(seed=seed)
        needed += module.needs_pass()
        module(images, ids)
        assert len(net.passes) == needed
    assert 0 < needed < 20
    module(images, ids, features=features)
    module.eval()(images, ids)
    assert len(net.passes) == needed


def test_a_pass_that_the_loop_has_made_is_used():
    net = Normalized()
    images, ids, _ = batch_of()
    module = SaliencyGraft("body", network=net, num_classes=5)
    net(images)
    module(images, ids)
    assert len(net.passes) == 1


def test_a_refused_call_leaves_no_features_to_the_next_batch():
    net = Normalized()
    module = SaliencyGraft("body", network=net, num_classes=5)
    images, ids, _ = batch_of()
    with pytest.raises(ValueError, match="targets"):
        module(images, ids + 9)
    other = batch_of(seed=1)[0]
    module(other, ids)
    torch.testing.assert_close(module.result.saliency, net.body.eval()(other).abs().sum(1))


def test_under_autocast_the_weights_keep_their_gradients():
    net = Normalized()
    images, ids, _ = batch_of()
    module = SaliencyGraft("body", network=net, num_classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, targets = module(images, ids)
        F.cross_entropy(net(mixed), targets).backward()
    assert net.body[0].weight.grad.abs().sum() > 0


def test_what_goes_wrong_in_its_pass_leaves_the_modes_as_they_were():
    net = Normalized()
    module = SaliencyGraft("body", network=net, num_classes=5)
    images, ids, _ = batch_of()
    net.head = None
    with pytest.raises(TypeError, match="NoneType"):
        module(images, ids)
    assert net.training
    assert not net.frozen.training


def test_a_network_that_nobody_keeps_is_named_as_the_cause():
    net = Normalized()
    module = SaliencyGraft("module.body", network=nn.DataParallel(net), num_classes=5)
    images, ids, _ = batch_of()
    with pytest.raises(RuntimeError, match="network no longer exists"):
        module(images, ids)
    net(images)  # a pass of the layer serves all the same
    module(images, ids)
    assert module.result is not None


def test_a_copied_network_makes_the_pass_of_the_copied_module():
    net = Normalized()
    module = SaliencyGraft("body", network=net, num_classes=5)
    twin_net, twin = copy.deepcopy([net, module])
    twin(*batch_of()[:2])
    assert len(twin_net.passes) == 1
    assert not net.passes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": "nothing"}, "layer must name a module of network; got 'nothing'"),
        ({"layer": None}, "network goes with layer"),
        ({"layer": "body", "network": 5}, "network must be a torch.nn.Module"),
        ({"layer": "body", "network": None}, "layer must be a torch.nn.Module, or with network="),
        ({"layer": "body", "pass_scale": 0}, "pass_scale"),
        ({"layer": "body", "pass_scale": 1.5}, "pass_scale"),
        ({"layer": "body", "pass_scale": "half"}, "pass_scale"),
    ],
)
def test_a_network_and_its_layer_are_checked(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SaliencyGraft(**{"network": Normalized(), **given})


def test_only_floating_images_are_passed_at_another_scale():
    net = Normalized()
    module = SaliencyGraft("body", network=net, pass_scale=0.5)
    with pytest.raises(TypeError, match=r"pass_scale .*uint8"):
        module(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
