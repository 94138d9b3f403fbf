"""examples/transformers_trainer.py"""

import pytest
import torch
from digits import CLASSES, digits
from torch.nn import functional as F

from sg_kernels import SaliencyGraft

pytest.importorskip("transformers")

import transformers

from examples.transformers_trainer import GraftTrainer

IMAGES, BATCH = 32, 8


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return transformers.ResNetForImageClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def dataset():
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(*digits(IMAGES))]


def trainer(tmp_path, model, layer="resnet.encoder.stages.0", accumulated=1, **options):
    mixer = SaliencyGraft(layer, network=model, num_classes=CLASSES, seed=1, **options)
    arguments = transformers.TrainingArguments(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.01,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    return GraftTrainer(
        model, arguments, train_dataset=dataset(), eval_dataset=dataset(), mixer=mixer
    )


def test_soft_targets_meet_cross_entropy(tmp_path):
    model = resnet().train()
    run = trainer(tmp_path, model)
    images, targets = digits(BATCH)
    loss, outputs = run.compute_loss(
        model, {"pixel_values": images, "labels": targets}, return_outputs=True
    )
    result = run.mixer.result
    logits = outputs.logits
    own, other = (
        F.cross_entropy(logits, y, reduction="none") for y in (targets, targets[result.index])
    )
    torch.testing.assert_close(loss, (result.lam * own + (1 - result.lam) * other).mean())
    assert model.config.problem_type is None, "the network has guessed it from the targets"


def test_evaluation_sees_the_images_as_they_are(tmp_path):
    model = resnet()
    run = trainer(tmp_path, model)
    metrics = run.evaluate()
    images, targets = digits(IMAGES)
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(images).logits, targets)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert run.mixer.step == 0


def test_a_batch_that_accumulates_counts_for_its_share(tmp_path):
    """ViT takes the number of items, so that Trainer expects its loss to be divided already."""
    model = vit()
    run = trainer(tmp_path, model, "vit.layers.0", 2, token_grid="square", prefix_tokens=1)
    assert run.model_accepts_loss_kwargs
    run.current_gradient_accumulation_steps = 2
    images, targets = digits(BATCH)
    batch = {"pixel_values": images, "labels": targets}
    step = run.training_step(model, dict(batch), num_items_in_batch=2 * BATCH)
    run.mixer.step.zero_()
    torch.testing.assert_close(step, run.compute_loss(model, batch).detach() / 2)


def test_training_grafts_every_batch_and_evaluation_none(tmp_path):
    model = resnet()
    run = trainer(tmp_path, model, accumulated=2)
    run.args.eval_strategy = "epoch"
    run.train()
    assert run.mixer.step == 2 * IMAGES // BATCH
    statistics = model.resnet.embedder.embedder.normalization
    assert statistics.num_batches_tracked == 2 * IMAGES // BATCH


def test_the_warm_up_ends(tmp_path):
    model = resnet()
    run = trainer(tmp_path, model, warmup_epochs=1)
    run.train()
    assert run.mixer.step == IMAGES // BATCH  # of the second of two epochs


def test_a_run_resumes_exactly(tmp_path):
    torch.manual_seed(0)
    start = resnet().state_dict()

    def trained(checkpoint):
        model = resnet()
        model.load_state_dict(start)
        run = trainer(tmp_path, model)
        run.train(resume_from_checkpoint=checkpoint)
        return model, run.mixer

    whole, mixer = trained(None)
    resumed, again = trained(tmp_path / "checkpoint-3")  # within the first epoch of four steps
    assert again.step == mixer.step == 2 * IMAGES // BATCH
    for name, expected in whole.state_dict().items():
        assert resumed.state_dict()[name].equal(expected), name
