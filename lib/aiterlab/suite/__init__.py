# SPDX-License-Identifier: Apache-2.0
"""Run notebooks with checked parameters, end truthfully, and render what they found.

`parameters` reads and checks, `execution` runs one notebook, `status` is what is said about it, `report` shows it, and
`runs` puts several into one results folder. `results` reads a run back; `metrics` declares every number of the records,
from which `bundle` writes a run's index, summary and samples, and `compare` judges two runs. Nothing here knows a
kernel or vLLM.
"""

import sys

# nbformat imports jsonschema, which imports this where it is installed: a grammar of international addresses that takes
# two seconds to compile, in every process. jsonschema does without it.
sys.modules.setdefault("rfc3987_syntax", None)

from aiterlab.suite.notebook_parameters import check_parameters  # noqa: E402

__all__ = ["check_parameters"]
