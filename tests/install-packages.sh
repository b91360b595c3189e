#!/usr/bin/env bash
# Looks for what no package can bring (root, FUSE, overlayfs), then installs what tests/packages.txt lists and this
# machine lacks. What is in the way is one line. Nothing to do: no network, no output.
# With --packages only the packages: for `make check`, which mounts nothing; else also the containerd 2.x of
# tests/install-containerd-2.sh.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
  echo "error: $*" >&2
  exit 1
}

packages_only=""
[[ "${1:-}" != --packages ]] || packages_only=yes

# What is not a package of this release, and needs some.
finish() {
  [[ -n "$packages_only" ]] || bash "$here/install-containerd-2.sh"
}

if [[ -z "$packages_only" ]]; then
  [[ $EUID -eq 0 ]] || fail "not root: namespaces, mounts and cgroups need it; run it with sudo"
  # Opened, for in a container the device may be there and forbidden.
  { [[ -c /dev/fuse ]] && : <> /dev/fuse; } 2> /dev/null || fail "cannot open /dev/fuse: load the fuse module, or give this container the device"
  grep -q -w overlay /proc/filesystems || fail "the kernel has no overlayfs: load the overlay module"
fi

missing=()
while read -r package proof; do
  [[ -z "$package" || "$package" == \#* ]] && continue
  [[ -e "$proof" ]] || missing+=("$package")
done < "$here/packages.txt"
if [[ ${#missing[@]} -eq 0 ]]; then
  finish
  exit
fi

[[ $EUID -eq 0 ]] || fail "not root, and these packages are missing: ${missing[*]}; run as root, or install them first"
command -v apt-get > /dev/null || fail "this is not a Debian machine; install by hand: ${missing[*]}"

# Some of these packages start a service as they are installed (containerd, docker-registry). The harness runs its own
# copies and leaves the machine's alone, so nothing is started, unless the machine already has a policy of its own.
log="$(mktemp)"
policy=/usr/sbin/policy-rc.d
if [[ -e "$policy" ]]; then
  trap 'rm -f "$log"' EXIT
else
  trap 'rm -f "$log" "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
fi
echo "installing: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive

# apt's own first error, which names the package or the archive.
apt() {
  apt-get -q -o DPkg::Use-Pty=0 "$@" > "$log" 2>&1 ||
    fail "apt-get $1 failed (for ${missing[*]}): $(grep -m 1 '^E: ' "$log" || tail -n 1 "$log")"
}
apt update
apt install -y --no-install-recommends "${missing[@]}"
finish
