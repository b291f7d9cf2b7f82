# %% [markdown]
# # Is EAGLE speculative decoding in vLLM lossless, how much does it accept, and what speed-up is that worth?

# %% [markdown]
# ## Why it matters
# A draft model proposes K tokens and the target verifies all of them in one step: the text must be the same, only sooner.
# Each of these steps attends with K + 1 query tokens per sequence, and there vLLM's Triton kernel, the default on ROCm, leaves
# its fast path (`04_run_attention_kernels`). The pull request under study also decides whether EAGLE may draft with AITER's
# attention. Here the real engine answers, with models that ship with this project.
#
# | word | meaning |
# |---|---|
# | target, draft | the model that decides, the small one that proposes K tokens |
# | acceptance length | tokens per step, the target's own (bonus) token included: 1 to K + 1 |
# | lossless | a draft changes when tokens come, never which: greedy ones are equal, sampled ones equally distributed |

# %% [markdown]
# ## What it needs
# Any CPU: about three minutes on two cores, 8 GB memory, nothing from a model hub. On a GPU, 16 GB of its memory for the models
# that ship; profile `full` also times the shape of Llama-3.1-8B, which wants 80 GB or more.

# %% [markdown]
# ## Imports

# %%
import pandas as pd
from IPython.display import Markdown

from aiterlab import meanwhile, plots, provenance, records, suite
from aiterlab.measure import hardware
from aiterlab.probes import proposer
from aiterlab.spec_decode import findings, study, tables

STEM = "05_run_eagle_spec_decode"
pd.set_option("display.max_colwidth", None, "display.max_rows", None, "display.float_format", "{:.4g}".format)

# %% [markdown]
# ## Parameters

# %% tags=["parameters"]
profile: str = "standard"  # smoke, standard or full; kept in the record
models: dict[str, str] = {}  # folder or hub id of target, eagle, eagle3; empty for those that ship
methods: list[str] = ["eagle", "eagle3", "ngram"]  # who drafts; the last draft model is put to the further tests
draft_tokens: list[int] = [2, 4]  # K, each an engine of its own for every draft model
tasks: list[str] = ["code", "prose", "arithmetic"]  # held-out prompts, or file:PATH with one prompt a line
count: int = 12  # prompts of each task
output_tokens: int = 64  # of each prompt
temperatures: list[float] = [0.0, 1.0]  # acceptance is measured at each; 0 must be among them
samples: int = 300  # of each of four prompts, for the test of distributions
rounds: int = 6  # interleaved short rounds of each timing; their 20th percentile counts
cells: list[str] = ["1x128", "4x128"]  # sequences x context, timed; 8b: before one for the shape of Llama-3.1-8B
accuracy: dict[str, int] = {"aiterlab_arithmetic": 50}  # task of lm-eval and how many of its questions
beside: list[str] = ["sabotage", "backends", "serve", "tensor 2", "data 2"]  # further tests; tensor N, data N: ranks
trees: list[str] = ["regressed", "hotfixed", "release:0.16.0"]  # states of vLLM whose EAGLE proposer is asked
seed: int = 0  # of prompts, samples and engines

# %%
given = suite.check_parameters(STEM, globals())
pd.Series(given, name="in effect").to_frame()

# %% [markdown]
# ## Environment

# %%
card = hardware.card(study.device())
commit = (provenance.collect()["git_commit"] or "unknown")[:12]
pairs = study.pairs(models)
asked = study.asked(tasks, count, pairs["vanilla"].target, seed)
task, most, strongest = next(iter(asked)), study.largest(draft_tokens), study.last_drafted(methods)
pd.Series({"commit": commit} | card | tables.models(pairs), name="value").dropna().to_frame()

# %% [markdown]
# ## Measure
# ### Engines
# Each is a real `vllm.LLM` in a process of its own. All stay alive and take turns. What happens before the first measured step
# (import, weights, compilation, warm-up) is kept apart.

# %%
common = study.options(cells, most, output_tokens, seed)
lab = study.Study(STEM, seed)
lab.start(study.specs(pairs, methods, draft_tokens, **common))
tables.facts(lab.facts)

# %% [markdown]
# ### Answers, samples, times
# Every engine answers the same prompts greedily and at each temperature; two of them draw many short samples. Then all take
# turns at decoding; as many rounds with marks say where a step's time goes, and the cost model predicts from them.

# %%
lab.decode(asked, output_tokens, temperatures)
lab.losses()
lab.sample(asked[task][:4], samples, 3, [study.name(strongest, most)])
lab.time(study.cells_of(cells), rounds, asked[task])
lab.score(study.trials(accuracy), ["vanilla", study.name(strongest, most)])

# %% [markdown]
# ### Broken on purpose, other backends, a server, several ranks, and the proposer on ROCm
# A draft of noise must change nothing but the speed; a verifier that accepts everything must be caught. Then explicit attention
# backends, `vllm serve` behind the OpenAI client, tensor parallel and data parallel ranks. Beside them, the EAGLE proposer of
# each state of vLLM runs on a simulated MI300X, with AITER's backend chosen by name: does it take AITER's metadata?

