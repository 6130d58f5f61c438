# SPDX-License-Identifier: MIT
"""Breaks the code in many small ways, one after the other, and says which test sees each.

    python tests/mutants/run.py [--slow] [--all-tests] [NAME ...]

README.md of this folder has the format of a mutant. The exit status is 1 if one survives, or if it
cannot be tried: its patch does not apply, it does not build, its tests do not exist.
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
COPY = ROOT / "build" / "mutants"
LOG = ROOT / "build" / "mutants.log"  # what the tests of the last mutant printed

PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
# As `make test` runs them; the tests of a mutant run in one process.
PARALLEL = ["--numprocesses=auto", "--maxprocesses=8", "--dist=worksteal"]
BUILD = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "python"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(COPY / "python"), *os.environ.get("PYTHONPATH", "").split()]),
    "OMP_NUM_THREADS": "1",  # as in the workers of `make test`
    "LPSGD_CUDA": "0",  # the tests that need CUDA kernels build a module of their own
}
MINUTES, MINUTES_OF_ALL = 8, 60  # after these the tests hang


class Mutant(NamedTuple):
    """One patch; `what` it breaks, and the `tests` that should see it, or the `slow` command."""

    path: Path
    what: str
    tests: list[str]
    slow: str
    files: list[str]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_compiled(self) -> bool:
        """Whether the module has to be built anew. Without CUDA kernels it has none of their files."""
        return any(
            file.startswith(("csrc/", "lpsgd_ext/", "setup.py")) and "cuda" not in file
            for file in self.files
        )


class Outcome(NamedTuple):
    caught: bool
    by: str  # which test, or what else came of it


def read(path: Path) -> Mutant:
    text = path.read_text()
    head = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    fields = {key: [h.removeprefix(key) for h in head if h.startswith(key)] for key in FIELDS}
    tests = [test for line in fields["tests:"] for test in shlex.split(line)]
    files = re.findall(r"(?m)^\+\+\+ b/(\S+)", text)
    return Mutant(path, head[0], tests, "".join(fields["slow:"]).strip(), files)


FIELDS = ("tests:", "slow:")


def run(command: Sequence[str], minutes: float = MINUTES) -> tuple[int | None, str]:
    """The exit status of a program in the copy, None if it hangs, and what it printed."""
    with open(LOG, "w+") as log:
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


def must(command: Sequence[str]) -> None:
    status, output = run(command)
    if status != 0:
        raise RuntimeError(f"{shlex.join(command)}:\n{output[-4000:]}")


def make_copy() -> None:
    """The tracked files as they are now, in a repository of its own, and the module."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    shutil.rmtree(COPY, ignore_errors=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)
    must(["git", "init", "-q"])
    must(BUILD)


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The mutant in the copy, built; without it again afterwards."""
    (module,) = (COPY / "python").glob("lpsgd_ext*.so")
    kept = COPY / "build" / "kept"
    shutil.copy2(module, kept)
    must(["git", "apply", str(mutant.path)])
    try:
        if mutant.is_compiled:
            must(BUILD)
        yield
    finally:
        must(["git", "apply", "--reverse", str(mutant.path)])
        module.unlink(missing_ok=True)
        shutil.copy2(kept, module)


def outcome(status: int | None, output: str) -> Outcome:
    """What a run of tests says of the mutant."""
    if status is None:
        return Outcome(True, "hangs")
    if status < 0:
        return Outcome(True, f"crashes: {signal.Signals(-status).name}")
    if status == 0:
        return Outcome(False, "SURVIVES")
    failed = re.search(r"(?m)^(?:FAILED|ERROR) (.+?)(?: - |$)", output)
    if status == 1 and failed:
        return Outcome(True, failed[1])
    return Outcome(False, f"ERROR: the tests did not run (status {status}), see {LOG}")


def try_out(mutant: Mutant, all_tests: bool) -> Outcome:
    try:
        with applied(mutant):
            if all_tests:
                return outcome(*run([*PYTEST, *PARALLEL], MINUTES_OF_ALL))
            if mutant.slow:
                status, _ = run(shlex.split(mutant.slow), MINUTES_OF_ALL)
                return Outcome(status != 0, mutant.slow if status != 0 else "SURVIVES")
            return outcome(*run([*PYTEST, *mutant.tests]))
    except RuntimeError as error:
        return Outcome(False, f"ERROR: {error}")


def check_without(mutants: Iterable[Mutant]) -> None:
    """A test that fails or is skipped without any mutant would say nothing of one."""
    tests = sorted({test for mutant in mutants if not mutant.slow for test in mutant.tests})
    status, output = run([*PYTEST, *tests], MINUTES_OF_ALL) if tests else (0, "")
    if status != 0 or "SKIPPED" in output:
        raise RuntimeError(f"without a mutant not all of the tests pass:\n{output[-4000:]}")
    for command in sorted({mutant.slow for mutant in mutants if mutant.slow}):
        must(shlex.split(command))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants")
    parser.add_argument("--slow", action="store_true", help="also those that no test of `make test` sees")
    parser.add_argument("--all-tests", action="store_true", help="all of `make test` for each mutant")
    options = parser.parse_args()
    mutants = [read(path) for path in sorted(FOLDER.glob("*.patch"))]
    if unknown := {*options.names} - {mutant.name for mutant in mutants}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if options.names:
        mutants = [mutant for mutant in mutants if mutant.name in options.names]
    elif not options.slow:
        mutants = [mutant for mutant in mutants if not mutant.slow]

    make_copy()
    for mutant in mutants:
        must(["git", "apply", "--check", str(mutant.path)])
    if not options.all_tests:
        check_without(mutants)
    width = max(len(mutant.name) for mutant in mutants)
    bad = []
    for mutant in mutants:
        start = time.monotonic()
        result = try_out(mutant, options.all_tests)
        seconds = time.monotonic() - start
        print(f"{mutant.name:{width}} {seconds:5.0f} s  {result.by}", flush=True)
        if not result.caught:
            bad.append(mutant)
    print(f"{len(mutants) - len(bad)} of {len(mutants)} mutants are caught")
    for mutant in bad:
        print(f"not caught: {mutant.name}: {mutant.what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
