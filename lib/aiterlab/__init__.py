# SPDX-License-Identifier: Apache-2.0
"""Ask real vLLM and AITER code a question on a machine that we describe, and write the answer down."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("aiterlab")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"
