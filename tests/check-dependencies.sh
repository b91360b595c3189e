#!/usr/bin/env bash
# Licences, sources, bans and advisories of all dependencies, by cargo-deny, which is built first if it is not there: in
# the version that deny.toml is written for.
# The advisory database is on the network; without it the rest is still enforced and one line says what was not checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cargo="${CARGO:-cargo}"
cargo_deny=0.20.2

if ! "$cargo" deny --version > /dev/null 2>&1; then
  "$cargo" install --locked --quiet --version "$cargo_deny" cargo-deny
fi
"$cargo" deny --workspace --locked --log-level error check licenses bans sources

database="$(mktemp -d)"
trap 'rm -rf "$database"' EXIT
if output="$(timeout 120 "$cargo" deny --workspace --locked --log-level error check advisories 2>&1)"; then
  echo "advisories ok"
elif grep -q -E 'failed to (fetch|clone|load) advisory database|failed to fetch advisory|unable to fetch|error fetching|failed to.*(resolve|connect)' <<< "$output"; then
  echo "advisories NOT checked: the advisory database cannot be reached from here"
else
  echo "$output" >&2
  exit 1
fi
