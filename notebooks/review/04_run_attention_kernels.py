# %% [markdown]
# # What do the attention kernels behind vLLM's ROCm backends compute, how fast, and what limits them?

# %% [markdown]
# ## Why it matters
# vLLM's ROCm backends attend with kernels of several makers: AITER's compiled and Triton kernels, vLLM's own Triton kernel,
# and a gather in front of attention where a kernel cannot read pages. An EAGLE step, which verifies a few tokens per
# sequence, leaves the path that those kernels are tuned for. Here each of them is held against float64, then timed under the
# ceilings of the same machine, beside Triton kernels of this project (`suite`) that read the pages themselves.
#
# | word | meaning |
# |---|---|
# | decode, verify | one new token per sequence; 2 to 8, as speculative decoding checks in one step: bound by memory |
# | prefill, extend | a prompt; a chunk of a prompt on top of what is cached: bound by matrix products |
# | gather | a paged KV cache made contiguous, which some attention needs first |

# %% [markdown]
# ## What it needs
# Any CPU: about two minutes on two cores, in Triton's interpreter, on tiny shapes and a simulated MI300X. There the numbers
# are checked and the code for AMD GPUs is read; times say nothing. On an NVIDIA or ROCm GPU the same cells run natively, on
# the shapes of real steps, in a few minutes and 16 GB of GPU memory.

# %% [markdown]
# ## Imports

# %%
import warnings

import pandas as pd
from IPython.display import Markdown

from aiterlab import meanwhile, plots, provenance, records, suite
from aiterlab.attention import cases as library
from aiterlab.attention import findings, goals, isa, study, tables, workloads
from aiterlab.attention import providers as makers
from aiterlab.machines import Machine, ledger
from aiterlab.measure import hardware

STEM = "04_run_attention_kernels"
warnings.filterwarnings("ignore", message="IProgress not found|Warning only once for all")  # tqdm's, torch's of AITER
pd.set_option("display.max_colwidth", None, "display.max_rows", None, "display.float_format", "{:.4g}".format)

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
profile: str = "standard"  # smoke, standard or full; kept in the record
operations: list[str] = ["decode", "verify", "extend", "prefill", "gather"]  # all of their cases, where cases is empty
cases: list[str] = []  # names such as verify_q4_16x4k: 16 sequences of 4096 keys, 4 of them new
shape: dict[str, int] = {}  # heads, kv_heads, head_size, page_size other than the cases' own
dtypes: list[str] = []  # bfloat16, float16, float32: checked, the first timed; empty for what suits the machine
providers: list[str] = []  # reference suite aiter aiter_triton vllm_triton flash_attn torch_sdpa; empty: the preferred
machine: str = ""  # simulated GPU, as in architectures; empty for the one here, or else a simulated MI300X
checks: str = "auto"  # sweep of shapes and options: auto, tiny, small, large or none
rounds: int = 0  # samples of each timing, 0 for what suits the machine
architectures: list[str] = ["gfx942", "gfx950"]  # that kernels are compiled for; also gfx90a, gfx1100, gfx1151, gfx1201
compiled: list[str] = ["decode_64x8k", "verify_q4_1x32k", "extend_q512_1x32k", "prefill_2x8k", "gather_64x8k"]  # cases
seed: int = 0  # of every tensor

# %%
given = suite.check_parameters(STEM, globals())
pd.Series(given, name="in effect").to_frame()

# %% [markdown]
# ## Environment

# %%
# before Triton, vLLM or a kernel is imported: imports decide things once
place = makers.enter(Machine(arch=machine) if machine else None)
card = hardware.card(place.device)
ceilings = hardware.ceilings(place.device)
commit = (provenance.collect()["git_commit"] or "unknown")[:12]
facts = {"commit": commit, "platform": place.platform, "architecture seen": place.architecture}
reached = {f"{c.name} (measured)": f"{c.rate:.3g} {c.unit}" for c in ceilings.values()}
pd.Series(facts | card | reached, name="value").dropna().to_frame()

# %% [markdown]
# Who computes is chosen by the rule of `02_apply_fix`: what is preferred runs by default, what is named needs to be available
# and nothing else. Whatever does not run says why.

# %%
chosen = makers.table(providers or None)
chosen

# %% [markdown]
# ## Measure
# ### Checks, and code for AMD GPUs
# Every output is filled with NaN before each launch and held against float64, row by row; the tolerance comes from the
# error of a plain implementation in the same dtype. First the cases, by everybody. Then this project's kernels, by every
# route, on a sweep in which any two settings of two options meet, and on inputs made to break kernels. Meanwhile the same
# launchers, AITER's and vLLM's included, compile for AMD GPUs that need not be here, in processes of their own.

