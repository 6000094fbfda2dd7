"""Where a verified image goes: to destinations, into a file, or else into the build's directory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from policies.reference import ImageReference
from runner import events, publish
from runner.cancel import Cancellation
from runner.errors import Cancelled, RegistryUnreachable, RunnerError
from runner.journal import Journal
from runner.output import Output, write_output
from runner.registry.client import RegistryClient
from runner.request import BuildRequest
from runner.tools import Tools
from runner.verify import VerifiedImage

_T = TypeVar("_T")


class Delivery:
    """Of one build.

    Attributes:
        published: Destinations whose tag names the image by now.
    """

    def __init__(
        self,
        request: BuildRequest,
        tools: Tools,
        kept: Path,
        journal: Journal,
        cancellation: Cancellation,
    ) -> None:
        """``kept`` is where an OCI layout is written of an image that is nowhere else."""
        self.published: list[str] = []
        self._request = request
        self._tools = tools
        self._kept = kept
        self._journal = journal
        self._cancellation = cancellation

    def ask(self) -> None:
        """A destination that nobody can push to is better known before the build than after.

        Raises:
            RegistryError: There is one.
        """
        with RegistryClient(self._tools.settings, self._tools.credentials) as client:
            for destination in self._request.destinations:
                self._patiently(destination, partial(client.may_push, destination))

    def deliver(self, image: VerifiedImage) -> None:
        """Publishes and writes what was asked for.

        Raises:
            RunnerError: What could not be published is kept on this host.
        """
        request = self._request
        if request.output is not None:
            first = request.destinations[0] if request.destinations else None
            write_output(image, request.output, first)
        elif not request.destinations:
            self._keep(image)
        with RegistryClient(self._tools.settings, self._tools.credentials) as client:
            for destination in request.destinations:
                done = self._publish(image, destination, client)
                self.published.append(str(done.destination))
                self._journal.emit(events.Published(done.destination, done.digest))

    def _publish(
        self, image: VerifiedImage, destination: ImageReference, client: RegistryClient
    ) -> publish.PublishedImage:
        work = partial(publish.publish, image, destination, client, report=self._journal.publishing)
        try:
            return self._patiently(destination, work)
        except RunnerError as error:
            if not isinstance(error, Cancelled):
                self._keep(image)
                error.advice += (
                    " The verified image is kept: "
                    f"skopeo copy oci:{self._kept} docker://{destination}"
                )
            raise

    def _patiently(self, destination: ImageReference, work: Callable[[], _T]) -> _T:
        seconds = self._tools.settings.http.publish_seconds
        late = RegistryUnreachable(f"{destination.host} took longer than {seconds:g} s")
        return self._cancellation.waiting(work, seconds, late)

    def _keep(self, image: VerifiedImage) -> None:
        if not self._kept.exists():
            write_output(image, Output("oci", self._kept), None)
