"""One line for what the command line does not understand, with the name that was meant."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

# What jsonargparse 4.5x says, of a flag, of a key in a file, of a setting of a class.
_UNKNOWN = re.compile(
    r"^(?:unrecognized arguments: (?P<flag>--?[^\s=]+)"
    r"|(?:Subcommand|Group) '\w+' does not accept option '(?P<key>[^']+)'"
    r"|Option '(?P<setting>[^']+)' is not accepted$)"
)
_PLACE = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"class_path '([^']+)'")
_INSIDE = re.compile(r"unknown option .*?\?")
_WRONG = re.compile(
    r'Parser key "(?P<key>[^"]+)":\s+Expected an? <class \'(?P<kind>\w+)\'>\. '
    r"Got value: (?P<value>.*)"
)
_NO_LIST = re.compile(
    r'.*Parser key "(?P<key>[^"]+)":.*- Expected a <class \'list\'>\n.*'
    r"Given value type: <class '(?!list)\w+'>\n +Given value: (?P<value>[^\n]*)",
    re.DOTALL,
)
_REASONS = re.compile(r"^ *Errors:\n(.*?)^ *Given value type", re.MULTILINE | re.DOTALL)
_CHOICES = re.compile(
    r"Subtypes: \[(?P<kinds>(?:<class '\w+'>|typing\.Literal\[[^]]*]|, )+)]$"
    r".*^ *Given value: (?P<value>.*)",
    re.MULTILINE | re.DOTALL,
)
_NO_FILE = re.compile(
    r"^Parser key \"(?P<key>[\w.]+)\":\s+Unable to load config '(?P<value>[^']*)'"
)
_LITERAL = re.compile(
    r"Expected a typing\.Literal\[(?P<choices>[^]]*)\](?:\. Got value: (?P<value>[^\n]*))?$"
)
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")


def clearer(message: str, options: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Return ``message`` in one line, if it is about a name that is not known.

    Args:
        message: What jsonargparse says.
        options: The dotted names that the parser knows.
        classes: Names that an option may mean by their last part alone, such as LoRA.
    """
    if unknown := _UNKNOWN.match(message):
        dashes = "--" if unknown["flag"] else ""
        name = (unknown["flag"] or unknown["key"] or unknown["setting"]).lstrip("-")
        return f"unknown option {dashes + name!r}{_meant(name, options, dashes)}"
    if wrong := _NO_FILE.match(message):
        key, value = wrong.groups()
        return (
            f"{key} is a group of settings, and {value!r} no file of them; give --{key}.NAME=VALUE"
        )
    place = _PLACE.search(message)
    where = f"{place[1]}: " if place else ""
    if inside := _INSIDE.search(message):  # said by the parser of a class
        owner = _CLASS.search(message)
        return f"{where}{f'{owner[1]}: ' if owner else ''}{inside[0]}"
    if wrong := _WRONG.search(message):
        owner = _CLASS.search(message)
        inner = f"{owner[1]}: {wrong['key']}" if owner else wrong["key"]
        prefix = where if owner else ""
        return f"{prefix}{inner} must be {wrong['kind']}, got {wrong['value']!r}"
    if place and (single := _NO_LIST.match(message)):
        owner, value = _CLASS.search(message), single["value"]
        who = f"{where}{owner[1]}: {single['key']}" if owner else single["key"]
        return (
            f"{who} must be a list, got {value!r}; write '[{value}]', or end the flag in + to add "
            f"one entry: {single['key'].rpartition('.')[2]}+ {value}"
        )
    if "is abstract" in message and place:
        example = classes[0] if classes else "CLASS"
        return (
            f"{where}its class is not known yet; name it before its settings, as in "
            f"--{place[1]} {example}, or as class_path in a config file"
        )
    if wrong := _NO_CLASS.search(message):
        choices = re.findall(r"'(\w+)'", "".join(re.findall(r"Literal\[[^]]*]", message)))
        return f"{where}{wrong[1]!r} is unknown{_meant(wrong[1], [*choices, *classes])}"
    reason = _only_reason(message) or _not_among(message)
    if choice := _LITERAL.search(reason or message):
        given = re.findall(r"^ *Given value: (.*)", message, re.MULTILINE)
        if value := choice["value"] or "".join(given[-1:]):
            reason = _among(value, re.findall(r"'([^']+)'", choice["choices"]))
    return where + reason if reason else message


def _only_reason(message: str) -> str | None:
    """The one reason why a value is refused, among those of a union with None."""
    listed = _REASONS.search(message)
    reasons = re.split(r"^ *- ", listed[1], flags=re.MULTILINE)[1:] if listed else []
    reasons = [
        re.sub(r"^Problem with given class_path '([^']+)':", r"\1:", " ".join(reason.split()))
        for reason in reasons
        if "<class 'NoneType'>" not in reason
    ]
    # Of the class that was named; that it is nothing else either goes without saying.
    named = [reason for reason in reasons if re.match(r"[\w.]+: the following arguments", reason)]
    if len(named) == 1:
        return named[0]
    if len(reasons) != 1:
        return None
    owner = re.search(r"class_path='([^']+)'", message)
    return f"{owner[1]}: {reasons[0]}" if owner else reasons[0]


def _not_among(message: str) -> str | None:
    """That a value is none of the words and plain types of a union."""
    choices = _CHOICES.search(message)
    if choices is None:
        return None
    return _among(
        choices["value"],
        [one for one in re.findall(r"'([^']+)'", choices["kinds"]) if one != "NoneType"],
    )


def _among(value: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, allowed, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{value!r} is none of {', '.join(allowed)}{meant}"


def _meant(name: str, options: Sequence[str], dashes: str = "") -> str:
    options = list(dict.fromkeys(options))
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.7)
    if not near:
        lasts = [option.rpartition(".")[2].lower() for option in options]
        alike = difflib.get_close_matches(last.lower(), lasts, n=1, cutoff=0.7)
        near = [option for option, one in zip(options, lasts, strict=True) if one in alike]
    if not near:
        return "; did you forget a part of its name? COMMAND --help lists all"
    return f"; did you mean {' or '.join(dashes + option for option in near[:3])}?"


class ClearErrors(argparse.ArgumentParser):
    """Put before a parser of jsonargparse: its errors are one line, without the usage of pages."""

    classes: Sequence[str] = ()
    exit_on_error: bool

    def error(self, message: str, ex: Any = None) -> NoReturn:
        """Say what is wrong and exit with status 2."""
        known = getattr(ex, "subcommand_parser", None) or self
        names = [a.dest for a in known._actions if not a.dest.endswith("help")]
        groups = {name.rpartition(".")[0] for name in names}
        options = [name for name in names if name not in groups]
        line = clearer(message, options, self.classes)
        if not self.exit_on_error or os.environ.get("LIT_ADAPTERS_TRACEBACK"):
            super().error(line, ex)  # type: ignore[call-arg]  # jsonargparse's has two
        self.exit(2, f"error: {line}\n({known.prog.replace(' [options]', '')} --help lists all)\n")