# %%
launches = [launch for name in compiled for launch in isa.launches_of(library.parse(name))]
compiling = meanwhile.start(isa.compile_launches, launches, architectures)
timed_dtype, *_ = checked_dtypes = library.dtypes(place, dtypes)
plain_cases = library.select(place, operations, cases, shape)
implementations = makers.implementations(providers or None)
ours = [implementation for implementation in implementations if implementation.provider == "suite"]
lab = study.Study(STEM, place, implementations, seed)
lab.check("cases", study.with_dtype(plain_cases, checked_dtypes))
lab.check("sweep", library.sweep(place, checks), ours)
lab.check("adversarial", workloads.adversarial(timed_dtype), ours)
checked = lab.checks

# %% [markdown]
# ### Times
# Only what was right is timed. On a GPU: graph replays between two events, caches flushed, inputs rotated, one sample of every
# implementation in each round. On a CPU: wall clock of calls into Triton's interpreter.

# %%
kernels = isa.table(compiling.result())
lab.time(study.with_dtype(plain_cases, [timed_dtype]), rounds)
timed = lab.timings
rated = tables.rates(timed, ceilings)
ratios, steps = tables.ratios(rated), tables.two_step(rated)
bar = goals.reached(ratios, steps)

# %% [markdown]
# ## Look
# ### How far from float64
# One point per check. The providers' counts follow, then every check that was not right, then who was not asked what.

# %%
correctness = findings.correctness(checked)
figure = plots.save(plots.error(checked, correctness), STEM, "error")
display(figure, metadata={"image/png": {"alt": f"{correctness}. One line per implementation, the limit drawn at 1."}})
display(tables.readable(tables.outcomes(checked)), tables.faults(checked), tables.refusals(checked))

# %% [markdown]
# ### How long, and how close to the ceiling
# Bytes and operations are the fewest that a case needs. The lines are what plain torch reached in this run: copying (read and
# written bytes counted), reading, and a product of large matrices.

# %%
speed, limits = findings.speed(ratios, place, card["device_name"]), findings.ceiling(rated, place)
figure = plots.save(plots.latency(rated, speed), STEM, "latency")
display(figure, metadata={"image/png": {"alt": f"{speed}. Microseconds by case, implementation and provider."}})
lines = tables.ceilings_of(ceilings, timed_dtype)
figure = plots.save(plots.throughput(rated, lines, limits), STEM, "throughput")
display(figure, metadata={"image/png": {"alt": f"{limits}. Rates by case and implementation, under measured lines."}})
display(tables.untimed(timed))

# %% [markdown]
# ### Against FA3 and vLLM's Triton kernel
# How many times as fast `suite` is (×), each side by its fastest implementation on the same K and V; in brackets what the
# spread of both (p20, p80) allows. `varlen` reads K and V as the layer made them, `paged` and `gather` read pages, and so do
# their rivals on that line. Then the goals that this project has set itself on an H200.

# %%
display(tables.comparison(ratios), tables.readable(goals.shown(bar)))

# %% [markdown]
# ### In two steps or in one
# Attention from contiguous keys needs a gather first, which writes and reads the whole context once more.

# %%
gathering = findings.two_step(steps, place)
figure = plots.save(plots.two_step(steps, gathering), STEM, "two_step")
display(figure, metadata={"image/png": {"alt": f"{gathering}. Microseconds of both ways, by case."}})

# %% [markdown]
# ### On MI300X, MI325X and MI355X
# What would run there, as the assembly has it. A time cannot be shorter than its bound: every byte once at the memory's peak,
# every product at the matrix units' peak. VGPRs include AGPRs; beside the waves stands what limits them; matrix instructions
# are those of the loop; the last column is the share of loaded bytes that come in the widest loads.

# %%
registers = findings.code(kernels)
figure = plots.save(plots.occupancy(kernels, registers), STEM, "occupancy")
display(figure, metadata={"image/png": {"alt": f"{registers}. Waves per SIMD by kernel and architecture."}})
display(tables.bounds(kernels), tables.kernels(kernels))

# %% [markdown]
# ## Finding

# %%
finding = findings.whole(correctness, speed, registers, bar, place)
display(Markdown(f"**{finding}**\n\n{limits}. {gathering}. {findings.bar(bar)}."))

# %% [markdown]
# ## Record

# %%
record = {"finding": finding, "correctness": correctness, "speed": speed, "ceiling": limits, "two_step": gathering}
record |= {"bar": findings.bar(bar), "code": registers, "machine_simulated": place.platform == "simulated"}
record |= {"stand_ins": sorted(ledger.stand_ins), "platform": place.platform, "timed_dtype": timed_dtype, "card": card}
record |= {"ceilings": [ceiling.row() for ceiling in ceilings.values()], "peak_memory_bytes": lab.peak_memory_bytes()}
frames = {"providers": chosen, "checks": checked[checked.outcome != "refused"], "refusals": tables.refusals(checked)}
frames |= {"timings": timed, "ratios": ratios, "goals": bar, "two_step_rows": steps, "kernels": kernels}
record |= {name: tables.plain(frame) for name, frame in frames.items()}
print(records.save_record(STEM, record, parameters=given).name)
