#!/bin/sh
# Installs a build of quantattn into a scratch prefix, then builds and runs the first program of docs/cpp.md against it.
# Usage: check.sh BUILD_DIR [cmake options of the consumer, for example -G Ninja]
set -eu
build=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cmake --install "$build" --prefix "$scratch/prefix" > "$scratch/install.log"
sed -n '/^```cpp$/,/^```$/p' "$here/../../../docs/cpp.md" | sed -e '/^```cpp$/d' -e '/^```$/,$d' > "$scratch/first_program.cc"
test -s "$scratch/first_program.cc"
cmake -S "$here" -B "$scratch/consumer" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$scratch/prefix" \
  -DEXAMPLE_SOURCE="$scratch/first_program.cc" -DCMAKE_CXX_FLAGS="-Wall -Wextra -Werror" "$@"
cmake --build "$scratch/consumer"
"$scratch/consumer/first_program"
