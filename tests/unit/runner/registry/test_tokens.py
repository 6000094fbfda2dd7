import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runner.errors import RegistryProtocol, RegistryRefused
from runner.registry import dial, tokens
from runner.registry.auth import Anonymous, Login, Secret
from runner.registry.tokens import Challenge, Site, Tokens, parse_challenges
from runner.settings import RegistrySettings, Settings

if TYPE_CHECKING:
    from tests.unit.runner.registry.conftest import Answer, Peer, Request

BEARER = 'Bearer realm="https://a.example/token",service="a.example",scope="repository:x:pull"'


def sending(here: RegistrySettings, other: "Peer") -> RegistrySettings:
    """The same, for a registry whose redirects may lead to ``other``."""
    return here.model_copy(update={"redirect_hosts": (other.host,)})


class Me:
    def for_host(self, host: str, repository: str = "") -> Login | None:
        return Login("me", Secret("hunter2"))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", ()),
        ('Basic realm="r"', (Challenge("basic", {"realm": "r"}),)),
        (
            BEARER,
            (
                Challenge(
                    "bearer",
                    {
                        "realm": "https://a.example/token",
                        "service": "a.example",
                        "scope": "repository:x:pull",
                    },
                ),
            ),
        ),
        ("bearer REALM=x , , service = y", (Challenge("bearer", {"realm": "x", "service": "y"}),)),
        ('Basic realm="a\\"b\\\\, c=d"', (Challenge("basic", {"realm": 'a"b\\, c=d'}),)),
        (
            'Negotiate, Bearer realm="x", Basic realm="y"',
            (
                Challenge("negotiate", {}),
                Challenge("bearer", {"realm": "x"}),
                Challenge("basic", {"realm": "y"}),
            ),
        ),
        ('Basic realm=""', (Challenge("basic", {"realm": ""}),)),
    ],
)
def test_challenges_are_read(header: str, expected: tuple[Challenge, ...]) -> None:
    assert parse_challenges(header) == expected


@pytest.mark.parametrize(
    "header",
    [
        'realm="x"',
        'Bearer realm="x", realm="y"',
        'Bearer realm="x", REALM="y"',
        'Bearer realm="unterminated',
        'Bearer realm="x"junk',
        'Bearer realm="x\x01"',
        "Bearer =x",
        '"Bearer"',
        "Bearer realm=x y=z",
        "a" * 8193,
    ],
)
def test_a_malformed_challenge_is_refused(header: str) -> None:
    with pytest.raises(RegistryProtocol):
        parse_challenges(header)


@given(st.text(alphabet='Bab="\\, \t-/:\x00é', max_size=60))
@example(BEARER)
def test_any_header_is_read_or_refused(header: str) -> None:
    try:
        found = parse_challenges(header)
    except RegistryProtocol:
        return
    assert all(c.scheme == c.scheme.lower() for c in found)


Answers = Callable[..., Tokens]


@pytest.fixture
def tokens_of() -> Iterator[Answers]:
    sessions: list[dial.Session] = []

    def make(settings: Settings, login: bool = True, clock: Callable[[], float] = float) -> Tokens:
        sessions.append(dial.session(settings))
        return Tokens(settings, sessions[-1], Me() if login else Anonymous(), clock)

    yield make
    for session in sessions:
        session.close()


def site_at(peer: "Peer") -> Site:
    return Site("http", peer.host, "acme/app", peer.host)


def challenge(peer: "Peer", path: str = "/token") -> str:
    return f'Bearer realm="{peer.url}{path}",service="the service",scope="repository:other:*"'


@pytest.mark.parametrize("login", [True, False])
def test_a_token_is_asked_for_with_our_own_scope(
    login: bool, peer: "Peer", tokens_of: Answers
) -> None:
    peer.answer = lambda _: peer.reply(200, b'{"token": "abc"}')
    value = tokens_of(peer.settings, login).answer(site_at(peer), "pull", challenge(peer, "/t?a=b"))
    assert value.reveal() == "Bearer abc"
    request = peer.seen[0]
    assert parse_qs(urlsplit(request.path).query) == {
        "a": ["b"],
        "scope": ["repository:acme/app:pull"],
        "service": ["the service"],
    }
    expected = Login("me", Secret("hunter2")).basic().reveal() if login else None
    assert request.headers.get("Authorization") == expected


def test_a_token_lives_as_long_as_it_says_less_a_margin(peer: "Peer", tokens_of: Answers) -> None:
    now = [0.0]
    peer.answer = lambda _: peer.reply(200, b'{"access_token": "abc", "expires_in": 100}')
    kept = tokens_of(peer.settings, clock=lambda: now[0])
    site = site_at(peer)
    assert kept.known(site, "pull") is None
    kept.answer(site, "pull", challenge(peer))
    for moment, known in ((0.0, True), (79.0, True), (81.0, False)):
        now[0] = moment
        assert (kept.known(site, "pull") is not None) is known
        assert kept.known(site, "pull,push") is None


