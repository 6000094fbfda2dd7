import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.dockerfile import read_dockerfile
from builder.errors import DockerfileInvalid, StageUnknown
from policies.errors import RunnerError
from policies.facts import DockerfileFacts


def read(text: str, target: str | None = None, **build_args: str) -> DockerfileFacts:
    data = text.encode("utf-8", "surrogateescape")
    return read_dockerfile(data, build_args=build_args, target=target)


def images(facts: DockerfileFacts) -> list[str]:
    return [str(image).removeprefix("docker.io/library/") for image in facts.images]


@pytest.mark.parametrize(
    ("text", "frontend"),
    [
        ("FROM a", None),
        ("# syntax=docker/dockerfile:1\nFROM a", "docker/dockerfile:1"),
        ("#SYNTAX = evil/x  arg \r\nFROM a", "evil/x"),
        ("\ufeff# check=skip=all\n# syntax=evil/x\nFROM a", "evil/x"),
        ("#!/bin/x\n# syntax=evil/x\nFROM a", "evil/x"),
        ("# a comment\n# syntax=evil/x\nFROM a", None),
        ("\n# syntax=evil/x\nFROM a", None),
        ("# syntax=\nFROM a", None),
        ("FROM a\n# syntax=evil/x", None),
    ],
)
def test_the_frontend_is_what_stands_at_the_very_top(text: str, frontend: str | None) -> None:
    assert read(text).frontend == frontend