# %%
asking = meanwhile.start(proposer.table, trees, draft_tokens=(3,))
by_backend = lab.beside(beside, pairs[strongest], most, asked, output_tokens, study.trials(accuracy), common)
lab.stop()
proposals = asking.result()

# %% [markdown]
# ### The shape of Llama-3.1-8B
# Models of a few million parameters are bound by the host. What a step of a real model costs is measured on its shape, with
# random weights. Acceptance cannot be real then: vLLM draws it (its `synthetic` rejection sampler) at the rates published for
# that model, and every table and figure says so.

# %%
lab.time_shape(study.cells_of(cells, "8b:"), draft_tokens, rounds)
times = tables.times(lab.timed)
predicted, ratios = tables.predictions(times), tables.against(times)

# %% [markdown]
# ## Look
# ### The same tokens?
# One line per engine, then every place where one left the other. A near-tie is a place where vanilla itself held two tokens for equally likely, to within the
# rounding of the target's dtype; what follows it has another context and is not compared.

# %%
display(tables.losses(lab.greedy), tables.differences(lab.differences))
display(tables.sampled(lab.sampled), tables.broken(lab.broken))

# %% [markdown]
# ### How much is accepted

# %%
acceptance, often = findings.acceptance(lab.accepted), findings.histogram(lab.accepted)
figure = plots.save(plots.acceptance_by_position(tables.own(lab.accepted), acceptance), STEM, "acceptance")
display(figure, metadata={"image/png": {"alt": f"{acceptance}. Share of drafts accepted up to each position."}})
figure = plots.save(plots.tokens_per_step(tables.own(lab.accepted), often), STEM, "tokens_per_step")
display(figure, metadata={"image/png": {"alt": f"{often}. Histogram of tokens per step, by task and method."}})
display(tables.lengths(lab.accepted), tables.positions(lab.accepted))

# %% [markdown]
# ### What it is worth
# Measured against vanilla decoding in the same rounds; the line is what the cost model predicts from acceptance and from the
# parts of a step. Times are the 20th percentile of many short rounds, for a busy host only ever adds to one; the median round
# stands beside. "K left out": predicted without having measured that K.

# %%
speed, shown = findings.speed(times, predicted), tables.figures(times, predicted)
for group, one in shown.items():
    figure = plots.speedup_by_draft_tokens(one.rows, one.title, assumed=one.assumed)
    figure = plots.save(figure, STEM, f"speedup_{group}")
    display(figure, metadata={"image/png": {"alt": f"{one.title}. Speed-up by K, measured and predicted."}})
    figure = plots.save(plots.step_components(one.parts, one.parts_title), STEM, f"step_{group}")
    display(figure, metadata={"image/png": {"alt": f"{one.parts_title}. Milliseconds of a step, by part and K."}})
display(tables.predicted(predicted), tables.best(times))

# %% [markdown]
# ### Backends
# What was asked for, what could be had, what target and draft really used, and whether the answers agree. Where the shape was
# timed at long contexts: tokens per second, and beside them what one layer's attention costs.

# %%
gift = findings.backends(ratios, by_backend)
for rows in filter(None, [tables.throughput(times)]):
    figure = plots.backend_throughput(rows, tables.kernels(card["device_name"]), gift)
    figure = plots.save(figure, STEM, "backends")
    display(figure, metadata={"image/png": {"alt": f"{gift}. Tokens per second by backend and context."}})
display(by_backend, tables.ratios(ratios))

# %% [markdown]
# ### Accuracy, ranks, server, proposer

# %%
display(Markdown(tables.accuracy_markdown(lab.scores)), tables.ranks(lab.ranks), tables.served(lab.served))
tables.proposals(proposals)

# %% [markdown]
# ## Finding

# %%
lossless = findings.lossless(lab.greedy, lab.sampled, lab.broken)
others = findings.others(lab.scores, lab.ranks, lab.served, proposals)
finding = findings.whole(lossless, acceptance, speed, gift)
display(Markdown(f"**{finding}**\n\n{others}"))

# %% [markdown]
# ## Record

# %%
record = {"finding": finding, "lossless": lossless, "acceptance": acceptance, "speed": speed, "gift": gift}
record |= {"others": others, "machine_simulated": False, "stand_ins": [], "card": card, "models": tables.models(pairs)}
record |= {"engines": lab.facts, "greedy": lab.greedy, "sampled": lab.sampled}
record |= {"differences": lab.differences, "broken": lab.broken}
record |= {"accepted": lab.accepted, "timed": lab.timed, "times": times, "predictions": predicted, "ratios": ratios}
record |= {"scores": tables.scores(lab.scores), "ranks": lab.ranks, "served": lab.served}
record |= {"backends": tables.record_rows(by_backend), "proposals": tables.record_rows(proposals)}
print(records.save_record(STEM, record, parameters=given).name)