def test_tokens_do_not_pile_up(
    peer: "Peer", tokens_of: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_MOST_TOKENS", 3)
    kept = tokens_of(peer.settings)
    for number in range(10):
        site = Site("http", peer.host, f"r{number}", peer.host)
        kept.answer(site, "pull", 'Basic realm="x"')
        assert len(kept._known) <= 3


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        b"{}",
        b'{"token": ""}',
        b'{"token": "a b"}',
        b'{"token": "a\\r\\nX: y"}',
        b'{"token": "\\u00e9"}',
        b'{"token": 7}',
        b'{"token": "a", "expires_in": "soon"}',
        json.dumps({"token": "x" * (1 << 20)}).encode(),
    ],
)
def test_an_answer_without_a_usable_token_is_refused(
    body: bytes, peer: "Peer", tokens_of: Answers
) -> None:
    peer.answer = lambda _: peer.reply(200, body)
    with pytest.raises(RegistryProtocol):
        tokens_of(peer.settings).answer(site_at(peer), "pull", challenge(peer))


def test_a_login_that_the_realm_refuses_is_refused(peer: "Peer", tokens_of: Answers) -> None:
    peer.answer = lambda _: peer.reply(401)
    with pytest.raises(RegistryRefused, match="this login no pull token"):
        tokens_of(peer.settings).answer(site_at(peer), "pull", challenge(peer))
    with pytest.raises(RegistryRefused, match="an anonymous user"):
        tokens_of(peer.settings, login=False).answer(site_at(peer), "pull", challenge(peer))


def test_a_foreign_realm_gets_nothing(peers: Callable[[], "Peer"], tokens_of: Answers) -> None:
    peer = peers()
    settings = peer.settings
    with pytest.raises(RegistryProtocol, match="foreign") as caught:
        tokens_of(settings).answer(
            site_at(peer), "pull", f'Bearer realm="http://localhost:{peer.port}/token"'
        )
    assert "token_hosts" in caught.value.advice
    assert not peer.seen


def test_a_realm_that_is_configured_is_used(peer: "Peer", tokens_of: Answers) -> None:
    both = RegistrySettings(plain_http=True, private_address=True, token_hosts=("127.0.0.1",))
    settings = Settings(registries={"r.example": both, peer.host: both})
    peer.answer = lambda _: peer.reply(200, b'{"token": "abc"}')
    site = Site("https", "r.example", "acme/app", "r.example")
    assert tokens_of(settings).answer(site, "pull", challenge(peer)).reveal() == "Bearer abc"


@pytest.mark.parametrize(
    ("site_host", "realm", "accepted"),
    [
        ("r.example", "https://r.example/token", True),
        ("r.example:5050", "https://r.example/token", True),
        ("r.example", "https://R.EXAMPLE:8443/token", True),
        ("registry-1.docker.io", "https://auth.docker.io/token", True),
        ("r.example", "https://auth.docker.io/token", False),
        ("r.example", "https://auth.r.example/token", False),
        ("r.example", "https://example/token", False),
        ("r.example", "https://r.example.evil.org/token", False),
        ("r.example", "https://evil.org/r.example", False),
        ("r.example", "https://evil.org\\.r.example/", False),
        ("r.example", "https://r.example@evil.org/", False),
        ("r.example", "http://r.example/token", False),
        ("r.example", "http://r.example:5000/token", True),
        ("r.example", "file:///etc/passwd", False),
        ("r.example", "/token", False),
        ("r.example", "", False),
    ],
)
def test_realms_are_pinned(site_host: str, realm: str, accepted: bool, tokens_of: Answers) -> None:
    settings = Settings(registries={"r.example:5000": RegistrySettings(plain_http=True)})
    site = Site("https", site_host, "acme/app", site_host)
    kept = tokens_of(settings)
    if accepted:
        assert kept._pinned(site, realm) == realm
    else:
        with pytest.raises(RegistryProtocol):
            kept._pinned(site, realm)


def test_a_login_follows_no_redirect_to_another_host(
    peers: Callable[[], "Peer"], tokens_of: Answers
) -> None:
    peer, other = peers(), peers()
    here = RegistrySettings(plain_http=True, private_address=True)

    def stolen(request: "Request") -> "Answer":
        return peer.reply(200, b'{"token": "abc"}')

    other.answer = stolen
    peer.answer = lambda _: peer.reply(307, Location=f"{other.url}/token")
    settings = Settings(registries={peer.host: sending(here, other), other.host: here})
    tokens_of(settings).answer(site_at(peer), "pull", challenge(peer))
    assert "Authorization" in peer.seen[0].headers
    assert "Authorization" not in other.seen[0].headers


def test_basic_is_answered_with_the_login_alone(peer: "Peer", tokens_of: Answers) -> None:
    site, header = site_at(peer), 'Basic realm="x"'
    expected = Login("me", Secret("hunter2")).basic()
    assert tokens_of(peer.settings).answer(site, "pull", header) == expected
    with pytest.raises(RegistryRefused, match="wants a login"):
        tokens_of(peer.settings, login=False).answer(site, "pull", header)
    assert not peer.seen


@pytest.mark.parametrize("header", ["", "Negotiate"])
def test_an_unknown_way_to_log_in_is_refused(header: str, peer: "Peer", tokens_of: Answers) -> None:
    with pytest.raises(RegistryProtocol, match="no way to log in"):
        tokens_of(peer.settings).answer(site_at(peer), "pull", header)
