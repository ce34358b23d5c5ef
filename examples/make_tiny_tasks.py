"""Write the three small tasks that the tiny base model is fine-tuned on.

Every record follows the Alpaca layout (``instruction``, ``input``, ``output``) with one more field,
``task``, which is ``representation``, ``sql`` or ``arithmetic``. Records are assembled from a small
closed world by a seeded generator, so running the script twice writes the same bytes:

    python examples/make_tiny_tasks.py

The validation and test records are built from combinations that never occur in training, for
example a restaurant together with a food, or a table together with a kind of query. A model that
memorises the training records therefore gains nothing on them; it has to read the input.

:func:`unlabelled_text` yields text from the same world for pretraining. It contains sentences,
representations, queries and sums, but never an input next to its answer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

TASKS: Final = ("representation", "sql", "arithmetic")
SPLIT_SIZES: Final = {"train": 2000, "validation": 200, "test": 200}
SHARES: Final = {"representation": 0.4, "sql": 0.4, "arithmetic": 0.2}
DEFAULT_SEED: Final = 20240607
DEFAULT_OUT: Final = Path(__file__).resolve().parent.parent / "lit_adapters" / "assets" / "tasks"

# Out of every ten diagonals of a (row, column) grid one is kept for each of the held-out splits.
# Diagonals, unlike random cells, leave every row and every column well covered in training.
_GRID_PERIOD: Final = 10
_TEST_DIAGONAL: Final = 0
_VALIDATION_DIAGONAL: Final = 5


@dataclass(frozen=True)
class Combination:
    """Two things that meet in a record, such as an entity and an attribute value.

    Attributes:
        left: The first of them.
        right: The second of them.
        split: The only split whose records may contain the two together.
    """

    left: str
    right: str
    split: str


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        task: Name of the task.
        instruction: What the model is asked to do.
        input: The text it is asked to do it with.
        output: The expected answer.
        combinations: What meets in the record; this decides which split it belongs to.
    """

    task: str
    instruction: str
    input: str
    output: str
    combinations: tuple[Combination, ...]

    @property
    def split(self) -> str | None:
        """The split that may contain the record, or None if there is none.

        A single held-out combination is enough to keep a record out of training. Where a
        combination held out for validation meets one held out for test, no split may have it.
        """
        held_out = {item.split for item in self.combinations if item.split != "train"}
        if len(held_out) > 1:
            return None
        return held_out.pop() if held_out else "train"

    def to_json(self) -> str:
        """Return the record as one JSON line without its bookkeeping fields."""
        fields = {
            "instruction": self.instruction,
            "input": self.input,
            "output": self.output,
            "task": self.task,
        }
        return json.dumps(fields, ensure_ascii=False)


def cell_split(row: int, column: int) -> str:
    """Return the split of one cell of a combination grid.

    Args:
        row: Index of the first element, such as an entity.
        column: Index of the second element, such as an attribute value.

    Returns:
        ``"train"``, ``"validation"`` or ``"test"``.
    """
    diagonal = (row + column) % _GRID_PERIOD
    if diagonal == _TEST_DIAGONAL:
        return "test"
    if diagonal == _VALIDATION_DIAGONAL:
        return "validation"
    return "train"


# --------------------------------------------------------------------------------------------------
# Representation: an English sentence becomes a function call such as inform(name[...], food[...]).


