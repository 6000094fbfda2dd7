"""What holds for every Dockerfile, however it came to be."""

import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.dockerfile import read_dockerfile
from builder.errors import DockerfileInvalid, StageUnknown
from tests.dockerfiles.corpus import CASES, Case, shown

NAMES = st.sampled_from(["ant", "bird:1", "registry.example.com/cat", "one", "One", "0", "scratch"])
VARIABLES = st.sampled_from(
    [
        *("$X", "${X}", "${X:-ant}", "${Y:+$X}", "${X-$Y}", "${Y:?no}", "${X%.*}", "${", "$1"),
        *("$TARGETARCH", "\\$X", "'$X'", '"$X"', "$é", "`$X"),
    ]
)
WORDS = NAMES | VARIABLES | st.builds("{}{}".format, NAMES, VARIABLES)
SPACES = st.sampled_from(
    [*[" "] * 12, "\t", "  ", " \\\n", " \\\n# comment\n\n  ", "\u00a0", "\x1c", "\r"]
)
SETTINGS = st.builds("{}={}".format, st.sampled_from(["X", "Y", "TARGETARCH", "'X'"]), WORDS)
FIELDS = st.lists(
    st.builds(
        "{}={}".format, st.sampled_from(["from", "type", "id", "target", "FROM", "$X"]), WORDS
    )
    | st.sampled_from(["type=secret", "type=cache", "ro", '"from=ant"']),
    max_size=4,
).map(",".join)
FLAGS = st.one_of(
    st.builds("--from={}".format, WORDS),
    st.builds("--mount={}".format, FIELDS),
    st.builds("--network={}".format, WORDS | st.just("none")),
    st.sampled_from(["--chmod=755", "--link", "--", "--$X", "--security=insecure", '--"x y"']),
)
HEREDOCS = st.sampled_from(
    ["<<E", "<<-E", "<< E", "<<'E'", '<<"E F"', "<<$X", "<<<E", "<<", "3<<E"]
)
ENDS = st.sampled_from(["", "\nE", "\nFROM owl\nE", "\nFROM owl\n\tE", "\nE\r", "\nE F"])


def _line(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Parts with white space between them."""
    spaced = [each for part in parts for each in (SPACES, part)][1:]
    return st.tuples(*spaced).map("".join)


INSTRUCTIONS = st.one_of(
    _line(st.just("FROM"), WORDS),
    _line(st.just("from"), WORDS, st.just("AS"), NAMES),
    _line(st.sampled_from(["ARG", "ENV", "LABEL"]), SETTINGS),
    _line(st.sampled_from(["ARG", "ENV"]), st.just("X"), WORDS),
    _line(st.sampled_from(["COPY", "ADD"]), FLAGS, WORDS, st.just("/x")),
    _line(st.sampled_from(["COPY", "ADD", "RUN"]), HEREDOCS, st.just("/x"), ENDS),
    _line(st.just("ADD"), st.sampled_from(["https://h.example/", "h", "c/"]).map(str), WORDS),
    _line(st.just("RUN"), FLAGS, FLAGS, st.just("make")),
    st.sampled_from(['RUN ["x"]', 'RUN ["x"] <<E', "SHELL []", "# escape=`", "# x", ""]),
)
LINES = INSTRUCTIONS | _line(st.just("ONBUILD"), INSTRUCTIONS)
DIRECTIVES = st.sampled_from(
    ["", "# syntax=x\n", "# escape=`\n", "  # escape=`\n", "#!/x\n", "\ufeff"]
)
FILES = st.builds(
    lambda directive, first, lines, end: f"{directive}FROM {first}{end}{end.join(lines)}",
    DIRECTIVES,
    NAMES,
    st.lists(LINES, max_size=8),
    st.sampled_from(["\n", "\n", "\r\n"]),
).map(lambda text: text.encode("utf-8"))


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A file of the corpus with a few of its pieces, or pieces of others, in other places."""
    small = [case.dockerfile for case in CASES if len(case.dockerfile) < 2000]
    data = draw(st.sampled_from(small))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        other = draw(st.sampled_from([*small, data]))
        at = draw(st.integers(0, len(other)))
        piece = draw(st.binary(max_size=3) | st.just(other[at : at + 30]))
        data = data[:start] + piece + data[end:]
    return data


def _outcome(data: bytes) -> object:
    try:
        facts = read_dockerfile(data, build_args={"X": "owl"}, target=None)
    except (DockerfileInvalid, StageUnknown) as error:
        return error.message
    assert facts.stages
    assert all(unknown.facts and unknown.sentence.isprintable() for unknown in facts.unknown)
    return facts


@given(FILES | mutations() | st.binary(max_size=200))
def test_every_file_has_facts_or_a_printable_error_and_always_the_same(data: bytes) -> None:
    outcome = _outcome(data)
    assert _outcome(data) == outcome
    assert not isinstance(outcome, str) or outcome.isprintable()


@given(FILES, st.sampled_from(["ARG Z", "LABEL a=b", "# a comment", "USER nobody"]))
def test_an_instruction_without_a_wish_changes_no_other_fact(data: bytes, more: str) -> None:
    try:
        before = shown(read_dockerfile(b"FROM ant\n" + data, build_args={}, target=None))
        after = f"FROM ant\n{more}\n".encode() + data
        with_more = shown(read_dockerfile(after, build_args={}, target=None))
    except DockerfileInvalid:
        return
    for facts in (before, with_more):
        facts.pop("build_args", None)
    assert with_more == before


def _steps(work: Callable[[], object]) -> int:
    """Calls of functions, those in C too: the same on every machine, however busy."""
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1

    before = sys.getprofile()
    sys.setprofile(step)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@given(LINES | WORDS | st.binary(min_size=1, max_size=20).map(lambda b: b.decode("latin-1")))
def test_twice_the_text_takes_at_most_twice_the_steps(piece: str) -> None:
    few, many = (f"FROM ant AS one\n{piece * times}".encode() for times in (50, 100))
    assert _steps(lambda: _outcome(many)) <= 2.2 * _steps(lambda: _outcome(few)) + 2000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twice_a_file_of_the_corpus_takes_at_most_twice_the_steps(case: Case) -> None:
    data = case.dockerfile[:4000] + b"\n"
    few, many = data * 8, data * 16
    assert _steps(lambda: _outcome(many)) <= 2.2 * _steps(lambda: _outcome(few)) + 2000
