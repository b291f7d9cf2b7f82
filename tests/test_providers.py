# SPDX-License-Identifier: Apache-2.0
"""Providers: who is chosen and why, what each claims, and whether its calls reach the library and come back right."""

import json
from types import SimpleNamespace

import pytest
import torch

from aiterlab.attention import providers
from aiterlab.attention.providers import place, selection
from aiterlab.attention.providers.provider import Limits, deliver
from aiterlab.attention.workloads import Workload
from aiterlab.machines import Machine, aiter_on_cuda
from aiterlab.measure import checks
from aiterlab.policy import MAIN_SWITCH

TINY = {"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": "float16"}

# In Triton's interpreter, on a simulated MI300X, in one process. What the check compares with is itself compared with a
# formula written here, token by token, which knows nothing of the package's own.
INTERPRETED = """
import json, warnings
warnings.simplefilter("ignore")
from aiterlab.attention import providers
providers.enter()
assert providers.enter() == providers.current()
import torch
from aiterlab.attention.workloads import Workload
from aiterlab.machines import Machine, ledger
from aiterlab.measure.checks import check

TINY = dict(heads=4, kv_heads=2, head_size=64, dtype="float16")
workloads = [
    Workload("prefill", "prefill", ((0, 5), (0, 19)), **TINY),
    Workload("extend", "extend", ((21, 7), (33, 3)), **TINY),
    Workload("verify", "verify", ((60, 4), (17, 4)), window=20, **TINY),
    Workload("capped", "verify", ((13, 3),), softcap=2.5, alibi=True, **TINY),
    Workload("decode", "decode", ((16, 1), (40, 1), (0, 1)), **TINY),
    Workload("long", "decode", ((560, 1),), 2, 1, 64, 64, "float16"),
    Workload("fp8", "decode", ((16, 1), (40, 1)), kv_dtype="float8_e4m3fn", **TINY),
    Workload("int8", "decode", ((16, 1), (40, 1)), kv_dtype="int8", scales="token_head", **TINY),
    Workload("shuffled", "decode", ((36, 1), (0, 1)), 8, 1, 128, dtype="float16", layout="SHUFFLE"),
    Workload("gather", "gather", ((16, 0), (33, 0)), **TINY),
    Workload("gather_shuffled", "gather", ((16, 0), (33, 0)), layout="SHUFFLE", **TINY),
    Workload("gather_fp8", "gather", ((16, 0), (33, 0)), kv_dtype="float8_e4m3fn", **TINY),
]

def stored(inputs, part, sequence, position, head):
    w = inputs.workload
    cache, descale = getattr(inputs, part + "_cache"), getattr(inputs, part + "_descale")
    block, slot = int(inputs.block_table[sequence, position // w.page_size]), position % w.page_size
    if w.layout == "NHD":
        values = cache[block, slot, head]
    elif part == "k":
        values = cache[block, head, :, slot].flatten()
    else:
        x = cache.shape[-1]
        values = cache[block, head, slot // x, :, slot % x]
    scale = 1 if descale is None else descale.double() if descale.numel() == 1 else descale[block, slot, head].double()
    return values.double() * scale

def formula(inputs):
    w, rows = inputs.workload, []
    for sequence, (context, new) in enumerate(w.sequences):
        for token in range(new):
            p = context + token
            seen = range(max(0, p - w.window + 1) if w.window else 0, p + 1)
            for head in range(w.heads):
                shared = head // (w.heads // w.kv_heads)
                keys = torch.stack([stored(inputs, "k", sequence, j, shared) for j in seen])
                values = torch.stack([stored(inputs, "v", sequence, j, shared) for j in seen])
                logits = keys @ inputs.q[len(rows) // w.heads, head].double() / w.head_size**0.5
                if w.softcap:
                    logits = w.softcap * torch.tanh(logits / w.softcap)
                if w.alibi:
                    logits = logits + inputs.alibi_slopes[head].double() * (torch.tensor(list(seen)) - p)
                rows.append(logits.softmax(0) @ values)
    return torch.stack(rows).unflatten(0, (-1, w.heads))

def gathered(inputs):
    w = inputs.workload
    return [
        torch.stack([
            torch.stack([stored(inputs, part, sequence, j, head) for head in range(w.kv_heads)])
            for sequence, length in enumerate(w.lengths) for j in range(length)
        ])
        for part in "kv"
    ]

answers, formulas = [], []
for w in workloads:
    poisoned, clean = w.make(1), w.make(1, poison=False)
    if w.operation == "gather":
        pairs = zip((clean.k, clean.v), gathered(clean))
    else:
        pairs = [(clean.expected()[0], formula(clean))]
    formulas.append([w.name, max((one.double() - other).abs().max().item() for one, other in pairs)])
    for provider in providers.PROVIDERS.values():  # also AITER's compiled kernels, whose stand-ins compute
        for implementation in provider.implementations:
            if provider.name == "flash_attn" or not implementation.supports(w):
                continue
            if provider.name == "aiter" and (w.window or w.softcap or w.alibi):
                continue  # the stand-ins have none of these
            if w.name == "long" and implementation.name != "unified":
                continue  # it is here for the split-KV paths
            one = check(implementation, clean if implementation.reads_whole_pages else poisoned)
            answers.append([w.name, implementation.label, one.outcome, one.reason])
try:
    providers.enter(Machine(arch="gfx950"))
    another = None
except RuntimeError as error:
    another = str(error)

import vllm.v1.attention.backends.rocm_aiter_fa as backend
from aiterlab.attention.providers import vllm_triton
defined = backend.cp_mha_gather_cache
del backend.cp_mha_gather_cache  # as on a platform that is not ROCm
compiled = vllm_triton.gather_function()
same = [compiled is not defined, compiled.__code__.co_firstlineno == defined.__code__.co_firstlineno]
gather = next(i for i in providers.PROVIDERS["vllm_triton"].implementations if i.name == "gather")
same.append(check(gather, workloads[-2].make(2)).outcome)

print(json.dumps({
    "answers": answers, "formulas": formulas, "another": another, "gather": same, "stand_ins": ledger.stand_ins,
    "runs": [name for name, how in providers.choose().items() if how.chosen],
    "aiter": providers.choose(["aiter"])["aiter"].reasons["aiter"],
    "bf16": [i.supports(Workload("w", "decode", ((5, 1),))).reason for i in providers.implementations() if i.triton],
}))
"""


