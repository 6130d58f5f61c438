# SPDX-License-Identifier: MIT
"""What the package has for files, by the name that the studies and the battery know it by."""

from lpsgd.experiments._records import dumps, jsonable, rounded, write_whole

__all__ = ["dumps", "jsonable", "rounded", "write_whole"]
