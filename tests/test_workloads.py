# SPDX-License-Identifier: Apache-2.0
"""Workloads say what work they are, their tensors show misuse, and the sweep shows every pair of settings."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiterlab import pairwise
from aiterlab.attention import layouts, workloads
from aiterlab.attention.workloads import CASES, CPU_CASES, Workload

SMALL = {"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": "float16"}
SWEEPS = {size: workloads.sweep(size) for size in ("small", "large")}
MADE = (*SWEEPS["small"], *workloads.adversarial(), *CPU_CASES.values())


def extend(*sequences, **fields):
    return Workload("test", "extend", sequences, **(SMALL | fields))


def pairs(context, new, causal=True, window=0):
    """(query, key) that may meet, from the definition: the query at position context + i, one by one."""
    return {
        (query, key)
        for query in range(context, context + new)
        for key in range(context + new)
        if (not causal or key <= query) and (not window or (query - key < window and key - query < window))
    }


# What a workload counts


@given(st.integers(0, 30), st.integers(0, 12), st.booleans(), st.sampled_from([0, 1, 3, 20]), st.booleans())
def test_work_is_counted_as_the_mask_says(context, new, causal, window, short):
    context = -min(context, new) if short else context
    workload = extend((context, new), (7, 2), causal=causal, window=window)
    each = [pairs(*sequence, causal, window) for sequence in workload.sequences]
    assert workload.flops() == 4 * 64 * 4 * sum(len(seen) for seen in each)
    rows = workload.visible(context, new)
    assert {(context + i, key) for i, keys in enumerate(rows) for key in keys} == each[0]
    keys = sum(len({key for _, key in seen}) for seen in each)
    assert workload.bytes_moved() == keys * 2 * 2 * 64 * 2 + 2 * workload.tokens * 4 * 64 * 2


def test_bytes_of_quantised_caches_and_gathers():
    token = 2 * 2 * 64  # numbers of a token in both caches
    out = 2 * 4 * 64 * 2  # one row of q and of the output
    assert extend((99, 1)).bytes_moved() == 100 * token * 2 + out
    assert extend((99, 1), kv_dtype="int8").bytes_moved() == 100 * token + out
    per_head = extend((99, 1), kv_dtype="int8", scales="token_head")
    assert per_head.bytes_moved() == 100 * (token + 2 * 2 * 4) + out
    gather = Workload("test", "gather", ((99, 0),), **SMALL, kv_dtype="float8_e4m3fn")
    assert gather.bytes_moved() == 99 * (token + 2 * token)
    assert gather.flops() == 0


def test_the_cases_are_the_issues():
    assert CASES["decode_64x8k"].bytes_moved() == pytest.approx(2 * 64 * 8192 * 8 * 128 * 2, rel=0.001)
    assert CASES["prefill_1x16k"].flops() == pytest.approx(4 * 128 * 32 * 16384**2 / 2, rel=0.001)
    assert CASES["extend_q512_8x32k"].lengths == (32 * 1024 + 512,) * 8
    assert CASES["verify_q4_1x32k"].lengths == (32 * 1024,)
    for name in (*(f"verify_q{new}" for new in (4, 8)), "decode"):
        assert {f"{name}_{batch}" for batch in ("1x8k", "1x32k", "8x16k", "64x8k")} <= set(CASES)
    assert {"prefill_8x2k", "prefill_2x8k", "gather_64x8k", "gather_64x8k_shuffle", "decode_64x8k_fp8"} <= set(CASES)
    assert {w.dtype for w in CASES.values()} == {"bfloat16"}
    assert {(w.heads, w.kv_heads, w.head_size) for w in CASES.values()} == {(32, 8, 128)}
    assert CASES["decode_64x8k_fp8"].kv_dtype == "float8_e4m3fn"
    assert {name: w.page_size for name, w in CASES.items() if w.page_size != 16} == {
        "decode_64x8k_page64": 64,
        "decode_64x8k_page128": 128,
    }
    for name, workload in (*CASES.items(), *CPU_CASES.items()):
        assert name == workload.name
        assert name.startswith(workload.operation)
    assert {w.operation for w in CPU_CASES.values()} == set(workloads.OPERATIONS)
    assert {w.dtype for w in CPU_CASES.values()} == {"float16"}  # Triton's interpreter has no right bf16


REFUSED = {
    "operation": ({"operation": "train"}, "operation 'train' is not one of prefill"),
    "dtype": ({"dtype": "float64"}, "dtype 'float64'"),
    "kv_dtype": ({"kv_dtype": "float16"}, "kv_dtype 'float16'"),
    "layout": ({"layout": "HND"}, "layout 'HND'"),
    "values": ({"values": "zero"}, "values 'zero'"),
    "scales": ({"scales": "token_head"}, "not quantised has no scales"),
    "heads": ({"heads": 5}, "5 heads cannot share 2 KV heads"),
    "no sequence": ({"sequences": ()}, "each sequence needs"),
    "fewer than no keys": ({"sequences": ((-3, 2),)}, "context \\+ new >= 0"),
    "fewer than no tokens": ({"sequences": ((3, -1),)}, "new >= 0"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_no_operation_can_have_is_refused(wrong):
    fields, reason = REFUSED[wrong]
    with pytest.raises(ValueError, match=reason):
        Workload(**({"name": "test", "operation": "extend", "sequences": ((1, 1),), **SMALL} | fields))


def test_windows_are_flash_attns():
    assert extend((9, 1)).window_size == (-1, -1)
    assert extend((9, 1), window=4).window_size == (3, 0)
    assert extend((9, 1), window=4, causal=False).window_size == (3, 3)


# The tensors


@pytest.mark.parametrize("workload", MADE, ids=lambda workload: workload.name)
def test_the_tensors_have_the_stated_shapes(workload):
    w, made = workload, workload.make(seed=1)
    sequences, keys = len(w.sequences), sum(w.lengths)
    assert made.q.shape == (w.tokens, w.heads, w.head_size)
    assert made.q.dtype == getattr(torch, w.dtype)
    stored = made.q.dtype if w.kv_dtype == "auto" else getattr(torch, w.kv_dtype)
    shapes = layouts.shapes(w.layout, len(made.k_cache), w.page_size, w.kv_heads, w.head_size, stored.itemsize)
    assert (made.k_cache.shape, made.v_cache.shape) == shapes
    assert made.k_cache.dtype == made.v_cache.dtype == stored
    assert made.k_cache.is_contiguous()
    assert made.cu_seqlens_q.tolist() == [sum(new for _, new in w.sequences[:i]) for i in range(sequences + 1)]
    assert made.cu_seqlens_k.tolist() == [sum(w.lengths[:i]) for i in range(sequences + 1)]
    assert made.seqused_k.tolist() == list(w.lengths)
    integers = (made.cu_seqlens_q, made.cu_seqlens_k, made.seqused_k, made.block_table)
    assert {tensor.dtype for tensor in integers} == {torch.int32}
    assert (made.max_seqlen_q, made.max_seqlen_k) == (max(new for _, new in w.sequences), max(w.lengths))
    assert made.k.shape == made.v.shape == (keys, w.kv_heads, w.head_size)
    assert made.k.dtype == made.v.dtype == made.q.dtype
    assert bool(made.k.isfinite().all() and made.v.isfinite().all())
    assert (made.alibi_slopes is not None) == w.alibi
    for descale in (made.k_descale, made.v_descale):
        if w.kv_dtype == "auto":
            assert descale is None
        else:
            assert descale.dtype is torch.float32
            paged = (len(made.k_cache), w.page_size, w.kv_heads)
            assert descale.shape == (paged if w.scales == "token_head" else (1,))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("kv_dtype", workloads.KV_DTYPES)
def test_whatever_belongs_to_no_sequence_is_poisoned(kv_dtype, layout):
    scales = "tensor" if kv_dtype == "auto" else "token_head"
    made = extend((16, 3), (0, 0), (0, 5), (1, 31), kv_dtype=kv_dtype, layout=layout, scales=scales).make(0)
    used = set(zip(*(part.tolist() for part in layouts.locate(made.block_table, made.seqused_k, 16)), strict=True))
    assert len(used) == 16 + 3 + 5 + 32  # no two tokens share a slot
    blocks, offsets = torch.tensor(
        [(b, o) for b in range(len(made.k_cache)) for o in range(16) if (b, o) not in used]
    ).T
    for part, cache, descale in (("k", made.k_cache, made.k_descale), ("v", made.v_cache, made.v_descale)):
        rest = layouts.read(cache, part, blocks, offsets, layout)
        assert bool((rest == -128).all() if kv_dtype == "int8" else rest.float().isnan().all())
        if descale is not None:
            assert bool(descale[blocks, offsets].isnan().all())
    zeroed = made.workload.make(0, poison=False)
    assert not layouts.read(zeroed.k_cache, "k", blocks, offsets, layout).float().any()
    assert torch.equal(zeroed.k, made.k)


def test_unused_entries_of_the_block_table_name_no_block_and_lead_to_poison():
    made = extend((16, 3), (0, 0), (0, 5)).make(0)
    blocks = len(made.k_cache)
    assert (made.block_table == blocks).tolist() == [[False, False], [True, True], [False, True]]
    used = made.block_table[made.block_table != blocks]
    assert len(used.unique()) == len(used) == 3 < blocks
    behind = made.k_cache.as_strided(
        (1, *made.k_cache.shape[1:]), made.k_cache.stride(), blocks * made.k_cache.stride(0)
    )
    assert bool(behind.isnan().all())


def test_pages_are_scattered():
    table = extend((700, 1)).make(0).block_table[0].tolist()
    assert len(set(table)) == len(table) == 44
    assert table != sorted(table)


def test_one_seed_makes_one_set_of_tensors():
    first, again, other = (extend((33, 4), kv_dtype="int8").make(seed) for seed in (3, 3, 4))
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.k_cache, again.k_cache)
    assert torch.equal(first.block_table, again.block_table)
    assert not torch.equal(first.q, other.q)
    assert not torch.equal(first.k, other.k)


def test_descales_of_keys_and_values_differ_by_more_than_rounding():
    made = extend((33, 4), kv_dtype="float8_e4m3fn").make(0)
    assert made.v_descale.item() > 1.5 * made.k_descale.item()


# The sweep


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_the_cover_shows_every_pair_in_few_rows(counts):
    options = {f"option {i}": tuple(range(count)) for i, count in enumerate(counts)}
    rows = pairwise.cover(options)
    shown = {pair for row in rows for pair in combinations(row.items(), 2)}
    needed = {((a, x), (b, y)) for a, b in combinations(options, 2) for x, y in product(options[a], options[b])}
    assert shown == needed
    most = sorted(counts)[-2:]
    assert most[0] * most[1] <= len(rows) <= 2 * most[0] * most[1]


@pytest.mark.parametrize("size", SWEEPS)
def test_every_pair_of_the_issues_settings_is_swept(size):
    swept = SWEEPS[size]
    assert swept == workloads.sweep(size)
    assert len(swept) < 50
    settings = [
        {
            "dtype": w.dtype,
            "head_size": w.head_size,
            "group": "MQA" if w.kv_heads == 1 else w.heads // w.kv_heads,
            "page": w.page_size,
            "window": 0 if not w.window else 1 if w.window < w.page_size else 2,
            "layout": w.layout,
            "cache": (w.kv_dtype, w.scales),
            "softcap": bool(w.softcap),
            "alibi": w.alibi,
        }
        for w in swept
    ]
    values = {name: {row[name] for row in settings} for name in settings[0]}
    assert values["head_size"] == {64, 96, 128, 256}
    assert values["group"] == {1, 4, 5, 8, "MQA"}
    assert values["page"] == {16, 32, 64, 128}
    assert values["window"] == {0, 1, 2}
    assert values["cache"] == set(workloads.CACHES)
    assert values["dtype"] == ({"float16", "float32"} if size == "small" else {"bfloat16", "float16"})
    for a, b in combinations(values, 2):
        assert {(row[a], row[b]) for row in settings} == set(product(values[a], values[b])), (a, b)
    contexts = {(context - w.page_size, context == 0) for w in swept for context, _ in w.sequences}
    assert {offset for offset, _ in contexts} >= {-1, 0, 1}
    assert any(empty for _, empty in contexts)
    steps = {new for w in swept for _, new in w.sequences}
    assert {1, 16} | set(range(2, 9)) <= steps


def test_small_workloads_are_small():
    """Triton's interpreter handles a few thousand pairs of rows and pages a second."""
    for workload in (*SWEEPS["small"], *workloads.adversarial(), *CPU_CASES.values()):
        assert sum(workload.lengths) < 700
        assert workload.tokens * workload.heads < 700
    assert max(sum(workload.lengths) for workload in SWEEPS["large"]) > 4000


def test_adversarial_workloads_are_what_their_names_say():
    cases = {workload.name: workload for workload in workloads.adversarial()}
    rows = {name: [len(keys) for one in w.sequences for keys in w.visible(*one)] for name, w in cases.items()}
    assert {name for name, seen in rows.items() if 0 in seen} == {"rows_without_keys", "queries_without_keys"}
    assert set(rows["window_of_one"]) == {1}
    assert (0, 0) in cases["empty_sequences"].sequences
    assert any(new == 0 < context for context, new in cases["no_new_tokens"].sequences)
    large, outlier = cases["large_logits"].make(0), cases["outlier"].make(0)
    logits = large.softmax_scale * torch.einsum("thd,shd->hts", large.q[:, ::2].float(), large.k.float())
    assert logits.abs().max() > 1000
    assert bool(logits.isfinite().all() and large.k.isfinite().all())
    assert outlier.v.abs().max() == 5000
    assert outlier.v.abs().float().median() < 10
    assert {w.dtype for w in workloads.adversarial("bfloat16")} == {"bfloat16"}
