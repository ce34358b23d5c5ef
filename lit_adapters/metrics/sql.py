"""SQL queries: the same words, and the same rows."""

import re
from collections.abc import Sequence

from lit_adapters.metrics.base import Answer, TextMetric
from lit_adapters.metrics.sandbox import same_results, schema_of

_TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\w+(?:\.\d+)?|<>|!=|<=|>=|==|\S")
_QUERY = re.compile(r"\s*(?:SELECT|WITH)\b", re.IGNORECASE)


class SQLMatch(TextMetric):
    """Share of queries that are the reference but for writing, and that give the same rows.

    ``sql_exact`` compares tokens: case outside of quotes, white space and a last semicolon do not
    matter. ``sql_execution`` runs both queries on databases in memory, made from the schema in the
    prompt (``Table: name(column, ...)`` or CREATE TABLE) and from the literals of the two; the
    queries can reach nothing else. Where the reference itself does not run there, exactness counts
    instead. Speaks of answers whose reference is a query.
    """

    names = ("sql_exact", "sql_execution")
    width = 2

    def count(self, answer: Answer) -> list[float] | None:
        """Return 1 or 0 for exactness and for the same rows."""
        if not _QUERY.match(answer.reference):
            return None
        exact = tokens(answer.prediction) == tokens(answer.reference)
        if exact:
            return [1.0, 1.0]
        alike = same_results(schema_of(answer.prompt), answer.prediction, answer.reference)
        return [0.0, float(bool(alike))]

    def scores(self, sums: Sequence[float], answers: int) -> list[float]:
        """Return both shares."""
        return [total / answers for total in sums]


def tokens(query: str) -> list[str]:
    """Return what matters of the writing of a query."""
    found = [t if t[0] in "'\"" else t.lower() for t in _TOKEN.findall(query)]
    even = [{"!=": "<>", "==": "="}.get(token, token) for token in found]
    while even and even[-1] == ";":
        even.pop()
    return even
