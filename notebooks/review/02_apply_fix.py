# %% [markdown]
# # Does separating availability from preference cure every fault, without bringing the noise back?

# %% [markdown]
# ## Why it matters
# The fix of [vllm-project/vllm#33749](https://github.com/vllm-project/vllm/pull/33749) is one rule, with eight changes to hold it:
# *availability never reads a switch, preference does, and an explicit choice needs availability alone*. Here the rule is one
# module, `aiterlab.policy`, laid over the regressed vLLM by a plugin that vLLM itself loads. It must cure what
# `01_reproduce_regression` found, equal upstream's own fix, and keep what #32902 wanted: no import of AITER that nobody
# asked for. The same plugin serves users who are pinned to a regressed build: `AITERLAB_HOTFIX=1 vllm serve …`.

# %% [markdown]
# ## What it needs
# Any CPU: a few minutes on two cores and 4 GB of memory, and the package index on the first run. Cells that
# `01_reproduce_regression` asked in the same run are read back instead of asked again.

# %% [markdown]
# ## Imports

# %%
import inspect

import pandas as pd
from IPython.display import Code, Markdown

from aiterlab import hotfix, plots, policy, probes, provenance, records, suite
from aiterlab.probes import comparisons, findings, tables
from aiterlab.trees import get as get_tree

STEM = "02_apply_fix"
pd.set_option("display.max_colwidth", None, "display.max_rows", None)

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
profile: str = "standard"  # smoke, standard or full; kept in the record
regressed: str = "regressed"  # the tree to cure
upstream: str = "release:0.16.0"  # the tree with upstream's own fix
architectures: list[str] = ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]  # simulated GPUs; also gfx1151, native
installed: list[bool] = [True, False]  # AITER on the simulated machine, present or absent
switches: list[str] = ["unset", "0", "1"]  # positions of VLLM_ROCM_USE_AITER
machine: str = "gfx942"  # GPU of left-out parts and errors: gfx90a, gfx942, gfx950, gfx1100, gfx1151, gfx1201 or native
workers: int = 0  # processes at a time, 0 for one per core

# %%
given = suite.check_parameters(STEM, globals())
pd.Series(given, name="in effect").to_frame()

# %% [markdown]
# ## Environment

# %%
card = provenance.collect()
versions = {name: version for name, version in card["versions"].items() if version}
facts = {"commit": (card["git_commit"] or "unknown")[:12], "processor": card["cpu_model"], "python": card["python"]}
pd.Series(facts | versions, name="value").to_frame()

# %% [markdown]
# The heart of the fix: functions that take facts and switches as arguments, and nothing else.

# %%
rule = inspect.getsource(policy.availability) + "\n\n" + inspect.getsource(policy.preference)
parts = pd.DataFrame([{"part": p.number, "what it changes": p.title, "in": p.module} for p in hotfix.PARTS])
kernel_test = {"part": 8, "what it changes": "the kernel test gathers, then attends", "in": "aiterlab.probes.drive"}
display(Code(rule, language="python"), pd.concat([parts, pd.DataFrame([kernel_test])], ignore_index=True))

# %% [markdown]
# ## Measure
# Three trees, the same questions: the regressed one, the same files with the plugin, and upstream's fix. Then the hotfix
# with one of its seven patches left out at a time, with and without the shuffled KV cache, to see what each is for. The
# eighth change, the kernel test, runs in every driven cell.

# %%
hotfixed = "hotfixed" if regressed == "regressed" else f"hotfixed:{regressed}"
states = {name: get_tree(name) for name in (regressed, hotfixed, upstream)}
ablated = [get_tree(hotfixed.replace("hotfixed", f"hotfixed-without-{part}", 1)) for part in range(1, 8)]
needless = get_tree(f"hotfixed:{upstream}")
cells = probes.grid(list(states.values()), architectures, switches, aiter=installed)
part_cells = probes.ablation([*states.values(), *ablated, needless], machine)
every_row = probes.ask([*cells, *part_cells], workers=workers or None, progress=probes.Progress())
rows, table = every_row[: len(cells)], tables.frame(every_row[: len(cells)])
part_table = tables.frame(every_row[len(cells) :])
before, after, fixed = (table[table.tree == name] for name in states)

