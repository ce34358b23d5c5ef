"""Instruction data for a Lightning trainer, resumable in the middle of an epoch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_adapters.adapters import AdapterSpec
from lit_adapters.base_model import load_tokenizer
from lit_adapters.data import (
    BatchLoader,
    EvalOrder,
    Example,
    FormatName,
    LengthReport,
    Overlong,
    Prompting,
    PromptLoader,
    Records,
    SplitName,
    Splits,
    Tokens,
    TrainOn,
    TrainOrder,
    choose_format,
    complete_splits,
    is_hub_id,
    prompt_ids,
    read_hub,
    read_splits,
    sequences,
    shares,
    source_names,
    to_examples,
    tokenise,
    weights_of,
    why,
)
from lit_adapters.data.cache import FOLDER, once

Batching = Literal["auto", "packed", "padded"]

_STAGES: Mapping[str | None, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": (),
    None: ("train", "validation", "test"),
}


class FitLoader(BatchLoader):
    """Training batches that begin where the trainer's own progress says.

    The trainer counts the batches that were trained; a loader could only count those it handed
    out, which is one more when a step failed.
    """

    trainer: Trainer | None = None

    def start(self) -> tuple[int, int]:
        """Return the trainer's epoch and the batches of it that were trained."""
        if self.trainer is None or self.trainer.train_dataloader is not self:
            return super().start()  # iterated by hand
        loop = self.trainer.fit_loop
        epoch = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        return epoch, loop.epoch_loop.batch_progress.current.ready


