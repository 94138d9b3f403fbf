"""examples/segmentation.py, examples/distillation.py, and targets that are no class ids."""

import torch
from digits import CLASSES, Net, digits
from torch.nn import functional as F

from examples.distillation import distillation_loss
from examples.segmentation import graft_with_maps
from sg_kernels import SaliencyGraft


def with_maps(size=16):
    """Digits, and maps of which pixels are ink; 255 marks a frame that no loss counts."""
    images, _ = digits(8)
    images[..., 0] = -1
    return images, labels_of(images)


def labels_of(images):
    grey = images.mean(1)
    return torch.where(grey < 0, 255, (grey > 0.5).long())


def mixer_of(model, **options):
    return SaliencyGraft("body", network=model, seed=0, **options)


def test_a_pixel_keeps_its_label():
    images, maps = with_maps()
    model = Net()
    mixed, mixed_maps = graft_with_maps(mixer_of(model), images, maps)
    assert not mixed_maps.equal(maps)
    assert mixed_maps.equal(labels_of(mixed))


def test_maps_may_be_smaller_than_the_images():
    images, maps = with_maps()
    model = Net()
    mixed, mixed_maps = graft_with_maps(mixer_of(model), images, maps[:, ::2, ::2])
    assert mixed_maps.equal(labels_of(mixed)[:, ::2, ::2])


def test_maps_pass_where_images_do():
    images, maps = with_maps()
    model = Net()
    for mixer in (mixer_of(model, prob=0.0), mixer_of(model).eval()):
        mixed, mixed_maps = graft_with_maps(mixer, images, maps)
        assert mixed.equal(images)
        assert mixed_maps is maps


def distilled(**options):
    """The loss, and what it is made of."""
    torch.manual_seed(0)
    teacher, student = Net().eval(), Net().eval()
    torch.nn.init.normal_(teacher.head[1].weight, std=20)  # it has opinions
    seen = []
    teacher.register_forward_pre_hook(lambda teacher, args: seen.append(args[0]))
    mixer = SaliencyGraft(teacher.body, mixed_pass=False, num_classes=CLASSES, seed=0, **options)
    images, targets = digits(8)
    loss = distillation_loss(student, teacher, mixer, images, targets, temperature=3.0, weight=0.3)
    assert [given is images for given in seen] == [True], "the teacher runs once, on clean images"
    return loss, mixer.result, teacher, student, images, targets


def cross_entropy(logits, soft_targets):
    return -(soft_targets * logits.log_softmax(1)).sum(1).mean()


def expected_loss(logits, targets, said):
    entropy = -(said * said.log()).sum(1).mean()
    softened = cross_entropy(logits / 3, said) - entropy
    return 0.7 * cross_entropy(logits, targets) + 0.3 * 9 * softened


def test_the_student_learns_both_mixed_targets():
    loss, result, teacher, student, images, targets = distilled()
    said = (teacher(images) / 3).softmax(1)
    lam = result.lam[:, None]
    hot = F.one_hot(targets, CLASSES).float()
    mixed = [lam * rows + (1 - lam) * rows[result.index] for rows in (hot, said)]
    torch.testing.assert_close(loss, expected_loss(student(result.images), *mixed))
    assert not result.images.equal(images)
    loss.backward()
    assert student.head[1].weight.grad.any()
    assert teacher.head[1].weight.grad is None


def test_the_student_of_an_unmixed_batch_learns_the_plain_targets():
    loss, result, teacher, student, images, targets = distilled(prob=0.0)
    assert result is None
    said = (teacher(images) / 3).softmax(1)
    hot = F.one_hot(targets, CLASSES).float()
    torch.testing.assert_close(loss, expected_loss(student(images), hot, said))


def test_several_labels_per_image_are_mixed_each_by_itself():
    """A binary cross-entropy is linear in the targets, so it is mixed as they are."""
    images, classes = digits(8)
    targets = F.one_hot(classes, CLASSES) | F.one_hot(classes // 2, CLASSES)
    model = Net().eval()
    mixer = mixer_of(model)
    mixed, mixed_targets = mixer(images, targets)
    logits, lam, index = model(mixed), mixer.result.lam, mixer.result.index
    own, other = (
        F.binary_cross_entropy_with_logits(logits, rows.float(), reduction="none").mean(1)
        for rows in (targets, targets[index])
    )
    loss = F.binary_cross_entropy_with_logits(logits, mixed_targets)
    torch.testing.assert_close(loss, (lam * own + (1 - lam) * other).mean())
