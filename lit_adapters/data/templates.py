"""The Alpaca prompt, with and without input.

Source: Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca (the prompts of its README).
The one difference: the prompt ends with a newline, so that the answer starts on its own line.
"""

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:  # noqa: A002 - Alpaca's own field name
    """Return the text the model continues; an empty or blank `input` leaves its section out."""
    template = _WITH_INPUT if input.strip() else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)