# %%
facts = ["verdict", "available", "enabled", "backend", "prefill", "extend", "decode", "gather_then_attend"]
facts += ["eagle_allowed_metadata", "fa_utils_exports", "flash_attn_has", "varlen_func_available"]
facts += ["vit_auto", "vit_explicit", "shuffle_kv_cache_enabled", "fp8_dtype", "ops_registered"]
differing = comparisons.differences(after, fixed, facts)

# %% [markdown]
# ## Look
# ### Before, after, upstream

# %%
gone = len(tables.trapped(before)) - len(tables.trapped(after))
title = f"The hotfix takes the builtin trap out of {gone} cells and {findings.agreement(differing)}"
figure = plots.save(plots.truth_table(table, title), STEM, "before_after_upstream")
display(
    figure, metadata={"image/png": {"alt": title + ". Squares by tree, selection, architecture, AITER and switch."}}
)

# %%
tables.truth_table(table)

# %% [markdown]
# ### Cell by cell against upstream
# The facts that matter to a user, compared between the hotfixed tree and upstream's; then two that cannot be equal. The old
# names of the FP8 dtype stay beside the new one. And with the switch on, a regressed operator module has imported AITER
# before any plugin can run.

# %%
print(f"{len(after)} cells, {len(facts)} facts each, {len(differing)} differences")
also = comparisons.differences(after, fixed, ["fp8_names", "aiter_imported_by"])
groups = also.groupby(["fact", "left", "right", "switch"], sort=False, dropna=False).size().rename("cells")
if len(differing):
    display(differing)
display(groups.reset_index().rename(columns={"left": hotfixed, "right": upstream}))

# %% [markdown]
# ### `policy.py` against each tree's own answers
# The second table lists the cells in which a tree selected otherwise than the policy: auto-selection that follows the
# switch without asking for availability, or a missing library that is found out only when the backend runs.

# %%
display(comparisons.agreement_with_policy(table), comparisons.against_policy(table))

# %% [markdown]
# ### No noise on the auto path
# With the switch off, nothing may import AITER unless it was asked for by name.

# %%
auto_path = tables.auto_path(rows)
noise = findings.noise(auto_path)
display(Markdown(noise), auto_path)

# %% [markdown]
# ### The numbers are right
# Largest error of each step against float64. The tolerance comes from the data: twice the error of a plain implementation
# in float16, plus two roundings. Steps without a result are crosses.

# %%
steps = tables.accuracy(table[(table.arch == machine) & (table.aiter != "absent") & (table.selection != "auto")])
worst = (steps.max_abs_error / steps.tolerance).max()
title = f"Largest error of a step that runs: {worst:.0%} of its tolerance" if len(steps) else "No step was driven"
figure = plots.save(plots.accuracy(steps, title), STEM, "accuracy")
display(figure, metadata={"image/png": {"alt": title}})
shown = ["tree", "switch", "step", "outcome", "max_abs_error", "tolerance", "exception"]
steps[shown].astype(object).fillna("–")

# %% [markdown]
# ### Each part is needed
# The hotfix with one part left out, AITER's backend asked for by name and the switch unset. » « marks where a tree differs
# from the whole hotfix. On a vLLM without the regression, the second table, the plugin changes nothing and says why.

# %%
display(comparisons.parts(part_table[part_table.tree != needless.name], whole=hotfixed))
refusal = part_table[part_table.tree == needless.name]
refusal[["tree", "shuffle_switch", "verdict", "hotfix_parts", "hotfix_refused"]].fillna("–")

# %% [markdown]
# ## Finding

# %%
finding = findings.fix(before, after, differing)
display(Markdown(f"**{finding}**\n\n{noise}"))

# %% [markdown]
# ## Record

# %%
record = {
    "finding": finding,
    "noise": noise,
    "cells_total": len(table),
    "differences_to_upstream": tables.plain(differing),
}
record |= {"cells_trapped_before": len(tables.trapped(before)), "cells_trapped_after": len(tables.trapped(after))}
record |= {"cells": tables.plain(table), "part_cells": tables.plain(part_table), "steps": tables.plain(steps)}
record |= {"machine_simulated": bool(table.simulated.all()), "facts_compared": facts, "failures": tables.failures(rows)}
record |= {"stand_ins": tables.stand_ins(rows), "trees": {s.name: [s.origin, s.fingerprint] for s in states.values()}}
print(records.save_record(STEM, record, parameters=given).name)