@dataclass(frozen=True)
class Slot:
    """An attribute and the ways to say it.

    Attributes:
        name: Name in the representation.
        phrases: For each value, verb phrases that express it. ``{v}`` stands for the value.
        questions: Questions for the value. ``{n}`` stands for the entity.
    """

    name: str
    phrases: dict[str, tuple[str, ...]]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A kind of thing that sentences talk about.

    Attributes:
        noun: What one of them is called.
        names: Names of the entities.
        slots: The attributes, in the order in which representations list them.
        bookable: Whether there is something to reserve.
    """

    noun: str
    names: tuple[str, ...]
    slots: tuple[Slot, ...]
    bookable: bool = False


def _spoken_alike(values: Sequence[str], *phrases: str) -> dict[str, tuple[str, ...]]:
    """Give every value the same phrases."""
    return {value: tuple(phrases) for value in values}


def _two_words(first: str, second: str) -> tuple[str, ...]:
    """Return every two-word name from two lists of words."""
    return tuple(f"{left} {right}" for left in first.split() for right in second.split())


_AREAS: Final = ("riverside", "old town", "harbour", "city centre", "market square", "north side")
_AREA: Final = Slot(
    "area",
    _spoken_alike(_AREAS, "is in the {v}", "is located in the {v} area", "lies in the {v}"),
    ("Where is {n}?", "In which area is {n}?"),
)
_PRICE: Final = Slot(
    "price",
    {
        "cheap": ("is cheap", "has low prices", "costs little"),
        "moderate": ("has average prices", "is moderately priced"),
        "high": ("is expensive", "has high prices", "costs a lot"),
    },
    ("How expensive is {n}?", "What are the prices at {n}?"),
)
_YEAR: Final = Slot(
    "year",
    _spoken_alike(
        [str(year) for year in range(1987, 2024, 4)], "came out in {v}", "was released in {v}"
    ),
    ("When did {n} come out?", "In which year was {n} released?"),
)

DOMAINS: Final = (
    Domain(
        "restaurant",
        _two_words("Blue Golden Green Silver Red Royal Little", "Spice Palace Garden Lantern Oven"),
        (
            Slot(
                "food",
                _spoken_alike(
                    ("Thai", "Italian", "French", "Indian", "Greek", "Mexican", "Turkish"),
                    "serves {v} food",
                    "offers {v} dishes",
                    "has a {v} menu",
                ),
                ("What kind of food does {n} serve?", "What can I eat at {n}?"),
            ),
            _AREA,
            _PRICE,
            Slot(
                "terrace",
                {
                    "yes": ("has a terrace", "has tables outside"),
                    "no": ("has no terrace", "has no tables outside"),
                },
                ("Does {n} have a terrace?", "Can I sit outside at {n}?"),
            ),
        ),
        bookable=True,
    ),
    Domain(
        "film",
        _two_words(
            "Silent Last Broken Hidden Winter Distant Paper", "River Train Letter Moon Road"
        ),
        (
            Slot(
                "director",
                _spoken_alike(
                    ("Novak", "Larsen", "Moreau", "Tanaka", "Silva", "Okoye", "Kaplan"),
                    "was directed by {v}",
                    "was made by {v}",
                    "is a work of {v}",
                ),
                ("Who directed {n}?", "Who made {n}?"),
            ),
            Slot(
                "mood",
                _spoken_alike(
                    ("funny", "sad", "scary", "romantic", "exciting"),
                    "is {v}",
                    "is rather {v}",
                    "is known to be {v}",
                ),
                ("What is {n} like?", "What is the mood of {n}?"),
            ),
            _YEAR,
            Slot(
                "award",
                {
                    "yes": ("won an award", "was given a prize"),
                    "no": ("never won an award", "was never given a prize"),
                },
                ("Did {n} win an award?", "Was {n} given a prize?"),
            ),
        ),
    ),
)

_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_INFORM_TWO: Final = (
    "{n} {a} and {b}.",
    "{n} {a}. It {b}.",
    "The {noun} {n} {a} and {b}.",
    "There is a {noun} called {n} that {a} and {b}.",
)
_INFORM_THREE: Final = (
    "{n} {a}, {b} and {c}.",
    "{n} {a} and {b}. It also {c}.",
    "The {noun} {n} {a}. It {b} and {c}.",
    "There is a {noun} called {n} that {a}, {b} and {c}.",
)
_RECOMMEND: Final = (
    "I would recommend {n} because it {a} and {b}.",
    "You should try {n}, which {a} and {b}.",
    "You will like {n}: it {a} and {b}.",
)
_CONFIRM: Final = (
    "So {n} {a} and {b}, right?",
    "Is it true that {n} {a} and {b}?",
    "Am I right that {n} {a} and {b}?",
)
_BOOK: Final = (
    "Please book {n} for {p} people on {d}.",
    "I want to go to {n} on {d} with a group of {p}.",
    "We are {p} people and need a reservation at {n} on {d}.",
)
_REPRESENTATION_INSTRUCTIONS: Final = (
    "Turn the sentence into a meaning representation.",
    "Write the meaning of the text as a function call.",
    "Give the meaning representation of this text.",
)


def _column(domain: Domain, slot: Slot, value: str) -> int:
    """Return the grid column of an attribute value; each slot starts on a different diagonal."""
    return 3 * domain.slots.index(slot) + list(slot.phrases).index(value)


def _representation_parts(
    rng: random.Random, domain: Domain, act: str, name: str, counts: tuple[int, ...] = (2, 3)
) -> tuple[str, str, list[tuple[str, int]]]:
    """Return a sentence, its representation and the (value, grid column) pairs in it."""
    if act == "request":
        slot = rng.choice(domain.slots)
        sentence = rng.choice(slot.questions).format(n=name)
        cell = (f"asks {slot.name}", 2 * domain.slots.index(slot))
        return sentence, f"request(name[{name}], {slot.name})", [cell]
    if act == "book":
        day, people = rng.choice(_DAYS), str(rng.randint(2, 9))
        sentence = rng.choice(_BOOK).format(n=name, p=people, d=day)
        answer = f"book(name[{name}], people[{people}], day[{day}])"
        return sentence, answer, [(f"day {day}", _DAYS.index(day)), (f"people {people}", 1)]
    count = rng.choice(counts) if act == "inform" else 2
    chosen = [(slot, rng.choice(list(slot.phrases))) for slot in rng.sample(domain.slots, count)]
    said = [rng.choice(slot.phrases[value]).format(v=value) for slot, value in chosen]
    frames = {
        "inform": _INFORM_TWO if count == 2 else _INFORM_THREE,
        "recommend": _RECOMMEND,
        "confirm": _CONFIRM,
    }[act]
    sentence = rng.choice(frames).format(n=name, noun=domain.noun, a=said[0], b=said[1], c=said[-1])
    # The sentence mentions attributes in any order; the representation has one fixed order.
    ordered = sorted(chosen, key=lambda item: domain.slots.index(item[0]))
    listed = ", ".join(f"{slot.name}[{value}]" for slot, value in ordered)
    cells = [(f"{slot.name} {value}", _column(domain, slot, value)) for slot, value in chosen]
    return sentence, f"{act}(name[{name}], {listed})", cells


def representation_record(rng: random.Random, wide: bool = False) -> Record:
    """Draw one sentence with its representation, from any split.

    Args:
        rng: Source of randomness.
        wide: Whether to draw from the whole world, bookings and three attributes included, and not
            only from the part of it that the task asks about.

    Returns:
        The record.
    """
    domain = rng.choice(DOMAINS)
    acts = ["inform", "inform", "recommend", "confirm", "request"]
    if domain.bookable and wide:
        acts.append("book")
    row = rng.randrange(len(domain.names))
    name = domain.names[row]
    counts = (2, 3) if wide else (2,)
    sentence, answer, cells = _representation_parts(rng, domain, rng.choice(acts), name, counts)
    # How many people come along says nothing about the entity, so it takes no part in the split.
    cells = [cell for cell in cells if not cell[0].startswith("people")]
    return Record(
        task="representation",
        instruction=rng.choice(_REPRESENTATION_INSTRUCTIONS),
        input=sentence,
        output=answer,
        combinations=tuple(
            Combination(name, value, cell_split(row, column)) for value, column in cells
        ),
    )


# --------------------------------------------------------------------------------------------------
# SQL: a question about one table becomes a query.


@dataclass(frozen=True)
class Table:
    """A table that questions are asked about.

    Attributes:
        name: Name of the table, a plural noun.
        label: Column that identifies a row.
        category: Text column that conditions compare with.
        values: Values of the text column.
        numbers: Numeric columns with their ranges.
    """

    name: str
    label: str
    category: str
    values: tuple[str, ...]
    numbers: dict[str, tuple[int, int]]


_CITIES: Final = ("Oslo", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Perth", "Turin")
_COUNTRIES: Final = ("Norway", "Peru", "Egypt", "India", "France", "Chile", "Kenya", "Japan")
_PEOPLE: Final = ("Novak", "Larsen", "Moreau", "Tanaka", "Silva", "Okoye", "Kaplan", "Weber")
_BRANDS: Final = ("Acme", "Zenith", "Orion", "Vertex", "Nimbus", "Polar", "Delta", "Terra")

TABLES: Final = (
    Table("employees", "name", "city", _CITIES, {"salary": (20, 90), "age": (20, 65)}),
    Table(
        "players",
        "name",
        "team",
        ("Lions", "Bears", "Hawks", "Wolves", "Sharks", "Eagles", "Tigers", "Bulls"),
        {"goals": (2, 60), "age": (17, 40)},
    ),
    Table("books", "title", "author", _PEOPLE, {"pages": (60, 900), "price": (3, 50)}),
    Table("films", "title", "director", _PEOPLE, {"year": (1960, 2023), "rating": (2, 9)}),
    Table("towns", "name", "country", _COUNTRIES, {"population": (10, 900), "area": (5, 400)}),
    Table("products", "name", "brand", _BRANDS, {"price": (3, 99), "stock": (5, 300)}),
    Table(
        "students",
        "name",
        "subject",
        ("maths", "history", "music", "physics", "art", "biology", "latin", "chemistry"),
        {"grade": (2, 9), "age": (11, 25)},
    ),
    Table("cars", "model", "maker", _BRANDS, {"year": (1980, 2023), "price": (5, 90)}),
    Table("songs", "title", "artist", _PEOPLE, {"length": (90, 600), "plays": (10, 900)}),
    Table(
        "dogs",
        "name",
        "breed",
        ("poodle", "beagle", "collie", "husky", "boxer", "terrier", "spaniel", "pug"),
        {"weight": (3, 60), "age": (2, 15)},
    ),
    Table("ships", "name", "port", _CITIES, {"length": (20, 300), "crew": (4, 90)}),
    Table("mountains", "name", "country", _COUNTRIES, {"height": (900, 8000), "climbs": (2, 90)}),
    Table("flights", "code", "airline", _BRANDS, {"seats": (40, 400), "price": (30, 900)}),
    Table("museums", "name", "city", _CITIES, {"visitors": (5, 900), "rooms": (4, 80)}),
)


@dataclass(frozen=True)
class QueryShape:
    """A kind of query and the questions that ask for it.

    Placeholders: ``t`` table, ``l`` label column, ``c`` text column, ``v`` its value, ``x`` a
    numeric column, ``n`` a number to compare with, ``k`` a number of rows.

    Attributes:
        name: Short name of the kind.
        query: Template of the query.
        questions: Templates of the questions.
    """

    name: str
    query: str
    questions: tuple[str, ...]


SHAPES: Final = (
    QueryShape(
        "list by text",
        "SELECT {l} FROM {t} WHERE {c} = '{v}'",
        ("Which {t} have the {c} {v}?", "List the {l} of all {t} whose {c} is {v}."),
    ),
    QueryShape(
        "count by text",
        "SELECT COUNT(*) FROM {t} WHERE {c} = '{v}'",
        ("How many {t} have the {c} {v}?", "Count the {t} whose {c} is {v}."),
    ),
    QueryShape(
        "list above",
        "SELECT {l} FROM {t} WHERE {x} > {n}",
        ("Which {t} are above {n} in {x}?", "List the {l} of {t} whose {x} is more than {n}."),
    ),
    QueryShape(
        "list below",
        "SELECT {l} FROM {t} WHERE {x} < {n}",
        ("Which {t} are below {n} in {x}?", "List the {l} of {t} whose {x} is less than {n}."),
    ),
    QueryShape(
        "count above",
        "SELECT COUNT(*) FROM {t} WHERE {x} > {n}",
        ("How many {t} are above {n} in {x}?", "Count the {t} whose {x} is more than {n}."),
    ),
    QueryShape(
        "highest",
        "SELECT {l} FROM {t} ORDER BY {x} DESC LIMIT {k}",
        ("Which {k} {t} have the highest {x}?", "Show the top {k} {t} by {x}."),
    ),
    QueryShape(
        "lowest",
        "SELECT {l} FROM {t} ORDER BY {x} LIMIT {k}",
        ("Which {k} {t} have the lowest {x}?", "Show the bottom {k} {t} by {x}."),
    ),
    QueryShape(
        "average",
        "SELECT AVG({x}) FROM {t} WHERE {c} = '{v}'",
        (
            "What is the average {x} of {t} with {c} {v}?",
            "Find the mean {x} among {t} whose {c} is {v}.",
        ),
    ),
    QueryShape(
        "per group",
        "SELECT {c}, COUNT(*) FROM {t} GROUP BY {c}",
        ("How many {t} are there for each {c}?", "Count the {t} per {c}."),
    ),
)
# The kinds that the task asks about; the text that the base model reads knows the others as well.
_ASKED: Final = tuple(
    index for index, shape in enumerate(SHAPES) if shape.name not in ("list below", "lowest")
)
# A table may hold more columns than a question needs, so that the schema has to be read.
_EXTRA_COLUMNS: Final = ("id", "notes", "created", "owner", "status")
_SQL_INSTRUCTIONS: Final = (
    "Write an SQL query that answers the question.",
    "Translate the question into SQL.",
    "Answer with one SQL query.",
)


def _schema(rng: random.Random, table: Table, numbers: Sequence[str] | None = None) -> str:
    """Return the table with its columns in random order, sometimes with one that is not needed."""
    columns = [table.label, table.category, *(table.numbers if numbers is None else numbers)]
    if rng.random() < 0.5:
        columns.append(rng.choice(_EXTRA_COLUMNS))
    rng.shuffle(columns)
    return f"{table.name}({', '.join(columns)})"


def sql_record(rng: random.Random, wide: bool = False) -> Record:
    """Draw one question with its query, from any split.

    Args:
        rng: Source of randomness.
        wide: Whether to draw from all kinds of query and to list all number columns, and not only
            what the task asks about.

    Returns:
        The record.
    """
    row = rng.randrange(len(TABLES))
    column = rng.randrange(len(SHAPES)) if wide else rng.choice(_ASKED)
    table, shape = TABLES[row], SHAPES[column]
    number_column = rng.choice(list(table.numbers))
    blanks = {
        "t": table.name,
        "l": table.label,
        "c": table.category,
        "v": rng.choice(table.values),
        "x": number_column,
        "n": rng.randint(*table.numbers[number_column]),
        "k": rng.randint(2, 9),
    }
    question = rng.choice(shape.questions).format(**blanks)
    instruction = rng.choice(_SQL_INSTRUCTIONS)
    schema = _schema(rng, table, None if wide else [number_column])
    return Record(
        task="sql",
        instruction=instruction,
        input=f"Table: {schema}\nQuestion: {question}",
        output=shape.query.format(**blanks),
        combinations=(Combination(table.name, shape.name, cell_split(row, column)),),
    )


# --------------------------------------------------------------------------------------------------
# Arithmetic: a word problem becomes short steps and a last line with the result.

_FIRST_NAMES: Final = (
    *("Mia", "Noah", "Emma", "Liam", "Zoe", "Omar", "Lena", "Ravi", "Nina", "Hugo"),
    *("Ada", "Finn", "Iris", "Theo", "Maya", "Jonas", "Clara", "Amir", "Ella", "Sven"),
)
_ITEMS: Final = (
    *("apples", "pencils", "stickers", "marbles", "cards", "books"),
    *("coins", "shells", "stamps", "buttons", "cookies", "balloons"),
)


@dataclass(frozen=True)
class Story:
    """A kind of word problem.

    Placeholders: ``p`` and ``q`` are people, ``i`` the items, ``a``, ``b`` and ``c`` numbers.

    Attributes:
        name: Short name of the kind.
        texts: Templates of the problem.
        draw: Draws the numbers.
        solve: Returns the steps as (left, operator, right) triples; an operand of None stands for
            the result of the step before.
    """

    name: str
    texts: tuple[str, ...]
    draw: Callable[[random.Random], tuple[int, int, int]]
    solve: Callable[[int, int, int], tuple[tuple[int | None, str, int | None], ...]]


def _draw_sum(rng: random.Random) -> tuple[int, int, int]:
    """Draw two numbers to add and a third that their sum can spare."""
    a, b = rng.randint(5, 49), rng.randint(3, 40)
    return a, b, rng.randint(2, min(30, a + b - 1))


def _draw_rest(rng: random.Random) -> tuple[int, int, int]:
    """Draw a number from which two others can be taken away."""
    a = rng.randint(20, 90)
    b = rng.randint(3, a // 2)
    return a, b, rng.randint(2, a // 2 - 1)


def _draw_product(rng: random.Random) -> tuple[int, int, int]:
    """Draw two small factors and a number below their product."""
    a, b = rng.randint(3, 9), rng.randint(3, 9)
    return a, b, rng.randint(2, min(20, a * b - 1))


STORIES: Final = (
    Story(
        "gain",
        (
            "{p} has {a} {i} and gets {b} more. How many {i} does {p} have now?",
            "{p} had {a} {i}. Then {q} gave {p} {b} {i}. How many {i} does {p} have?",
        ),
        _draw_sum,
        lambda a, b, c: ((a, "+", b),),
    ),
    Story(
        "loss",
        (
            "{p} has {a} {i} and loses {b}. How many {i} are left?",
            "{p} had {a} {i} and gave {b} to {q}. How many {i} does {p} still have?",
        ),
        _draw_rest,
        lambda a, b, c: ((a, "-", b),),
    ),
    Story(
        "groups",
        (
            "{p} has {a} boxes with {b} {i} in each. How many {i} are there in total?",
            "There are {b} {i} in every bag. {p} has {a} bags. How many {i} does {p} have?",
        ),
        _draw_product,
        lambda a, b, c: ((a, "*", b),),
    ),
    Story(
        "gain and loss",
        (
            "{p} has {a} {i}, finds {b} more and then loses {c}. How many {i} are left?",
            "{p} had {a} {i}, got {b} from {q} and used {c}. How many {i} does {p} have now?",
        ),
        _draw_sum,
        lambda a, b, c: ((a, "+", b), (None, "-", c)),
    ),
    Story(
        "two losses",
        (
            "{p} has {a} {i}, sells {b} and then sells {c}. How many {i} are left?",
            "From {a} {i}, {p} took {b} and {q} took {c}. How many {i} remain?",
        ),
        _draw_rest,
        lambda a, b, c: ((a, "-", b), (None, "-", c)),
    ),
    Story(
        "groups and gain",
        (
            "{p} buys {a} packs of {b} {i} and finds {c} more. How many {i} does {p} have?",
            "{p} fills {a} bags with {b} {i} each and keeps {c} over. How many {i} are there?",
        ),
        _draw_product,
        lambda a, b, c: ((a, "*", b), (None, "+", c)),
    ),
    Story(
        "groups and loss",
        (
            "{p} buys {a} packs of {b} {i} and gives away {c}. How many {i} are left?",
            "{p} had {a} bags with {b} {i} each, but {c} were lost. How many {i} remain?",
        ),
        _draw_product,
        lambda a, b, c: ((a, "*", b), (None, "-", c)),
    ),
    Story(
        "together",
        (
            "{p} has {a} {i}. {q} has {b} more than {p}. How many {i} do they have together?",
            "{q} owns {b} {i} more than {p}, who owns {a}. How many {i} do both own?",
        ),
        lambda rng: (rng.randint(5, 30), rng.randint(2, 30), 0),
        lambda a, b, c: ((a, "+", b), (a, "+", None)),
    ),
)
_ARITHMETIC_INSTRUCTIONS: Final = (
    "Solve the problem step by step.",
    "Work out the answer in short steps.",
    "Solve this word problem and show the steps.",
)


def work_out(left: int, operator: str, right: int) -> int:
    """Return the result of one step.

    Args:
        left: First operand.
        operator: One of ``+``, ``-`` and ``*``.
        right: Second operand.

    Returns:
        The result.
    """
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _solution(steps: Sequence[tuple[int | None, str, int | None]]) -> str:
    """Return the steps as text, one a line, and the result on a line of its own."""
    lines: list[str] = []
    result = 0
    for left, operator, right in steps:
        first = result if left is None else left
        second = result if right is None else right
        result = work_out(first, operator, second)
        lines.append(f"{first} {operator} {second} = {result}")
    return "\n".join([*lines, f"#### {result}"])


def arithmetic_record(rng: random.Random) -> Record:
    """Draw one word problem with its solution, from any split."""
    row, column = rng.randrange(len(STORIES)), rng.randrange(len(_ITEMS))
    story, item = STORIES[row], _ITEMS[column]
    a, b, c = story.draw(rng)
    first, second = rng.sample(_FIRST_NAMES, 2)
    text = rng.choice(story.texts).format(p=first, q=second, i=item, a=a, b=b, c=c)
    return Record(
        task="arithmetic",
        instruction=rng.choice(_ARITHMETIC_INSTRUCTIONS),
        input=text,
        output=_solution(story.solve(a, b, c)),
        combinations=(Combination(story.name, item, cell_split(row, column)),),
    )


# --------------------------------------------------------------------------------------------------
# The splits.

_DRAW: Final[dict[str, Callable[[random.Random], Record]]] = {
    "representation": representation_record,
    "sql": sql_record,
    "arithmetic": arithmetic_record,
}
_DRAW_WIDE: Final[dict[str, Callable[[random.Random], Record]]] = {
    "representation": partial(representation_record, wide=True),
    "sql": partial(sql_record, wide=True),
    "arithmetic": arithmetic_record,
}


@dataclass
class _Quota:
    """How many records of one task each split still needs, and the inputs already used."""

    left: dict[str, int]
    seen: set[str] = field(default_factory=set)

    def accepts(self, record: Record) -> bool:
        """Take the record if its split has room and its input is new."""
        if record.split is None or not self.left[record.split] or record.input in self.seen:
            return False
        self.seen.add(record.input)
        self.left[record.split] -= 1
        return True


def generate(seed: int = DEFAULT_SEED) -> dict[str, list[Record]]:
    """Draw all splits.

    Args:
        seed: Seed of the generator.

    Returns:
        The records of each split, shares of the tasks as in ``SHARES``, shuffled.
    """
    splits: dict[str, list[Record]] = {split: [] for split in SPLIT_SIZES}
    for task, share in SHARES.items():
        rng = random.Random(f"{seed} {task}")
        quota = _Quota({split: round(share * size) for split, size in SPLIT_SIZES.items()})
        while any(quota.left.values()):
            record = _DRAW[task](rng)
            if record.split is not None and quota.accepts(record):
                splits[record.split].append(record)
    for split, records in splits.items():
        random.Random(f"{seed} {split}").shuffle(records)
    return splits


def write(splits: dict[str, list[Record]], out: Path) -> None:
    """Write each split to its own JSON Lines file.

    Args:
        splits: The records of each split.
        out: Folder to write to; it is created when missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        lines = "".join(f"{record.to_json()}\n" for record in records)
        (out / f"{split}.jsonl").write_bytes(lines.encode("utf-8"))


