#!/usr/bin/env bash
# Installs what tests/packages.txt lists and this machine lacks. Nothing to do: no network, no output.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

missing=()
while read -r package proof; do
  [[ -z "$package" || "$package" == \#* ]] && continue
  [[ -e "$proof" ]] || missing+=("$package")
done < "$here/packages.txt"
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $EUID -ne 0 ]]; then
  echo "error: not root, and these packages are missing: ${missing[*]}; run as root, or install them first" >&2
  exit 1
fi
if ! command -v apt-get > /dev/null; then
  echo "error: this is not a Debian machine; install by hand: ${missing[*]}" >&2
  exit 1
fi

# Some of these packages start a service as they are installed (containerd, docker-registry). The harness runs its own
# copies and leaves the machine's alone, so nothing is started, unless the machine already has a policy of its own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e "$policy" ]]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
echo "installing: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -q > /dev/null
apt-get install -y -q --no-install-recommends "${missing[@]}" > /dev/null
