"""Queries that mean the same match, queries that differ do not, and none can do harm."""

import itertools
import sqlite3
import time

import pytest

from lit_adapters.data import read_splits
from lit_adapters.metrics import Answer, SQLMatch, score
from lit_adapters.metrics.sandbox import fill, run, same_results, schema_of
from lit_adapters.metrics.sql import tokens

PROMPT = "Table: t(name, status, age, subject)\nQuestion: ..."
SCHEMA = {"t": ["name", "status", "age", "subject"]}


def execution(query, reference, prompt=PROMPT):
    return score(Answer(prompt, query, reference), [SQLMatch()])["sql_execution"]


@pytest.mark.parametrize(
    ("prompt", "schema"),
    [
        (PROMPT, SCHEMA),
        ("x\nTable: a(b)\nTable: c(d,e )\n", {"a": ["b"], "c": ["d", "e"]}),
        (
            "CREATE TABLE head (age INTEGER, born_state VARCHAR(20), PRIMARY KEY (age))",
            {"head": ["age", "born_state"]},
        ),
        ('create table "t" ("a" int, `b` text)', {"t": ["a", "b"]}),
        ("Table: a(b, B)", {}),
        ("Table: a(b; DROP TABLE x)", {}),
        ("no table", {}),
    ],
)
def test_schemas_are_read_from_prompts(prompt, schema):
    assert schema_of(prompt) == schema


@pytest.mark.parametrize(
    ("query", "reference"),
    [
        ("select count(*) from t where age>18;", "SELECT COUNT(*) FROM t WHERE age > 18"),
        ("SELECT name  FROM t WHERE status != 'x'", "SELECT name FROM t WHERE status <> 'x'"),
    ],
)  # fmt: skip
def test_writing_does_not_matter(query, reference):
    assert tokens(query) == tokens(reference)


@pytest.mark.parametrize(
    ("query", "reference"),
    [
        ("SELECT name FROM s WHERE a = 'Blue'", "SELECT name FROM s WHERE a = 'blue'"),
        ('SELECT name FROM s WHERE a = "Blue"', 'SELECT name FROM s WHERE a = "blue"'),
        ("SELECT a FROM s WHERE b = 'x  y'", "SELECT a FROM s WHERE b = 'x y'"),
        ("SELECT a FROM s WHERE b = 1.5", "SELECT a FROM s WHERE b = 15"),
        ("SELECT ab FROM s", "SELECT a b FROM s"),
    ],
)
def test_what_is_more_than_writing_does(query, reference):
    assert tokens(query) != tokens(reference)


@pytest.mark.parametrize(
    ("query", "reference"),
    [
        ("SELECT COUNT(name) FROM t WHERE age > 18", "SELECT COUNT(*) FROM t WHERE age > 18"),
        ("SELECT name FROM t WHERE NOT age <= 18", "SELECT name FROM t WHERE age > 18"),
        ("SELECT s.name FROM t AS s WHERE 18 < s.age", "SELECT name FROM t WHERE age > 18"),
        (
            "SELECT name FROM t WHERE status = 'new' AND subject = 'art'",
            "SELECT name FROM t WHERE subject = 'art' AND status = 'new'",
        ),
        (
            "SELECT SUM(age) * 1.0 / COUNT(*) FROM t WHERE status = 'new'",
            "SELECT AVG(age) FROM t WHERE status = 'new'",
        ),
        ('SELECT name FROM t WHERE status = "new"', "SELECT name FROM t WHERE status = 'new'"),
        (
            "WITH u AS (SELECT * FROM t) SELECT name FROM u WHERE age > 18",
            "SELECT name FROM t WHERE age > 18",
        ),
        (
            "SELECT subject, COUNT(*) FROM t GROUP BY 1 ORDER BY 2",
            "SELECT subject, COUNT(*) FROM t GROUP BY subject",
        ),
    ],
)  # fmt: skip
def test_queries_that_mean_the_same_give_the_same(query, reference):
    assert execution(query, reference) == 1
    assert score(Answer(PROMPT, query, reference), [SQLMatch()])["sql_exact"] == 0


@pytest.mark.parametrize(
    ("query", "reference"),
    [
        ("SELECT COUNT(*) FROM t WHERE age >= 18", "SELECT COUNT(*) FROM t WHERE age > 18"),
        ("SELECT COUNT(*) FROM t WHERE age > 19", "SELECT COUNT(*) FROM t WHERE age > 18"),
        ("SELECT COUNT(*) FROM t WHERE age = 18", "SELECT COUNT(*) FROM t WHERE age > 18"),
        ("SELECT name FROM t WHERE status = 'New'", "SELECT name FROM t WHERE status = 'new'"),
        ("SELECT name FROM t WHERE subject = 'new'", "SELECT name FROM t WHERE status = 'new'"),
        ("SELECT MAX(age) FROM t", "SELECT MIN(age) FROM t"),
        ("SELECT AVG(age) FROM t", "SELECT SUM(age) FROM t"),
        ("SELECT name FROM t ORDER BY age LIMIT 3", "SELECT name FROM t ORDER BY age DESC LIMIT 3"),
        ("SELECT age FROM t ORDER BY age LIMIT 4", "SELECT age FROM t ORDER BY age LIMIT 3"),
        ("SELECT name FROM t", "SELECT DISTINCT name FROM t WHERE status = 'a'"),
        (
            "SELECT name FROM t WHERE status = 'new' OR subject = 'art'",
            "SELECT name FROM t WHERE status = 'new' AND subject = 'art'",
        ),
        ("SELECT name FROM t ORDER BY age", "SELECT name FROM t ORDER BY age DESC"),
        ("SELECT name FROM u", "SELECT name FROM t"),
        ("", "SELECT name FROM t"),
    ],
)  # fmt: skip
def test_queries_that_differ_give_something_else(query, reference):
    assert execution(query, reference) == 0


