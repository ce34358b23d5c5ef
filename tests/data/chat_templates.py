"""Chat templates after the formats of five model families, and a small tokenizer for each.

Written for these tests from the formats alone. `expected` says, independently of the library, what
a model that talks in this format has to write.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Tell me about the sea.\n\nThe sea is wide, and deep.\n\n\n",
    "  Count to three:\n1\n2\n3\n\nThen stop. user assistant system model",
    "What is the answer? The answer is here, there and everywhere.",
] * 4


@dataclass(frozen=True)
class Family:
    """One format: its template, its special tokens, and what an answer is written as."""

    template: str
    bos: str | None
    eos: str
    pad: str
    others: tuple[str, ...] = ()
    write: Callable[[str], str] = str
    last: str = ""  # stands only behind the last answer
    refuses: tuple[str, ...] = field(default=())  # "system", "alternation"

    def expected(self, answers: list[str]) -> str:
        return "".join(map(self.write, answers)) + self.last


LLAMA3 = Family(
    "{{- bos_token }}{% for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|eot_id|>",
    ("<|start_header_id|>", "<|end_header_id|>"),
    lambda answer: answer.strip() + "<|eot_id|>",
)
QWEN = Family(
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nBe of use.<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}",
    None,
    "<|im_end|>",
    "<|endoftext|>",
    ("<|im_start|>",),
    lambda answer: answer + "<|im_end|>",
)
MISTRAL = Family(
    "{%- if messages[0].role == 'system' %}{% set head = messages[0].content + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{{- bos_token }}{% for m in rest %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('user and assistant must take turns') }}{% endif %}"
    "{%- if m.role == 'user' %}"
    "{{- '[INST] ' + (head if loop.first else '') + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
    "<s>",
    "</s>",
    "<unk>",
    ("[INST]", "[/INST]"),
    lambda answer: f" {answer}</s>",
    refuses=("alternation",),
)
GEMMA = Family(
    "{{- bos_token }}{% for m in messages %}"
    "{%- if m.role == 'system' %}{{- raise_exception('no system turn') }}{% endif %}"
    "{%- set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}",
    "<bos>",
    "<eos>",
    "<pad>",
    ("<start_of_turn>", "<end_of_turn>"),
    lambda answer: answer.strip() + "<end_of_turn>",
    refuses=("system",),
)
PHI = Family(
    "{% for m in messages %}"
    "{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}"
    "{%- else %}{{- eos_token }}{% endif %}",
    None,
    "<|endoftext|>",
    "<|endoftext|>",
    ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    lambda answer: answer + "<|end|>",
    last="\n<|endoftext|>",
)
FAMILIES = {"llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "gemma": GEMMA, "phi": PHI}

# Reasoning is kept in the last answer alone, which always shows that there was some or none.
THINKING = (
    "{%- for m in messages %}{% set said = m.content %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in said else '' %}"
    "{%- set said = said.split('</think>')[-1].strip() %}"
    "{%- if loop.last %}"
    "{%- set said = '<think>\\n' + thought + '\\n</think>\\n\\n' + said %}{% endif %}{% endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same format, with the answers marked by the template.
MARKED = (
    "{% for m in messages %}\n"
    "    {% if m.role == 'assistant' %}\n"
    "<|im_start|>assistant\n"
    "{%- generation %}\n\n{{ m.content }}<|im_end|>{% endgeneration %}\n\n"
    "    {% else %}\n"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "    {% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def chat_tokenizer(name: str = "qwen", words: bool = True) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a family; without `words` its tokens may span words and lines."""
    family = FAMILIES[name]
    specials = [token for token in (family.bos, family.eos, family.pad) if token]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys((*specials, *family.others))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        chat_template=family.template,
    )
