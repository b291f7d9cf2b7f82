# SPDX-License-Identifier: Apache-2.0
"""Run notebooks with checked parameters, end truthfully, and render what they found.

`parameters` reads and checks, `execution` runs one notebook, `status` is what is said about it, `report` shows it, and
`runs` puts several into one results folder. `results` reads a run back; `metrics` declares every number of the records,
from which `bundle` writes a run's index, summary and samples, and `compare` judges two runs. Nothing here knows a
kernel or vLLM.
"""

from aiterlab import importing

importing.skip_address_grammars()  # before nbformat is imported, which imports jsonschema

from aiterlab.suite.notebook_parameters import check_parameters  # noqa: E402

__all__ = ["check_parameters"]
