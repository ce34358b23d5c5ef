"""Instruction data for a Lightning trainer, resumable in the middle of an epoch."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_adapters.adapters import AdapterSpec
from lit_adapters.base_model import load_tokenizer
from lit_adapters.batching import (
    Batching,
    check_batching,
    check_context,
    packing,
    pins_memory,
    sharing,
    tells_loaders_apart,
    tokenizer_of,
)
from lit_adapters.data import (
    BatchLoader,
    Corpus,
    EvalOrder,
    Example,
    FormatName,
    LengthReport,
    Overlong,
    Prompting,
    PromptLoader,
    SplitName,
    Tokens,
    TrainOn,
    TrainOrder,
    is_hub_id,
    kept_tokens,
    prompt_ids,
    read_hub,
    sequences,
    stop_ids,
)
from lit_adapters.fit_loaders import FitLoader, FitStream
from lit_adapters.known_tokens import teach_held
from lit_adapters.prompting import prompting_of, set_prompting
from lit_adapters.token_store import TokenStore

_STAGES: Mapping[str | None, tuple[SplitName, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": (),
    None: ("train", "validation", "test"),
}


class InstructionDataModule(LightningDataModule):
    """Prompts and responses from a file, a folder or the hub, tokenised once.

    Trained on are the response and the end-of-sequence token. The order of batches depends on
    the seed and the epoch only, and resuming from a checkpoint within an epoch continues with
    the very batch that would have come next. Under several devices the data is shared here;
    `Trainer(use_distributed_sampler=...)` makes no difference.

    The sequences of a batch are packed, one behind the other in a single row, if the trainer's
    module says that its model keeps them apart (`packing_obstacle` is None); else they are padded.
    Several sources are evaluated each by itself and together.
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
        task_prompt: str | None = None,
        train_on: TrainOn = "all",
        cache_dir: str | None = "auto",
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
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
                attention stays within each, and batches hold nearly the same number of tokens.
                "padded" pads them to the longest. "auto" packs where the model is known to keep the
                examples apart.
            val_size: Used when a source has no validation split: what to hold out of train,
                below 1 a share, else a count of records; 0 trains without validation. Several
                sources give so many together, each in proportion to its size (streams, whose size
                nobody knows, in equal parts). A source without test split is tested on its
                validation split.
            seed: Decides the held-out examples and the order of batches.
            group_by_length: Choose the examples of a training batch by length: packed, so that all
                batches hold nearly the same number of tokens; padded, of similar length, which
                saves padding. With batch_tokens, examples are chosen by what fits.
            overlong: What happens to examples above max_length: truncate (on the right; dropped
                where the prompt alone is too long), truncate-prompt (the start of the prompt goes
                before any of the response) or drop.
            num_workers: Processes that build batches; 0 builds them in the main process.
            train_limit: Train on this many records of each source at most, the first ones.
            template: alpaca; chat, the tokenizer's own; none; the path of a .jinja file, or its
                text; or auto: that of its training for an adapter that was loaded; else the
                tokenizer's own, if it has one, for conversations (messages, sharegpt), none for
                prompt_completion and text, and Alpaca's for everything else.
            task_prompt: A description of the task, put in front of every prompt: as the system's
                turn of a chat, else as a paragraph. None is that of its training for an adapter
                that was loaded, else nothing.
            train_on: all answers of a conversation, the last, or everything, prompts included.
            cache_dir: Where the tokens of larger data (from 2 million characters on) are kept for
                the next run. "auto" is a folder in the cache of Hugging Face; null keeps none.
            streaming: Read and tokenise training records while training, for data that fits
                neither memory nor disk. Statistics are then of the first thousand, and a val_size
                must be a count. A trainer needs max_steps, since nobody knows the length.
            shuffle_buffer: Examples of a stream that are shuffled together.
        """
        super().__init__()
        if train_limit is not None and train_limit < 1:
            raise ValueError(f"train_limit {train_limit} is below 1; give a count, or null for all")
        check_batching(batching)
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
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        prompting = Prompting(template, task_prompt or "", train_on)
        self.corpus = Corpus(
            path, format, prompting, val_size, seed, train_limit, streaming, rank_zero_info
        )
        given = {"template": None if template == "auto" else template, "task_prompt": task_prompt}
        self._store = TokenStore(self.corpus, cache_dir, given)
        self._padding_explained = False

    @property
    def reports(self) -> dict[str, LengthReport]:
        """Lengths of what was tokenised, by split, and by source where there are several."""
        return self._store.reports

    def prepare_data(self) -> None:
        """Download a hub data set into the cache, once per machine."""
        for path in [] if self.streaming else self.corpus.sources.values():
            if is_hub_id(path):
                read_hub(path)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what a stage needs and is not there yet; report lengths."""
        for split in _STAGES[stage]:
            self.tokens(split)

    def examples(self, split: SplitName) -> list[Example]:
        """Return the prompts and responses of a split, source after source.

        Needs a trainer or a tokenizer for conversations only.
        """
        tokenizer = self._known_tokenizer()
        self._ask_as_trained(tokenizer)
        return self.corpus.examples(split, tokenizer)

    def tokens(self, split: SplitName) -> list[Tokens]:
        """Return the tokenised examples of a split, those that were kept."""
        return [one for source in self._parts(split) for one in self._tokenised(split, source)]

    def sequences(self, batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Return the sequences of a packed or padded batch: `input_ids` and `labels`, 1-D."""
        return sequences(batch)

    def train_dataloader(self) -> FitLoader | FitStream:
        """Return the shuffled training batches of this device."""
        tokens = self._fitting("train")
        if self._module is not None:
            set_prompting(self._module, self.corpus.resolved(self._load_tokenizer()).with_text())
        order = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": not getattr(self.trainer, "overfit_batches", 0),
            "group_by_length": self.group_by_length,
            **self._budget(),
            **sharing(self.trainer),
        }
        if self.streaming:
            return self._train_stream(order)
        lengths = [len(example["input_ids"]) for example in tokens]
        loader = FitLoader(tokens, TrainOrder(lengths, **order), self._pad_id(), **self._loading())
        loader.trainer = self.trainer
        return loader

    def val_dataloader(self) -> BatchLoader | dict[str, BatchLoader] | list[Any]:
        """Return the validation batches of this device, those of several sources by their names.

        An empty list if there are none.
        """
        return self._eval_loaders("validation") if self.tokens("validation") else []

    def test_dataloader(self) -> BatchLoader | dict[str, BatchLoader]:
        """Return the test batches of this device, in the order of the data."""
        self._check_test()
        return self._eval_loaders("test")

    def predict_dataloader(self) -> PromptLoader:
        """Return the prompts of the test split, whole, and in its order."""
        self._check_test()
        examples, tokenizer = self.examples("test"), self._load_tokenizer()
        ids = prompt_ids(examples, tokenizer)
        order = EvalOrder([len(one) for one in ids], self.batch_size, **sharing(self.trainer))
        return PromptLoader(examples, ids, order, stop_ids(examples, tokenizer))

    @property
    def _module(self) -> LightningModule | None:
        return getattr(self.trainer, "lightning_module", None)

    def _ask_as_trained(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Ask adapters that were loaded as in their training, where these settings say nothing."""
        if self._module is not None:
            self._store.ask_as(prompting_of(self._module), tokenizer)

    def _check_test(self) -> None:
        if not self.corpus.count("test"):
            raise ValueError(
                f"{self.corpus.name} has neither a test nor a validation split and val_size is 0; "
                "raise val_size, or add a split"
            )

    def _parts(self, split: SplitName) -> list[str | None]:
        """The sources that are looked at one by one; None for all together."""
        several = split != "train" and len(self.corpus.sources) > 1
        apart = several and tells_loaders_apart(self._module, split)
        return list(self.corpus.sources) if apart else [None]

    def _eval_loaders(self, split: SplitName) -> BatchLoader | dict[str, BatchLoader]:
        loaders = {
            source: self._eval_loader(split, source)
            for source in self._parts(split)
            if self._tokenised(split, source)
        }
        return loaders.get(None) or {str(source): loader for source, loader in loaders.items()}

    def _eval_loader(self, split: SplitName, source: str | None) -> BatchLoader:
        tokens = self._fitting(split, source)
        lengths = [len(example["input_ids"]) for example in tokens]
        order = EvalOrder(lengths, self.batch_size, **self._budget(), **sharing(self.trainer))
        return BatchLoader(tokens, order, self._pad_id(), **self._loading())

    def _budget(self) -> dict[str, Any]:
        return {"batch_tokens": self.batch_tokens, "packed": self._packs()}

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "packed": self._packs(),
            "pin_memory": pins_memory(self.trainer),
        }

    def _packs(self) -> bool:
        """Whether batches are packed; says once why not, if that was left to be found out."""
        packed, why_not = packing(self.batching, self._module)
        if why_not and not self._padding_explained:
            self._padding_explained = True
            rank_zero_info(f"Batches are padded, not packed: {why_not}.")
        return packed

    def _train_stream(self, order: dict[str, Any]) -> FitStream:
        if self.batch_tokens is not None and self.batch_tokens < self.max_length:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is below max_length {self.max_length}, and a "
                "stream may hold an example as long as that: raise batch_tokens, or lower "
                "max_length"
            )
        tokenizer = self._load_tokenizer()
        encode = partial(
            kept_tokens, tokenizer=tokenizer, max_length=self.max_length, overlong=self.overlong
        )
        examples = partial(self.corpus.stream, tokenizer=tokenizer, encode=encode)
        loader = FitStream(examples, order, self._pad_id(), self.shuffle_buffer, self._packs())
        loader.trainer = self.trainer
        return loader

    def _tokenised(self, split: SplitName, source: str | None = None) -> list[Tokens]:
        """The tokens of a split, or of what one source gives to it."""
        tokenizer = self._load_tokenizer()
        self._ask_as_trained(tokenizer)
        loggers = getattr(self.trainer, "loggers", [])
        return self._store.tokens(split, source, tokenizer, self.max_length, self.overlong, loggers)

    def _fitting(self, split: SplitName, source: str | None = None) -> list[Tokens]:
        """The tokens of a split, all within the context of the model, if it is known."""
        tokens = self._tokenised(split, source)
        longest = max((len(example["input_ids"]) for example in tokens), default=0)
        streamed = self.streaming and split == "train"
        data = f"{self.corpus.name} ({split})"
        check_context(self._module, data, None if streamed else longest, self.max_length)
        return tokens

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
            adapter = getattr(self._module, "adapter", None)
            if isinstance(adapter, AdapterSpec):
                adapter.teach(self.tokenizer)
            if self._module is not None:
                teach_held(self._module, self.tokenizer)
            return self.tokenizer
        return tokenizer_of(self._module, asker=type(self).__name__)

    def _pad_id(self) -> int:
        tokenizer = self._load_tokenizer()
        pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        return eos_id if pad_id is None else pad_id