# --------------------------------------------------------------------------------------------------
# Text for pretraining: the same world, but no input ever stands next to its answer.

_ONSETS: Final = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w z".split()
_VOWELS: Final = "a e i o u ai ea oo".split()
_CODAS: Final = ("", "", "", "n", "r", "l", "s", "k", "m", "nd", "st", "x")
_QUOTES: Final = (("[", "]"), ("'", "'"), ("(", ")"), ('"', '"'), ("", ""), ("= ", ""))


def _training_record(rng: random.Random, task: str) -> Record:
    """Draw a record of the whole world whose combinations are all in the training split."""
    while True:
        record = _DRAW_WIDE[task](rng)
        if record.split == "train":
            return record


def _made_up_word(rng: random.Random) -> str:
    """Return a capitalised word that no one has used before, so that it can only be copied."""
    syllables = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    ]
    return "".join(syllables).capitalize()


def _made_up_name(rng: random.Random) -> str:
    """Return a made-up name of one or two words."""
    return " ".join(_made_up_word(rng) for _ in range(rng.choice((1, 1, 2))))


def _any_name(rng: random.Random) -> str:
    """Return an entity, a person, a value of a table or a made-up name."""
    kind = rng.random()
    if kind < 0.45:
        return _made_up_name(rng)
    if kind < 0.65:
        return rng.choice(rng.choice(DOMAINS).names)
    if kind < 0.75:
        slot = rng.choice(rng.choice(DOMAINS).slots)
        return rng.choice(list(slot.phrases))
    if kind < 0.85:
        return rng.choice(rng.choice(TABLES).values)
    if kind < 0.95:
        return str(rng.randint(2, 2030))
    return rng.choice(_FIRST_NAMES)


