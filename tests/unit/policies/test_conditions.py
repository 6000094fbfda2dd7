"""A condition that was accepted cannot fail, and says unknown where a fact is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.conditions import (
    MOST_CHARACTERS,
    Condition,
    ConditionFailed,
    ConditionInvalid,
    View,
    compile_condition,
)
from policies.vocabulary import FACTS, TRUST, Kind, Value

SAMPLES: dict[Kind, Value] = {
    Kind.BOOL: True, Kind.INT: 7, Kind.STRING: "a.b/c", Kind.LIST: ("a", "a.b/c:1"),
}  # fmt: skip
KNOWN: dict[str, Value] = {name: SAMPLES[fact.kind] for name, fact in FACTS.items()}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("source.fork", True),
        ("!source.fork || context.bytes == 7", True),
        ("tenant == 'a.b/c' && tenant != \"x\"", True),
        ("tenant.glob('a.b/*')", True),
        ("tenant.glob('a.b')", False),
        ("tenant.glob('b/c')", False),
        ("['x', 'a.b/*'].exists(p, tenant.glob(p))", True),
        ("tenant in ['x', 'a.b/c']", True),
        ("context.bytes in [1, 2]", False),
        ("context.bytes > 5 && context.bytes <= 7", True),
        ("'a' in dockerfile.images", True),
        ("dockerfile.images.all(i, i.glob('a**'))", True),
        ("dockerfile.images.exists(i, i == 'b')", False),
        ("size(dockerfile.images) == 2", True),
        ("dockerfile.images == []", False),
        ("(source.fork ? 'x' : 'y') == 'x'", True),
        ("time.date < '2030-01-01'", False),
        ("source.fork &&\n  !source.signed", False),
        ("true", True),
    ],
)
def test_what_the_language_has(text: str, holds: bool) -> None:
    assert compile_condition(text).holds(View(KNOWN)) is holds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Syntax error"),
        ("source.frok", "undeclared reference to 'source.frok'"),
        ("source", "undeclared"),
        ("tenant", "not true or false"),
        ("tenant == 5", "no matching overload"),
        ("tenant == null", "no matching overload"),
        ("context.bytes == 1.0", "no matching overload"),
        ("dockerfile.images.all(i, i == 5)", "no matching overload"),
        ("tenant == 'a", "not part of the language"),
        *((text, "undeclared") for text in (
            "tenant.matches('a')", "tenant.startsWith('a')", "tenant.endsWith('a')",
            "tenant.contains('a')", "dockerfile.images[0] == 'a'",
            "int(tenant) == 1", "dyn(tenant) == 1", "has(source.fork)", "type(tenant) == string",
            "timestamp(tenant) == timestamp(tenant)", "dockerfile.images.map(i, i) == []",
            "dockerfile.images.filter(i, i == 'a') == []", "string(context.bytes) == '1'",
        )),
        *((text, "not part of the language") for text in (
            "context.bytes + 1 == 2", "-context.bytes == 1", "context.bytes / 1 == 1",
            "context.bytes % 2 == 0",
            "{'a': 1} == {'a': 1}", "{'a': 1, 'a': 2} == {}", "[tenant, 'a'] == []",
            "['a', 1] == []", "[[1]] == []", "b'a' == b'a'", "r'a' == 'a'", "'''a''' == 'a'",
            "'a\\'' == 'a'", "`tenant` == 'a'", "tenant == 'a' // b", "tenant == 'a'\0",
            "tenant == 'a'\n#", "5 == 5;", "a\u00e9 == 'a'", "[1.0] == []", "[true, 1] == []",
        )),
        *((text, "a pattern is written out") for text in (
            "tenant.glob(source.url)", "source.url.glob( tenant )", "tenant.glob(trust)",
            "tenant . glob (source . ref)",
        )),
        ("(" * 33 + "true" + ")" * 33, "too deep"),
        ("!" * 40 + "true", "too deep"),
        ("true" + " " * MOST_CHARACTERS, "longer"),
    ],
)  # fmt: skip
def test_what_the_language_does_not_have(text: str, says: str) -> None:
    with pytest.raises(ConditionInvalid, match=says):
        compile_condition(text)


def test_a_mistake_has_a_line_and_a_column() -> None:
    for text, where in (
        ("source.fork &&\n  source.frok", (2, 9)),
        ("source.fork &&\n tenant[0]", (2, 8)),
        ("tenant", (1, 1)),
    ):
        with pytest.raises(ConditionInvalid) as caught:
            compile_condition(text)
        assert (caught.value.line, caught.value.column) == where


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("source.fork", None),
        ("!source.fork", None),
        ("source.fork && context.bytes == 7", None),
        ("source.fork && context.bytes == 8", False),
        ("context.bytes == 8 && source.fork", False),
        ("source.fork || context.bytes == 7", True),
        ("source.fork || context.bytes == 8", None),
        ("base.onbuild.exists(i, i == 'x')", None),
        ("size(base.onbuild) > 0", None),
        ("dockerfile.images.exists(i, i in base.onbuild)", None),
        ("dockerfile.images.exists(i, i == 'a' || i in base.onbuild)", True),
        ("dockerfile.images.all(i, i == 'x' && i in base.onbuild)", False),
        ("source.ref.glob('**')", None),
        ("(source.fork ? 1 : 1) == 1", None),
        (f"{TRUST} == 'trusted'", None),
    ],
)
def test_an_unknown_fact_makes_unknown_what_depends_on_it(text: str, holds: bool | None) -> None:
    unknown = ("source.fork", "source.ref", "base.onbuild")
    known = {name: value for name, value in KNOWN.items() if name not in unknown}
    assert compile_condition(text).holds(View(known)) is holds


def test_an_evaluation_that_goes_wrong_is_no_answer() -> None:
    endless = "dockerfile.images.all(i, dockerfile.images.all(j, i == j || i != j))"
    many = View({"dockerfile.images": tuple(map(str, range(200)))})
    with pytest.raises(ConditionFailed, match="budget"):
        compile_condition(endless).holds(many)


def test_an_answer_that_is_no_answer_is_an_error() -> None:
    class Program:
        def eval(self, _: object) -> "Program":
            return self

        def value(self) -> str:
            return "divide by zero"

    with pytest.raises(ConditionFailed, match="divide"):
        Condition("x", Program()).holds(View({}))


def test_names_that_are_no_text_are_compared_all_the_same() -> None:
    view = View({"dockerfile.images": ("\udcff",), "tenant": "\udcff\0"})
    assert compile_condition("tenant == 'a' || 'x' in dockerfile.images").holds(view) is False


@pytest.mark.parametrize(
    ("text", "is_open"),
    [("size(base.onbuild) > 0", True), ("base . onbuild == []", True), ("source.fork", False),
     ("dockerfile.onbuild", False)],
)  # fmt: skip
def test_a_condition_knows_whether_it_has_to_wait_for_the_base_images(
    text: str, is_open: bool
) -> None:
    assert compile_condition(text).is_open is is_open


WORDS = [
    *FACTS, TRUST, "i", "true", "false", "1", "'a'", '"b"', "''", "[]", "['a']", "[1, 2]", "(", ")",
    "!", "&&", "||", "==", "!=", "<", "in", "?", ":", ",", ".all(i, ", ".exists(i, ", ".glob('a*')",
    "size(", "[", "]", "{", "}", "'", "\\", "/", "+", ".", " ", "\n", "\0", "1.5", "null", "1u",
]  # fmt: skip


@given(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), st.sets(st.sampled_from([*FACTS]))
)
def test_whatever_is_accepted_gives_an_answer(text: str, unknown: set[str]) -> None:
    try:
        condition = compile_condition(text)
    except ConditionInvalid:
        return
    known = {name: value for name, value in KNOWN.items() if name not in unknown}
    assert condition.holds(View(known)) in {True, False, None}
