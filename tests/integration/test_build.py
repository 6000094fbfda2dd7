"""What RUN steps find inside is what they find under ``docker build``, and what they make arrives.

One Dockerfile under ``set -e``: a builder that merely builds hello fails in it.
"""

import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from policies.reference import ImageReference
from runner.errors import Cancelled
from runner.events import Event, Published
from runner.registry.auth import Anonymous
from runner.registry.client import RegistryClient
from tests.support.hosts import Person, write_context

if TYPE_CHECKING:
    from tests.integration.conftest import RealRegistry

pytestmark = [pytest.mark.sandbox, pytest.mark.registry]

DOCKERFILE = r"""
ARG BASE
FROM ${BASE} AS package
WORKDIR /package
COPY control preinst postinst prerm DEBIAN/
RUN <<STEPS
set -e
chmod 755 DEBIAN DEBIAN/preinst DEBIAN/postinst DEBIAN/prerm
mkdir -p usr/share/greeting
echo hello >usr/share/greeting/text
dpkg-deb --build --root-owner-group /package /greeting.deb
STEPS

FROM ${BASE} AS compiled
COPY xattr.c /
RUN gcc -O -Wall -Werror -static -o /xattr /xattr.c

FROM ${BASE} AS result
ARG GREETING=unset
ENV NAMED=${GREETING}-env EMPTY=
RUN test "$GREETING" = "given value" && test "$NAMED" = "given value-env"

# Devices, /proc, temporary files.
RUN set -e; \
    echo gone >/dev/null; test -z "$(cat /dev/null)"; \
    test "$(head -c 4 /dev/zero | od -An -tx1 | tr -d ' ')" = 00000000; \
    test "$(head -c 8 /dev/urandom | wc -c)" = 8; \
    echo shared >/dev/shm/file; test "$(cat /dev/shm/file)" = shared; \
    test "$(echo piped | cat /dev/fd/0)" = piped; \
    test "$(echo piped | cat /dev/stdin)" = piped; \
    echo to-stderr >/dev/stderr; echo to-stdout >/dev/stdout; \
    test -r /proc/self/status; test -e /proc/1/cmdline; test -e /proc/cpuinfo; \
    file="$(mktemp)"; directory="$(mktemp -d)"; rm -r "$file" "$directory"; \
    df / >/dev/null; ps_name="$(cat /proc/self/comm)"; test "$ps_name" = cat

# Users, groups, and becoming one of them.
RUN set -e; \
    groupadd --gid 3000 crew; \
    useradd --uid 2000 --gid crew --create-home --shell /bin/sh sailor; \
    test "$(su sailor -c 'id -un')" = sailor; \
    su sailor -c 'touch ~/mine; ! touch /root/theirs 2>/dev/null'; \
    echo sailor:secret | chpasswd

# Locks, sockets, background processes, signals.
RUN <<STEPS
set -e
flock /tmp/lock true
flock --exclusive /tmp/lock sh -c '! flock --nonblock /tmp/lock true'
perl -MSocket -e '
    socketpair(my $one, my $two, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or die;
    syswrite $one, "x"; sysread $two, my $got, 1; $got eq "x" or die;
    socket(my $door, AF_UNIX, SOCK_STREAM, 0) or die;
    bind($door, pack_sockaddr_un("/tmp/door")) && listen($door, 1) or die "unix: $!";
    socket(my $tcp, AF_INET, SOCK_STREAM, 0) or die;
    bind($tcp, sockaddr_in(0, INADDR_LOOPBACK)) && listen($tcp, 1) or die "tcp: $!";
    socket(my $peer, AF_INET, SOCK_STREAM, 0) or die;
    connect($peer, getsockname($tcp)) or die "connect: $!";
'
sleep 60 &
background=$!
kill -0 $background
kill $background
! wait $background
trap 'echo trapped >/tmp/trapped' USR1
kill -USR1 $$
test "$(cat /tmp/trapped)" = trapped
rm -rf /tmp/*
STEPS

# A package with maintainer scripts.
COPY --from=package /greeting.deb /tmp/
RUN set -e; dpkg -i /tmp/greeting.deb; rm /tmp/greeting.deb; \
    id greeter; test -e /var/lib/greeting/pre; test -e /var/lib/greeting/post; \
    dpkg --verify greeting

# Files that are more than their content.
COPY --from=compiled /xattr /usr/local/bin/
RUN set -e; mkdir /made; cd /made; \
    for owner in root:root sailor:crew greeter:nogroup 12345:54321; do \
        echo "$owner" >"$owner"; chown "$owner" "$owner"; \
    done; \
    echo setuid >setuid; chown sailor:crew setuid; chmod 6751 setuid; \
    echo linked >one; ln one two; ln -s ../etc/passwd link; ln -s /nowhere dangling; \
    echo xattr >xattr; xattr xattr user.greeting hello; \
    mkfifo fifo; mknod null c 1 3; mkdir -m 1777 sticky; \
    truncate -s 1M sparse; : >empty; \
    echo odd >"$(printf 'odd name\nwith a line')"; rm /usr/local/bin/xattr
COPY --chown=sailor:crew --chmod=640 file /made/copied
ADD file /made/added
COPY <<first <<second /made/
1
first
2
second

USER sailor
WORKDIR /home/sailor/work
RUN set -e; test "$(id -un):$(id -gn)" = sailor:crew; test "$PWD" = /home/sailor/work; \
    id >../whoami; ! touch /made/denied 2>/dev/null
ENTRYPOINT ["/bin/true"]
"""

