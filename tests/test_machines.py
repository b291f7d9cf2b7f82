# SPDX-License-Identifier: Apache-2.0
"""The simulated machine: what its driver answers, what its stand-ins compute, and what it refuses to invent."""

import json

import numpy as np
import pytest
import torch

from aiterlab.attention import reference
from aiterlab.machines import ARCHITECTURES, Machine, aiter_jit, extensions, paged
from aiterlab.machines.description import with_switch
from aiterlab.policy import MAIN_SWITCH

HEADS, KV_HEADS, HEAD_SIZE, PAGE, BLOCKS = 4, 2, 64, 16, 8
SCALE = HEAD_SIZE**-0.5

# Kernels on the device of a kernel that is interpreted: integers around the ends of int32; a block of attention, with
# blocks of one and two dimensions, pointers, a loop, masks, reductions and functions that call functions.
INTERPRETED = """
import hashlib, json, sys
from pathlib import Path
if sys.argv[1] == "ours":
    from aiterlab.machines import interpreter
    interpreter.choose()
import torch, triton
from triton import language as tl
Path("kernels.py").write_text('''
import triton
from triton import language as tl

@triton.jit
def wrapped(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(X + at)
    tl.store(OUT + at, x * x + 7 - x)

@triton.jit
def scalars(X, OUT, count, stride):
    row = tl.program_id(0)
    at = row * stride + count % stride - count // stride
    x, y = tl.load(X + at), tl.load(X + (at.to(tl.int64) + count) % 7)
    tl.store(OUT + row * 4, x * x - y)
    tl.store(OUT + row * 4 + 1, x / y)
    tl.store(OUT + (row * 4 + 2), (x < y) & (row == at))
    tl.store(OUT + 3 + row * 4, (at.to(tl.uint8) + at.to(tl.uint8)) % 7)

@triton.jit
def offset_by(X, OFFSET):
    tl.store(X + OFFSET, tl.load(X))

@triton.jit
def address(BASE, row, column, WIDTH: tl.constexpr):
    return BASE + row[:, None] * WIDTH + column[None, :]

@triton.jit
def tile(BASE, row, column, WIDTH: tl.constexpr, length):
    return tl.load(address(BASE, row, column, WIDTH), mask=row[:, None] < length, other=0.0)

@triton.jit
def attention(Q, K, V, LENGTHS, OUT, N: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr):
    length = tl.load(LENGTHS + tl.program_id(0))
    rows, columns = tl.arange(0, N), tl.arange(0, D)
    query = tile(Q, rows, columns, D, N)
    most = tl.full((N,), -float("inf"), tl.float32)
    total, out = tl.zeros((N,), tl.float32), tl.zeros((N, D), tl.float32)
    for start in range(0, length, STEP):
        keys = start + tl.arange(0, STEP)
        scores = tl.dot(query, tl.trans(tile(K, keys, columns, D, length))).to(tl.float32)
        scores = tl.where(keys[None, :] < length, scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(V.dtype.element_ty), tile(V, keys, columns, D, length))
        most = higher
    tl.store(address(OUT + tl.program_id(0) * N * D, rows, columns, D), (out / total[:, None]).to(OUT.dtype.element_ty))
''')
sys.path.insert(0, "")
from kernels import attention, offset_by, scalars, wrapped
from triton.runtime.interpreter import interpreter_builder
x = torch.tensor([0, 3, -5, 2**31 - 1, -2**31, 46341, 65536, -46341], dtype=torch.int32)
integers = torch.empty_like(x)
wrapped[(1,)](x, integers, 8)
found = [interpreter_builder.options.sanitize_overflow, type(tl.arange).__name__, integers.tolist()]
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float16, torch.float32, torch.int16):
    out = torch.zeros(12, dtype=dtype)
    scalars[(3,)](torch.arange(1, 9).to(dtype), out, 5, 3)
    found.append(out.tolist())
for wrong in (0.5, x):
    try:
        offset_by[(1,)](x, wrong)
    except Exception as error:
        found.append(repr(error))
for dtype, steps in ((torch.float32, 16), (torch.float16, 16), (torch.float16, 32)):
    q, k, v = (torch.randn(n, 32, generator=generator).to(dtype) for n in (16, 64, 64))
    out = torch.empty(2, 16, 32, dtype=dtype)
    attention[(2,)](q, k, v, torch.tensor([33, 64]), out, 16, steps, 32)
    for lengths, one in zip((33, 64), out):
        expected = torch.softmax(q.double() @ k[:lengths].double().T, -1) @ v[:lengths].double()
        found.append((one.double() - expected).abs().max().item() < (1e-5 if dtype is torch.float32 else 4e-3))
    found.append(hashlib.sha256(out.numpy().tobytes()).hexdigest())
print(json.dumps(found))
"""