def _inputs_alone(rng: random.Random) -> str:
    """Return a few sentences, questions or problems without their answers."""
    task = rng.choice(TASKS)
    texts = [_training_record(rng, task).input for _ in range(rng.randint(1, 4))]
    return rng.choice(("\n", " ")).join(text.split("Question: ")[-1] for text in texts)


def _outputs_alone(rng: random.Random) -> str:
    """Return a few representations, queries or solutions without their inputs."""
    task = rng.choice(TASKS)
    return "\n".join(_training_record(rng, task).output for _ in range(rng.randint(1, 4)))


def _sums(rng: random.Random) -> str:
    """Return a block of arithmetic facts, some of which carry on from the line before."""
    lines: list[str] = []
    result = rng.randint(2, 99)
    for _ in range(rng.randint(3, 10)):
        operator = rng.choice("+-*+-")
        if operator == "*":
            left, right = rng.randint(2, 10), rng.randint(2, 10)
        else:
            left = result if result < 100 and rng.random() < 0.5 else rng.randint(2, 99)
            right = rng.randint(0, 60) if operator == "+" else rng.randint(0, left)
        result = work_out(left, operator, right)
        lines.append(f"{left} {operator} {right} = {result}")
    return "\n".join(lines)


def _schemas(rng: random.Random) -> str:
    """Return table definitions and then their columns once more, one by one."""
    tables = rng.sample(TABLES, rng.randint(1, 3))
    dumps = [_schema(rng, table) for table in tables]
    lines = [f"Table: {dump}" for dump in dumps]
    for dump in rng.sample(dumps, 1):
        name, columns = dump.rstrip(")").split("(")
        lines.append(f"The table {name} has the columns {columns.replace(', ', ' and ')}.")
    return "\n".join(lines)


