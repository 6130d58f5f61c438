#!/bin/sh
# SPDX-License-Identifier: MIT
#
# check_example.sh DIRECTORY: installs csrc there and does with its README what a reader would do:
# compiles the program with the command given below it, without a warning, and runs it. The library is
# not optimized, which would take longer than all the rest.
set -eu
cc=${CC:-cc}
csrc=$(cd "$(dirname "$0")/../../csrc" && pwd)
rm -rf "$1"
mkdir -p "$1"
cd "$1"
make -s -C "$csrc" install CC="$cc" CFLAGS=-O0 WERROR=1 BUILD="$PWD/lib" PREFIX="$PWD/prefix"
export PKG_CONFIG_PATH="$PWD/prefix/lib/pkgconfig"

sed -n '/^```c$/,/^```$/p' "$csrc/README.md" | sed '/^```/d' >train.c
[ "$(wc -l <train.c)" -le 60 ]
command=$(sed -n 's/^cc //p' "$csrc/README.md")
eval "$cc -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror $command"
./train | tee output
awk '/before/ { before = $NF } /after/ { after = $NF }
    END { exit !(before > 0 && after > 0 && after < before / 3) }' output ||
    { echo "check_example: the loss did not fall to a third" >&2; exit 1; }