@pytest.fixture(scope="module")
def interpreted(run_python):
    return json.loads(run_python(INTERPRETED).splitlines()[-1])


def at(monkeypatch, platform, architecture):
    monkeypatch.setattr(place, "_entered", place.Place(platform, architecture))


def test_every_call_that_an_interpreter_can_make_agrees_with_a_formula_of_this_file(interpreted):
    assert [answer for answer in interpreted["answers"] if answer[2] != "ok"] == []
    for name, distance in interpreted["formulas"]:
        assert distance < (2e-3 if name.startswith("gather") else 1e-10)  # a gather's is of float16
    computed = {(label, workload) for workload, label, _, _ in interpreted["answers"]}
    for pair in (
        ("reference formula", "capped"),
        ("torch_sdpa sdpa", "verify"),
        ("suite paged", "capped"),
        ("suite gather+varlen", "shuffled"),
        ("suite varlen", "prefill"),
        ("suite gather", "gather_fp8"),
        ("vllm_triton unified", "capped"),
        ("vllm_triton unified", "long"),
        ("vllm_triton unified", "int8"),
        ("vllm_triton gather", "gather_shuffled"),
        ("vllm_triton gather", "gather_fp8"),
        ("aiter_triton unified", "verify"),
        ("aiter_triton unified", "long"),
        ("aiter_triton paged_decode", "decode"),
        ("aiter_triton varlen", "prefill"),
        ("aiter varlen", "prefill"),
        ("aiter gather+varlen", "extend"),
        ("aiter paged_v1", "decode"),
        ("aiter pa_asm", "shuffled"),
    ):
        assert pair in computed


def test_a_simulated_machine_runs_what_needs_no_compiled_kernel(interpreted):
    assert interpreted["runs"] == ["reference", "suite", "aiter_triton", "vllm_triton", "torch_sdpa"]
    assert interpreted["aiter"] == "compiled kernels need the GPU; this machine is simulated"
    assert interpreted["another"].startswith("this process already runs on Place(platform='simulated'")
    assert any("MI300X simulated" in line for line in interpreted["stand_ins"])


def test_bf16_is_refused_in_the_interpreter_with_the_reason(interpreted):
    assert any("computes bf16 dot products wrongly" in reason for reason in interpreted["bf16"])
    assert not any(reason == "supported" for reason in interpreted["bf16"])


def test_vllms_gather_is_compiled_from_its_own_source_where_vllm_does_not_define_it(interpreted):
    assert interpreted["gather"] == [True, True, "ok"]
    assert any("cp_mha_gather_cache: compiled from vLLM's own source" in line for line in interpreted["stand_ins"])


def test_a_machine_is_entered_before_triton_is_imported(run_python):
    code = """
    import triton.language
    from aiterlab.attention import providers
    print(providers.choose(["suite"])["suite"].reasons["suite"])
    from aiterlab.machines import Machine
    try:
        providers.enter(Machine())
    except RuntimeError as error:
        print(error)
    """
    reason = "there is no GPU, and Triton was imported before TRITON_INTERPRET=1 was set"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run_python(code).splitlines() == [reason, f"{reason}; start a new process"]


