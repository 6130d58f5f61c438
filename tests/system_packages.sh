#!/bin/sh
# SPDX-License-Identifier: MIT
#
# system_packages.sh NEED...: sees to the system packages behind the named needs. As root on Debian
# or Ubuntu it installs what is missing; elsewhere it says what is missing, and the tests that need
# it are skipped.
python=${PYTHON:-python3}

has() {
    case $1 in
    python-venv) "$python" -c "import ensurepip, venv" ;;
    python-dev) "$python" -c "
import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')))" ;;
    python-debug) command -v python3-dbg ;;
    ccache) command -v ccache ;;
    clang) command -v clang ;;
    clang-sanitizers) echo '#include <omp.h>' | clang -fopenmp -E - &&
        [ -e "$(clang -print-file-name="libclang_rt.asan-$(uname -m).so")" ] ;;
    valgrind) command -v valgrind ;;
    libfuzzer) test -e "$(clang -print-resource-dir)/lib/linux/libclang_rt.fuzzer-$(uname -m).a" ;;
    pkg-config) command -v pkg-config ;;
    cmocka) echo '#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>' | ${CC:-cc} -E - ;;
    debootstrap) command -v debootstrap && command -v dpkg ;;
    wine) command -v wine ;;
    llvm) command -v llvm-nm && command -v llvm-readobj ;;
    qemu-user) command -v qemu-aarch64 && command -v qemu-x86_64 ;;
    cross-*) echo '#include <stdio.h>' | "${1#cross-}-linux-gnu-gcc" -E - ;;
    esac >/dev/null 2>&1
}

packages_of() {
    case $1 in
    python-venv) echo python3-venv ;;
    python-dev) echo python3-dev ;;
    python-debug) echo python3-dbg ;;
    ccache) echo ccache ;;
    clang) echo clang ;;
    clang-sanitizers) echo libclang-rt-dev libomp-dev ;;
    valgrind) echo valgrind ;;
    libfuzzer) echo libclang-rt-dev ;;
    pkg-config) echo pkg-config ;;
    cmocka) echo libcmocka-dev ;;
    debootstrap) echo debootstrap ;;
    wine) echo wine wine64 ;;
    llvm) echo llvm ;;
    qemu-user) echo qemu-user ;;
    cross-aarch64) echo gcc-aarch64-linux-gnu libc6-dev-arm64-cross ;;
    cross-*) echo "gcc-${1#cross-}-linux-gnu libc6-dev-${1#cross-}-cross" ;;
    esac
}

missing=
packages=
for need in $(echo " $* " | sed 's/ python / python-venv python-dev /'); do
    has "$need" && continue
    missing="$missing $need"
    packages="$packages $(packages_of "$need")"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null; then
    echo "Installing$packages"
    apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages \
            >/dev/null || echo "apt-get could not install$packages; going on without" >&2
else
    echo "Missing:$missing (on Debian or Ubuntu: apt-get install$packages)" >&2
fi
