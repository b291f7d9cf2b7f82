# SPDX-License-Identifier: Apache-2.0
"""What becomes of a VLLM_ variable whose name the tree does not know: an error, a warning, or nothing at all?"""

from __future__ import annotations

import os

from aiterlab.probes import engine
from aiterlab.probes.layer import Layer


def ask(layer: Layer, warnings: list[str]) -> dict:
    """The names that are set and unknown to the tree's `vllm.envs`, and what the tree made of them.

    Args:
        warnings: what the tree warned of while the engine was configured.
    """
    from vllm import envs

    unknown = sorted(name for name in os.environ if name.startswith("VLLM_") and name not in envs.environment_variables)
    strictness = engine.options_named("environ")  # the options of the tree that make such a name an error
    raised = None
    if unknown and strictness:
        try:
            engine.configuration(layer, **dict.fromkeys(strictness, True))
        except ValueError as error:
            raised = str(error)
    return {
        "unknown": unknown,
        "warned": all(any(name in warning for warning in warnings) for name in unknown) if unknown else False,
        "raised": raised,
        "can_be_an_error": bool(strictness),
    }