def test_a_build_argument_names_the_frontend_too() -> None:
    assert read("# syntax=a\nFROM a", BUILDKIT_SYNTAX="evil/x").frontend == "evil/x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FROM debian:12", ["debian:12"]),
        ("from debian", ["debian"]),
        ("FROM scratch", []),
        ("FROM --platform=$BUILDPLATFORM debian AS Build\nFROM Build", ["debian"]),
        ('FROM "debian:12"', ["debian:12"]),
        ("FROM 'a' AS b\nFROM b as c\nFROM c", ["a"]),
        ("ARG T=12\nFROM debian:$T", ["debian:12"]),
        ("ARG T=12\nFROM debian:${T}", ["debian:12"]),
        ("ARG A=1 B=$A.2\nFROM a:$B", ["a:1.2"]),
        ("FROM a:${T:-12}", ["a:12"]),
        ("FROM a:${T-12}", ["a:12"]),
        ("ARG T=\nFROM a:${T:-12}", ["a:12"]),
        ("ARG T=\nFROM a${T-:12}", ["a"]),
        ("ARG T=1\nFROM a${T:+:x$T}", ["a:x1"]),
        ("FROM a${T+:x}", ["a"]),
        ("ARG T=1\nFROM a:${T:-${U}}", ["a:1"]),
        ("ARG T=1\nFROM a:${T:?needed}", ["a:1"]),
        ("FROM a:${T:-${U:-3}}", ["a:3"]),
        ("FROM a-$TARGETARCH", ["a-amd64"]),
        ("FROM a\\\n  :12", None),
        ("FROM \\\n# comment\n\n  debian", ["debian"]),
        ("# escape=`\nFROM `\ndebian", ["debian"]),
        ("FROM a\nCOPY --from=busybox /x /y", ["a", "busybox"]),
        ("FROM a AS b\nFROM c\nCOPY --from=b / /\nCOPY --from=0 / /", ["a", "c"]),
        ("FROM a\nCOPY --from=0 / /", ["a", "0"]),
        ("FROM php AS php\nCOPY --from=php / /", ["php"]),
        ("ARG V=1\nFROM a\nARG V\nCOPY --from=b:$V / /", ["a", "b:1"]),
        ("FROM a\nRUN --mount=from=b,target=/x true", ["a", "b"]),
        ("FROM a AS b\nFROM c\nRUN --mount=type=bind,from=b true", ["a", "c"]),
        ("FROM a\nONBUILD COPY --from=b / /", ["a", "b"]),
        ("FROM a\nCOPY --from='b' / /", ["a", "b"]),
        ("FROM a\nCOPY --from=scratch / /", ["a"]),
        ("FROM a\nRUN cat <<EOF\nFROM b\nEOF\nCOPY --from=c / /", ["a", "c"]),
        ("FROM a\nRUN <<-'E' cat <<\"F\"\nFROM b\n\tE\nFROM c\nF\nFROM d", ["a", "d"]),
        ("FROM a\nRUN cat <<- \nFROM d", ["a", "d"]),
        ("FROM a\nRUN cat <<''\nFROM d\n\n", ["a", "d"]),
        ("FROM a\nRUN cat <<\\E\nFROM b\nE\nFROM d", ["a", "d"]),
        ("FROM a\nRUN echo $((1 << 2))\nFROM d", ["a", "d"]),
        ("FROM a\nRUN cat <<<x\nFROM d", ["a", "d"]),
        ("FROM a\nRUN it's <<EOF\nFROM d", ["a", "d"]),
        ('FROM a\nRUN ["cat", "<<EOF"]\nFROM d', ["a", "d"]),
        ("FROM a\nRUN [ 1 -eq 1 ] <<E\nE\nFROM d", ["a", "d"]),
        ("FROM a\nRUN [1] <<E\nE\nFROM d", ["a", "d"]),
        ("FROM a\nRUN [1]\nFROM d", ["a", "d"]),
        ("FROM a\nONBUILD RUN <<E\nFROM b\nE\nFROM d", ["a", "d"]),
        ("FROM a\n  # comment\n\nLABEL x=<<EOF\nFROM d", ["a", "d"]),
    ],
)
def test_the_images_are_those_that_a_build_would_pull(
    text: str, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(DockerfileInvalid):
            read(text)
    else:
        facts = read(text)
        assert images(facts) == expected
        assert facts.unknown == ()


def test_build_arguments_override_defaults() -> None:
    assert images(read("ARG T=12\nFROM debian:$T-$TARGETOS", T="13")) == ["debian:13-linux"]


def test_a_variant_is_part_of_the_platform() -> None:
    facts = read_dockerfile(
        b"FROM a-$TARGETARCH-$TARGETVARIANT",
        build_args={},
        target=None,
        platform="linux/arm64/v8",
    )
    assert images(facts) == ["a-arm64-v8"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("FROM a:$T", "Line 1: the base image 'a:$T' cannot be determined (T)."),
        ("ARG T\nFROM x${T}", "Line 2: the base image 'x${T}' cannot be determined (T)."),
        ("FROM a:${T:?no}", "(T)"),
        ("FROM a:${T:+${U}}${T:-$U}", "(U)"),
        ("FROM ${T%x}", "(the substitution of T)"),
        ("FROM ${}", "(a bad substitution)"),
        ("FROM ${T:-a", "(an open quote or brace)"),
        ("FROM 'a", "(an open quote or brace)"),
        ('FROM "a', "(an open quote or brace)"),
        ("FROM " + "${A:-" * 20 + "}" * 20, "(too many nested substitutions)"),
        ("ARG A=" + "x" * 3000 + "\nFROM $A$A", "(longer than 4096 characters)"),
        ("FROM a\nCOPY --from=$X / /", "Line 2: what is copied from '$X' cannot"),
        ("FROM a\nARG X=$Y\nCOPY --from=$X / /", "Line 3: what is copied"),
        ("FROM a\nENV X=$Y\nADD $X /", "Line 3: the source of ADD"),
        ("FROM a\nADD $URL /x", "Line 2: the source of ADD '$URL' cannot"),
        ("FROM a\nADD https://x/$V /x", "Line 2: the source of ADD 'https://x/$V' cannot"),
        ("FROM a\nCOPY --new=1 a b", "Line 2: the flag '--new' is not known."),
        ("FROM a\nRUN --device=x true", "Line 2: the flag '--device' is not known."),
        ("FROM a\nRUN --mount=type=secret true", "Line 2: the secret that is mounted has no id."),
        ("FROM a\nRUN --mount=type=secret,id=$S true", "Line 2: the id of a secret '$S' cannot"),
        ("FROM a\nRUN --mount=type=$K true", "Line 2: the kind of mount '$K' cannot"),
        ("FROM a\nRUN echo \\\\\nRUN x", "Line 2 ends in two escape characters"),
    ],
)
def test_what_cannot_be_determined_is_said_with_its_line(text: str, sentence: str) -> None:
    (unknown,) = read(text).unknown
    assert sentence in unknown.sentence