@pytest.mark.parametrize(
    "triton, numpy, works",
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.0+rocm", "2.10.1", False), ("3.7.0", "2.5.2", True)],
)
def test_an_interpreter_that_fails_with_this_numpy_is_not_available_and_the_mend_is_told(
    monkeypatch, triton, numpy, works
):
    monkeypatch.setattr(place.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    answer = place._interpreter_works()
    assert answer.holds is works
    assert ("pip install 'numpy<2.4'" in answer.reason) is not works


@pytest.mark.parametrize("value, preferred", [(None, False), ("0", False), ("1", True)])
def test_aiter_lives_by_the_rule_that_it_can_be_used_whatever_the_switch_says(monkeypatch, value, preferred):
    at(monkeypatch, "rocm", "gfx942")
    switches = {} if value is None else {MAIN_SWITCH: value}
    for name in ("aiter", "aiter_triton"):
        candidate = providers.PROVIDERS[name].candidate(switches)
        assert (candidate.available.holds, candidate.preferred.holds) == (True, preferred)
        assert (providers.choose(None, switches)[name].chosen == name) is preferred
        assert providers.choose([name], switches)[name].chosen == name
    if not preferred:
        assert providers.choose(None, switches)["aiter"].reasons["aiter"] == f"{MAIN_SWITCH} is off"


def test_an_explicit_choice_is_refused_only_for_availability_and_never_replaced(monkeypatch):
    at(monkeypatch, "cuda", "sm_90")
    chosen = providers.choose(["aiter", "torch_sdpa"], {MAIN_SWITCH: "1"})
    assert chosen["aiter"].how == "refused"
    assert chosen["aiter"].reasons["aiter"] == "the platform is not ROCm"
    assert [name for name, how in chosen.items() if how.chosen] == ["torch_sdpa"]
    assert chosen["suite"].how == "not asked"
    reason = providers.choose(["aiter_triton"], {})["aiter_triton"].reasons["aiter_triton"]
    assert reason == "on NVIDIA it needs stand-ins that this process has not entered with"
    with pytest.raises(ValueError, match="no provider flash; there are reference, suite, aiter, "):
        providers.choose(["flash"])


def test_tables_say_who_runs_and_why_not(monkeypatch):
    at(monkeypatch, "rocm", "gfx90a")
    table = providers.table(["aiter", "reference"]).set_index("provider")
    assert table.loc["aiter", "reason"] == "the library has no kernels for gfx90a"
    assert table["runs"].to_dict() == {name: name == "reference" for name in selection.PROVIDERS}
    workloads = [Workload("g", "gather", ((16, 0),)), Workload("d", "decode", ((16, 1),))]
    refused = providers.refusals(workloads, ["reference"])
    assert refused.values.tolist() == [
        ["g", "reference", "formula", "operation gather: it has prefill, extend, decode, verify"],
        ["d", "reference", "gather", "operation decode: it has gather"],
    ]
    assert list(providers.refusals([], ["reference"]).columns) == list(refused.columns)


@pytest.mark.parametrize(
    "limits, fields, reason",
    [
        (Limits(), {}, None),
        (Limits(("decode",)), {}, "operation extend: it has decode"),
        (Limits(dtypes=("float16",)), {"dtype": "bfloat16"}, "dtype bfloat16: it has float16"),
        (Limits(head_sizes=(128,)), {}, "head size 64: it has 128"),
        (Limits(page_sizes=(32,)), {}, "page size 16: it has 32"),
        (Limits(), {"layout": "SHUFFLE"}, "layout SHUFFLE: it has NHD"),
        (Limits(), {"kv_dtype": "int8", "scales": "token_head"}, "no int8 cache with a scale per token and head"),
        (Limits(largest_group=1), {}, "2 query heads per KV head: it has up to 1"),
        (Limits(window=False), {"window": 5}, "no sliding window"),
        (Limits(softcap=False), {"softcap": 5.0}, "no soft cap"),
        (Limits(alibi=False), {"alibi": True}, "no ALiBi"),
        (Limits(), {"causal": False}, "no attention that is not causal"),
    ],
)
def test_limits_give_the_first_reason(limits, fields, reason):
    assert limits.refusal(Workload("w", "extend", ((8, 4),), **(TINY | fields))) == reason


def test_a_library_that_allocates_its_output_is_not_charged_for_a_copy():
    out, result = torch.empty(4, 2, 8), torch.rand(4, 2, 8)
    deliver(out, result)
    assert out.data_ptr() == result.data_ptr()
    out, turned = torch.empty(4, 2, 8), torch.rand(2, 4, 8).transpose(0, 1)
    deliver(out, turned)
    assert torch.equal(out, turned) and out.is_contiguous()


@pytest.mark.parametrize(
    "sequences, fields",
    [
        (((0, 9), (0, 9)), {}),
        (((7, 4), (7, 4)), {}),
        (((7, 1), (30, 1), (0, 1)), {}),
        (((7, 4), (5, 0), (0, 9)), {"window": 3}),
        (((7, 4), (0, 9)), {"alibi": True}),
        (((7, 4), (0, 9)), {"causal": False}),
        (((7, 4), (7, 4)), {"causal": False, "window": 3, "kv_heads": 4}),
        (((5, 0), (5, 0)), {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_gets_the_mask_that_the_workload_means(sequences, fields, dtype):
    workload = Workload("w", "extend", sequences, **(TINY | {"dtype": dtype} | fields))
    (implementation,) = providers.PROVIDERS["torch_sdpa"].implementations
    assert checks.check(implementation, workload.make(0)).outcome == "ok"


def test_aiters_stand_ins_for_nvidia_are_installed_only_there_and_drop_only_amds_options(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="need an NVIDIA GPU"):
            aiter_on_cuda.install()
    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **kwargs: launched.append(kwargs))
    aiter_on_cuda._drop_amd_options()
    options = {"num_warps": 4, "waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2, "BLOCK": 64}
    for module, names in (("aiter.ops", []), ("aiter.ops", ["waves_per_eu"]), ("aiterlab.attention", [])):
        kernel = SimpleNamespace(fn=SimpleNamespace(__module__=module), arg_names=names)
        jit.JITFunction.run(kernel, **options)
    assert launched == [{"num_warps": 4, "BLOCK": 64}, {"num_warps": 4, "waves_per_eu": 2, "BLOCK": 64}, options]


# What a notebook's cell would show under its answers.
HEARD = """
import contextlib, io, logging, warnings
warnings.simplefilter("ignore")
said = io.StringIO()
with contextlib.redirect_stderr(said):
    from aiterlab.attention import providers
    providers.enter()
    from aiterlab.attention.workloads import Workload
    from aiterlab.measure.checks import check
    w = Workload("decode", "decode", ((16, 1),), 4, 2, 64, dtype="float16")
    outcomes = {i.provider: check(i, w.make(1)).outcome for i in providers.implementations() if i.supports(w)}
    logging.getLogger("aiter").warning("of something else")
assert {outcomes["aiter_triton"], outcomes["vllm_triton"]} == {"ok"}, outcomes
print(said.getvalue())
"""


@pytest.mark.slow
def test_a_simulated_machine_does_not_say_that_it_is_one_between_the_answers(run_python):
    assert run_python(HEARD).strip() == "[aiter] of something else"


def test_a_machine_of_its_own_is_not_mistaken_for_another(monkeypatch):
    at(monkeypatch, "simulated", "gfx942")
    with pytest.raises(RuntimeError, match="this process already runs on"):
        providers.enter(Machine("native"))


# On a GPU: everything that is available here, native, checked and timed.
NATIVE = """
import json, warnings
warnings.simplefilter("ignore")
from aiterlab.attention import providers
providers.enter()
from aiterlab.attention.workloads import Workload
from aiterlab.measure.checks import check
from aiterlab.measure.timing import Stopwatch

workloads = [
    Workload("prefill", "prefill", ((0, 160), (0, 512))),
    Workload("extend", "extend", ((2000, 70), (33, 300))),
    Workload("verify", "verify", ((4000, 4), (160, 4))),
    Workload("decode", "decode", ((16, 1), (4000, 1), (0, 1))),
    Workload("fp8", "decode", ((16, 1), (400, 1)), kv_dtype="float8_e4m3fn"),
    Workload("gather", "gather", ((160, 0), (3300, 0))),
    Workload("gather_shuffled", "gather", ((160, 0), (3300, 0)), layout="SHUFFLE"),
]
stopwatch, outcomes = Stopwatch("cuda", rounds=5), []
for w in workloads:
    checked = [
        (i, check(i, w.make(1, "cuda", poison=not i.reads_whole_pages)))
        for i in providers.implementations() if i.supports(w)
    ]
    outcomes += [[w.name, i.label, one.outcome, one.reason] for i, one in checked]
    stopwatch.measure(w, checked)
print(json.dumps({"outcomes": outcomes, "reasons": [[t.workload, t.provider, t.implementation, t.reason]
      for t in stopwatch.timings if not t.samples_us], "table": providers.table().values.tolist()}))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_available_provider_is_right_and_can_be_captured_on_this_gpu(run_python):
    answer = json.loads(run_python(NATIVE, timeout_s=500).splitlines()[-1])
    assert [row for row in answer["outcomes"] if row[2] != "ok"] == []
    assert {row[1] for row in answer["reasons"]} <= {"reference"}
