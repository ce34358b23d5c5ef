"""Answers from a causal language model, in batches."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.data.batches import sequences
from lit_adapters.data.endings import stop_ids_of_tokens
from lit_adapters.data.tokens import leading_ids
from lit_adapters.losses import IGNORE
from lit_adapters.spread import is_spread, most_of_all


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    stop: Collection[int] = (),
) -> list[str]:
    """Return the model's answer to each prompt, without the prompt and special tokens.

    Greedy at temperature 0. Train or evaluation mode is as before afterwards.

    Args:
        model: With or without adapters.
        tokenizer: Its tokenizer; adds a BOS token to each text if that is its habit.
        prompts: Complete prompts, template included, as texts or as token ids. What is longer than
            the model's positions allow, beside the answer, loses its beginning.
        max_new_tokens: Longest answer, tokens.
        temperature: Of the sampling distribution.
        batch_size: Prompts at a time; they are sorted by length, so padding is small.
        progress: Called with the number of prompts that were just answered.
        stop: Tokens that end an answer, beside EOS and those the model's own settings name.
    """
    before = leading_ids(tokenizer)

    def encoded(prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids if ids[: len(before)] == before else before + ids

    ids = _within_context(list(map(encoded, prompts)), model, max_new_tokens, len(before))
    return generate_from_ids(
        model, tokenizer, ids, max_new_tokens, temperature, batch_size, progress, stop
    )


def generate_from_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    stop: Collection[int] = (),
) -> list[str]:
    """Like `generate`, for prompts that are token ids already."""
    config = _generation_config(model, tokenizer, max_new_tokens, temperature, stop)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    own, model.generation_config = model.generation_config, config
    modes = {module: module.training for module in model.modules()}
    model.eval()
    together = is_spread(model)  # then a rank without prompts computes with the others
    count = most_of_all(len(order), model.device) if together else len(order)
    try:
        for start in range(0, count, batch_size):
            chosen = order[start : start + batch_size]
            rows = [prompts[i] for i in chosen] or [[config.pad_token_id]]
            ids, mask = _pad_left(rows, config.pad_token_id, model.device)
            # Else compiled layers would be compiled anew for every layer's place in the cache.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                tokens = cast(Any, model).generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    synced_gpus=together,
                )
            texts = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts[: len(chosen)], strict=True):
                answers[i] = text
            if progress is not None:
                progress(len(chosen))
    finally:
        model.generation_config = own
        for module, training in modes.items():
            module.training = training
    return answers


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, Any],
    max_new_tokens: int,
) -> list[dict[str, str]]:
    """Answer the last question of every sequence of a labelled batch, packed or padded.

    That is all before the last tokens that are trained on without a break. Answers end at EOS, and
    where these tokens show that the template of training ends turns.
    """
    prompts, trained = [], []
    for part in sequences(batch):
        ids, flags = part["input_ids"], (part["labels"] != IGNORE).tolist()
        stop = len(flags) - flags[::-1].index(True) if any(flags) else len(flags)
        start = stop
        while start > 1 and flags[start - 1]:  # nothing predicts the first token
            start -= 1
        prompts.append(ids[:start].tolist())
        trained.append(ids[start:stop].tolist())
    ends = stop_ids_of_tokens(trained, tokenizer)
    predictions = generate_from_ids(model, tokenizer, prompts, max_new_tokens, stop=ends)
    references = tokenizer.batch_decode(trained, skip_special_tokens=True)
    return [
        {
            "prompt": str(tokenizer.decode(prompt, skip_special_tokens=True)),
            "prediction": prediction,
            "reference": reference,
        }
        for prompt, prediction, reference in zip(prompts, predictions, references, strict=True)
    ]


def positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model knows; None where it has no such limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _within_context(
    prompts: list[list[int]], model: PreTrainedModel, max_new_tokens: int, lead: int
) -> list[list[int]]:
    """Cut the start of prompts that leave no room for an answer; ``lead`` tokens stay."""
    limit = positions(model)
    if limit is None:
        return prompts
    room = max(limit - max_new_tokens, limit // 2)
    if any(len(ids) > room for ids in prompts):
        rank_zero_warn(
            f"prompts of more than {room} tokens lose their beginning: the model knows {limit} "
            f"positions, of which an answer may take {limit - room}; lower max_new_tokens, or "
            "shorten the prompts"
        )
    return [i if len(i) <= room else i[:lead] + i[lead + len(i) - room :] for i in prompts]


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    stop: Collection[int],
) -> GenerationConfig:
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    ends = {tokenizer.eos_token_id, *named, *stop} - {None}
    pad = tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends) if pad is None else pad,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        **sampling,
    )


def _pad_left(
    sequences: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (batch, time) int64; padding on the left, so answers line up."""
    width = max(map(len, sequences))
    rows = [[pad] * (width - len(ids)) + list(ids) for ids in sequences]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
