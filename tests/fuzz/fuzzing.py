# SPDX-License-Identifier: MIT
"""How long to fuzz: FUZZ_SECONDS, or for as long as a fixed number of cases takes, the same ones
each time. That is what `make test` does, in seconds."""

import os

SECONDS = float(os.environ["FUZZ_SECONDS"]) if "FUZZ_SECONDS" in os.environ else None


def report(text):
    """Into pytest's output, which `make fuzz` shows."""
    print(f"\n{text}")
