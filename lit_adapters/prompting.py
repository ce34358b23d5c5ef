"""How an adapter was asked in training: kept on its modules, and written beside its weights.

A folder is not trusted. What it says about prompts is the name of a template or the text of one,
never a path; a text runs in the sandbox of transformers, without access to anything but the prompt.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from lit_adapters.adapters import METHOD
from lit_adapters.adapters.fields import shown
from lit_adapters.attachment import adapted_layers
from lit_adapters.data import Prompting

NOTE = "prompting"  # its key in `lit_adapters.json` and in checkpoints
NOTED = ("template", "task_prompt")


def prompting_of(model: nn.Module) -> Prompting | None:
    """Return how the adapters of ``model`` were asked in training; None where nobody knows."""
    return next((one.adapter.prompting for one in adapted_layers(model, METHOD)), None)


def set_prompting(model: nn.Module, prompting: Prompting | None) -> None:
    """State how the adapters of ``model`` are asked."""
    for one in adapted_layers(model, METHOD):
        one.adapter.prompting = prompting


def to_note(prompting: Prompting | None) -> dict[str, str] | None:
    """Return what a file says about it."""
    if prompting is None:
        return None
    whole = prompting.with_text()
    return {field: getattr(whole, field) for field in NOTED}


def from_note(note: Any, file: Any) -> Prompting | None:
    """Return what a file says; None where it says nothing.

    Raises:
        ValueError: if it is not as expected.
    """
    if note is None:
        return None
    remedy = f"save or download the adapter again, or remove {NOTE!r} from it"
    if not isinstance(note, Mapping):
        raise ValueError(f"{file}: {NOTE!r} must be an object, got {shown(note)}; {remedy}")
    said = {field: note.get(field, "") for field in NOTED}
    for field, value in said.items():
        if not isinstance(value, str):
            raise ValueError(f"{file}: {field!r} must be a text, got {shown(value)}; {remedy}")
    try:
        found = Prompting(said["template"] or "auto", said["task_prompt"])
    except ValueError as error:
        raise ValueError(f"{file}: {shown(str(error))}; {remedy}") from error
    if found.is_file:
        raise ValueError(
            f"{file}: 'template' must be the text of a template or the name of one of ours, got "
            f"the path {shown(found.template)}, which is not followed; {remedy}"
        )
    return found


class Choice(NamedTuple):
    """How to ask, and which given options differ from training, in words; empty if none does."""

    prompting: Prompting
    differs: str


def choose(
    given: Mapping[str, str | None], recorded: Prompting | None, default: str = "auto"
) -> Choice:
    """Let what is given win over what was recorded, and that over the default.

    Args:
        given: `template` and `task_prompt`; None where nothing is said.
        recorded: How the adapter was asked in training, if that is known.
        default: The template where nothing is said or known.
    """
    fallback = recorded or Prompting(default)
    said = {key: getattr(fallback, key) if value is None else value for key, value in given.items()}
    chosen = Prompting(said["template"], said["task_prompt"])
    if recorded is None:
        return Choice(chosen, "")
    ours, theirs = to_note(chosen) or {}, to_note(recorded) or {}
    differing = [
        f"{key} {_brief(given[key])} is not that of the adapter's training, {_brief(theirs[key])}"
        for key in given
        if given[key] is not None and ours[key] != theirs[key]
    ]
    return Choice(chosen, "; ".join(differing))


def _brief(text: str | None) -> str:
    line = " ".join((text or "").split())
    return repr(line if len(line) <= 60 else f"{line[:60]}...")
