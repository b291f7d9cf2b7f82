# SPDX-License-Identifier: Apache-2.0
"""Run notebooks with checked parameters, end truthfully, and render what they found.

`parameters` reads and checks, `execution` runs one notebook, `status` is what is said about it, `report` shows it, and
`runs` puts several into one results folder. Nothing here knows a kernel or vLLM.
"""

from aiterlab.suite.notebook_parameters import check_parameters

__all__ = ["check_parameters"]