FILES = {
    "control": "Package: greeting\nVersion: 1\nArchitecture: all\n"
    "Maintainer: tests <tests@example.com>\nDescription: test\n",
    "preinst": "#!/bin/sh\nset -e\nmkdir -p /var/lib/greeting\necho $1 >/var/lib/greeting/pre\n",
    "postinst": "#!/bin/sh\nset -e\nuseradd --system --no-create-home greeter\n"
    "echo $1 >/dev/null\necho $1 >/var/lib/greeting/post\n",
    "prerm": "#!/bin/sh\nexit 0\n",
    "xattr.c": "#include <string.h>\n#include <sys/xattr.h>\n"
    "int main(int n, char **a) { return n != 4 || setxattr(a[1], a[2], a[3], strlen(a[3]), 0); }\n",
    "file": "from the context\n",
}

MADE = {
    # name: (type, uid, gid, mode, content or target)
    "root:root": (tarfile.REGTYPE, 0, 0, 0o644, "root:root\n"),
    "sailor:crew": (tarfile.REGTYPE, 2000, 3000, 0o644, "sailor:crew\n"),
    "12345:54321": (tarfile.REGTYPE, 12345, 54321, 0o644, "12345:54321\n"),
    "setuid": (tarfile.REGTYPE, 2000, 3000, 0o6751, "setuid\n"),
    "link": (tarfile.SYMTYPE, 0, 0, 0o777, "../etc/passwd"),
    "dangling": (tarfile.SYMTYPE, 0, 0, 0o777, "/nowhere"),
    "xattr": (tarfile.REGTYPE, 0, 0, 0o644, "xattr\n"),
    "fifo": (tarfile.FIFOTYPE, 0, 0, 0o644, ""),
    "null": (tarfile.CHRTYPE, 0, 0, 0o644, ""),
    "sticky": (tarfile.DIRTYPE, 0, 0, 0o1777, ""),
    "sparse": (tarfile.REGTYPE, 0, 0, 0o644, "\0" * (1 << 20)),
    "empty": (tarfile.REGTYPE, 0, 0, 0o644, ""),
    "odd name\nwith a line": (tarfile.REGTYPE, 0, 0, 0o644, "odd\n"),
    "copied": (tarfile.REGTYPE, 2000, 3000, 0o640, "from the context\n"),
    "added": (tarfile.REGTYPE, 0, 0, 0o644, "from the context\n"),
    "first": (tarfile.REGTYPE, 0, 0, 0o644, "1\n"),
    "second": (tarfile.REGTYPE, 0, 0, 0o644, "2\n"),
}


@dataclass(frozen=True)
class Seen:
    """One entry of a layer."""

    entry: tarfile.TarInfo
    content: bytes


@dataclass(frozen=True)
class Pulled:
    """An image as another client stored it."""

    directory: Path
    digest: str

    def blob(self, digest: str) -> Path:
        return self.directory / "blobs" / digest.replace(":", "/")

    @cached_property
    def manifest(self) -> Any:
        return json.loads(self.blob(self.digest).read_bytes())

    @cached_property
    def config(self) -> Any:
        return json.loads(self.blob(self.manifest["config"]["digest"]).read_bytes())

    @cached_property
    def made(self) -> dict[str, Seen]:
        """Entries of the layer on top of the base; a hard link has the content of its target."""
        with tarfile.open(self.blob(self.manifest["layers"][-1]["digest"])) as archive:
            return {
                entry.name.rstrip("/"): Seen(entry, _content(archive, entry)) for entry in archive
            }


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(entry) if entry.isreg() or entry.islnk() else None
    return stream.read() if stream is not None else entry.linkname.encode()