def _queries(rng: random.Random) -> str:
    """Return a table definition with queries, or with questions, about that table."""
    table = rng.choice(TABLES)
    lines: list[str] = []
    asks = rng.random() < 0.4
    while len(lines) < rng.randint(1, 4):
        record = sql_record(rng, wide=True)
        if record.combinations[0].left == table.name and record.split == "train":
            lines.append(record.input.split("Question: ")[-1] if asks else record.output)
    return "\n".join([f"Table: {_schema(rng, table)}", *lines])


def _story_of_one(rng: random.Random) -> str:
    """Return facts about one entity with a new name, each said in several ways.

    Either as sentences or as representations, never as both.
    """
    domain = rng.choice(DOMAINS)
    row = rng.randrange(len(domain.names))
    # The name is never that of another entity, which could make up a held-out combination.
    new = _made_up_name(rng)
    slots = rng.sample(domain.slots, 2)
    values = [rng.choice(list(slot.phrases)) for slot in slots]
    pairs = list(zip(slots, values, strict=True))
    if any(cell_split(row, _column(domain, *pair)) != "train" for pair in pairs):
        return _story_of_one(rng)
    if rng.random() < 0.5:
        ordered = sorted(pairs, key=lambda pair: domain.slots.index(pair[0]))
        listed = ", ".join(f"{slot.name}[{value}]" for slot, value in ordered)
        acts = rng.sample(("inform", "recommend", "confirm"), rng.randint(2, 3))
        lines = [f"{act}(name[{new}], {listed})" for act in acts]
        return "\n".join([*lines, *(f"request(name[{new}], {s.name})" for s in slots[:1])])
    frames = rng.sample((*_INFORM_TWO, *_RECOMMEND, *_CONFIRM), rng.randint(2, 4))
    sentences: list[str] = []
    for frame in frames:
        rng.shuffle(pairs)
        said = [rng.choice(slot.phrases[value]).format(v=value) for slot, value in pairs]
        sentences.append(frame.format(n=new, noun=domain.noun, a=said[0], b=said[1]))
    for slot, value in pairs[:1]:
        fact = rng.choice(slot.phrases[value]).format(v=value)
        sentences.append(f"{rng.choice(slot.questions).format(n=new)} {new} {fact}.")
    return " ".join(sentences)


