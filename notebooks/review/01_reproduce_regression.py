# %% [markdown]
# # How did Python's builtin `aiter` get into vLLM's attention backend?

# %% [markdown]
# ## Why it matters
# AITER is AMD's library of GPU kernels for ROCm. Importing it is noisy, because it may start to compile.
# [vllm-project/vllm#32902](https://github.com/vllm-project/vllm/pull/32902) ended that noise by importing AITER only where
# the switch `VLLM_ROCM_USE_AITER` is on. With it, *availability* came to depend on *preference*: who asked for AITER's
# backend by name, with the switch off, got an `AttributeError` that names neither.
# [#33749](https://github.com/vllm-project/vllm/pull/33749) separated the two again.
#
# | word | meaning |
# |---|---|
# | availability | ROCm platform, library installed, architecture supported; no switch is read |
# | preference | availability, and the user's switch is on; decides what auto-selection takes |
# | selection | what is used in the end; an explicit choice needs availability alone |

# %% [markdown]
# ## What it needs
# Any CPU: a few minutes on two cores and 4 GB of memory, and the package index on the first run. The ROCm machine is
# simulated where a driver would answer; vLLM, AITER, Triton and torch are the real packages. On a ROCm machine with vLLM's
# ROCm build, set `architectures` to `["native"]` and `trees` to `["installed"]`.

# %% [markdown]
# ## Imports

# %%
import builtins

import pandas as pd
from IPython.display import Markdown

from aiterlab import plots, probes, provenance, records, suite
from aiterlab.probes import findings, tables
from aiterlab.trees import get as get_tree

STEM = "01_reproduce_regression"
pd.set_option("display.max_colwidth", None, "display.max_rows", None)

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
profile: str = "standard"  # smoke, standard or full; kept in the record
trees: list[str] = ["release:0.15.1", "regressed", "release:0.16.0", "release:0.32.0"]  # states of vLLM's source
architectures: list[str] = ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]  # simulated GPUs; also gfx1151, native
installed: list[bool] = [True, False]  # AITER on the simulated machine, present or absent
switches: list[str] = ["unset", "0", "1"]  # positions of VLLM_ROCM_USE_AITER
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
# Each tree is vLLM's Python source in one state. `regressed` is release 0.15.1 with the edits of #32902, which went to main
# after that release was cut; an edit that does not match its source exactly once is an error.

# %%
sources = [get_tree(name) for name in trees]
pd.DataFrame(
    [{"tree": s.name, "what it is": s.origin, "sha256 of its Python files": s.fingerprint[:16]} for s in sources]
)

# %% [markdown]
# ## Measure
# One process per cell, because an import decides things once per process. A cell loads vLLM's plugins, asks for
# availability and preference, builds vLLM's real attention layer (and with it selects a backend), constructs the real
# EAGLE proposer, and, where AITER's backend was selected, drives it through a decode, a prefill and an extend step that
# are compared with float64. Decode comes first, as it does when vLLM captures its decode graphs.

# %%
cells = probes.grid(sources, architectures, switches, aiter=installed)
rows = probes.ask(cells, workers=workers or None, progress=probes.Progress())
table = tables.frame(rows)

# %% [markdown]
# ## Look
# ### The truth table
# One square is one cell. Red: a step met Python's builtin in the place of the module. Where AITER is not installed, an
# import error that names it (∅) is the honest answer, and red there is the same fault.

# %%
trapped = tables.trapped(table)
where = ", ".join(trapped.tree.unique()) or "none"
title = f"{len(trapped)} of {len(table)} cells end in Python's builtin aiter: {where}"
figure = plots.save(plots.truth_table(table, title), STEM, "truth_table")
alt = title + ". Squares by tree, kind of selection, architecture, AITER and switch; the table below has the words."
display(figure, metadata={"image/png": {"alt": alt}})

# %%
display(tables.truth_table(table), tables.counts(table))

# %% [markdown]
# ### The exception
# Every distinct failure of the backend's steps, with the line of vLLM that raised it.

# %%
failures = tables.failures(rows)
seen = [f for f in failures if f["step"] in ("prefill", "extend", "decode")]
shown = pd.DataFrame(seen, columns=["tree", "step", "type", "message", "raised_at", "cells"])
display(shown.assign(raised_at=[f"{at['file']}:{at['line']}" if at else "–" for at in shown.raised_at]))
met = [failure for failure in seen if probes.TRAP in failure["message"]]
print(tables.traceback_text(met[0]) if met else "no cell met the builtin")

# %% [markdown]
# ### The builtin
# Since Python 3.10 there is a builtin function `aiter`. A module that names `aiter` without having imported it does not get
# a `NameError`: the builtin answers, and it has no attribute of that name. No check for undefined names can see this.

# %%
builtin = {"name": "aiter", "value": repr(builtins.aiter), "type": type(builtins.aiter).__name__}
pd.DataFrame([builtin | {"has flash_attn_varlen_func": hasattr(builtins.aiter, "flash_attn_varlen_func")}])

# %% [markdown]
# ### What #32902 wanted to silence
# Auto-selection, where nobody asked for AITER by name: who imports it all the same while the engine is configured, the
# layer is built and the EAGLE proposer is constructed, and what that import would compile.

# %%
auto_path = tables.auto_path(rows)
noise = findings.noise(auto_path)
display(Markdown(noise), auto_path)

# %% [markdown]
# ### Three more faults
# The decode step calls an operator that exists only once somebody has imported AITER. EAGLE allows its draft certain kinds
# of attention metadata, AITER's among them or not. And `fa_utils` may lack names on ROCm that FlashAttention's module takes
# from it; its own check then keeps that module from asking.

# %%
tables.other_faults(table)

# %% [markdown]
# ### The encoder of multimodal models
# vLLM chooses the attention of a vision or audio encoder separately (the granite-speech case of #33749).

# %%
encoder = table[(table.selection != "auto") & (table.aiter != "absent")]
encoder[["tree", "arch", "switch", "vit_auto", "vit_explicit"]].reset_index(drop=True)

# %% [markdown]
# ## Finding

# %%
finding = findings.regression(table)
others = findings.other_failures(failures)
display(Markdown(f"**{finding}**\n\n{noise}\n\n{others}"))

# %% [markdown]
# ## Record

# %%
record = {
    "finding": finding,
    "noise": noise,
    "other_failures": others,
    "cells_total": len(table),
    "cells_trapped": len(trapped),
}
record |= {"machine_simulated": bool(table.simulated.all()), "cells": tables.plain(table), "failures": failures}
record |= {"aiter_imports": tables.plain(tables.imports(rows)), "jit_modules": tables.plain(tables.jit_modules(rows))}
record |= {"stand_ins": tables.stand_ins(rows), "trees": {s.name: [s.origin, s.fingerprint] for s in sources}}
print(records.save_record(STEM, record, parameters=given).name)
