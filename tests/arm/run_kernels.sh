#!/usr/bin/env bash
# The kernel test for Arm from another processor: cross-compiled, run under qemu. On Debian:
# apt install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
here=$(cd "$(dirname "$0")" && pwd)
export CXX=${CXX:-aarch64-linux-gnu-g++}
program=$("$here/../native/build.sh" "$folder" -O2 -static)
qemu-aarch64 -cpu max "$program" "$folder"
