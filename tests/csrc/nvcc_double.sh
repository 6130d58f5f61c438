#!/bin/sh
# SPDX-License-Identifier: MIT
#
# nvcc_double.sh OPTION... SOURCE.cu -o IMAGE: writes what cuda_double.c takes for a fat binary of
# the source: the header of one, and the source. nvcc_double.sh --version: it is of CUDA 13.0.
if [ "$1" = --version ]; then
    echo "Cuda compilation tools, release 13.0"
    exit
fi
while [ $# -gt 0 ]; do
    case $1 in
    -o) image=$2 && shift ;;
    *.cu) source=$1 ;;
    esac
    shift
done
size=$(wc -c <"$source")
{
    printf '\120\355\125\272\001\000\020\000'
    for shift in 0 8 16 24 32 40 48 56; do
        printf "\\$(printf %03o $((size >> shift & 255)))"
    done
    cat "$source"
} >"$image"