# One process per machine, forked from one that holds torch.
DRIVERS = """
import json, multiprocessing, subprocess, sys, torch

def look(arch):
    from aiterlab.machines import Machine, simulation
    simulation.install(Machine(arch=arch))
    import amdsmi
    from triton.runtime import driver
    tool = lambda *words: subprocess.run(words, capture_output=True, text=True, check=True).stdout
    asic = amdsmi.amdsmi_get_gpu_asic_info(amdsmi.amdsmi_get_processor_handles()[0])
    seen, target = torch.cuda.get_device_properties("cuda"), driver.active.get_current_target()
    try:
        import aiter as library
        found = library.__name__
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return arch, {
        "rocminfo": tool("rocminfo"), "hipconfig": tool("hipconfig", "--version").strip(), "asic": asic,
        "properties": vars(seen), "capability": list(torch.cuda.get_device_capability()), "aiter": found,
        "count": torch.cuda.device_count(), "triton": [target.backend, target.arch, target.warp_size],
    }

pool = multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1)
print(json.dumps(dict(pool.map(look, sys.argv[1:], chunksize=1))))
"""

# What one gfx942 with AITER does, up to the edges of the simulation.
EDGES = """
import json
from aiterlab.machines import Machine, ledger, simulation
simulation.install(Machine(arch="gfx942"))
simulation.install(Machine(arch="gfx942"))
answers = {}
def refused(name, call):
    try: answers[name] = repr(call())
    except Exception as error: answers[name] = f"{type(error).__name__}: {error}"
refused("second machine", lambda: simulation.install(Machine(arch="gfx90a")))
import vllm._C
with open("/proc/self/maps") as maps: loaded = sorted({l.split("/")[-1].strip() for l in maps if "/vllm/" in l})
answers["extension"] = [vllm._C.__file__, loaded]
ledger.enter("import")
import aiter as library
answers["imported"] = list(ledger.jit_modules)
ledger.enter("call")
import torch
from aiterlab.attention import reference
answers["errors"] = []
generator = torch.Generator().manual_seed(0)
# two sequences: a prompt of 5 tokens, and 3 tokens on top of 30 cached ones
lengths, new = [5, 33], [5, 3]
queries = torch.randn(sum(new), 4, 64, generator=generator).half()
keys, values = (torch.randn(sum(lengths), 2, 64, generator=generator).half() for _ in "kv")
offsets = lambda counts: torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
def attend(*tensors):
    return library.flash_attn_varlen_func(*tensors, offsets(new), offsets(lengths), max(new), max(lengths),
                                          softmax_scale=0.125, causal=True)
output = attend(queries, keys, values)
output = output[0] if isinstance(output, tuple) else output
for q, s in ((slice(0, 5), slice(0, 5)), (slice(5, 8), slice(5, 38))):
    parts = queries[q], keys[s], values[s], 0.125
    answers["errors"].append([(output[q].double() - reference.attend(*parts)).abs().max().item(),
                              reference.tolerance(*parts)])
answers["called"] = [entry["module"] for entry in ledger.jit_modules if entry["step"] == "call"]
refused("bf16", lambda: attend(queries.bfloat16(), keys.bfloat16(), values.bfloat16()))
refused("rms_norm", lambda: library.rms_norm(queries[0], queries[0, 0], 1e-5))
import module_of_no_use
refused("unknown", lambda: module_of_no_use.some_kernel(1))
refused("dunder", lambda: module_of_no_use.__wrapped__)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def drivers(run_python):
    return json.loads(run_python(DRIVERS, *ARCHITECTURES))


@pytest.fixture(scope="module")
def edges(run_python):
    return json.loads(run_python(EDGES).splitlines()[-1])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_driver_question_has_one_answer(drivers, arch):
    gpu, seen = ARCHITECTURES[arch], drivers[arch]
    assert f"Name:                    {arch}\n" in seen["rocminfo"]
    assert f"Compute Unit:            {gpu.compute_units}\n" in seen["rocminfo"]
    assert seen["hipconfig"].startswith("6.4.")
    assert (seen["asic"]["target_graphics_version"], seen["asic"]["device_id"]) == (arch, gpu.device_id)
    properties = seen["properties"]
    assert properties["gcnArchName"] == (f"{arch}:sramecc+:xnack-" if arch.startswith("gfx9") else arch)
    assert (properties["warp_size"], properties["total_memory"]) == (gpu.wavefront, gpu.memory_bytes)
    assert (properties["multi_processor_count"], properties["name"]) == (gpu.compute_units, gpu.product)
    hip = {
        "gfx90a": [9, 0],
        "gfx942": [9, 4],
        "gfx950": [9, 5],
        "gfx1100": [11, 0],
        "gfx1151": [11, 5],
        "gfx1201": [12, 0],
    }
    assert seen["capability"] == [properties["major"], properties["minor"]] == hip[arch]
    assert (seen["count"], seen["triton"]) == (1, ["hip", arch, gpu.wavefront])


def test_aiter_itself_decides_which_architectures_it_knows(drivers):
    known = ("gfx90a", "gfx942", "gfx950", "gfx1100")
    assert {arch: drivers[arch]["aiter"] for arch in known} == dict.fromkeys(known, "aiter")
    for arch in ARCHITECTURES.keys() - known:
        assert drivers[arch]["aiter"].startswith("RuntimeError: ")
        assert f"Unknown GPU architecture: {arch}" in drivers[arch]["aiter"]


@pytest.mark.slow
@pytest.mark.parametrize("flash_attn", [True, False])
def test_what_is_absent_cannot_be_found(run_python, flash_attn):
    code = f"""
    from importlib.util import find_spec
    from aiterlab.machines import Machine, ledger, simulation
    simulation.install(Machine(aiter=False, flash_attn={flash_attn}))
    print(find_spec("aiter"), find_spec("flash_attn") is not None, ledger.jit_modules)
    try:
        import aiter as library
    except ModuleNotFoundError as error:
        print(error)
    """
    assert run_python(code).splitlines() == [f"None {flash_attn} []", "No module named 'aiter'"]


def test_a_process_has_one_machine(edges):
    assert edges["second machine"].startswith("RuntimeError: this process already runs on {")


def test_no_compiled_file_of_the_installed_vllm_is_loaded(edges):
    assert edges["extension"] == ["<simulated ROCm build>/vllm._C", []]


def test_importing_aiter_would_compile_its_enums(edges):
    assert [(entry["module"], entry["step"]) for entry in edges["imported"]] == [("module_aiter_enum", "import")]


def test_varlen_attention_through_aiters_own_python_agrees_with_float64(edges):
    assert [name.partition("_fp16")[0] for name in edges["called"]] == ["mha_varlen_fwd"]
    for error, limit in edges["errors"]:
        assert 0 < error < limit < 0.02


def test_what_cannot_be_computed_honestly_is_refused_by_name(edges):
    assert edges["bf16"].startswith("NotImplementedError: bf16 is refused: Triton's interpreter computes bf16")
    assert edges["unknown"].startswith("NotImplementedError: module_of_no_use.some_kernel exists only compiled for")
    assert edges["rms_norm"].startswith("NotImplementedError: module_rmsnorm.")
    assert edges["dunder"].startswith("AttributeError")


@pytest.fixture
def paged_batch():
    """Three sequences over a scattered cache; what lies beyond their tokens is NaN and must not be touched."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 16, 41]
    queries = torch.randn(3, HEADS, HEAD_SIZE, generator=generator).half()
    sequences = [torch.randn(2, n, KV_HEADS, HEAD_SIZE, generator=generator).half() for n in lengths]
    tables = torch.tensor([[6, 0, 0], [1, 0, 0], [7, 2, 5]], dtype=torch.int32)
    cache = torch.full((2, BLOCKS, PAGE, KV_HEADS, HEAD_SIZE), float("nan"), dtype=torch.float16)
    for table, (keys, values) in zip(tables, sequences, strict=True):
        slots = torch.tensor([int(table[t // PAGE]) * PAGE + t % PAGE for t in range(len(keys))])
        extensions.reshape_and_cache_flash(
            keys, values, cache[0], cache[1], slots, "auto", torch.ones(1), torch.ones(1)
        )
    return queries, sequences, cache, tables, torch.tensor(lengths, dtype=torch.int32)


def worst_share(output: torch.Tensor, queries, sequences) -> float:
    """Largest error of a decode step as a share of its tolerance; NaN counts as infinitely wrong."""
    shares = []
    for i, (keys, values) in enumerate(sequences):
        parts = queries[i : i + 1], keys, values, SCALE
        error = (output[i : i + 1].double() - reference.attend(*parts)).abs().max().item()
        shares.append(error / reference.tolerance(*parts) if error == error else float("inf"))
    return max(shares)


def decode(batch) -> torch.Tensor:
    queries, _, cache, tables, lengths = batch
    arguments = (part.numpy() for part in (queries, cache[0], cache[1], tables, lengths))
    return torch.from_numpy(paged.attend_paged(*arguments, SCALE))


def decode_shuffled(batch) -> torch.Tensor:
    """Through the stand-in of AITER's assembly kernel, whose cache has another memory order."""
    queries, _, cache, tables, lengths = batch
    x = 16 // cache.element_size()
    keys = cache[0].reshape(BLOCKS, PAGE, KV_HEADS, HEAD_SIZE // x, x).permute(0, 2, 3, 1, 4).contiguous()
    values = cache[1].reshape(BLOCKS, PAGE // x, x, KV_HEADS, HEAD_SIZE).permute(0, 3, 1, 4, 2).contiguous()
    return aiter_jit.pa_fwd_asm(queries, keys, values, tables, lengths, 3, out_=torch.empty_like(queries))


@pytest.mark.parametrize("path", [decode, decode_shuffled])
def test_paged_decode_agrees_with_float64(paged_batch, path):
    assert worst_share(path(paged_batch), *paged_batch[:2]) < 1


@pytest.mark.parametrize("path", [decode, decode_shuffled])
def test_a_stand_in_that_ignores_the_block_table_is_caught(paged_batch, monkeypatch, path):
    honest = paged.attend_paged

    def first_pages(queries, key_cache, value_cache, block_tables, *rest):
        in_order = np.arange(block_tables.size, dtype=np.int32).reshape(block_tables.shape) % BLOCKS
        return honest(queries, np.nan_to_num(key_cache), np.nan_to_num(value_cache), in_order, *rest)

    monkeypatch.setattr(paged, "attend_paged", first_pages)
    monkeypatch.setattr(aiter_jit, "attend_paged", first_pages)
    assert worst_share(path(paged_batch), *paged_batch[:2]) > 10


def test_the_cache_write_skips_padding_and_refuses_to_quantise():
    keys, values = torch.arange(4.0).reshape(4, 1, 1), -torch.arange(4.0).reshape(4, 1, 1)
    key_cache, value_cache = (torch.full((2, 2, 1, 1), 9.0) for _ in "kv")
    rest = "auto", torch.ones(1), torch.ones(1)
    extensions.reshape_and_cache_flash(keys, values, key_cache, value_cache, torch.tensor([3, -1, 0]), *rest)
    assert (key_cache.flatten().tolist(), value_cache.flatten().tolist()) == ([2, 9, 9, 0], [-2, 9, 9, 0])
    with pytest.raises(NotImplementedError, match="does not quantise"):
        slots = torch.tensor([0])
        extensions.reshape_and_cache_flash(keys, values, key_cache, value_cache, slots, "fp8", *rest[1:])


def test_a_machine_crosses_a_process_boundary_and_leaves_nothing_of_ours_set(monkeypatch):
    machine = with_switch(Machine(arch="gfx1100", aiter=False, switches={"VLLM_X": "2"}), "0")
    assert Machine.from_json(machine.to_json()) == machine
    for name in (MAIN_SWITCH, "GPU_ARCHS", "AITERLAB_HOTFIX"):
        monkeypatch.setenv(name, "1")
    variables = machine.environment()
    assert (variables[MAIN_SWITCH], variables["VLLM_X"]) == ("0", "2")
    assert variables["GPU_ARCHS"] is variables["AITERLAB_HOTFIX"] is None
    assert with_switch(machine, "unset").environment()[MAIN_SWITCH] is None
    assert "AITERLAB_MACHINE" not in Machine("native").environment()
    with pytest.raises(ValueError, match="unknown architecture 'gfx000'; known: gfx90a, gfx942"):
        Machine(arch="gfx000")


def test_the_interpreter_computes_the_same_without_what_it_throws_away(run_python):
    ours, theirs = (json.loads(run_python(INTERPRETED, whose, TRITON_INTERPRET="1")) for whose in ("ours", "theirs"))
    assert (ours[0], theirs[0]) == (False, True)
    assert ours[1:] == theirs[1:]
    assert ours[2][:3] == [7, 13, 37]
    assert [one for one in ours[3:] if one is True] == [True] * 6
    assert [type(one) for one in ours[3:8]] == [list] * 3 + [str] * 2


def test_the_interpreter_works_out_a_shape_once_and_is_wrapped_once(run_python):
    told = run_python(
        "from aiterlab.machines import interpreter; interpreter.choose()\n"
        "import triton\n"
        "from triton.language import core\n"
        "one, other = (core.block_type(kind, [4, core.constexpr(8)]) for kind in (core.int32, core.int32))\n"
        "assert one == other and one is not other and one.shape is other.shape and one.numel == 32\n"
        "assert core.block_type(core.pointer_type(core.int32), [4, 8]) != one != core.block_type(core.int32, [8, 4])\n"
        "assert core.tensor(None, one).shape is core.tensor(None, core.block_type(core.int8, [4, 8])).shape\n"
        "constant = core.pointer_type(core.int32, const=True)\n"
        "assert core.block_type(constant, [4]).element_ty.const\n"
        "assert not core.block_type(core.pointer_type(core.int32), [4]).element_ty.const\n"
        "from triton.runtime import interpreter as runtime\n"
        "wrapped = runtime._patch_builtin; interpreter.choose(); assert runtime._patch_builtin is wrapped\n"
        "print(core.tensor(None, core.int32).numel.value)\n",
        TRITON_INTERPRET="1",
    )
    assert told.split() == ["1"]
