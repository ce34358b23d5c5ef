"""A tokenizer built on the spot: one token per letter standing alone, anything else unknown."""

import string

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN, A = range(5)  # A: the id of "a"; "b" has the next, and so on


def word_tokenizer(bos: bool = True, eos: bool = True, pad: bool = True, suffix: bool = False):
    """Build one; `bos` and `suffix` say whether it puts BOS and EOS around every text."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase]
    vocab = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{'<s> ' if bos else ''}$A{' </s>' if suffix else ''}",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        pad_token="<pad>" if pad else None,
        unk_token="<unk>",
    )
