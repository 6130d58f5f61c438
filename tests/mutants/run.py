# SPDX-License-Identifier: MIT
"""Breaks the code in many small ways, one after the other, and says which test sees each.

    python tests/mutants/run.py [--slow] [--all-tests] [NAME ...]

README.md beside this has the format of a mutant. The exit status is 1 if a mutant survives, or
cannot be tried: its patch does not apply, it does not build, or its tests do not run.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
COPY = ROOT / "build" / "mutants"
LOG = ROOT / "build" / "mutants.log"  # what the last program printed

PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
PARALLEL = ["--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile"]  # as in `make test`
# With the stand-in for nvcc, so that mutants of the CUDA code compile without a warning too.
BUILD = ["env", "LPSGD_WERROR=1", "LPSGD_CUDA=1", "NVCC=tests/csrc/nvcc_double.sh"]
BUILD += [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "python"]
APPLY = ["git", "apply"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(COPY / "python"),
    "OMP_NUM_THREADS": "1",  # as in the workers of `make test`
    "LPSGD_CUDA": "0",  # what tests build need not wait for nvcc
}
MINUTES, MINUTES_OF_ALL = 8, 60  # tests that take longer hang


class Failure(Exception):
    """Something that has to work does not, so that nothing is known of the mutant."""


class Mutant(NamedTuple):
    """A patch, with `what` it breaks and the `tests`, or the `slow` command, that see it."""

    path: Path
    what: str
    tests: list[str]
    slow: list[str]
    files: list[str]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_compiled(self) -> bool:
        return any(file.startswith(("csrc/", "lpsgd_ext/", "setup.py")) for file in self.files)


def read(path: Path) -> Mutant:
    what, *rest = path.read_text().splitlines()

    def words_of(field: str) -> list[str]:
        lines = [line.removeprefix(field) for line in rest if line.startswith(field)]
        return shlex.split(" ".join(lines))

    files = [line.removeprefix("+++ b/") for line in rest if line.startswith("+++ b/")]
    return Mutant(path, what.removeprefix("# "), words_of("# tests:"), words_of("# slow:"), files)


def run(command: Sequence[str], minutes: float = MINUTES) -> tuple[int | None, str]:
    """The exit status of a program in the copy, None if it hangs, and what it printed."""
    with open(LOG, "w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=COPY, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status: int | None = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return status, log.read()


def must(command: Sequence[str], minutes: float = MINUTES) -> str:
    status, output = run(command, minutes)
    if status != 0:
        raise Failure(f"{shlex.join(command)}: exit status {status}\n{output[-4000:]}")
    return output


def make_copy() -> None:
    """The tracked files as they lie here, and the module built from them."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    shutil.rmtree(COPY, ignore_errors=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)
    must(["git", "init", "-q"])  # else `git apply` would take the paths for those of ROOT
    must(BUILD)


def check_without_mutants(mutants: Sequence[Mutant]) -> None:
    """A test that fails, or is skipped, in any case says nothing of a mutant."""
    if stale := [one.name for one in mutants if run([*APPLY, "--check", str(one.path)])[0] != 0]:
        raise Failure(f"patches that do not apply: {', '.join(stale)}")
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    if tests and "SKIPPED" in (output := must([*PYTEST, *PARALLEL, *tests], MINUTES_OF_ALL)):
        raise Failure(f"tests of mutants are skipped here:\n{output[-4000:]}")
    for mutant in mutants:
        if mutant.slow:
            must(mutant.slow, MINUTES_OF_ALL)


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The copy with the mutant in it, built; afterwards as before."""
    (module,) = (COPY / "python").glob("lpsgd_ext*.so")
    kept = COPY / "build" / "kept.so"
    shutil.copy2(module, kept)
    must([*APPLY, str(mutant.path)])
    try:
        if mutant.is_compiled:
            must(BUILD)
        yield
    finally:
        must([*APPLY, "--reverse", str(mutant.path)])
        module.unlink(missing_ok=True)
        shutil.copy2(kept, module)


def catcher(mutant: Mutant, all_tests: bool) -> str | None:
    """Which test sees the mutant, or what else comes of it; None if it survives."""
    with applied(mutant):
        if all_tests:
            status, output = run([*PYTEST, *PARALLEL], MINUTES_OF_ALL)
        elif mutant.slow:
            status, output = run(mutant.slow, MINUTES_OF_ALL)
        else:
            status, output = run([*PYTEST, *mutant.tests])
    if status == 0:
        return None
    if status is None:
        return "hangs"
    if status < 0:
        return f"crashes by {signal.Signals(-status).name}"
    if mutant.slow and not all_tests:
        return shlex.join(mutant.slow)
    failed = re.search(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - |$)", output)
    if status != 1 or not failed:  # no such test, an error outside of tests
        raise Failure(f"pytest: exit status {status}\n{output[-4000:]}")
    return failed[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants")
    parser.add_argument("--slow", action="store_true", help="those that `make test` can't see too")
    parser.add_argument("--all-tests", action="store_true", help="all of `make test` for each")
    options = parser.parse_args()
    mutants = [read(path) for path in sorted(FOLDER.glob("*.patch"))]
    if unknown := {*options.names} - {mutant.name for mutant in mutants}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    if options.names:
        mutants = [mutant for mutant in mutants if mutant.name in options.names]
    elif not options.slow:
        mutants = [mutant for mutant in mutants if not mutant.slow]

    make_copy()
    check_without_mutants(mutants)
    width, uncaught = max(len(mutant.name) for mutant in mutants), 0
    for mutant in mutants:
        start = time.monotonic()
        try:
            result = catcher(mutant, options.all_tests) or f"SURVIVES: {mutant.what}"
            uncaught += result.startswith("SURVIVES")
        except Failure as failure:
            result, uncaught = f"ERROR: {failure}", uncaught + 1
        print(f"{mutant.name:{width}}  {time.monotonic() - start:4.0f} s  {result}", flush=True)
    print(f"{len(mutants) - uncaught} of {len(mutants)} mutants are caught")
    return 1 if uncaught else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(str(failure))
