"""What a session may see follows the decision, and a final decision takes nothing back silently."""

from dataclasses import replace

import pytest

from policies.model import Decision
from policies.reference import Digest, ImageReference
from runner.errors import PolicyDenied
from runner.gateway.reachable import ReachableSet
from runner.registry.image import OCI_INDEX, Descriptor
from tests.support.gateway import decision

IMAGE = ImageReference.parse("r.example/a:1")
PINNED, ENTRY = Digest.of(b"index"), Digest.of(b"entry")


def index() -> bytes:
    entry = (
        f'{{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "{ENTRY}", '
        '"size": 7}'
    )
    return f'{{"schemaVersion": 2, "manifests": [{entry}], "mediaType": "{OCI_INDEX}"}}'.encode()


def resolved(allowed: Decision) -> ReachableSet:
    reachable = ReachableSet(allowed)
    reachable.resolved(IMAGE, Descriptor(OCI_INDEX, PINNED, len(index())), index())
    return reachable


def test_an_entry_of_an_index_by_digest_is_reachable_once_the_index_is() -> None:
    allowed = decision(base_images=((f"r.example/a@{PINNED}",),))
    before, after = ReachableSet(allowed), resolved(allowed)
    assert before.may_resolve(IMAGE.at(PINNED))
    for reachable, seen in ((before, False), (after, True)):
        assert reachable.may_resolve(IMAGE.at(ENTRY)) is seen
        assert not reachable.may_resolve(IMAGE)
        assert not reachable.may_resolve(ImageReference.parse("r.example/b").at(ENTRY))


def test_the_final_decision_holds_from_then_on() -> None:
    reachable = resolved(decision())
    other = ImageReference.parse("r.example/b:1")
    assert reachable.may_resolve(other)
    reachable.decide(decision(base_images=(("r.example/a",),)))
    assert not reachable.may_resolve(other)


def test_credentials_that_the_final_decision_withholds_end_the_build() -> None:
    with_login = decision(pull_credentials=(("r.example/**",),))
    reachable = resolved(with_login)
    reachable.decide(decision())
    reachable.decide(with_login)
    assert reachable.with_credentials(IMAGE)
    reachable.decide(replace(with_login, tenant="x"))
    with pytest.raises(PolicyDenied, match="was pulled with credentials"):
        reachable.decide(decision())
    assert not reachable.with_credentials(IMAGE)
