# SPDX-License-Identifier: Apache-2.0
"""Find the regression's class of fault in source code: read, never imported, nothing run."""

from aiterlab.scan.engine import Report, scan
from aiterlab.scan.findings import RULES, Finding

__all__ = ["RULES", "Finding", "Report", "scan"]
