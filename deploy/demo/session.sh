#!/bin/sh
# The demo itself: session.sh STATE BIN CONTEXT, as an ordinary user.
# Nothing here is privileged, and everything it makes is below STATE.
set -eu
state=$1
bin=$2
context=$3

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}
say() { printf '\n== %s\n' "$*"; }

mkdir -p "$state"
cd "$state"
python=$bin/python

say "who runs this"
show id

say "a registry on loopback"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
registry=127.0.0.1:$port
cat >registry.yml <<YAML
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $state/registry}}
http: {addr: "$registry"}
YAML
docker-registry serve registry.yml >registry.log 2>&1 &
registry_pid=$!
trap 'kill $registry_pid 2>/dev/null || true' EXIT
tries=0
until "$python" -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 50 ] || { cat registry.log >&2; exit 1; }
    sleep 0.1
done
echo "$registry"

# Plain HTTP and a loopback address are refused unless somebody names the registry.
cat >config.toml <<TOML
[registries."$registry"]
plain_http = true
private_address = true
TOML
export RUNNER_CONFIG="$state/config.toml" XDG_DATA_HOME="$state/data"
export XDG_STATE_HOME="$state/state" XDG_RUNTIME_DIR="$state/run"
mkdir -p -m 700 run

say "the builder's root filesystem, from the distribution's packages"
show "$bin/runner" builder install buildah

if [ ! -s base.tar ]; then
    say "a Debian base image, made once (half a minute)"
    mirror=$("$python" -c 'from runner.stores.debian import host_mirror; print(host_mirror())')
    mmdebstrap --mode=fakechroot --variant=minbase --include=gcc,libc6-dev --quiet \
        bookworm base.part.tar "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main"
    mv base.part.tar base.tar
fi
base=$registry/library/debian:12
skopeo copy --quiet --dest-tls-verify=false "tarball:base.tar" "docker://$base"

say "what this host can do"
show "$bin/runner" doctor || [ $? -eq 1 ]

say "an untrusted context, built inside gVisor"
show "$bin/runner" submit --untrusted "$context" \
    --build-arg "BASE=$base" \
    --destination "$registry/demo/c-hello:1" \
    --digest-file digest
digest=$(cat digest)

say "the same image, as an independent client sees it"
show skopeo inspect --tls-verify=false --format '{{.Name}} {{.Digest}}' "docker://$registry/demo/c-hello:1"
seen=$(skopeo inspect --tls-verify=false --format '{{.Digest}}' "docker://$registry/demo/c-hello:1")
[ "$seen" = "$digest" ] || { echo "the digests differ: $seen, $digest" >&2; exit 1; }
show "$bin/runner" verify "$registry/demo/c-hello@$digest"

say "and what it does, in a sandbox too"
rm -rf pulled hello
skopeo copy --quiet --src-tls-verify=false "docker://$registry/demo/c-hello@$digest" "oci:pulled"
for layer in pulled/blobs/sha256/*; do
    if tar -tzf "$layer" 2>/dev/null | grep -qx usr/local/bin/hello; then
        mkdir -p hello
        tar -xzf "$layer" -C hello usr/local/bin/hello
    fi
done
show timeout 60 runsc --rootless --root="$state/run/runsc" --network=none --ignore-cgroups \
    "do" "$state/hello/usr/local/bin/hello"

say "the digest"
echo "$registry/demo/c-hello@$digest"