EVERYTHING_BELOW = {
    *("images", "remote_adds", "mounts", "networks", "securities", "secrets"),
    *("build_args", "docker_only"),
}


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("FROM a:$T", EVERYTHING_BELOW),
        ("FROM a\nCOPY --from=$X / /", {"images"}),
        ("FROM a\nCOPY --new=1 a b", {"images", "remote_adds"}),
        ("FROM a\nADD $URL /x", {"remote_adds"}),
        ("FROM a\nRUN --device=x true", {"images", "mounts", "networks", "securities", "secrets"}),
        ("FROM a\nRUN --network=$N true", {"networks"}),
        ("FROM a\nRUN --security=$S true", {"securities"}),
        ("FROM a\nRUN --mount=type=$K true", {"mounts", "secrets"}),
        ("FROM a\nRUN --mount=type=secret,id=$S true", {"secrets"}),
        ("FROM a\nRUN --mount=type=secret true", {"secrets"}),
        ("FROM a\nRUN --mount=type=cache,$X true", {"images", "mounts", "secrets"}),
        ("FROM a\nRUN --mount=from=$X true", {"images"}),
        ("FROM a AS b\nONBUILD ENV X=1\nENV X=2\nFROM b\nADD $X /", {"remote_adds"}),
        ("FROM a\nRUN echo \\\\\nRUN x", EVERYTHING_BELOW),
    ],
)
def test_what_cannot_be_determined_says_which_facts_are_incomplete(
    text: str, facts: set[str]
) -> None:
    (unknown,) = read(text).unknown
    assert unknown.facts == facts


def test_a_base_that_could_be_any_stage_makes_variables_unknown() -> None:
    base, source = read("FROM a\nENV V=1\nFROM b:$T\nADD $V /").unknown
    assert base.facts == EVERYTHING_BELOW
    assert source.facts == {"remote_adds"}


def test_the_sentences_are_bounded_and_the_facts_they_spoil_are_not() -> None:
    text = "FROM a\n" + "ADD $X /\n" * 249 + "RUN --network=$N true"
    unknown = read(text).unknown
    assert len(unknown) == 201
    assert unknown[-1].sentence == "50 more things could not be determined."
    assert unknown[-1].facts == {"remote_adds", "networks"}


def test_the_stages_keep_name_base_and_line() -> None:
    first, second, third = read("ARG T\nFROM a AS X\n\nFROM x\nFROM b:$T").stages
    assert (first.name, first.base, first.line) == ("x", "a", 2)
    assert (second.name, second.base, second.image, second.line) == (None, "x", None, 4)
    assert (third.base, third.image) == ("b:$T", None)