def test_every_query_of_the_embedded_data_differs_from_the_others_on_its_table():
    records = [r for r in read_splits("tiny")["test"] if r["task"] == "sql"]
    by_schema = {}
    for record in records:
        schema = schema_of(record["input"])
        assert same_results(schema, record["output"] + " ", record["output"]) is True
        key = tuple((t, tuple(sorted(c))) for t, c in schema.items())
        by_schema.setdefault(key, (schema, set()))[1].add(record["output"])
    compared = 0
    for schema, queries in by_schema.values():
        for one, other in itertools.permutations(sorted(queries), 2):
            assert same_results(schema, one, other) is False, (one, other)
            compared += 1
    assert compared > 30


def test_a_reference_that_does_not_run_counts_by_its_words():
    for reference in (
        "SELECT x FROM elsewhere",
        "SELECT FROM",
        "SELECT name FROM t LIMIT 0",
    ):
        assert same_results(SCHEMA, "SELECT 1", reference) is None
        found = score(Answer(PROMPT, reference.lower(), reference), [SQLMatch()])
        assert found == {"sql_exact": 1, "sql_execution": 1}
        assert execution("SELECT 1", reference) == 0


def doubled(times):
    """A text of 8 characters, doubled again and again."""
    return "SELECT x || x AS x FROM (" * times + "SELECT 'aaaaaaaa' AS x" + ")" * times


HARMFUL = [
    "ATTACH 'FILE' AS other",
    "ATTACH 'FILE' AS other; CREATE TABLE other.x (y)",
    "VACUUM INTO 'FILE'",
    "CREATE TABLE x (y)",
    "INSERT INTO t VALUES (1, 2, 3, 4)",
    "DELETE FROM t",
    "DROP TABLE t",
    "SELECT 1; DROP TABLE t",
    "PRAGMA table_info(t)",
    "PRAGMA writable_schema = 1",
    "SELECT * FROM pragma_database_list",
    "SELECT load_extension('FILE')",
    "SELECT readfile('/etc/hostname')",
    "SELECT writefile('FILE', 'x')",
    "SELECT * FROM sqlite_master",
    "SELECT randomblob(1000000000)",
    "SELECT zeroblob(1000000000)",
    "SELECT printf('%.*c', 1000000000, 'x')",
    "SELECT replace('aaaa', 'a', 'aaaaaaaaaaaa')",
    "WITH RECURSIVE u(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM u) SELECT * FROM u",
    "WITH RECURSIVE u(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM u) SELECT COUNT(*) FROM u",
    "SELECT COUNT(*) FROM t a, t b, t c, t d, t e",
    "SELECT * FROM t a, t b",
    "SELECT a.name FROM t a, t b, t c ORDER BY b.age, c.age LIMIT 1",
    f"SELECT LENGTH(x) FROM ({doubled(40)})",
    f"SELECT LENGTH(x) FROM ({doubled(12)})",  # 33 kB: beyond what a text may have here
    "SELECT '" + "a" * 3000 + "' LIKE '" + "%a" * 300 + "%b'",
    "SELECT " + "(" * 3000 + "1",
    "SELECT " + "1+" * 1900 + "1 FROM",
    "SELECT '" + "a" * 5000 + "'",
    "BEGIN",
    "SELECT 1\0",
    "SELECT '\ud800'",
    "SELECT CAST(x'ff' AS TEXT)",
]


@pytest.mark.parametrize("query", HARMFUL, ids=lambda query: query[:40].encode("unicode_escape"))
def test_harmful_queries_come_to_nothing_soon(query, tmp_path):
    file = tmp_path / "file"
    query = query.replace("FILE", str(file))
    reference = "SELECT name FROM t WHERE age > 18"
    start = time.perf_counter()
    assert run(fill(SCHEMA, (query, reference), 0), SCHEMA, query) is None
    assert execution(query, reference) == 0
    assert time.perf_counter() - start < 20  # measured: below 1 s
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_works_outside_of_the_sandbox(tmp_path):
    """Or the refusals above would prove nothing."""
    connection = sqlite3.connect(":memory:")
    connection.execute(f"ATTACH '{tmp_path / 'file'}' AS other")
    connection.execute("CREATE TABLE other.x (y)")
    connection.execute("PRAGMA table_info(x)")
    assert connection.execute("SELECT length(zeroblob(10))").fetchall() == [(10,)]
    connection.close()
    assert (tmp_path / "file").exists()


def test_a_harmful_schema_comes_to_nothing(tmp_path):
    columns = ", ".join(f"c{i}" for i in range(5000))
    for table in (f"t({columns})", "sqlite_master(a)", "sqlite_x(a)"):
        assert execution("SELECT 2", "SELECT 1", f"Table: {table}") == 0


def test_rows_depend_on_nothing_but_schema_queries_and_seed():
    queries = ("SELECT name FROM t WHERE status = 'new'", "SELECT 18")
    one, same, other = (
        fill(SCHEMA, q, s) for q, s in ((queries, 0), (queries[::-1], 0), (queries, 1))
    )
    assert one == same != other
    statuses = [row[1] for row in one["t"]]
    assert 20 < statuses.count("new") + statuses.count("news") < 100
    ages = [row[2] for row in one["t"]]
    assert {17, 18, 19} < set(ages)
