"""Fine-tuning as users of transformers write it: Trainer or TRL's SFTTrainer, and PEFT.

    python benchmarks/peers.py FOLDER examples.json [--trl --steps 1]

Trains LoRA on the model of FOLDER; examples.json holds ``input_ids`` and ``labels``. Nothing of
lit_adapters is imported, so that the time to the first step is that of a script without it.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Settings:
    """What all sides train with."""

    rank: int = 8
    lr: float = 1e-3
    epochs: int = 1
    batch_size: int = 8
    steps: int = -1  # as many as the epochs have


def lora(settings: Settings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def arguments(settings: Settings, folder: str) -> dict[str, Any]:
    """What is the same for both trainers; nothing is written, evaluated or clipped."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": settings.batch_size,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.steps,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "adamw_torch_fused",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def clocked(start: Callable[[], object], stop: Callable[[], object]) -> Any:
    """A callback that says when training begins and ends."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *unread: Any, **more: Any) -> None:
            start()

        def on_train_end(self, *unread: Any, **more: Any) -> None:
            stop()

    return Clock()


def with_trainer(
    model: Any, tokenizer: Any, examples: Sequence[Example], settings: Settings, callback: Any
) -> Any:
    """Train with transformers' Trainer and padding; return the model."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        adapted = get_peft_model(model, lora(settings))
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(**arguments(settings, folder)),
            train_dataset=Dataset.from_list(list(examples)),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[callback],
        )
        trainer.train()
        return adapted


def with_trl(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: Settings,
    callback: Any,
    row: int = 1024,
) -> Any:
    """Train with TRL's SFTTrainer and rows of ``row`` packed tokens; return the model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **arguments(settings, folder),
            packing=True,
            max_length=row,
            gradient_checkpointing=False,
            bf16=False,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(list(examples)),
            processing_class=tokenizer,
            peft_config=lora(settings),
            callbacks=[callback],
        )
        trainer.train()
        return trainer.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("examples", type=Path)
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--steps", type=int, default=-1)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    examples = json.loads(options.examples.read_text())
    train = with_trl if options.trl else with_trainer
    nothing = clocked(lambda: None, lambda: None)
    train(model, tokenizer, examples, Settings(steps=options.steps), nothing)


if __name__ == "__main__":
    main()
