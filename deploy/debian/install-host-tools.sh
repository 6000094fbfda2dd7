#!/bin/sh
# Installs, on Debian 12, the host tools that runner drives, and those that its
# demo and tests use. Needs root (or sudo) for apt-get and for nothing else.
#
#   deploy/debian/install-host-tools.sh [PACKAGE...]
#
# runsc comes from backports: the release's own is of 2022 and too old. The
# mirror is the one that this machine's apt already uses.
set -eu

[ $# -gt 0 ] || set -- runsc mmdebstrap fakechroot fakeroot docker-registry skopeo \
    openssl python3-venv
runsc_at_least=0.0~20240729

installed() { # PACKAGE
    version=$(dpkg-query -W -f '${db:Status-Abbrev}${Version}' "$1" 2>/dev/null) || return 1
    case "$version" in "ii "*) ;; *) return 1 ;; esac
    [ "$1" != runsc ] || dpkg --compare-versions "${version#ii }" ge "$runsc_at_least"
}

missing=
for package in "$@"; do
    installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || {
        echo "missing packages:$missing. Install them as root, or install sudo." >&2
        exit 2
    }
    as_root=sudo
fi

# docker-registry starts a service on every address. Nothing here wants that
# one: for the length of this script Debian's packages start no services.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap '$as_root rm -f /usr/sbin/policy-rc.d' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' | $as_root tee /usr/sbin/policy-rc.d >/dev/null
    $as_root chmod 755 /usr/sbin/policy-rc.d
fi

install() { # APT_OPTION... PACKAGE...
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

echo "installing:$missing"
$as_root apt-get update -qq
case "$missing " in *" runsc "*)
    missing=$(printf '%s' "$missing" | sed 's/ runsc\>//')
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    if ! apt-cache policy | grep -q "n=$codename-backports"; then
        # shellcheck disable=SC2016  # apt-get expands these
        mirror=$(apt-get indextargets --format '$(SITE)' \
            "Created-By: Packages" "Component: main" "Release: $codename" | head -n 1)
        [ -n "$mirror" ] || { echo "apt knows no mirror for $codename main" >&2; exit 2; }
        $as_root tee /etc/apt/sources.list.d/runner-backports.sources >/dev/null <<SOURCES
Types: deb
URIs: $mirror
Suites: $codename-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
        $as_root apt-get update -qq
    fi
    install -t "$codename-backports" runsc
    ;;
esac
# shellcheck disable=SC2086  # a list of package names
[ -z "$missing" ] || install $missing
