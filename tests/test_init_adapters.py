"""`InitAdapters`: another start than the default, before the optimizer exists; not on a resume."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_adapters import Gaussian, InitAdapters, Kaiming, LoRA, attach, initialise
from lit_adapters.attachment import adapted_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Foreign(LightningModule):
    """A module that is not ours and builds its model in ``__init__``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        attach(self.net, LoRA(rank=4, targets=["0", "2"]), seed=1)
        self.seen = []

    def configure_optimizers(self):
        self.seen = [adapter.lora_A.clone() for *_, adapter in adapted_layers(self)]
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 8))


def fit(module, callback, tmp_path, **options):
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], accelerator="cpu",
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, **options)
    return trainer


def test_a_foreign_module_is_initialised_before_its_optimizer_exists(tmp_path):
    module = Foreign()
    callback = InitAdapters(Gaussian())
    fit(module, callback, tmp_path)
    expected = Foreign()
    initialise(expected, Gaussian())  # names as seen from the LightningModule
    for found, (*_, adapter) in zip(module.seen, adapted_layers(expected), strict=True):
        assert torch.equal(found, adapter.lora_A)
    assert callback.initialised == ["net.0", "net.2"]


def test_a_second_fit_keeps_what_was_trained(tmp_path):
    module, callback = Foreign(), InitAdapters(Gaussian())
    fit(module, callback, tmp_path)
    with torch.no_grad():
        module.net[0].adapter.lora_A.fill_(7.0)
    fit(module, callback, tmp_path)
    assert module.net[0].adapter.lora_A.eq(7.0).all()


@pytest.mark.parametrize("start", [Kaiming(), Gaussian()])
def test_a_start_is_a_no_op_and_has_the_stated_spread(start):
    wide = nn.Sequential(nn.Linear(400, 64), nn.Embedding(300, 64))
    attach(wide, LoRA(rank=16, targets=["0", "1"]))
    initialise(wide, start, seed=5)
    dense, table = wide[0].adapter, wide[1].adapter
    assert not dense.lora_B.any()
    assert not table.lora_A.any()
    expected = {Kaiming: (1 / (3 * 400)) ** 0.5, Gaussian: 1 / 16}[type(start)]
    assert dense.lora_A.std().item() == pytest.approx(expected, rel=0.05)
    assert table.lora_B.std().item() == pytest.approx(1.0, rel=0.1)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="no adapters.*attach"):
        initialise(nn.Linear(4, 4), Gaussian())