@pytest.mark.parametrize(
    ("line", "remote"),
    [
        ("ADD https://x.org/a /a", ("https://x.org/a",)),
        ("ADD HTTP://x.org/a b /a", ("HTTP://x.org/a",)),
        ('ADD ["https://x.org/a b", "/a"]', ("https://x.org/a b",)),
        ("ADD --checksum=sha256:0 --link https://x.org/a /a", ("https://x.org/a",)),
        ("ADD -- https://x.org/a /a", ("https://x.org/a",)),
        ("ADD git@github.com:a/b.git /a", ("git@github.com:a/b.git",)),
        ("ADD ssh://git@x.org/a/b /a", ("ssh://x.org/a/b",)),
        ("ADD https://user:token@x.org/a /a", ("https://x.org/a",)),
        ("ADD github.com/a/b /a", ("github.com/a/b",)),
        ("ADD x.org/a/b.git#main:sub /a", ("x.org/a/b.git#main:sub",)),
        ("ONBUILD ADD https://x.org/a /a", ("https://x.org/a",)),
        ("ENV V=1 W=$V\nADD https://x.org/$V /a", ("https://x.org/1",)),
        ('ENV V 1 2\nADD "https://x.org/$V" /a', ("https://x.org/1 2",)),
        ("ENV V=1\nARG V=2\nADD https://x.org/$V /a", ("https://x.org/1",)),
        ("ARG V=2\nADD https://x.org/\\$V'$V'\"\\a$V\"$ /a", ("https://x.org/$V$V\\a2$",)),
        ("ADD $DIR/b /a", None),
        ("ADD h$X /a", None),
        ("ADD ./a.tar c/${V}.txt ./$V /a", ()),
        ("ADD <<EOF /a\nhttps://x.org/a\nEOF", ()),
        ("COPY https.txt /a", ()),
    ],
)
def test_remote_sources_of_add_are_listed(line: str, remote: tuple[str, ...] | None) -> None:
    facts = read(f"FROM a\n{line}")
    if remote is None:
        assert len(facts.unknown) == 1
    else:
        assert facts.remote_adds == remote
        assert facts.unknown == ()


def test_a_stage_inherits_env_but_not_arg() -> None:
    facts = read("FROM a AS b\nENV V=1\nARG W=2\nFROM b\nADD http://x/$V /\nADD http://x/$W /")
    assert facts.remote_adds == ("http://x/1", "http://x/$W")


def test_what_run_asks_for_is_listed() -> None:
    facts = read(
        "FROM a\n"
        "RUN --mount=type=secret,id=one --mount=type=secret,target=/run/two \\\n"
        "    --mount=type=secret,dst=/three,required --mount=type=cache,target=/c \\\n"
        "    --mount=type=ssh --mount=type=tmpfs,target=/t --mount='target=/x,from=b' \\\n"
        "    --network=host --security=insecure make\n"
        "ARG K=secret\n"
        "RUN --mount=type=$K,id=four true\n"
        "ONBUILD RUN --network=none true\n"
        "ONBUILD ARG LATER=$X\n"
    )
    assert facts.secrets == {"one", "two", "three", "four"}
    assert facts.mounts == {"bind", "cache", "secret", "ssh", "tmpfs"}
    assert facts.networks == {"host", "none"}
    assert facts.securities == {"insecure"}
    assert facts.build_args == {"K", "LATER"}
    assert images(facts) == ["a", "b"]


def test_the_names_of_arguments_are_collected() -> None:
    facts = read("ARG A\nARG B=1 C='x y'\nFROM a\nARG D=2 A", D="3", A="4")
    assert facts.build_args == {"A", "B", "C", "D"}


@pytest.mark.parametrize("target", ["build", "BUILD", "0", "1"])
def test_a_target_is_a_name_in_any_case_or_an_index(target: str) -> None:
    assert len(read("FROM a AS Build\nFROM b", target).stages) == 2


