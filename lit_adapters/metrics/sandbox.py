"""Run an untrusted query on a small database in memory, made for it."""

import itertools
import random
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Sequence[str]]  # columns by table
Rows = list[tuple[Any, ...]]

ROWS = 120  # per table
DATABASES = 3  # two queries that differ must agree by chance in all of them
LONGEST_QUERY = 4000  # characters
LONGEST_VALUE = 16_000  # bytes of any text that a query makes
LONGEST_PATTERN = 50  # bytes of a pattern of LIKE
MOST_ROWS = 5000  # of a result
STEPS, MOST_PAUSES = 1000, 3000  # instructions between two pauses; a count is the same everywhere

_TABLE = re.compile(r"\bTable:\s*(\w+)\s*\(([^()]*)\)", re.IGNORECASE)
_CREATE = re.compile(
    r"\bCREATE\s+TABLE\s+[\"`\[]?(\w+)[\"`\]]?\s*\(((?:[^()]|\([^()]*\))*)\)", re.IGNORECASE
)
_CONSTRAINTS = {"primary", "foreign", "unique", "check", "constraint", "key"}
_QUOTED = re.compile(r"'((?:[^']|'')*)'|\"((?:[^\"]|\"\")*)\"")  # the second may be a name
_NUMBER = re.compile(r"(?<![\w.'])\d{1,15}(?:\.\d{1,6})?(?![\w.'])")
_FUNCTIONS = frozenset(
    "abs avg coalesce count date datetime glob ifnull iif instr julianday length like lower ltrim "
    "max min nullif round rtrim strftime substr substring sum time total trim typeof upper "
    "cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank "
    "row_number".split()
)


def schema_of(prompt: str) -> dict[str, list[str]]:
    """Read tables: ``Table: name(column, ...)`` or ``CREATE TABLE name (column type, ...)``."""
    found = {}
    for name, columns in (*_TABLE.findall(prompt), *_CREATE.findall(prompt)):
        parts = re.sub(r"\([^()]*\)", "", columns).split(",")
        names = [words[0].strip('"`[]') for part in parts if (words := part.split())]
        own = [n for n in names if n.isidentifier() and n.lower() not in _CONSTRAINTS]
        if own and len({n.lower() for n in own}) == len(own):
            found[name] = own
    return found


def same_results(schema: Schema, query: str, reference: str) -> bool | None:
    """Tell whether two queries give the same rows on databases made from their own literals.

    The order of rows counts if the reference orders them. None if the reference itself does not
    run on the schema, or gives nothing on any of the databases.
    """
    ordered = re.search(r"\bORDER\s+BY\b", reference, re.IGNORECASE) is not None
    anything, alike = False, True
    for seed in range(DATABASES):
        filled = fill(schema, (query, reference), seed)
        expected = run(filled, schema, reference)
        if expected is None:
            return None
        anything |= bool(expected)
        found = run(filled, schema, query) if alike else None
        alike = found is not None and _comparable(found, ordered) == _comparable(expected, ordered)
    return alike if anything else None


def fill(schema: Schema, queries: Iterable[str], seed: int) -> dict[str, Rows]:
    """Make rows of which the literals of the queries choose some and not others.

    Columns that a query compares with a text hold texts, the others numbers. About half of the
    values are literals of the queries or next to one. Depends on the arguments only.
    """
    text = "\n".join(sorted({query[:LONGEST_QUERY] for query in queries}))
    names = {name.lower() for columns in schema.values() for name in columns} | {*schema}
    texts: set[str] = set()

    def take(quoted: re.Match[str]) -> str:
        single, double = quoted.groups()
        if double is not None and double.lower() in names:
            return double
        texts.add(single.replace("''", "'") if double is None else double)
        return "''"

    plain = _QUOTED.sub(take, text)
    numbers = {float(n) if "." in n else int(n) for n in _NUMBER.findall(plain)}
    near_numbers = sorted({n + step for n in numbers for step in (-1, 0, 1)})
    pieces = sorted({piece for t in texts for piece in (t, t.strip("%"), t.lower(), t + "s")})
    random_ = random.Random(f"{seed} {sorted(schema)}")
    tables = {}
    for table, columns in schema.items():
        made = []
        for column in columns:
            is_text = _is_text(column, plain)
            own = pieces if is_text else near_numbers
            made.append([_value(random_, own, is_text, column) for _ in range(ROWS)])
        tables[table] = list(zip(*made, strict=True))
    return tables


def run(tables: Mapping[str, Rows], schema: Schema, query: str) -> Rows | None:
    """Return the rows that a query selects; None if it is refused, fails, or takes too long.

    Nothing but SELECT on these tables with plain functions is allowed; memory and time are
    limited. There is no file, and no other database, to reach.
    """
    if len(query) > LONGEST_QUERY:
        return None
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("PRAGMA temp_store = MEMORY")  # or a large sort would write a file
        for table, rows in tables.items():
            columns = ", ".join(f'"{column}"' for column in schema[table])
            connection.execute(f'CREATE TABLE "{table}" ({columns})')
            marks = ", ".join("?" * len(schema[table]))
            connection.executemany(f'INSERT INTO "{table}" VALUES ({marks})', rows)
        connection.commit()
        if not _confine(connection, {table.lower() for table in tables}) and "||" in query:
            return None  # before Python 3.11 the length of what it makes has no limit
        rows = connection.execute(query).fetchmany(MOST_ROWS + 1)
        return rows if len(rows) <= MOST_ROWS else None
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None
    finally:
        connection.close()


def _confine(connection: sqlite3.Connection, tables: set[str]) -> bool:
    """Allow reading `tables` and little else; tell whether sizes are limited too."""

    def allowed(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ and (first or "").lower() in tables:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    pauses = itertools.count(1)
    connection.set_authorizer(allowed)
    connection.set_progress_handler(lambda: next(pauses) > MOST_PAUSES, STEPS)
    if not hasattr(connection, "setlimit"):
        return False
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, LONGEST_PATTERN)
    return True


def _is_text(column: str, plain: str) -> bool:
    """Whether a query, its texts emptied, compares the column with one."""
    operator = r"(?:=|==|<>|!=|(?:NOT\s+)?(?:LIKE|IN)\b)"
    compared = rf"\b{re.escape(column)}\b[`\]]?\s*{operator}\s*\(?\s*''"
    return re.search(compared, plain, re.IGNORECASE) is not None


def _value(random_: random.Random, own: Sequence[Any], is_text: bool, column: str) -> Any:
    if own and random_.random() < 0.5:
        return random_.choice(own)
    number = random_.randrange(10 * ROWS)
    return f"{column} {number}" if is_text else number


def _comparable(rows: Rows, ordered: bool) -> list[str]:
    texts = [repr([_even(value) for value in row]) for row in rows]
    return texts if ordered else sorted(texts)


def _even(value: Any) -> Any:
    """Take 2.0 for 2, and sums that differ in their last bits for one."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else float(f"{value:.9g}")
