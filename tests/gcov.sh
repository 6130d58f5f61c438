#!/bin/sh
# SPDX-License-Identifier: MIT
#
# gcov.sh FOLDER: says, after `make coverage` has run the tests, how much of C ran, and prints the
# lines that did not: of csrc in the C tests, of lpsgd_ext in the module's.
folder=$(realpath "$1")

# report DIRECTORY SOURCES DATA...: gcov wants to run where the compiler ran.
report() {
    cd "$1" || exit 1
    pattern=$2
    shift 2
    for data in "$@"; do
        rm -f "$folder"/*.gcov
        gcov -r -p "$data" 2>/dev/null | grep -A1 "^File.*$pattern" | grep -v "^--"
        mv ./*.gcov "$folder"
        grep -H "#####" $(ls "$folder"/*.gcov | grep "$pattern") | sed "s|^$folder/||"
    done
    cd - >/dev/null || exit 1
}

report csrc 'lpsgd_' "$folder"/c/lib/*.gcda
report tests/csrc 'lpsgd_cuda\.c' "$folder"/c/test_cuda-test_cuda.gcda
report . 'lpsgd_ext' "$folder"/objects/lpsgd_ext/*.gcda