def _copies(rng: random.Random) -> str:
    """Return a list of names that are then repeated between other marks."""
    names = [_any_name(rng) for _ in range(rng.randint(2, 6))]
    keys = [rng.choice(rng.choice(DOMAINS).slots).name for _ in names]
    left, right = rng.choice(_QUOTES)
    first = rng.choice(
        (
            ", ".join(names),
            "\n".join(f"{key}: {name}" for key, name in zip(keys, names, strict=True)),
            " and ".join(names),
            ". ".join(f"This is {name}" for name in names) + ".",
        )
    )
    again = names if rng.random() < 0.6 else rng.sample(names, len(names))
    second = rng.choice((", ", "\n", " ")).join(f"{left}{name}{right}" for name in again)
    return f"{first}\n{second}"


def _echo(rng: random.Random) -> str:
    """Return a sentence or a few names, and the same text once or twice more."""
    if rng.random() < 0.7:
        text = " ".join(_any_name(rng) for _ in range(rng.randint(3, 10)))
    else:
        text = _training_record(rng, rng.choice(TASKS)).input
    return "\n".join([text] * rng.choice((2, 2, 3)))


_MEETINGS: Final = (
    "{0} met {1} near {2}.",
    "{0} is larger than {1} but smaller than {2}.",
    "Yesterday {0} was sold by {1} to {2}.",
    "Did you see {0} and {1} at {2}?",
)


