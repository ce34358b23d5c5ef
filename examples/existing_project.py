"""LoRA in a Lightning project that exists already: the lines marked `+` are all that is added.

The project fine-tunes a language model's body as a classifier, with its own module, loss and data.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lit_adapters import AdapterCheckpoint, LoRA, attach, load_adapter  # +
from lit_adapters.base_model import resolve_base
from lit_adapters.data import read_splits

BASE = resolve_base("tiny")
TASKS = ["representation", "sql", "arithmetic"]


class TaskClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = AutoModel.from_pretrained(BASE, dtype=torch.float32)
        attach(self.body, LoRA(rank=4, alpha=8))  # + freezes the body, trains 1% beside it
        self.body.train()  # + from_pretrained returns evaluation mode
        self.head = nn.Linear(self.body.config.hidden_size, len(TASKS))

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.body(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = F.cross_entropy(self.logits(batch), batch["task"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        logits = self.logits(batch)
        self.log("val/loss", F.cross_entropy(logits, batch["task"]))
        self.log("val/accuracy", (logits.argmax(-1) == batch["task"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]  # +
        return torch.optim.AdamW(trained, lr=3e-3)


def loader(split: str, size: int) -> DataLoader:
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def collate(records: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        batch = tokenizer([r["input"] for r in records], padding=True, return_tensors="pt")
        return {**batch, "task": torch.tensor([TASKS.index(r["task"]) for r in records])}

    return DataLoader(read_splits("tiny")[split][:size], batch_size=16, collate_fn=collate)


if __name__ == "__main__":
    seed_everything(0)
    checkpoint = AdapterCheckpoint()  # +
    trainer = Trainer(max_epochs=1, callbacks=[checkpoint], log_every_n_steps=5)  # +
    trainer.fit(TaskClassifier(), loader("train", 320), loader("validation", 96))
    print({key: round(value.item(), 3) for key, value in trainer.callback_metrics.items()})
    print("adapter folder:", checkpoint.adapter_path)  # +
    body = AutoModel.from_pretrained(BASE, dtype=torch.float32)  # + and, elsewhere:
    load_adapter(body, str(checkpoint.adapter_path))  # +
