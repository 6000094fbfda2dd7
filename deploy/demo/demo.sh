#!/bin/sh
# `make demo`: installs what is needed, then does the main job for real, as an
# ordinary user. As root that user is runner-demo, which this script makes; it
# cannot read root's home, so it gets a copy of the wheel and of the example.
set -eu
cd "$(dirname "$0")/../.."

deploy/debian/install-host-tools.sh runsc mmdebstrap fakechroot fakeroot docker-registry skopeo \
    python3-venv gcc libc6-dev libssl-dev

python=$(command -v /usr/bin/python3 || command -v python3)

if [ "$(id -u)" -ne 0 ]; then
    make --no-print-directory venv
    exec deploy/demo/session.sh "$PWD/.demo" "$PWD/.venv/bin" "$PWD/examples/c-hello"
fi

user=runner-demo
home=/var/lib/runner-demo
id "$user" >/dev/null 2>&1 || useradd --system --create-home --home-dir "$home" --shell /bin/sh "$user"

# A wheel per source: nothing is installed again when nothing has changed.
sources="pyproject.toml dev.lock hatch_build.py runner sandbox policies builder"
# shellcheck disable=SC2086  # a list of paths
version=$(find $sources -type f ! -name '*.pyc' ! -path 'sandbox/guest/init' \
    ! -path 'sandbox/guest/init-pod' -exec sha256sum {} + |
    LC_ALL=C sort | sha256sum | cut -c1-16)
venv=$home/venv-$version
if [ ! -e "$venv/installed" ]; then
    echo "installing runner for $user"
    rm -rf "$home"/venv-*
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r dev.lock
    "$venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --wheel-dir "$venv/wheel" .
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$venv"/wheel/*.whl
    touch "$venv/installed"
fi
rm -rf "$home/c-hello"
cp -R examples/c-hello "$home/c-hello"
install -m 755 deploy/demo/session.sh "$home/session.sh"
chown -R "$user:$user" "$home/c-hello"

cd "$home"
exec setpriv --reuid="$user" --regid="$user" --clear-groups --reset-env \
    "$home/session.sh" "$home/demo" "$venv/bin" "$home/c-hello"
