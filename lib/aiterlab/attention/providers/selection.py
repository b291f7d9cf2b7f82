# SPDX-License-Identifier: Apache-2.0
"""Which providers run, and why not the others? By `policy`'s rule, which this project demonstrates on vLLM.

Several providers run side by side, so each is selected by itself: with no choice stated, if it is preferred; named by
the user, if it is available, whatever a switch says.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from aiterlab.attention.providers.aiter_compiled import AITER
from aiterlab.attention.providers.aiter_triton import AITER_TRITON
from aiterlab.attention.providers.flash_attn import FLASH_ATTN
from aiterlab.attention.providers.provider import Implementation, Provider
from aiterlab.attention.providers.reference import REFERENCE
from aiterlab.attention.providers.suite import SUITE
from aiterlab.attention.providers.torch_sdpa import TORCH_SDPA
from aiterlab.attention.providers.vllm_triton import VLLM_TRITON
from aiterlab.attention.workloads import Workload
from aiterlab.policy import Selection, selection

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for provider in (REFERENCE, SUITE, AITER, AITER_TRITON, VLLM_TRITON, FLASH_ATTN, TORCH_SDPA)
}


def choose(asked: Sequence[str] | None = None, switches: Mapping[str, str] | None = None) -> dict[str, Selection]:
    """Select every provider by itself.

    Args:
        asked: names of providers that must run; None: those that are preferred
        switches: environment variables; None: the process's own

    Raises:
        ValueError: no provider has such a name.
    """
    if unknown := set(asked or ()) - PROVIDERS.keys():
        raise ValueError(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(PROVIDERS)}")
    switches = os.environ if switches is None else switches
    chosen = {}
    for name, provider in PROVIDERS.items():
        if asked is not None and name not in asked:
            chosen[name] = Selection(None, "not asked", {name: f"{', '.join(asked)} asked for"})
        else:
            chosen[name] = selection([provider.candidate(switches)], explicit=name if asked is not None else None)
    return chosen


def implementations(asked: Sequence[str] | None = None) -> tuple[Implementation, ...]:
    """All implementations of the providers that run; see `choose`."""
    return tuple(
        implementation
        for name, how in choose(asked).items()
        if how.chosen
        for implementation in PROVIDERS[name].implementations
    )


def table(asked: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per provider: both of policy's answers, what was selected, and the reason."""
    rows = []
    for name, how in choose(asked).items():
        candidate = PROVIDERS[name].candidate(os.environ)
        rows.append(
            {
                "provider": name,
                "available": candidate.available.holds,
                "preferred": candidate.preferred.holds,
                "runs": how.chosen is not None,
                "how": how.how,
                "reason": how.reasons[name],
                "implementations": ", ".join(i.name for i in PROVIDERS[name].implementations),
            }
        )
    return pd.DataFrame(rows)


def refusals(workloads: Iterable[Workload], asked: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per implementation and workload that do not meet, with the reason; of the providers that run."""
    rows = [
        {"workload": w.name, "provider": i.provider, "implementation": i.name, "reason": answer.reason}
        for i in implementations(asked)
        for w in workloads
        if not (answer := i.supports(w))
    ]
    return pd.DataFrame(rows, columns=["workload", "provider", "implementation", "reason"])
