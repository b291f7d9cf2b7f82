# SPDX-License-Identifier: Apache-2.0
"""vLLM's own door for a platform: the entry point group `vllm.platform_plugins`.

vLLM asks every installed plugin for a platform class. Ours stays silent unless the process was started for a
simulated machine; then it names vLLM's real ROCm platform class, which asks the simulated driver.
"""

from __future__ import annotations

import os

from aiterlab.machines.description import ENVIRONMENT_VARIABLE


def platform() -> str | None:
    """The class path of vLLM's ROCm platform on a simulated machine, else None."""
    if ENVIRONMENT_VARIABLE not in os.environ:
        return None
    from aiterlab.machines import simulation

    simulation.install_from_environment()  # also reaches worker processes, which vLLM starts on its own
    return "vllm.platforms.rocm.RocmPlatform"