def pull(reference: str, directory: Path) -> Pulled:
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests",
         "--src-tls-verify=false", f"docker://{reference}", f"oci:{directory}:x"],
        check=True, timeout=120,
    )  # fmt: skip
    index = json.loads((directory / "index.json").read_bytes())
    return Pulled(directory, index["manifests"][0]["digest"])


@pytest.fixture(scope="module")
def context(playground: Path) -> Path:
    return write_context(playground / "steps", DOCKERFILE, **FILES)


@pytest.fixture(scope="module", params=["person", "stranger"])
def pulled(
    request: pytest.FixtureRequest,
    context: Path,
    debian_base: str,
    registry: "RealRegistry",
    playground: Path,
) -> Pulled:
    """The steps, built and published by whoever runs the tests, then by an ordinary user."""
    who: Person = request.getfixturevalue(request.param)
    destination = f"{registry.host}/steps/{request.param}:1"
    ran = who.run(
        "submit", "--untrusted", context, f"--build-arg=BASE={debian_base}",
        "--build-arg=GREETING=given value", f"--destination={destination}", seconds=300,
    )  # fmt: skip
    assert ran.status == 0, ran.stderr
    who.assert_nothing_left()
    image = pull(destination, playground / f"steps-{request.param}")
    assert ran.stdout == f"{registry.host}/steps/{request.param}@{image.digest}\n"
    with RegistryClient(registry.settings, Anonymous()) as client:
        descriptor, _ = client.manifest(ImageReference.parse(destination))
    assert descriptor.digest == image.digest
    return image


def test_every_file_arrives_as_it_was_made(pulled: Pulled) -> None:
    found = {}
    for name in MADE:
        seen = pulled.made[f"made/{name}"]
        entry = seen.entry
        found[name] = (entry.type, entry.uid, entry.gid, entry.mode, seen.content.decode())
    assert found == MADE
    null = pulled.made["made/null"].entry
    assert (null.devmajor, null.devminor) == (1, 3)
    xattrs = pulled.made["made/xattr"].entry.pax_headers
    assert xattrs["SCHILY.xattr.user.greeting"] == "hello"
    assert pulled.made["made/greeter:nogroup"].entry.uid not in {0, 2000}
    assert "made/denied" not in pulled.made


def test_a_hard_link_stays_one(pulled: Pulled) -> None:
    one, two = pulled.made["made/one"], pulled.made["made/two"]
    (link,) = [seen.entry for seen in (one, two) if seen.entry.islnk()]
    assert link.linkname in {"made/one", "made/two"}
    assert one.content == two.content == b"linked\n"


def test_what_users_and_packages_did_is_there(pulled: Pulled) -> None:
    files = {name: seen.content for name, seen in pulled.made.items()}
    assert files["var/lib/greeting/pre"] == b"install\n"
    assert files["var/lib/greeting/post"] == b"configure\n"
    assert files["usr/share/greeting/text"] == b"hello\n"
    assert files["home/sailor/whoami"] == b"uid=2000(sailor) gid=3000(crew) groups=3000(crew)\n"
    assert b"greeter:" in files["etc/passwd"]


def test_nothing_of_the_sandbox_is_in_the_image(pulled: Pulled) -> None:
    ours = ("dev/", "proc/", "sys/", "run/runner", "workspace", "var/lib/containers")
    assert [name for name in pulled.made if name.startswith(ours)] == []


def test_the_configuration_says_what_the_dockerfile_says(pulled: Pulled) -> None:
    config = pulled.config
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    shown = config["config"]
    assert (shown["User"], shown["WorkingDir"]) == ("sailor", "/home/sailor/work")
    assert {"NAMED=given value-env", "EMPTY="} <= set(shown["Env"])
    assert shown["Entrypoint"] == ["/bin/true"]
    assert len(config["rootfs"]["diff_ids"]) == len(pulled.manifest["layers"]) == 2


def test_what_was_published_before_the_end_is_said(
    person: Person, place: Path, registry: "RealRegistry"
) -> None:
    def gone(event: Event) -> None:
        if isinstance(event, Published):
            raise BrokenPipeError

    context = write_context(place / "context", "FROM scratch\nCOPY Dockerfile /\n")
    destination = f"{registry.host}/told/app:1"
    with pytest.raises(Cancelled) as ended:
        person.submit(context, destination=destination, listen=gone)
    assert ended.value.advice == f"Published already: {destination}."
    person.assert_nothing_left()