class InstructionDataModule(LightningDataModule):
    """Prompts and responses from a file, a folder or the hub, tokenised once.

    Trained on are the response and the end-of-sequence token. The order of batches depends on
    the seed and the epoch only, and resuming from a checkpoint within an epoch continues with
    the very batch that would have come next. Under several devices the data is shared here;
    `Trainer(use_distributed_sampler=...)` makes no difference.

    The sequences of a batch are packed, one behind the other in a single row, if the trainer's
    module says that its model keeps them apart (`packing_obstacle` is None); else they are padded.
    """

    def __init__(
        self,
        path: str | list[str] | dict[str, float] = "tiny",
        format: FormatName = "auto",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        batch_tokens: int | None = None,
        batching: Batching = "auto",
        val_size: int | float = 0.05,
        seed: int = 0,
        group_by_length: bool = True,
        overlong: Overlong = "truncate",
        num_workers: int = 0,
        train_limit: int | None = None,
        template: str = "auto",
        task_prompt: str = "",
        train_on: TrainOn = "all",
        cache_dir: str | None = "auto",
    ) -> None:
        """Settings only; nothing is read before it is needed.

        Args:
            path: "tiny" (embedded tasks), a file (.json, a list of objects; .jsonl, .csv, .tsv,
                .parquet, .arrow), a folder with train, validation and test files of these kinds
                or written by save_to_disk, or a hub id (owner/name or owner/name:config). A list
                of several: all their records. A mapping of several to weights: each gives that
                share of an epoch, which is as long as it takes for every record to come at least
                once; records of the other sources are repeated. Weights are for training only.
            format: How records are read. "auto" decides by the names of their fields, for each
                source.
            tokenizer: A folder or hub id, or a tokenizer. None takes the model's.
            max_length: Tokens per example, prompt included.
            batch_size: Examples per device and batch.
            batch_tokens: Tokens per device and batch, padding included, instead of batch_size:
                batches are filled with as many examples as fit.
            batching: "packed" concatenates the examples of a batch into one row, without padding;
                attention stays within each. "padded" pads them to the longest. "auto" packs where
                the model is known to keep the examples apart.
            val_size: Used when the source has no validation split: what to hold out of train,
                below 1 a share, else a count of examples; 0 trains without validation. A source
                without test split is tested on its validation split.
            seed: Decides the held-out examples and the order of batches.
            group_by_length: Batch examples of similar length; saves padding. With batch_tokens,
                examples are chosen by what fits.
            overlong: What happens to examples above max_length: truncate (on the right; dropped
                where the prompt alone is too long), truncate-prompt (the start of the prompt goes
                before any of the response) or drop.
            num_workers: Processes that build batches; 0 builds them in the main process.
            train_limit: Train on this many records of each source at most, the first ones.
            template: alpaca; chat, the tokenizer's own; none; the path of a .jinja file; or auto:
                the tokenizer's own, if it has one, for conversations (messages, sharegpt), none
                for prompt_completion and text, and Alpaca's for everything else.
            task_prompt: A description of the task, put in front of every prompt: as the system's
                turn of a chat, else as a paragraph.
            train_on: all answers of a conversation, the last, or everything, prompts included.
            cache_dir: Where the tokens of larger data (from 2 million characters on) are kept for
                the next run. "auto" is a folder in the cache of Hugging Face; null keeps none.
        """
        super().__init__()
        if train_limit is not None and train_limit < 1:
            raise ValueError(f"train_limit {train_limit} is below 1; give a count, or null for all")
        if batching not in get_args(Batching):
            raise ValueError(
                f"batching {batching!r} is unknown; use 'auto', 'packed' or 'padded' (with "
                "group_by_length, which is the default, padding is little)"
            )
        by_name = tokenizer is None or isinstance(tokenizer, str)
        self.save_hyperparameters(ignore=[] if by_name else ["tokenizer"])
        self.path = path
        self.format: FormatName = format
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.batching: Batching = batching
        self.val_size = val_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.overlong: Overlong = overlong
        self.num_workers = num_workers
        self.train_limit = train_limit
        self.prompting = Prompting(template, task_prompt, train_on)
        weights = weights_of(path)
        self.sources = dict(zip(source_names(list(weights)), weights, strict=True))
        self.cache_dir = cache_dir
        self.reports: dict[str, LengthReport] = {}
        self._splits: dict[str, Splits] | None = None
        self._formats: dict[str, FormatName] = {}
        self._tokens: dict[str, list[Tokens]] = {}
        self._tokenised_with: PreTrainedTokenizerBase | None = None
        self._padding_explained = False

    def prepare_data(self) -> None:
        """Download a hub data set into the cache, once per machine."""
        for path in self.sources.values():
            if is_hub_id(path):
                read_hub(path)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what a stage needs and is not there yet; report lengths."""
        for split in _STAGES[stage]:
            self._tokenised(split)

    def examples(self, split: SplitName) -> list[Example]:
        """Return the prompts and responses of a split, source after source.

        Needs a trainer or a tokenizer for conversations only.
        """
        found = []
        for source, splits in self._records().items():
            format = self._formats[source]
            tokenizer = self._known_tokenizer()
            with self._naming(split, source):
                found += to_examples(splits[split], format, source, self.prompting, tokenizer)
        return found

    def tokens(self, split: SplitName) -> list[Tokens]:
        """Return the tokenised examples of a split, those that were kept."""
        return self._tokenised(split)

    def sequences(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Return the sequences of a packed or padded batch: `input_ids` and `labels`, 1-D."""
        return sequences(batch)

    def train_dataloader(self) -> FitLoader:
        """Return the shuffled training batches of this device."""
        tokens = self._fitting("train")
        order = TrainOrder(
            lengths=[len(example["input_ids"]) for example in tokens],
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=not getattr(self.trainer, "overfit_batches", 0),
            group_by_length=self.group_by_length,
            **self._budget(),
            **self._devices(),
        )
        loader = FitLoader(tokens, order, self._pad_id(), **self._loading())
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """Return the validation batches of this device; an empty list if there are none."""
        return self._eval_loader("validation") if self._tokenised("validation") else []

    def test_dataloader(self) -> BatchLoader:
        """Return the test batches of this device, in the order of the data."""
        self._check_test()
        return self._eval_loader("test")

    def predict_dataloader(self) -> PromptLoader:
        """Return the prompts of the test split, whole, and in its order."""
        self._check_test()
        examples = self.examples("test")
        ids = prompt_ids(examples, self._load_tokenizer())
        order = EvalOrder([len(one) for one in ids], self.batch_size, **self._devices())
        return PromptLoader(examples, ids, order)

    def _check_test(self) -> None:
        if not self._records()["test"]:
            raise ValueError(
                f"{self._name} has neither a test nor a validation split and val_size is 0; "
                "raise val_size, or add a split"
            )

    def _eval_loader(self, split: SplitName) -> BatchLoader:
        tokens = self._fitting(split)
        lengths = [len(example["input_ids"]) for example in tokens]
        order = EvalOrder(lengths, self.batch_size, **self._budget(), **self._devices())
        return BatchLoader(tokens, order, self._pad_id(), **self._loading())

    def _budget(self) -> dict[str, Any]:
        if self.batch_tokens is None:  # then the order is the same, packed or not
            return {}
        return {"batch_tokens": self.batch_tokens, "packed": self._packs()}

    def _loading(self) -> dict[str, Any]:
        strategy = getattr(self.trainer, "strategy", None)
        on_cpu = strategy is None or strategy.root_device.type == "cpu"
        return {
            "num_workers": self.num_workers,
            "packed": self._packs(),
            "pin_memory": not on_cpu and torch.accelerator.is_available(),
        }

    def _packs(self) -> bool:
        """Whether batches are packed; says once why not, if that was left to be found out."""
        if self.batching == "padded":
            return False
        module = getattr(self.trainer, "lightning_module", None)
        unknown = f"{type(module).__name__} does not say whether its model keeps sequences apart"
        obstacle = getattr(module, "packing_obstacle", unknown if self.batching == "auto" else None)
        if obstacle is None:
            return True
        if self.batching == "packed":
            raise ValueError(
                f"batching='packed', but {obstacle}; use batching='auto', which then pads"
            )
        if module is not None and not self._padding_explained:
            self._padding_explained = True
            rank_zero_info(f"Batches are padded, not packed: {obstacle}.")
        return False

    def _devices(self) -> dict[str, Any]:
        # The strategy's numbers: under tensor parallelism several devices share a data rank.
        sharing = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        return {"rank": sharing.get("rank", 0), "devices": sharing.get("num_replicas", 1)}

    def _records(self) -> dict[str, Splits]:
        """The records of each source; those of train as often as its weight says."""
        if self._splits is None:
            found = {source: self._read(path) for source, path in self.sources.items()}
            weights = weights_of(self.path).values()
            sizes = [len(splits["train"]) for splits in found.values()]
            chosen = shares(sizes, list(weights), self.seed)
            for (source, splits), indices in zip(found.items(), chosen, strict=True):
                before = len(splits["train"])
                if len(indices) != before:
                    rank_zero_info(
                        f"{source}: each of {before} training records comes "
                        f"{len(indices) / before:.2f} times an epoch"
                    )
                splits["train"] = splits["train"].take(indices)
                self._formats[source] = self._format_of(splits["train"], self.sources[source])
            self._splits = found
        return self._splits

    def _read(self, path: str) -> Splits:
        splits = complete_splits(read_splits(path), self.val_size, self.seed)
        train = splits["train"]
        splits["train"] = train.take(range(len(train))[: self.train_limit])
        return splits

    def _format_of(self, records: Records, path: str) -> FormatName:
        name = choose_format(records, self.format, records.place(0))
        if self.format == "auto":
            rank_zero_info(f"{path}: format {name} ({why(name)})")
        return name

    def _tokenised(self, split: SplitName) -> list[Tokens]:
        tokenizer = self._load_tokenizer()
        if tokenizer is not self._tokenised_with:
            self._tokenised_with, self._tokens, self.reports = tokenizer, {}, {}
        if split not in self._tokens:
            tokens: list[Tokens] = []
            if examples := self.examples(split):
                with self._naming(split):
                    tokens, report = once(
                        tokenise,
                        examples,
                        tokenizer,
                        self._cache_folder(),
                        rank_zero_info,
                        max_length=self.max_length,
                        overlong=self.overlong,
                    )
                self.reports[split] = report
                rank_zero_info(f"{self._name} ({split}): {report}")
                for logger in getattr(self.trainer, "loggers", []):
                    values = report.metrics().items()
                    logger.log_metrics({f"data/{split}/{key}": v for key, v in values}, step=0)
            self._tokens[split] = tokens
        return self._tokens[split]

    @property
    def _name(self) -> str:
        return ", ".join(self.sources.values())

    @contextmanager
    def _naming(self, split: SplitName, source: str | None = None) -> Iterator[None]:
        """Let an error begin with the data it is about, unless it names its place already."""
        name = self._name if source is None else self.sources[source]
        try:
            yield
        except ValueError as error:
            if name in str(error):
                raise
            raise ValueError(f"{name} ({split}): {error}") from error

    def _cache_folder(self) -> Path | None:
        if self.cache_dir == "auto":
            return FOLDER
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()

    def _fitting(self, split: SplitName) -> list[Tokens]:
        """The tokens of a split, all within the context of the model, if it is known."""
        tokens = self._tokenised(split)
        longest = max((len(example["input_ids"]) for example in tokens), default=0)
        context = self._context()
        if context is not None and longest > context:
            raise ValueError(
                f"{self._name} ({split}): the longest example has {longest} tokens (max_length is "
                f"{self.max_length}), but the model reads {context} at most; set max_length to "
                f"{context} or less"
            )
        return tokens

    def _context(self) -> int | None:
        """Positions that the trainer's model knows; None where it has no such limit."""
        module = getattr(self.trainer, "lightning_module", None)
        config: Any = getattr(getattr(module, "model", None), "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        limit = getattr(text, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def _known_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, None where neither the settings nor a trainer give one."""
        try:
            return self._load_tokenizer()
        except ValueError:
            return None

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.tokenizer is not None:
            adapter = getattr(getattr(self.trainer, "lightning_module", None), "adapter", None)
            if isinstance(adapter, AdapterSpec):
                adapter.teach(self.tokenizer)
            return self.tokenizer
        module = self.trainer.lightning_module if self.trainer else None
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            owner = "there is no trainer" if module is None else f"{type(module).__name__} has none"
            raise ValueError(
                f"no tokenizer: tokenizer=None takes the model's, but {owner}; give "
                f"{type(self).__name__}(tokenizer=...) a folder, a hub id or a tokenizer"
            )
        return tokenizer

    def _pad_id(self) -> int:
        tokenizer = self._load_tokenizer()
        pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        return eos_id if pad_id is None else pad_id


class AlpacaDataModule(InstructionDataModule):
    """Instruction data whose records have `instruction`, `output` and perhaps `input`."""

    def __init__(
        self,
        path: str | list[str] | dict[str, float] = "tiny",
        format: Literal["alpaca"] = "alpaca",
        **settings: Any,
    ) -> None:
        """Settings only; nothing is read before it is needed.

        Args:
            path: "tiny" (embedded tasks), a file, a folder, a hub id, or several of them, as for
                InstructionDataModule.
            format: Always "alpaca".
            settings: The other arguments of InstructionDataModule.
        """
        super().__init__(path, format, **settings)