def _mentions(rng: random.Random) -> str:
    """Return a text and a list of the names or the numbers in it."""
    kind = rng.random()
    if kind < 0.3:
        problem = _training_record(rng, "arithmetic").input
        return f"{problem}\nNumbers: {', '.join(re.findall(r'[0-9]+', problem))}"
    left, right = rng.choice(_QUOTES[:4])
    if kind < 0.7:
        record = _training_record(rng, "representation")
        old = record.combinations[0].left
        names = [old if rng.random() < 0.4 else _made_up_name(rng)]
        text = record.input.replace(old, names[0])
    else:
        names = [_made_up_name(rng) for _ in range(3)]
        text = rng.choice(_MEETINGS).format(*names)
    return f"{text}\nNames: {', '.join(f'{left}{name}{right}' for name in names)}"


_KINDS: Final[tuple[tuple[Callable[[random.Random], str], int, int], ...]] = (
    (_inputs_alone, 18, 6),
    (_outputs_alone, 18, 10),
    (_sums, 16, 10),
    (_schemas, 6, 4),
    (_queries, 10, 14),
    (_story_of_one, 16, 24),
    (_copies, 20, 16),
    (_echo, 6, 10),
    (_mentions, 0, 16),
)


def unlabelled_text(seed: int = DEFAULT_SEED, *, copying: bool = False) -> Iterator[str]:
    """Yield short documents from the world of the tasks, without end and without any answer.

    Inputs and outputs are drawn independently of each other, and only from combinations of the
    training split. Names are often made up on the spot, so that the way to predict their second
    occurrence is to copy the first one.

    Args:
        seed: Seed of the generator.
        copying: Whether most documents should repeat what they said before.

    Yields:
        One document at a time.
    """
    rng = random.Random(f"{seed} unlabelled")
    makers = [maker for maker, _, _ in _KINDS]
    weights = [copies if copying else usual for _, usual, copies in _KINDS]
    while True:
        (maker,) = rng.choices(makers, weights)
        yield maker(rng)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the splits.

    Args:
        arguments: Command line, without the name of the program.
    """
    parser = argparse.ArgumentParser(description="Write the tasks for the tiny base model.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    options = parser.parse_args(arguments)
    splits = generate(options.seed)
    write(splits, options.out)
    for split, records in splits.items():
        print(f"{split}: {len(records)} records in {options.out / f'{split}.jsonl'}")


if __name__ == "__main__":
    main()
