"""examples/lightning_callback.py"""

import pytest
import torch
from digits import CLASSES, Net, loader
from torch.nn import functional as F

from sg_kernels import SaliencyGraft

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import EMAWeightAveraging

from examples.lightning_callback import Graft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]

BATCHES = len(loader())


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net(dropout=0)  # of whose draws Lightning keeps no record
        self.trained, self.validated = [], []

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.trained.append((images, targets))
        return F.cross_entropy(self(images), targets)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Hooked(Module):
    """Mixes without a callback."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return tuple(self.mixer(*batch)) if self.trainer.training else batch


def fit(tmp_path, epochs, checkpoint=None, callbacks=(), make=Module, options=None, **trainer):
    torch.manual_seed(0)
    module = make()
    mixer = SaliencyGraft("net.body", network=module, num_classes=CLASSES, seed=1, **options or {})
    if make is Hooked:
        module.mixer = mixer
    else:
        callbacks = [Graft(mixer), *callbacks]
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=tmp_path,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=checkpoint)
    return module, mixer, trainer


def test_training_sees_grafts_and_validation_does_not(tmp_path):
    module, mixer, _ = fit(tmp_path, 2)
    assert mixer.step == len(module.trained) == 2 * BATCHES
    for given, (images, targets) in zip([*loader(), *loader()], module.trained):
        assert not images.equal(given[0])
        assert targets.shape == (len(images), CLASSES)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(images)))
    for given, (images, targets) in zip(loader(), module.validated[-BATCHES:]):
        assert images.equal(given[0])
        assert targets.equal(given[1])


def test_the_hook_of_the_module_mixes_as_the_callback_does(tmp_path):
    expected, _, _ = fit(tmp_path, 1)
    module, mixer, _ = fit(tmp_path, 1, make=Hooked)
    assert mixer.step == BATCHES
    for (images, _), (same, _) in zip(module.trained, expected.trained, strict=True):
        assert images.equal(same)


def test_the_warm_up_ends(tmp_path):
    module, mixer, _ = fit(tmp_path, 2, options={"warmup_epochs": 1})
    assert mixer.step == BATCHES
    unmixed = [images.equal(given[0]) for given, (images, _) in zip(loader(), module.trained)]
    assert unmixed == [True] * BATCHES


def test_the_clean_passes_leave_the_statistics_alone(tmp_path):
    module, _, _ = fit(tmp_path, 1)
    assert module.net.stem[1].num_batches_tracked == BATCHES


def test_the_clean_pass_autocasts(tmp_path):
    dtypes = []
    options = {"to_features": lambda features: dtypes.append(features.dtype) or features}
    fit(tmp_path, 1, options=options, precision="bf16-mixed")
    assert dtypes == [torch.bfloat16] * BATCHES


def test_a_run_resumes_exactly(tmp_path):
    whole, mixer, _ = fit(tmp_path, 2)
    _, _, half = fit(tmp_path, 1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again, _ = fit(tmp_path, 2, tmp_path / "half.ckpt")
    assert again.step == mixer.step
    for parameter, expected in zip(resumed.parameters(), whole.parameters()):
        assert parameter.equal(expected)
    for (images, _), (expected, _) in zip(resumed.trained, whole.trained[BATCHES:], strict=True):
        assert images.equal(expected)


def test_the_average_of_the_weights_does_not_touch_the_seed(tmp_path):
    averaging = EMAWeightAveraging(decay=0.5)
    plain, _, _ = fit(tmp_path, 2)
    averaged, mixer, _ = fit(tmp_path, 2, callbacks=[averaging])
    assert mixer.seed == 1
    for (images, _), (expected, _) in zip(averaged.trained, plain.trained, strict=True):
        assert images.equal(expected)


def test_a_batch_that_is_no_list_is_refused(tmp_path):
    with pytest.raises(TypeError, match="batch must be a list; got tuple"):
        Graft(SaliencyGraft()).on_train_batch_start(None, None, (), 0)
