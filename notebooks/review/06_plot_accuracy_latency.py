# %% [markdown]
# # What is the answer: is it right, how fast is it, before and after the fix?

# %% [markdown]
# ## Why it matters
# Five notebooks ask one question each, some on a simulated machine, some on a GPU, each run on a day of its own. Who decides
# about the fix, a kernel or a draft wants all of it on one page, accuracy beside latency, with the machine that every number
# holds on. Nothing is measured here: the page is drawn from the records that the other notebooks left, and what no record has
# stands there as missing, with its reason.
#
# | word | meaning |
# |---|---|
# | record | what a notebook leaves behind: one JSON file with every number, its machine and its commit |
# | this run, reference | the results folder of this very run; the records that the repository keeps |
# | ceiling | what plain torch reached in the same run: copying, or a product of large matrices |

# %% [markdown]
# ## What it needs
# Any CPU: seconds, 2 GB memory, no network. Records: those of this run, of the runs that are named, and of the repository; with
# none of a run it draws the repository's alone.

# %% [markdown]
# ## Imports

# %%
import pandas as pd
from IPython.display import Markdown

from aiterlab import plots, provenance, records, suite
from aiterlab.answer import findings, shown, sources, tables
from aiterlab.attention.tables import plain

STEM = "06_plot_accuracy_latency"
pd.set_option("display.max_colwidth", None, "display.max_rows", None, "display.float_format", "{:.4g}".format)

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
profile: str = "standard"  # smoke, standard or full; kept in the record
runs: list[str] = []  # result folders to read beside the reference records, oldest first; empty for this run alone
reference: bool = True  # draw the reference records too

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
# ## Measure
# Reading, here. Of each notebook and machine one record counts: this run's before a named run's before the reference. The last
# column says why a place gave none, or why another one counts. `03_audit_backend_selection` answers in tables of its own.

# %%
frames = tables.read(sources.gather(STEM, runs, reference))
shown.sources(frames["sources"])

# %% [markdown]
# ## Look
# ### The page
# A4, landscape. Colour is who computes the attention (ink: vLLM's own choice), the sign is the method, hollow signs are a second
# machine's. Interpreter and CPU times say nothing about a GPU and are marked. The same page lies beside the record as PNG, PDF and SVG.

# %%
titles, headline = findings.panels(frames), findings.headline(frames)
figure = plots.answer_page(frames, titles, headline)
written = plots.publish(figure, STEM, "answer")
display(figure, metadata={"image/png": {"alt": findings.description(titles, headline)}})
print(", ".join(written))

# %% [markdown]
# ### The numbers behind it
# Before and after: cells by verdict. Errors: by machine, provider and dtype, as shares of the tolerance.

# %%
display(shown.verdicts(frames["cells"]), shown.errors(frames["checks"]))

# %% [markdown]
# Exact match, vanilla and with a draft; then kernels: share of the ceiling, and how many times the suite is as fast from the
# same K and V.

# %%
display(shown.matches(frames["scores"]), shown.kernels(frames["kernels"]))

# %% [markdown]
# Milliseconds per token of one sequence: the fastest K of each method, backend and cell beside vanilla. A speed-up of a CPU
# says nothing about a GPU.

# %%
shown.fastest(frames["times"])

# %% [markdown]
# ## Finding

# %%
finding = findings.whole(frames)
display(Markdown(f"**{finding}**\n\n{findings.lacking(frames)}."))

# %% [markdown]
# ## Record

# %%
record = {"finding": finding, "headline": headline, "titles": titles, "figures": written}
record |= {"machine_simulated": bool((frames["sources"]["kind"] == "simulated").any()), "stand_ins": []}
record |= {name: plain(frame) for name, frame in frames.items()}
print(records.save_record(STEM, record, parameters=given).name)
