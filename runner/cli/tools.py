"""Puts the parts of this host together for the commands that need them."""

from pathlib import Path

from builder.buildah import Buildah
from builder.model import Builder
from policies import loader
from policies.errors import PolicyInvalid
from policies.loader import Policy
from runner import settings
from runner.files import Home
from runner.registry.auth import DockerConfig
from runner.tools import Tools
from sandbox.local import LocalBackend

OPERATOR_POLICY = Path("/etc/runner/policy.yaml")

BUILDERS: dict[str, Builder] = {"buildah": Buildah()}


def backend(home: Home, loaded: settings.Settings) -> LocalBackend:
    """The local backend, as configured."""
    local = loaded.local
    uids = range(local.first_uid, local.first_uid + local.uids)
    return LocalBackend(home.sandboxes, runsc_name=local.runsc, uids=uids)


def operator_policy() -> bool:
    """Whether the operator wrote a policy; a link that leads nowhere is one that cannot be read.

    Raises:
        PolicyInvalid: Nobody can tell.
    """
    try:
        OPERATOR_POLICY.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise PolicyInvalid(f"{OPERATOR_POLICY}: {error.strerror}") from None
    return True


def policies(given: list[Path]) -> list[Policy]:
    """The operator's policy, or the shipped default where there is none; then what was given.

    The decision is the stricter of all, so what was given can only tighten.
    """
    first = loader.read(OPERATOR_POLICY) if operator_policy() else loader.shipped("default")
    return [first, *map(loader.read, given)]


def assemble(given_policies: list[Path]) -> Tools:
    """Everything that a build is made with. Raises ConfigInvalid or PolicyInvalid."""
    loaded, home = settings.load(), Home.find()
    local = backend(home, loaded)
    return Tools(
        settings=loaded,
        home=home,
        policies=policies(given_policies),
        backends={local.name: local},
        builders=BUILDERS,
        credentials=DockerConfig(),
    )
