"""Which egress rules let a RUN step connect."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.grants import NO_OPINION, may_connect
from policies.model import EgressRule, Grant, Network

FILES = EgressRule(hosts=("files.example.org", "*.cdn.example"), ports=(80, 443))


def granting(*sets: tuple[EgressRule, ...], network: Network = Network.EGRESS) -> Grant:
    return replace(NO_OPINION, network=network, egress=sets)


@pytest.mark.parametrize(
    ("host", "port", "named"),
    [
        ("files.example.org", 443, "files.example.org"),
        ("files.example.org", 80, "files.example.org"),
        ("files.example.org", 8080, None),
        ("a.b.cdn.example", 443, "*.cdn.example"),
        ("cdn.example", 443, None),
        ("evil.example", 443, None),
        ("xfiles.example.org", 443, None),
    ],
)
def test_the_rule_is_narrowed_to_what_was_asked(host: str, port: int, named: str | None) -> None:
    found = may_connect(granting((EgressRule(hosts=("other",)), FILES)), host, port, None)
    assert (found.hosts if found else None) == ((named,) if named else None)
    assert found is None or found.ports == (port,)


def test_a_wildcard_has_no_addresses() -> None:
    wild = granting((EgressRule(hosts=("*.0.0.1", "*.1")),))
    assert may_connect(wild, "127.0.0.1", 443, None) is None
    named = granting((EgressRule(hosts=("127.0.0.1",)),))
    assert may_connect(named, "127.0.0.1", 443, None) is not None


@pytest.mark.parametrize(
    ("methods", "method", "allowed"),
    [
        ((), None, True),
        ((), "DELETE", True),
        (("GET",), "GET", True),
        (("GET",), "get", False),
        (("GET",), "POST", False),
        (("GET",), None, False),
    ],
)
def test_a_rule_with_methods_allows_those_and_no_tunnel(
    methods: tuple[str, ...], method: str | None, allowed: bool
) -> None:
    found = may_connect(granting((replace(FILES, methods=methods),)), FILES.hosts[0], 443, method)
    assert (found is not None) is allowed


@pytest.mark.parametrize("network", [Network.NONE, Network.REGISTRIES])
def test_rules_allow_nothing_where_the_network_is_less_than_egress(network: Network) -> None:
    assert may_connect(granting((FILES,), network=network), FILES.hosts[0], 443, None) is None


def test_a_preset_without_hosts_allows_nothing() -> None:
    assert (
        may_connect(granting((EgressRule(preset="pip"),)), "packages.example.org", 443, None)
        is None
    )


rules = st.builds(
    EgressRule,
    hosts=st.sampled_from([("a.b",), ("*.b",), ("c.b", "a.b"), ("x",)]),
    ports=st.sampled_from([(443,), (80, 443), (1,)]),
    methods=st.sampled_from([(), ("GET",)]),
    private_ranges=st.lists(
        st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "fc00::/7", "0.0.0.0/0"]),
        max_size=2,
    ).map(tuple),
)
sets = st.lists(st.lists(rules, max_size=3).map(tuple), max_size=3)


@given(sets, st.lists(rules, max_size=3).map(tuple), st.sampled_from([None, "GET"]))
def test_a_further_set_of_rules_only_tightens(
    before: list[tuple[EgressRule, ...]], further: tuple[EgressRule, ...], method: str | None
) -> None:
    first = may_connect(granting(*before), "a.b", 443, method)
    then = may_connect(granting(*before, further), "a.b", 443, method)
    if before and then is not None:
        assert first is not None
        assert not set(then.private_ranges) or first.private_ranges
    if not before:
        assert first is None


def test_a_private_range_is_open_where_every_set_opens_it() -> None:
    one = replace(FILES, private_ranges=("10.0.0.0/8", "fc00::/7"))
    other = replace(FILES, private_ranges=("10.1.0.0/16", "192.168.0.0/16"))
    again = replace(FILES, private_ranges=("10.1.2.0/24", "10.2.0.0/16"))

    def opened(*sets: tuple[EgressRule, ...]) -> tuple[str, ...]:
        found = may_connect(granting(*sets), FILES.hosts[0], 443, None)
        assert found is not None
        return found.private_ranges

    assert opened((one,), (other,)) == ("10.1.0.0/16",)
    assert opened((one,), (other,), (again,)) == ("10.1.2.0/24",)
    assert opened((one,), (FILES,)) == ()
    assert opened((one, other)) == ("10.0.0.0/8", "10.1.0.0/16", "192.168.0.0/16", "fc00::/7")
