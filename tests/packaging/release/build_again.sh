#!/bin/sh
# SPDX-License-Identifier: MIT
# Builds what dist holds once more, from clone in another folder, under another umask and at another
# time, and compares the bytes. The tools are those of `make wheel`.
set -eu
umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet . "$folder/clone"
mkdir "$folder/clone/build"
ln -s "$PWD/build/venv-release" "$folder/clone/build"
make -C "$folder/clone" -o build/venv-release/.tools wheel >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
status=0
for file in dist/*; do
    cmp "$file" "$folder/clone/$file" && echo "the same bytes: $file" || status=1
done
exit $status
