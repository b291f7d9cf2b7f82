# SPDX-License-Identifier: Apache-2.0
"""vLLM's documented policy on AITER as statements: a sentence, its check, its source, and what a maintainer can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiterlab.audit import checks
from aiterlab.audit.judgement import Judgement, Statement, Verdict, judge_one
from aiterlab.policy import MAIN_SWITCH

STATEMENTS = (
    Statement(
        "explicit choice",
        "An explicit choice wins or is refused with a reason; it is never silently replaced.",
        checks.explicit_choice,
        "vllm-project/vllm#26980, #29371 and the docstring of vllm._aiter_ops.is_aiter_found_and_supported",
        "validate the requested backend alone and raise its reasons; fall back only where nothing was asked for",
        "no backend was asked for by name",
    ),
    Statement(
        "availability",
        f"Availability does not move with the switch: {MAIN_SWITCH} decides what is preferred, not what can be had.",
        checks.availability,
        "vllm-project/vllm#33749 (broken by #32902)",
        "read the switch in is_enabled() and its family only, never in is_aiter_found_and_supported()",
        "no cell was asked with the switch in two positions",
    ),
    Statement(
        "switch off",
        "With the switch off, nothing imports AITER or chooses a backend of it that was not asked for by name.",
        checks.switched_off,
        "vllm-project/vllm#32902; rocm_aiter_ops documents the switch as the main toggle for all AITER operations",
        "list AITER's backends behind is_enabled() and its family; import the library where it is called",
        "no cell has AITER installed, the switch off and none of its backends asked for",
    ),
    Statement(
        "documented default",
        "With the switch on, the documented default is chosen: ROCM_AITER_FA, or AITER's MLA, on gfx942 and gfx950.",
        checks.documented_default,
        "blog.vllm.ai, 2026-02-27 (ROCm attention backend); vllm-project/vllm#46596",
        "put ROCM_AITER_FA before ROCM_ATTN where is_mha_enabled() holds (vllm-project/vllm#58146), or mend the docs",
        "no cell has the switch on, on a GPU that the documentation names",
    ),
    Statement(
        "sub-switches",
        "Sub-switches are honoured: off keeps its backend out, on brings it in where it can be had.",
        checks.sub_switches,
        "vllm-project/vllm#56021; the comments of vllm/envs.py",
        "ask is_mha_enabled(), is_mla_enabled() and is_triton_unified_attn_enabled() where the priorities are listed",
        "no cell sets a sub-switch of attention with the main switch on",
    ),
    Statement(
        "architecture",
        "An architecture that vLLM does not count as supported is refused before the first token, not at it.",
        checks.architecture,
        "vllm-project/vllm#33749 (reasons in validate_configuration), #36702 (AITER is not built for gfx90a), #56021",
        "have supports_compute_capability() of the backend ask the same function as availability does",
        "AITER's backends were not asked for by name on an unsupported GPU",
    ),
    Statement(
        "missing library",
        "A backend whose library is not installed is refused before the first token, not at it.",
        checks.missing_library,
        "vllm-project/vllm#33749: an explicit choice needs availability, and availability needs the library",
        "let validate_configuration() of AITER's backends report that the library is not installed",
        "AITER's backends were not asked for by name without AITER",
    ),
    Statement(
        "only what is available",
        "Auto-selection takes only what is available: the switch cannot prefer a library that is not there.",
        checks.only_available,
        "vllm-project/vllm#33749 (preference is availability and the switch); #36702",
        "list AITER's backends behind is_enabled() and its family instead of the bare switch",
        "no cell lets vLLM choose without AITER or on an unsupported GPU",
    ),
    Statement(
        "draft and target",
        "Draft and target are resolved by the same rule: each by its own choice, and without one by the same order.",
        checks.draft_and_target,
        "vllm-project/vllm#39930, #54826; SpeculativeConfig.attention_backend: selected automatically when it is None",
        "hand the draft's layer the draft's own choice, None included, in both model runners",
        "no cell asks for a draft's layer beside the same layer of a target",
    ),
    Statement(
        "unknown names",
        "An unknown or dead VLLM_* name is an error.",
        checks.unknown_names,
        "vllm-project/vllm#50292",
        "make fail_on_environ_validation the default, or at least name the setting that replaced the variable",
        "no cell sets a variable that this tree does not know",
    ),
    Statement(
        "bound names",
        "Every name that a chosen backend uses is bound; no builtin stands in for a module.",
        checks.bound_names,
        "vllm-project/vllm#33749: Python's builtin `aiter` stood in for the library",
        "import the library in the function that calls it, or under another name (`import aiter as rocm_aiter`)",
        "no cell chose a backend whose module was examined",
    ),
)  # fmt: skip


def judge(rows: Sequence[dict]) -> list[Judgement]:
    """Hold every statement against the rows of every tree; trees in the order of their first row."""
    by_tree: dict[str, list[dict]] = {}
    for row in rows:
        by_tree.setdefault(row["tree"], []).append(row)
    return [judge_one(tree, answers, statement) for tree, answers in by_tree.items() for statement in STATEMENTS]


def judge_trees(rows: Sequence[dict], lacking: Mapping[str, str], order: Sequence[str]) -> list[Judgement]:
    """`judge`, with the trees that could not be had and why, all in the order in which they were named."""
    judged = judge(rows) + [one for tree, reason in lacking.items() for one in unprobed(tree, reason)]
    return sorted(judged, key=lambda one: order.index(one.tree))


def unprobed(tree: str, reason: str) -> list[Judgement]:
    """The judgements on a tree that could not be had at all."""
    return [Judgement(tree, statement, Verdict.UNKNOWN, reason) for statement in STATEMENTS]
