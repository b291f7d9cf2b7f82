# SPDX-License-Identifier: Apache-2.0
"""What it takes to run one notebook: plain data, so that another process or another machine can do it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One notebook to run: where it lies, where its results go, and how long it may take."""

    notebook: Path
    run_dir: Path
    profile: str
    parameters: Mapping[str, Any]  # effective values, for the status and the report
    overrides: Mapping[str, Any]  # those of them that the notebook itself does not say
    budget_s: float
    provenance: Mapping[str, Any]
    cell_budget_s: float = math.inf
    heartbeat_s: float = 30.0
    key: Mapping[str, str] | None = None  # `resume.key`: what the result will depend on
    node: Mapping[str, Any] | None = None  # where on a cluster it runs

    @property
    def stem(self) -> str:
        """Name of the notebook, of its results folder and of its row."""
        return self.notebook.stem

    @property
    def folder(self) -> Path:
        """Folder of this notebook's results, the same that `paths.output_dir` gives inside the kernel."""
        return self.run_dir / self.stem
