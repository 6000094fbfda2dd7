"""Which backend a build runs on: the one that was asked for, or the first that policy takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from policies import engine
from policies.facts import BuildFacts, HostFacts
from policies.loader import Policy
from policies.model import Decision, Denial
from runner.errors import IsolationUnavailable, PolicyDenied, RunnerError, UsageError
from runner.request import BuildRequest
from runner.tools import Tools
from sandbox.model import Backend, Offer


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend, and what it offered when it was asked."""

    backend: Backend
    offer: Offer

    @property
    def unavailable(self) -> IsolationUnavailable | None:
        """Why there is no isolation at all; None where there are some."""
        # Of the one that untrusted builds need at least, the reason says most.
        return None if self.offer.isolations else self.offer.refused[engine.UNTRUSTED_FLOOR]


class Candidates:
    """Backends in order: each is made and asked when its turn comes, and only once."""

    def __init__(self, backends: Mapping[str, Backend], names: Sequence[str]) -> None:
        """``names`` are those of the backends that count."""
        self._backends = backends
        self._names = names
        self._seen: dict[str, Candidate] = {}

    def __iter__(self) -> Iterator[Candidate]:
        for name in self._names:
            if name not in self._seen:
                backend = self._backends[name]
                self._seen[name] = Candidate(backend, backend.offer())
            yield self._seen[name]

    def require_any(self) -> None:
        """Looks as far as the first backend that offers something.

        Raises:
            IsolationUnavailable: With what each backend says, where none does.
        """
        unavailable: dict[str, RunnerError] = {}
        for candidate in self:
            if candidate.unavailable is None:
                return
            unavailable[candidate.backend.name] = candidate.unavailable
        raise _together(unavailable)


def candidates(request: BuildRequest, tools: Tools) -> Candidates:
    """The backend that the request names, or several. Raises UsageError where it is unknown."""
    if request.backend is None:
        return Candidates(tools.backends, tools.automatic)
    if request.backend not in tools.backends:
        raise UsageError(
            f"there is no backend {request.backend!r}",
            advice=f"One of: {', '.join(sorted(tools.backends))}.",
        )
    return Candidates(tools.backends, (request.backend,))


@dataclass(frozen=True, slots=True)
class Choice:
    """What policy says of a build, backend by backend.

    Attributes:
        candidate: The first that policy takes; the first at all where it takes none.
        facts: Of the build on that backend.
        decision: On those facts.
        refused: By name, why not on each backend that was tried before one was taken.
    """

    candidate: Candidate
    facts: BuildFacts
    decision: Decision | Denial
    refused: Mapping[str, RunnerError]

    @property
    def backend(self) -> Backend:
        return self.candidate.backend

    def allowed(self) -> Decision:
        """The decision.

        Raises:
            PolicyDenied: It is a denial on every backend; so are the first one's words.
            IsolationUnavailable: Likewise, and the first lacks the isolation.
        """
        if isinstance(self.decision, Denial):
            raise _together(self.refused)
        return self.decision


def choose(
    policies: Sequence[Policy], facts: BuildFacts, candidates: Iterable[Candidate]
) -> Choice:
    """Asks ``policies`` about one backend after the other until they take one.

    Args:
        policies: As in ``engine.decide``.
        facts: Of the build, whatever they say of a backend.
        candidates: At least one.
    """
    first: tuple[Candidate, BuildFacts, Denial] | None = None
    refused: dict[str, RunnerError] = {}
    for candidate in candidates:
        placed = on(facts, candidate)
        decision = engine.decide(policies, placed)
        if isinstance(decision, Decision):
            return Choice(candidate, placed, decision, refused)
        first = first or (candidate, placed, decision)
        refused[candidate.backend.name] = _refusal(candidate, decision)
    assert first is not None, "there is always a backend"
    return Choice(*first, refused)


def on(facts: BuildFacts, candidate: Candidate) -> BuildFacts:
    """The facts of the same build on that backend."""
    return replace(
        facts,
        request=replace(facts.request, backend=candidate.backend.name),
        # Every backend's door is our gateway, so its proxy is there.
        host=HostFacts(
            isolations=candidate.offer.isolations, egress=True, rootless=candidate.offer.rootless
        ),
    )


def _refusal(candidate: Candidate, denial: Denial) -> RunnerError:
    if denial.wanted is not None:
        return candidate.offer.refused.get(denial.wanted, IsolationUnavailable(denial.reason))
    return PolicyDenied(f"{denial.reason} ({denial.rule})")


def _together(refused: Mapping[str, RunnerError]) -> RunnerError:
    """The first one's error, with a line for each other one that has a reason of its own."""
    (_, error), *others = refused.items()
    own = (f"{name}: {each.message}" for name, each in others if each.message != error.message)
    lines = [error.message, *own]
    return type(error)("\n".join(lines), advice=error.advice)
