"""New tokens of a model that is passed in are those of whatever tokenizer makes its data."""

import json

import pytest
from lightning.pytorch import LightningModule

from lit_adapters import (
    AdapterFineTuneModule,
    InstructionDataModule,
    LoRA,
    attach,
    load_adapter,
    save_adapter,
)
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama
from tests.test_module import make_trainer

WORDS = len(word_tokenizer())
SPEC = LoRA(rank=2, new_tokens=["<tool>"])


@pytest.fixture
def files(tmp_path):
    """A tokenizer that knows no new token, and records with it."""
    word_tokenizer().save_pretrained(tmp_path / "words")
    record = json.dumps({"prompt": "a b", "completion": "c <tool> d"})
    (tmp_path / "records.jsonl").write_text("\n".join([record] * 8))
    return tmp_path


def loaded(folder):
    """A base with an adapter from a file."""
    trained = llama(vocab_size=WORDS)
    attach(trained, SPEC, tokenizer=word_tokenizer())
    save_adapter(trained, folder / "adapter")
    base = llama(vocab_size=WORDS)
    load_adapter(base, folder / "adapter")
    return base


class Foreign(LightningModule):
    """Holds adapters and says nothing about tokens."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def predict_step(self, batch, batch_idx):
        """Never reached."""


def test_the_module_s_tokenizer_by_name_learns_them(files):
    module = AdapterFineTuneModule(loaded(files), tokenizer=str(files / "words"))
    assert module.tokenizer.convert_tokens_to_ids("<tool>") == WORDS


def test_the_data_s_tokenizer_by_name_learns_them(files):
    data = InstructionDataModule(
        str(files / "records.jsonl"), tokenizer=str(files / "words"), val_size=2
    )
    data.trainer = make_trainer(files)
    data.trainer.strategy._lightning_module = Foreign(loaded(files))
    assert all(WORDS in one["input_ids"] for one in data.tokens("train"))


def test_a_tokenizer_with_another_id_for_one_is_refused(files):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<other>", "<tool>"])
    module = AdapterFineTuneModule(loaded(files), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"row {WORDS} of the model.*gives it id {WORDS + 1}"):
        _ = module.tokenizer
