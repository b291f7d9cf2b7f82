# %% [markdown]
# # What would every vLLM release choose on every AMD GPU, and does it keep to its own documented policy?

# %% [markdown]
# ## Why it matters
# The fault behind [vllm-project/vllm#33749](https://github.com/vllm-project/vllm/pull/33749) was one of a class: what can be had
# came to depend on what is preferred, and no test without an AMD GPU could see it. Here every release answers the same few
# hundred questions on described machines, with its own code, and the answers are held against vLLM's documented policy.
# A pull request can be held against it in the same way, in CI: `python -m aiterlab audit --tree path:. --fail-on broken`.
#
# | word | meaning |
# |---|---|
# | cell | one question: a tree, a GPU, AITER there or not, the switches, what is asked for by name, the layer |
# | statement | one sentence of the policy, with its source, and a check that looks at answers alone, never at a version |
# | holds, broken | no cell contradicts the statement, or some do; each contradiction has one command that shows it |
# | not applicable, no answer | no cell speaks to the statement, or those that would got no answer, with the reason |

# %% [markdown]
# ## What it needs
# Any CPU, 6 GB of memory, and the package index on the first run (some 10 MB a release); half a minute a tree on two cores. The
# machines are simulated where a driver would answer; what is asked is vLLM's real code, up to the constructed layer. No kernel
# runs: that AITER computes rightly is another question (`01_reproduce_regression`, `04_run_attention_kernels`).

# %% [markdown]
# ## Imports

# %%
import pandas as pd
from IPython.display import Markdown

from aiterlab import plots, provenance, records, suite
from aiterlab.audit import compact, detector, shown, tables
from aiterlab.audit.study import Audit
from aiterlab.probes.tables import plain

STEM = "03_audit_backend_selection"
pd.set_option("display.max_colwidth", None, "display.max_rows", None)

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
profile: str = "standard"  # smoke, standard or full; kept in the record
trees: list[str] = ["release:0.15.1", "regressed", "release:0.16.0", "release:0.19.0", "release:0.32.0"]  # oldest first
architectures: list[str] = ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201"]  # GPUs, with gfx942
looked_at: str = ""  # the tree that is shown cell by cell, empty for the last
compared: list[str] = []  # two trees whose answers are compared, empty for the last two
cold_share: float = 0.005  # of the cells, 0 to 1, asked again in a new interpreter each
seed: int = 0  # chooses the cells that are asked again
workers: int = 0  # processes at a time, 0 for one per core

# %%
given = suite.check_parameters(STEM, globals())
pd.Series(given, name="in effect").to_frame()

# %% [markdown]
# ## Environment
# Each tree below is vLLM's Python source in one state; `releases:0.20.0..0.25.0` stands for all between, `releases:all` for
# every release on the index. `regressed` is release 0.15.1 with the edits of #32902, which went to
# main after that release was cut; `hotfixed` is the same files with this project's fix laid over them as they run.

# %%
card = provenance.collect()
versions = {name: version for name, version in card["versions"].items() if version}
facts = {"commit": (card["git_commit"] or "unknown")[:12], "processor": card["cpu_model"], "python": card["python"]}
pd.Series(facts | versions, name="value").to_frame()

# %%
audit = Audit(trees, workers, architectures)
looked_at, before, after = audit.chosen(looked_at, compared)
shown.sources(audit.found)

# %% [markdown]
# ## Measure
# A cell is a process of its own: it is forked where its question parts from the others of its machine, so that an import in one
# cannot be seen in another. A random share is asked again in new interpreters, which have nothing in common with anything. The
# detector reads the same files without importing them.

# %%
audit.ask()
audit.ask_again(cold_share, seed)
audit.scan()
outcomes = compact.outcomes(audit.rows)

# %% [markdown]
# ## Look
# ### What is broken, and the command that shows it

# %%
here = audit.judged(looked_at)
display(Markdown(f"#### {looked_at}\n\n{shown.told(here)}"))

# %% [markdown]
# ### Which tree keeps which statement, and since when
# A contradiction is a cell, or a pair of cells that differ in one thing alone, whose answers the statement does not allow. Below
# the figure: the first and the last tree of each run of broken verdicts. Between two releases lie hundreds of commits;
# `python -m aiterlab bisect` finds the one, in a clone.

# %%
headline = shown.headline(audit.judgements, looked_at)
figure = plots.save(plots.verdicts(tables.counts(audit.judgements), headline), STEM, "verdicts")
alt = f"{headline}. Squares by tree and statement: holds, broken with a count, not applicable, no answer."
display(figure, metadata={"image/png": {"alt": alt}})
display(tables.spans(audit.judgements).fillna("–"), shown.policy())

# %% [markdown]
# ### What is chosen where nothing is asked for
# A plain decoder layer: head size 64, float16.

# %%
taken = shown.default_over_time(outcomes)
figure = plots.save(plots.choices(shown.auto(outcomes), taken), STEM, "choices")
alt = f"{taken}. Squares by tree, GPU, AITER and switch: the backend that auto-selection takes."
display(figure, metadata={"image/png": {"alt": alt}})

# %% [markdown]
# ### One tree, answer by answer
# What contradicts a statement comes first. Candidates and reasons are vLLM's own (… stands for the backend that was asked for);
# "as asked" is a choice that was made by name and used. The switch is `VLLM_ROCM_USE_AITER`; `_MHA` and the like are its
# sub-switches, with that name before them.

# %%
answers = shown.drill_down([row for row in audit.rows if row["tree"] == looked_at], here)
display(Markdown(f"#### {looked_at}"), answers)

# %% [markdown]
# ### What changed between two trees

# %%
changed = shown.changed(audit.rows, before, after)
display(Markdown(f"{changed}."), shown.changes(audit.rows, before, after))

# %% [markdown]
# ### The detector beside the probes
# `python -m aiterlab scan` looks for the class in source: names bound under a condition and used without it, among them those
# that a builtin silently replaces; availability that reads a preference; gates on explicit paths; one name for two orders of
# arguments. First the number of findings in all of vLLM, then every builtin that may stand in and what concerns the attention
# of the tree looked at, with what the probes saw of the same place.

# %%
beside = detector.beside(audit.scanned, audit.rows, audit.judgements, looked_at)
display(detector.counts(audit.scanned), beside)

# %% [markdown]
# ### Are forked answers those of a new process, and what do they cost?

# %%
agreement = audit.agreement()
display(Markdown(agreement), shown.pace(audit), *shown.differing(audit))

# %% [markdown]
# ## Finding

# %%
finding = shown.finding(audit, looked_at)
display(Markdown(f"**{finding}**\n\n{taken}. {changed}."))

# %% [markdown]
# ## Record

# %%
record = {"finding": finding, "headline": headline, "default_over_time": taken, "changed": changed}
record |= {"agreement": agreement, "cells_total": len(audit.rows), "machine_simulated": True}
record |= {"cells_unanswered": int((outcomes["outcome"] == compact.NO_ANSWER).sum())}
record |= {"trees": {name: [tree.origin, tree.fingerprint] for name, tree in audit.trees.items()}}
record |= {"trees_lacking": audit.lacking, "looked_at": looked_at, "before": before, "after": after}
record |= {"verdicts": compact.verdicts(audit.judgements), "found": compact.found(audit.judgements)}
record |= {"spans": plain(tables.spans(audit.judgements)), **compact.pack(outcomes)}
record |= {"scanned": plain(detector.counts(audit.scanned)), "beside": plain(beside)}
record |= {"pace": plain(shown.pace(audit)), "differing": audit.differing}
print(records.save_record(STEM, record, parameters=given).name)
