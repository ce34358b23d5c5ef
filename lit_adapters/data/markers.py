"""The markers by which a chat template may say what the model writes.

``{% generation %} ... {% endgeneration %}`` leaves no trace in the text that a template makes. Here
both become characters of Unicode's private use in it, which are taken out again.
"""

import re

from lit_adapters.data.examples import Span

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKERS = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")
_MARKED = re.compile(f"({_OPEN}[^{_CLOSE}]*{_CLOSE})")


def has_markers(template: str) -> bool:
    """Whether a template marks what is written."""
    return bool(_MARKERS.search(template))


def with_visible_markers(template: str) -> str:
    """Return a template that writes its markers into the text."""
    return _MARKERS.sub(_visible, template)


def without_markers(marked: str) -> tuple[str, list[Span]]:
    """Return the text that such a template means, and the spans that it marks."""
    text, spans = "", []
    for piece in _MARKED.split(marked):
        clean = piece.strip(_OPEN + _CLOSE) if piece.startswith(_OPEN) else piece
        if piece.startswith(_OPEN):
            spans.append((len(text), len(text) + len(clean)))
        text += clean
    return text, spans


def _visible(match: re.Match[str]) -> str:
    """Turn a marker into a character in the text, white space trimmed as before."""
    left, name, right = match.groups()
    if name == "generation":
        return f"{{%{left} if true %}}{{{{ {_OPEN!r} }}}}{{% if true {right}%}}"
    return f"{{%{left} endif %}}{{{{ {_CLOSE!r} }}}}{{% endif {right}%}}"