@pytest.mark.parametrize("target", ["buil", "2", "-1", "", "\x1b[2J" * 99])
def test_a_target_that_names_no_stage_is_refused(target: str) -> None:
    with pytest.raises(StageUnknown) as caught:
        read("FROM a AS build\nFROM b", target)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "has no FROM"),
        ("# only a comment", "has no FROM"),
        ("ARG X", "has no FROM"),
        ("# syntax=a", "has no FROM"),
        ("\\", "has no FROM"),
        ("RUN x\nFROM a", "line 1: RUN before the first FROM"),
        ("FROM a\nFRUN x", "line 2: unknown instruction 'FRUN'"),
        ("//syntax=evil/x\nFROM a", "line 1: unknown instruction"),
        ("FROM", "line 1: FROM takes"),
        ("FROM a b", "line 1: FROM takes"),
        ("FROM a AS", "line 1: FROM takes"),
        ("FROM a AS b c", "line 1: FROM takes"),
        ("FROM a OR b", "line 1: FROM takes"),
        ("FROM a AS 1x", "line 1: '1x' cannot name a stage"),
        ("FROM --from=x a", "line 1: FROM has no flag '--from=x'"),
        ("FROM Debian", "line 1: not an image: 'Debian'"),
        ("FROM a\nCOPY --from=B@d / /", "line 2: not an image"),
        ("FROM a\nCOPY --from / /", "line 2: from needs"),
        ("FROM a\nCOPY --from= / /", "line 2: from needs"),
        ("FROM a\nCOPY x", "line 2: COPY needs a source"),
        ("FROM a\nADD", "line 2: ADD needs a source"),
        ("FROM a\nARG", "line 2: ARG needs"),
        ("FROM a\nARG 'x", "line 2: ARG needs"),
        ("FROM a\nARG =x", "line 2: ARG cannot declare ''"),
        ("FROM a\nENV", "line 2: ENV needs"),
        ("FROM a\nRUN --mount='x true", "line 2: a flag with an open quote"),
        ("FROM a\nRUN --mount=type=evil true", "line 2: 'evil' is no kind of mount"),
        ("FROM a\nENV --x X=1", "line 2: ENV has no flags"),
        ("FROM a\nENV 'X'=1", "line 2: ENV cannot set"),
        ('FROM a\nARG "X=1"', "line 2: ARG cannot declare"),
        ("FROM a\nRUN cat <<$X\n$X", "line 2: a variable names a here-document"),
        ("FROM a\nRUN --network=evil true", "line 2: 'evil' is no network"),
        ("FROM a\nRUN --security=evil true", "line 2: 'evil' is no security mode"),
        ("FROM a\nRUN --mount true\x00", "line 2: a NUL byte"),
        ("FROM a\nONBUILD ONBUILD RUN x", "line 2: ONBUILD within ONBUILD"),
        ("FROM a\nONBUILD FROM x", "line 2: FROM cannot be a trigger"),
        ("FROM a\nONBUILD", "line 2: unknown instruction ''"),
        ("FROM a\n\nRUN cat <<EOF\nx", "line 3: the here-document 'EOF' has no end"),
        ("FROM a\nRUN cat <<E <<E\nE", "line 2: the here-document 'E' has no end"),
        ("# escape=x\nFROM a", "line 1: the escape character 'x'"),
        ("# syntax=a\n# syntax=b\nFROM a", "line 2: a second `# syntax=`"),
        ("FROM a\n" * 1001, "line 1001: more than 1000 stages"),
        ("#" * ((1 << 20) + 1), "more than 1048576 bytes"),
        ("FROM a\n\udcff\x1b]0;x\x07 y", "line 2: unknown instruction '.udcff.x1b"),
    ],
)
def test_what_is_outside_the_grammar_is_named_by_its_line(text: str, pattern: str) -> None:
    with pytest.raises(DockerfileInvalid, match=pattern) as caught:
        read(text)
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()


def test_comments_may_hold_any_bytes() -> None:
    assert images(read("# \udcff\udcfe\nFROM a\nRUN x \\\n# \udcff\n y")) == ["a"]


def test_an_escape_below_a_shebang_does_not_count() -> None:
    assert images(read("#!/x\n# escape=`\nFROM \\\na")) == ["a"]


MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    "text",
    [
        "# syntax=a" + " " * 900_000 + "b\nFROM a",
        "FROM a\nRUN " + "[" * 900_000,
        "FROM a\nRUN " + "<<'" * 300_000,
        "FROM a\nRUN " + "x \\\n" * 200_000,
        "FROM a\n" + "RUN x << y\n" * 90_000,
        "FROM a\n" + "RUN x <<y\ny\n" * 80_000,
        "FROM a\nADD " + "$x" * 400_000 + " /",
        "FROM a\nADD " + "${x:-" * 150_000 + " /",
        "FROM a\nRUN --" + "'a'" * 300_000 + "'",
        "FROM a\nRUN " + "--x " * 250_000,
        'FROM a\nRUN --"' + "\\a" * 400_000,
        'FROM a\nRUN << "' + "\\a" * 400_000,
        "FROM a\nADD " + "a@" * 500_000 + " /",
        "FROM a\nADD https://" + "a:" * 2000 + " /",
        "FROM a AS a\n" + "ENV a=1 b=2\n" * 80_000,
        "FROM a\n" + "".join(f"ENV x{i}=1 y{i}=2\n" for i in range(45_000)),
        "FROM a\n" + "".join(f"ARG x{i}\n" for i in range(80_000)),
        "ARG a0=xx\n" + "".join(f"ARG a{i + 1}=$a{i}$a{i}\n" for i in range(30_000)) + "FROM a",
        "FROM a AS s\n" * 1000 + "COPY --from=$x a b\n" * 50_000,
        "\n" * MEBIBYTE,
        "#" * MEBIBYTE,
    ],
    ids=range(21),
)
def test_reading_takes_linear_time(text: str) -> None:
    start = time.process_time()
    try:
        read(text)
    except RunnerError as error:
        assert len(error.message) < 1000  # noqa: PT017 - an error is as good as facts here
    assert time.process_time() - start < 5


WORDS = st.sampled_from(
    [
        *("FROM", "COPY", "ADD", "RUN", "ARG", "ENV", "ONBUILD", "LABEL", "AS", "scratch"),
        *("--from=", "--mount=", "--network=", "--platform=", "type=secret,", "id=a", "--", "#"),
        *("<<E", "<<-E", "<< E", "E", "$X", "${X:-", "}", "'", '"', "\\", "`", "[", "]", "=", ","),
        *("\n", "\n", "\n", "\\\n", "\r\n", " ", " ", " ", "\t", "a", "a:1", "https://x", "\ufeff"),
        *("# escape=`\n", "# syntax=a\n", "\x00", "\x1b", "\udcff", "\u2028"),
    ]
)


@given(st.lists(WORDS, max_size=40).map("".join), st.sampled_from([None, "a", "0"]))
def test_any_text_gives_the_same_facts_twice_or_a_printable_error(
    text: str, target: str | None
) -> None:
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(repr(read(f"FROM a AS a\n{text}", target, X="y")))
        except RunnerError as error:
            outcomes.append(error.message)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].isprintable()


@given(st.binary(max_size=200))
def test_any_bytes_are_facts_or_an_error_of_ours(data: bytes) -> None:
    with contextlib.suppress(RunnerError):
        assert read_dockerfile(data, build_args={}, target=None).stages


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'FROM a\nHEALTHCHECK CMD true\nSHELL ["sh"]', {"HEALTHCHECK", "SHELL"}),
        (b"FROM a\nONBUILD RUN true", {"ONBUILD"}),
        (b"FROM a\nRUN true", set()),
    ],
)
def test_what_only_dockers_format_keeps_is_named(text: bytes, found: set[str]) -> None:
    assert read_dockerfile(text, build_args={}, target=None).docker_only == found


@pytest.mark.parametrize("text", [b"ARG T\nFROM ${T}", b"FROM $T", b"ARG T=\nFROM ${T:-$U}"])
def test_a_base_that_is_empty_for_want_of_a_build_arg_is_said_before_anything_starts(
    text: bytes,
) -> None:
    with pytest.raises(DockerfileInvalid, match="no --build-arg gives"):
        read_dockerfile(text, build_args={}, target=None)


def test_names_in_env_are_bounded_so_that_many_stages_stay_cheap() -> None:
    text = b"FROM a\n" + b"".join(b"ENV N%d=1\n" % number for number in range(2001))
    with pytest.raises(DockerfileInvalid, match="names in ENV"):
        read_dockerfile(text, build_args={}, target=None)
