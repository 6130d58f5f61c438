# SPDX-License-Identifier: MIT
"""Counts of references."""

import contextlib
import gc
import sys


def count_references() -> int:
    """The references to all objects that the garbage collector knows or finds within those."""
    gc.collect()
    known = gc.get_objects()
    found = {id(one): one for one in (*known, *gc.get_referents(*known))}
    counts = map(sys.getrefcount, found.values())
    return sum(count for count in counts if count < 100_000_000)  # others are immortal


@contextlib.contextmanager
def references_kept(objects):
    """What is done 50 times within keeps and loses no reference to any of these objects."""

    def changed():
        counts = map(sys.getrefcount, objects)
        # Others come and go by a few.
        return [i for i, count in enumerate(counts) if abs(count - before[i]) >= 25]

    before = list(map(sys.getrefcount, objects))
    yield
    if changed():
        gc.collect()  # a traceback may be in a cycle
    assert not changed(), [objects[i] for i in changed()]
