#!/usr/bin/env bash
# A containerd 2.x with its shim and runc beside the machine's own, for the tests and figures that run on both: packages
# of Debian's next release, fetched and verified by apt with a state of its own, unpacked into a cache of our own, and
# bound to the C library that they came with. Nothing of the system changes. Already there: no network, no output.
set -euo pipefail

# The harness looks here, too (tests/src/release.rs).
cache="${HULLSPEED_CONTAINERD_2:-/var/cache/hullspeed/containerd-2}"
release=forky
packages=(containerd runc libc6 libseccomp2)
# Changes with whatever makes the content another; what another version of this script left is replaced.
stamp="1 $release ${packages[*]}"

[[ -f "$cache/stamp" && "$(< "$cache/stamp")" == "$stamp" ]] && exit 0

fail() {
  echo "error: containerd 2.x for the tests: $*" >&2
  exit 1
}

[[ $EUID -eq 0 ]] || fail "not root: $cache cannot be made"
mkdir -p "$(dirname "$cache")"
# Two runs at once: the second finds what the first has made.
exec 9> "$cache.lock"
flock 9
[[ -f "$cache/stamp" && "$(< "$cache/stamp")" == "$stamp" ]] && exit 0

echo "fetching containerd 2.x of Debian $release into $cache" >&2
work="$(mktemp -d "$cache.XXXXXX")"
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state,lists/partial,archives/partial,debs,root}
touch "$work/status"

# The machine's archive, else Debian's own; the machine's proxies; no other settings of the machine, no hooks.
archive="$(apt-get indextargets --format '$(COMPONENT)|$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' 2> /dev/null |
  awk -F'|' '$1 == "main" && $2 !~ /[-\/]/ && $3 ~ /^https?:.*\/debian\/?$/ { print $3; exit }')" || true
archive="${archive:-http://deb.debian.org/debian}"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $release main" > "$work/sources.list"
{
  apt-config dump | grep -E '^Acquire::(http|https)::' || true
  cat << CONFIG
Dir::Etc::main "/dev/null";
Dir::Etc::parts "$work/none";
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "$work/none";
Dir::State "$work/state";
Dir::State::status "$work/status";
Dir::State::lists "$work/lists";
Dir::Cache "$work";
Dir::Cache::archives "$work/archives";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "root";
CONFIG
} > "$work/apt.conf"

apt() {
  APT_CONFIG="$work/apt.conf" apt-get -q -o DPkg::Use-Pty=0 "$@" > "$work/log" 2>&1 ||
    fail "apt-get $1 from $archive failed: $(grep -m 1 '^E: ' "$work/log" || tail -n 1 "$work/log")"
  # An archive that cannot be reached is only a warning to apt.
  ! grep -q '^W: .*Failed to fetch' "$work/log" || fail "$(grep -m 1 '^W: .*Failed to fetch' "$work/log" | cut -c 4-)"
}
apt update
(cd "$work/debs" && apt download "${packages[@]}")
for deb in "$work"/debs/*.deb; do
  dpkg-deb -x "$deb" "$work/root" || fail "$(basename "$deb") cannot be unpacked"
done

# The programs and the libraries that they load, by names that stay when the directory moves into its place.
made="$work/made"
mkdir -p "$made"/{bin,lib}
libraries=("$work"/root/usr/lib/*/{ld-linux*.so.*,libc.so.6,libresolv.so.2,libpthread.so.0,libdl.so.2,libm.so.6,libseccomp.so.2})
cp -L "${libraries[@]}" "$made/lib/" || fail "the packages lack a library"
interpreter="$(basename "$made"/lib/ld-linux*)"
for program in usr/bin/containerd usr/bin/containerd-shim-runc-v2 usr/sbin/runc; do
  cp -L "$work/root/$program" "$made/bin/" || fail "the packages lack /$program"
  patchelf --set-interpreter "$cache/lib/$interpreter" --force-rpath --set-rpath "$cache/lib" \
    "$made/bin/$(basename "$program")" || fail "patchelf failed on $program"
done
(cd "$work/debs" && printf '%s\n' *.deb) > "$made/packages"

rm -rf "$cache"
mv "$made" "$cache"
for program in containerd containerd-shim-runc-v2 runc; do
  version="--version"
  [[ "$program" == containerd-shim-runc-v2 ]] && version=-v
  "$cache/bin/$program" "$version" > "$work/log" 2>&1 || fail "$program does not run: $(tail -n 1 "$work/log")"
done
echo "$stamp" > "$cache/stamp"
