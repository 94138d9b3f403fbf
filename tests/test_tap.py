"""The tapped layer: which pass its features are taken from, and what copies tap."""

import copy
import gc
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copied_network_taps_its_own_layer(backend, duplicate):
    images, ids, _ = batch_of()
    parent = nn.Module()
    parent.net = Net()
    parent.graft = SaliencyGraft(parent.net.body, num_classes=5, seed=1, backend=backend)
    twin = duplicate(parent)
    twin.net(images)
    with pytest.raises(RuntimeError, match="layer"):
        parent.graft(images, ids)
    twin.graft(images, ids)
    torch.testing.assert_close(twin.graft.result.saliency, parent.net.body(images).abs().sum(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("order", [1, -1])
def test_copies_in_either_order_tap_the_copied_layer_until_they_untap_or_go(duplicate, order):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    twins = duplicate([net, module][::order])[::order]
    assert twins[1]._tap.features is None
    twins[0](images)
    twins[1](images, ids)
    twins[1].untap()
    assert not twins[0].body._forward_hooks
    twins = duplicate([net, module][::order])[::order]
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_made_after_a_call_starts_with_a_clean_pass(duplicate):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    net(images)
    module(images, ids)
    twin_net, twin = duplicate([net, module])
    features = twin_net.body(images)
    twin(images, ids)
    torch.testing.assert_close(twin.result.saliency, features.abs().sum(1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_of_the_layer_is_not_tapped(duplicate):
    images, ids, _ = batch_of()
    net = Net()
    module = SaliencyGraft(net.body, num_classes=5)
    twin = duplicate(net)
    gc.collect()
    assert not twin.body._forward_hooks
    twin(images)
    with pytest.raises(RuntimeError, match="layer"):
        module(images, ids)


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
