"""Which backend a build runs on: the one that was asked for, or the first that policy takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from policies import engine
from policies.facts import BuildFacts, HostFacts
from policies.loader import Policy
from policies.model import Decision, Denial, Isolation
from runner.errors import IsolationUnavailable, PolicyDenied, RunnerError, UsageError
from runner.request import BuildRequest
from runner.tools import Tools
from sandbox.model import Backend


@dataclass(frozen=True, slots=True)
class Offer:
    """A backend, and what it was seen to offer.

    Attributes:
        refused: Why each of the others cannot be had.
    """

    backend: Backend
    refused: Mapping[Isolation, IsolationUnavailable]

    @property
    def isolations(self) -> frozenset[Isolation]:
        """That can be had."""
        return frozenset(Isolation) - self.refused.keys()

    @property
    def unavailable(self) -> IsolationUnavailable | None:
        """Why there are none; None where there are some."""
        # Of the one that untrusted builds need at least, the reason says most.
        return None if self.isolations else self.refused[engine.UNTRUSTED_FLOOR]


def offered(backend: Backend) -> Offer:
    """What can be had of ``backend`` now."""
    refused = {}
    for isolation in Isolation:
        try:
            backend.require(isolation)
        except IsolationUnavailable as error:
            refused[isolation] = error
    return Offer(backend, refused)


class Offers:
    """What backends offer, in order: each is made and asked when its turn comes, and only once."""

    def __init__(self, backends: Mapping[str, Backend], names: Sequence[str]) -> None:
        """``names`` are those of the backends that count."""
        self._backends = backends
        self._names = names
        self._seen: dict[str, Offer] = {}

    def __iter__(self) -> Iterator[Offer]:
        for name in self._names:
            if name not in self._seen:
                self._seen[name] = offered(self._backends[name])
            yield self._seen[name]

    def require_any(self) -> None:
        """Looks as far as the first backend that offers something.

        Raises:
            IsolationUnavailable: With what each backend says, where none does.
        """
        unavailable: dict[str, RunnerError] = {}
        for offer in self:
            if offer.unavailable is None:
                return
            unavailable[offer.backend.name] = offer.unavailable
        raise _together(unavailable)


def offers(request: BuildRequest, tools: Tools) -> Offers:
    """Of the backend that the request names, or of all. Raises UsageError where it is unknown."""
    if request.backend is None:
        return Offers(tools.backends, tuple(tools.backends))
    if request.backend not in tools.backends:
        raise UsageError(
            f"there is no backend {request.backend!r}",
            advice=f"One of: {', '.join(sorted(tools.backends))}.",
        )
    return Offers(tools.backends, (request.backend,))


@dataclass(frozen=True, slots=True)
class Choice:
    """What policy says of a build, backend by backend.

    Attributes:
        offer: Of the first backend that policy takes; of the first at all where it takes none.
        facts: Of the build on that backend.
        decision: On those facts.
        refused: By name, why not on each backend that was tried before one was taken.
    """

    offer: Offer
    facts: BuildFacts
    decision: Decision | Denial
    refused: Mapping[str, RunnerError]

    @property
    def backend(self) -> Backend:
        return self.offer.backend

    def allowed(self) -> Decision:
        """The decision.

        Raises:
            PolicyDenied: It is a denial on every backend; so are the first one's words.
            IsolationUnavailable: Likewise, and the first lacks the isolation.
        """
        if isinstance(self.decision, Denial):
            raise _together(self.refused)
        return self.decision


def choose(policies: Sequence[Policy], facts: BuildFacts, offers: Iterable[Offer]) -> Choice:
    """Asks ``policies`` about one backend after the other until they take one.

    Args:
        policies: As in ``engine.decide``.
        facts: Of the build, whatever they say of a backend.
        offers: At least one.
    """
    first: tuple[Offer, BuildFacts, Denial] | None = None
    refused: dict[str, RunnerError] = {}
    for offer in offers:
        placed = on(facts, offer)
        decision = engine.decide(policies, placed)
        if isinstance(decision, Decision):
            return Choice(offer, placed, decision, refused)
        first = first or (offer, placed, decision)
        refused[offer.backend.name] = _refusal(offer, decision)
    assert first is not None, "there is always a backend"
    return Choice(*first, refused)


def on(facts: BuildFacts, offer: Offer) -> BuildFacts:
    """The facts of the same build on that backend."""
    return replace(
        facts,
        request=replace(facts.request, backend=offer.backend.name),
        # Every backend's door is our gateway, so its proxy is there.
        host=HostFacts(isolations=offer.isolations, egress=True),
    )


def _refusal(offer: Offer, denial: Denial) -> RunnerError:
    if denial.wanted is not None:
        return offer.refused.get(denial.wanted, IsolationUnavailable(denial.reason))
    return PolicyDenied(f"{denial.reason} ({denial.rule})")


def _together(refused: Mapping[str, RunnerError]) -> RunnerError:
    """The first one's error, with a line for each other one."""
    (_, error), *others = refused.items()
    lines = [error.message, *(f"{name}: {other.message}" for name, other in others)]
    return type(error)("\n".join(lines), advice=error.advice)
