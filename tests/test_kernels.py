# SPDX-License-Identifier: Apache-2.0
"""Our attention kernels against float64, row by row; what they refuse; and, on a GPU, graphs and recompilation.

Triton decides once per process whether it compiles or interprets, so the classes below compute either on a GPU or in a
process of their own with the interpreter, which `test_in_the_interpreter` starts.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aiterlab import pairwise
from aiterlab.attention import eager, gather, merge, paged, pages, reference, tuning, varlen, workloads
from aiterlab.attention.workloads import Workload
from aiterlab.measure import checks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
COMPUTES = INTERPRETED or DEVICE == "cuda"  # can kernels run in this process?
PARTS = ("TestPaged", "TestVarlen or TestGather or TestMerge or TestUpstream or TestChecker")  # one process each
NAN = float("nan")
FP8 = torch.float8_e4m3fn
TINY = {"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": "float16"}
SWEEP = (*workloads.sweep("small"), *workloads.adversarial())


def named(cases):
    return pytest.mark.parametrize("workload", cases, ids=lambda workload: workload.name)


def extend(*sequences, **fields):
    return Workload("case", "extend", sequences or ((37, 4), (0, 9), (60, 1)), **(TINY | fields))


def attend_paged(inputs, **changes):
    arguments = {
        "max_seqlen_q": inputs.max_seqlen_q,
        "max_seqlen_k": inputs.max_seqlen_k,
        "out": torch.full_like(inputs.q, NAN),
        "return_lse": True,
        **inputs.paged,
        **inputs.options,
    }
    return paged.attend(inputs.q, inputs.k_cache, inputs.v_cache, **(arguments | changes))


def attend_varlen(inputs, **changes):
    arguments = {
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "max_seqlen_q": inputs.max_seqlen_q,
        "max_seqlen_k": inputs.max_seqlen_k,
        "out": torch.full_like(inputs.q, NAN),
        "return_lse": True,
        **inputs.options,
    }
    return varlen.attend(inputs.q, inputs.k, inputs.v, **(arguments | changes))


def gathered(inputs, **changes):
    arguments = {
        "block_table": inputs.block_table,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "total_tokens": sum(inputs.workload.lengths),
        "k_descale": inputs.k_descale,
        "v_descale": inputs.v_descale,
        "layout": inputs.layout,
        "out": (torch.full_like(inputs.k, NAN), torch.full_like(inputs.v, NAN)),
    }
    return gather.gather(inputs.k_cache, inputs.v_cache, **(arguments | changes))


def distance(inputs, out, lse=None):
    """How far a result is from float64, in units of the limit of each row: right up to 1."""
    (right, right_lse), (limit, lse_limit) = inputs.expected(), inputs.limits()
    ratio = checks.deviation(out, right, limit).ratio
    if lse is not None:
        ratio = max(ratio, checks.deviation(lse[..., None], right_lse[..., None], lse_limit).ratio)
    return ratio


def gather_distance(inputs, k, v):
    rounding = 0.0 if inputs.workload.kv_dtype == "auto" else torch.finfo(inputs.q.dtype).eps
    return max(
        checks.deviation(found, right, rounding * right.abs().amax(-1).float()).ratio
        for found, right in ((k, inputs.k), (v, inputs.v))
    )


def assert_right(inputs, result):
    assert distance(inputs, *result) <= 1


def force_splits(monkeypatch, count):
    monkeypatch.setattr(tuning, "splits", lambda *arguments, **sizes: count)


# The interpreter's own processes, and meanwhile, in this one, the eager twins


@pytest.fixture(scope="module", autouse=True)
def interpreters():
    """Start a process for each of PARTS; they compute while this one does the rest of the file."""
    if INTERPRETED:
        yield {}
        return
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", "not gpu"]
    processes = {
        part: subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "-k", part, __file__],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in PARTS
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@named(SWEEP)
def test_eager_twins_compute_the_same(workload):
    inputs = workload.make(0, DEVICE)
    assert_right(inputs, attend_paged(inputs, impl="eager"))
    assert_right(inputs, attend_varlen(inputs, impl="eager"))
    assert gather_distance(inputs, *gathered(inputs, impl="eager")) <= 1


@pytest.mark.skipif(INTERPRETED, reason="it is this process")
@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part, interpreters):
    report, _ = interpreters[part].communicate(timeout=600)
    assert interpreters[part].returncode == 0, report


class TestPaged:
    __test__ = COMPUTES

    @named(SWEEP)
    def test_sweep(self, workload):
        inputs = workload.make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs))

    SPLIT = (
        Workload("prefill", "prefill", ((0, 17), (0, 50)), **TINY),
        extend((90, 11), (0, 19), (0, 0), (130, 1)),
        Workload("decode", "decode", ((150, 1), (3, 1), (64, 1)), kv_dtype="int8", scales="token_head", **TINY),
        Workload("verify", "verify", ((200, 4), (31, 4)), 5, 1, 96, 32, "float16", layout="SHUFFLE", window=40),
        Workload("capped", "verify", ((140, 3), (0, 2)), kv_dtype="float8_e4m3fn", softcap=3.0, alibi=True, **TINY),
        Workload("unmasked", "extend", ((-4, 4), (75, 6), (-1, 9)), causal=False, window=30, **TINY),
    )

    @named(SPLIT)
    @pytest.mark.parametrize("splits", [2, 3, 7])
    def test_keys_split_over_programs(self, workload, splits, monkeypatch):
        force_splits(monkeypatch, splits)
        inputs = workload.make(1, DEVICE)
        assert_right(inputs, attend_paged(inputs))

    def test_without_lse_and_without_out(self, monkeypatch):
        inputs = extend().make(0, DEVICE)
        alone = attend_paged(inputs, out=None, return_lse=False)
        assert torch.equal(alone, attend_paged(inputs)[0])
        force_splits(monkeypatch, 3)
        assert distance(inputs, attend_paged(inputs, out=None, return_lse=False)) <= 1

    @pytest.mark.parametrize("heads, kv_heads", [(16, 1), (64, 1), (71, 1), (64, 2), (7, 7), (128, 1)])
    def test_groups(self, heads, kv_heads):
        inputs = extend((20, 3), (5, 1), (0, 2), heads=heads, kv_heads=kv_heads).make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs))

    @pytest.mark.parametrize("head_size", [16, 32, 48, 80, 112, 160, 192, 224])
    @pytest.mark.parametrize("layout, kv_dtype", [("NHD", "auto"), ("SHUFFLE", "int8")])
    def test_head_sizes(self, head_size, layout, kv_dtype):
        inputs = extend((20, 3), (0, 5), head_size=head_size, layout=layout, kv_dtype=kv_dtype).make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs))

    @pytest.mark.parametrize("head_size", [8, 40, 72])
    def test_head_sizes_that_are_no_multiple_of_16(self, head_size):
        inputs = extend((20, 3), (0, 5), head_size=head_size).make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs))
        assert_right(inputs, attend_varlen(inputs))
        assert gather_distance(inputs, *gathered(inputs)) <= 1

    @pytest.mark.parametrize("window", [(5, 3), (0, 0), (0, 4), (-1, 2), (3, -1), (40, 40), (2**31 - 1, 2**31 - 1)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_windows(self, window, causal):
        inputs = extend((37, 4), (0, 9), (-2, 5), causal=causal).make(0, DEVICE)
        inputs.window_size = window
        assert_right(inputs, attend_paged(inputs))
        assert_right(inputs, attend_varlen(inputs))

    @pytest.mark.parametrize("softcap", [1e-6, 0.5, 30.0, 1e6, 1e30])
    @pytest.mark.parametrize("values", ["normal", "large"])
    def test_soft_caps(self, softcap, values):
        inputs = extend((20, 2), (3, 1), softcap=softcap, values=values).make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs))

    def test_negative_alibi_slopes(self):
        inputs = extend(alibi=True).make(0, DEVICE)
        inputs.alibi_slopes = -inputs.alibi_slopes
        assert_right(inputs, attend_paged(inputs))

    @pytest.mark.parametrize("q_dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
    @pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e4m3fnuz", "int8"])
    def test_query_dtypes_over_quantised_caches(self, q_dtype, kv_dtype):
        """The output of fp8 queries is of float16 here, and may miss what float16 queries of the same values may."""
        inputs = extend(kv_dtype=kv_dtype).make(0, DEVICE)
        asked = inputs.q.to(q_dtype)
        inputs.q = asked.to(torch.float16 if asked.element_size() == 1 else q_dtype)
        inputs.expected()
        out = torch.full_like(inputs.q, NAN)
        inputs.q = asked
        assert_right(inputs, attend_paged(inputs, out=out))

    @pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 100.0])
    @pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "int8"])
    def test_scales_for_each_token_of_any_size(self, size, kv_dtype):
        inputs = extend(kv_dtype=kv_dtype, scales="token_head", dtype="float32" if size < 1e-3 else "float16").make(
            0, DEVICE
        )
        inputs.k_descale = inputs.k_descale * min(size, 10.0)
        inputs.v_descale = inputs.v_descale * size
        assert_right(inputs, attend_paged(inputs))

    @pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
    @pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
    def test_caches_that_are_slices(self, layout, kv_dtype):
        """As vLLM allocates them: keys and values in one tensor, pages apart, heads outside of the tokens."""
        inputs = extend(layout=layout, kv_dtype=kv_dtype).make(0, DEVICE)
        k, v = inputs.k_cache, inputs.v_cache
        both_first = torch.stack([k.flatten(1), v.flatten(1)])
        pages_first = both_first.transpose(0, 1).contiguous()
        apart = torch.nn.functional.pad(both_first, (0, 64))[..., : k[0].numel()]
        for stored in (both_first, pages_first.transpose(0, 1), apart):
            inputs.k_cache, inputs.v_cache = (
                x.unflatten(1, like.shape[1:]) for x, like in zip(stored, (k, v), strict=True)
            )
            assert not inputs.k_cache.is_contiguous() or stored is both_first
            assert_right(inputs, attend_paged(inputs))
            assert gather_distance(inputs, *gathered(inputs)) <= 1
        if layout == "NHD":
            inputs.k_cache, inputs.v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
            assert_right(inputs, attend_paged(inputs))

    def test_queries_and_output_that_are_slices(self, monkeypatch):
        inputs = extend().make(0, DEVICE)
        q = inputs.q
        fused = torch.randn(len(q), 2 * 4 + 3, 64, dtype=q.dtype, device=DEVICE)  # as q, k and v of one projection
        fused[:, 2:6] = q
        inputs.q = fused[:, 2:6]
        for splits in (1, 3):
            force_splits(monkeypatch, splits)
            into = torch.full((len(q), 9, 80), NAN, dtype=q.dtype, device=DEVICE)
            out, lse = attend_paged(inputs, out=into[:, 3:7, 8:72])
            assert_right(inputs, (out, lse))
            outside = into.clone()
            outside[:, 3:7, 8:72] = NAN
            assert outside.isnan().all()
            assert_right(inputs, attend_varlen(inputs))

    def test_heads_far_apart(self):
        """Two heads of q more than 2**31 numbers apart; memory that nobody touches costs nothing."""
        if DEVICE == "cuda":
            pytest.skip("a GPU's memory is real")
        inputs = extend((20, 1), heads=36, kv_heads=2).make(0)
        q = torch.empty(1, 36, 2**26, dtype=torch.float16)[:, :, :64]
        inputs.q = q.copy_(inputs.q)
        assert_right(inputs, attend_paged(inputs, out=torch.full((1, 36, 64), NAN, dtype=torch.float16)))
        assert_right(inputs, attend_varlen(inputs, out=torch.full((1, 36, 64), NAN, dtype=torch.float16)))

    @pytest.mark.parametrize("descale", ["k_descale", "v_descale"])
    def test_one_scale_for_each_token_and_the_other_for_all(self, descale):
        inputs = extend(kv_dtype="int8", scales="token_head").make(0, DEVICE)
        setattr(inputs, descale, torch.tensor([0.02], device=DEVICE))
        assert_right(inputs, attend_paged(inputs))
        setattr(inputs, descale, None)
        inputs.__dict__.pop("_reference")
        inputs.q = inputs.q / 50
        assert_right(inputs, attend_paged(inputs))

    @pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
    def test_a_scale_for_each_sequence_and_head(self, layout):
        """As flash-attn's tests give them. The reference gets the same numbers for each token and head."""
        inputs = extend(layout=layout, kv_dtype="float8_e4m3fn").make(0, DEVICE)
        scales = {name: torch.rand(3, 2, device=DEVICE) / 50 + 0.01 for name in ("k_descale", "v_descale")}
        for name, scale in scales.items():
            everywhere = torch.full((len(inputs.k_cache), 16, 2), NAN, device=DEVICE)
            for i, length in enumerate(inputs.workload.lengths):
                everywhere[inputs.block_table[i, : -(-length // 16)].long()] = scale[i]
            setattr(inputs, name, everywhere)
        inputs.expected()
        assert_right(inputs, attend_paged(inputs, **scales))
        assert_right(inputs, attend_paged(inputs, **scales, impl="eager"))
        assert gather_distance(inputs, *gathered(inputs, **scales)) <= 1
        assert gather_distance(inputs, *gathered(inputs, **scales, impl="eager")) <= 1

    def test_a_scale_of_zero(self):
        inputs = extend(kv_dtype="float8_e4m3fn").make(0, DEVICE)
        inputs.k_descale = torch.zeros(1, device=DEVICE)
        (out, lse), (right, right_lse) = attend_paged(inputs), inputs.expected()
        torch.testing.assert_close(out.double(), right, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse.double(), right_lse)

    @pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies bfloat16")
    def test_bfloat16_is_refused_in_the_interpreter(self):
        inputs = extend(dtype="bfloat16").make(0)
        for attend in (attend_paged, attend_varlen):
            with pytest.raises(TypeError, match="interpreter multiplies bfloat16 matrices wrongly"):
                attend(inputs)
            assert_right(inputs, attend(inputs, impl="eager"))


class TestVarlen:
    __test__ = COMPUTES

    @named(SWEEP)
    def test_sweep(self, workload):
        inputs = workload.make(0, DEVICE)
        assert_right(inputs, attend_varlen(inputs))

    @pytest.mark.parametrize("heads, head_size", [(16, 64), (71, 64), (5, 80), (4, 192)])
    def test_groups_and_head_sizes(self, heads, head_size):
        inputs = extend(heads=heads, kv_heads=1, head_size=head_size).make(0, DEVICE)
        assert_right(inputs, attend_varlen(inputs))

    def test_keys_and_values_that_are_slices(self):
        """Every second row of a wider tensor, from an odd offset on."""
        inputs = extend().make(0, DEVICE)
        k, v = inputs.k, inputs.v
        for name, x in (("k", k), ("v", v)):
            wide = torch.full((2 * len(x) + 1, 3, 72), NAN, dtype=x.dtype, device=DEVICE)
            wide[1::2, 1:, 8:] = x
            inputs.__dict__[name] = wide[1::2, 1:, 8:]
        assert_right(inputs, attend_varlen(inputs))

    def test_what_lies_behind_a_sequence_is_not_used(self):
        inputs = extend((30, 3), (17, 2)).make(0, DEVICE)
        inputs.expected()
        inputs.k[33:], inputs.v[33:] = NAN, NAN
        first = attend_varlen(inputs)[0][:3]
        assert torch.equal(first, attend_varlen(extend((30, 3), (17, 2)).make(0, DEVICE))[0][:3])


class TestGather:
    __test__ = COMPUTES

    @named(SWEEP)
    def test_sweep(self, workload):
        inputs = workload.make(0, DEVICE)
        assert gather_distance(inputs, *gathered(inputs)) <= 1

    @pytest.mark.parametrize("impl", ["triton", "eager"])
    @pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
    @pytest.mark.parametrize("kv_dtype", ["auto", "float8_e4m3fn"])
    def test_chunks_from_the_middle(self, impl, layout, kv_dtype):
        inputs = extend((40, 0), (0, 0), (70, 0), (33, 0), layout=layout, kv_dtype=kv_dtype).make(0, DEVICE)
        starts, counts = [13, 0, 48, 32], [20, 0, 22, 1]
        offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE)
        found = gathered(
            inputs,
            seq_starts=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            cu_seqlens_k=offsets,
            total_tokens=sum(counts),
            dtype=torch.float16,
            out=None,
            impl=impl,
        )
        rows = [torch.arange(s, s + n) + first for s, n, first in zip(starts, counts, (0, 40, 40, 110), strict=True)]
        for part, whole in zip(found, (inputs.k, inputs.v), strict=True):
            torch.testing.assert_close(part, whole[torch.cat(rows).to(DEVICE)], rtol=1e-3, atol=0)

    @pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e4m3fnuz", "int8"])
    @pytest.mark.parametrize("hip", [False, True])
    def test_every_byte(self, kv_dtype, hip, monkeypatch):
        """Also NaN. `hip`: as decoded where the hardware does not convert fp8."""
        if hip and not INTERPRETED:
            pytest.skip("its instructions are NVIDIA's")
        monkeypatch.setattr(pages, "is_hip", lambda: hip)
        dtype = getattr(torch, kv_dtype)
        cache = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 1, 16).view(dtype)
        offsets = torch.tensor([0, 16], dtype=torch.int32, device=DEVICE)
        k, v = gather.gather(
            cache, cache, block_table=offsets[None, :1], cu_seqlens_k=offsets, total_tokens=16, dtype=torch.float32
        )
        right = cache[0].float()
        if INTERPRETED and not hip and dtype == FP8:  # Triton's interpreter makes 480 of e4m3fn's NaN
            right = torch.where(right.isnan(), torch.tensor(480.0).copysign(right), right)
        torch.testing.assert_close(k, right, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(v, right, rtol=0, atol=0, equal_nan=True)

    def test_dtype_of_the_result(self):
        inputs = extend().make(0, DEVICE)
        assert gathered(inputs, out=None)[0].dtype == torch.float16
        assert gathered(inputs, out=None, dtype=torch.float32)[1].dtype == torch.float32
        quantised = extend(kv_dtype="int8").make(0, DEVICE)
        assert gathered(quantised, out=None)[0].dtype == torch.bfloat16


class TestMerge:
    __test__ = COMPUTES

    @pytest.mark.parametrize("impl", ["triton", "eager"])
    @pytest.mark.parametrize(
        "parts, tokens, heads, head_size", [(1, 3, 4, 64), (2, 1, 5, 96), (3, 7, 2, 256), (13, 2, 3, 128)]
    )
    def test_parts_that_were_never_written(self, impl, parts, tokens, heads, head_size):
        generator = torch.Generator().manual_seed(parts)
        partial = torch.randn(parts, tokens, heads, head_size, generator=generator).to(DEVICE)
        lse = (5 * torch.randn(parts, heads, tokens, generator=generator)).to(DEVICE)
        lse[torch.rand(lse.shape, generator=generator).to(DEVICE) < 0.3] = -torch.inf
        lse[:, 0, 0] = -torch.inf  # nobody has a key for this row
        written = lse.clone()
        written[0][lse[0] == -torch.inf] = torch.inf  # as flash-attn 2 says it
        whole = lse.double().logsumexp(0)
        weights = (lse.double() - whole).exp().nan_to_num(0).mT[..., None]
        right = (weights * partial).sum(0)
        partial[(lse == -torch.inf).mT] = NAN
        out, found = merge.merge(partial, written, return_lse=True, impl=impl)
        torch.testing.assert_close(out, right.float())
        torch.testing.assert_close(found, whole.float())
        assert found[0, 0] == -torch.inf
        assert not out[0, 0].any()

        into, lse_into = (
            torch.full((tokens, heads + 2, head_size), NAN, dtype=torch.float16, device=DEVICE),
            found.clone(),
        )
        merge.merge(partial, lse, out=into[:, 1:-1], lse=lse_into.fill_(NAN), impl=impl)
        torch.testing.assert_close(into[:, 1:-1], right.half(), rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(lse_into, whole.float())
        assert into[:, [0, -1]].isnan().all()

    def test_a_prefix_that_all_sequences_share(self):
        """Cascade attention: the prefix once for all queries, unmasked, then each sequence's own keys."""
        inputs = extend((35, 4), (33, 9), (60, 1)).make(0, DEVICE)
        inputs.block_table[:, :2] = inputs.block_table[0, :2]
        tokens = len(inputs.q)
        prefix = attend_paged(
            inputs,
            cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE),
            seqused_k=torch.tensor([32], dtype=torch.int32, device=DEVICE),
            block_table=inputs.block_table[:1],
            max_seqlen_q=tokens,
            causal=False,
        )
        rest = attend_paged(inputs, seqused_k=inputs.seqused_k - 32, block_table=inputs.block_table[:, 2:])
        outputs, lses = (torch.stack(pair) for pair in zip(prefix, rest, strict=True))
        assert_right(inputs, merge.merge(outputs.float(), lses, dtype=torch.float16, return_lse=True))

    def test_more_queries_than_keys_of_a_prefix(self):
        inputs = extend((-23, 40), causal=False).make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs, validate=True))


class TestChecker:
    """The limits are tight enough to see what a kernel may get wrong."""

    __test__ = COMPUTES

    def test_a_wrong_page(self):
        inputs = extend((60, 2)).make(0, DEVICE)
        table = inputs.block_table.clone()
        table[0, :2] = table[0, :2].flip(0)  # without a mask between them, the order of whole pages does not matter
        assert_right(inputs, attend_paged(inputs, block_table=table))
        table[0, 1] = table[0, 2]
        assert distance(inputs, *attend_paged(inputs, block_table=table)) > 5
        assert gather_distance(inputs, *gathered(inputs, block_table=table)) > 5

    @pytest.mark.parametrize(
        "change, value, fields",
        [
            ("softmax_scale", 0.13, {}),
            ("window_size", (12, 0), {"window": 14}),
            ("softcap", 2.6, {"softcap": 2.5}),
            ("k_descale", 1.03, {"kv_dtype": "float8_e4m3fn"}),
            ("v_descale", 1.03, {"kv_dtype": "int8", "scales": "token_head"}),
            ("alibi_slopes", 1.1, {"alibi": True}),
            ("causal", False, {}),
        ],
    )
    def test_a_wrong_argument(self, change, value, fields):
        inputs = extend(**fields).make(0, DEVICE)
        inputs.expected()
        before = getattr(inputs, change)
        setattr(inputs, change, before * value if torch.is_tensor(before) else value)
        assert distance(inputs, *attend_paged(inputs)) > 2


def upstream(sequences, row, dtype, blocks):
    """A batch as vLLM's and AITER's kernel tests draw it: (new, keys) each, pages at random, some of them shared."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    new, lengths = zip(*sequences, strict=True)
    heads, head_size, window, softcap, (q_dtype, kv_dtype) = (row[name] for name in list(row)[:5])
    q = torch.randn(sum(new), heads[0], head_size, generator=generator, device=DEVICE).to(q_dtype or dtype)
    cache = torch.randn(2, blocks, 16, heads[1], head_size, generator=generator, device=DEVICE, dtype=dtype)
    pages = -(-max(lengths) // 16)
    table = torch.randint(blocks, (len(new), pages), generator=generator, device=DEVICE, dtype=torch.int32)
    scales = {}
    if kv_dtype:
        cache = cache.to(kv_dtype)
        scales = {"k_descale": torch.tensor([0.7], device=DEVICE), "v_descale": torch.tensor([1.3], device=DEVICE)}
    arguments = {
        "cu_seqlens_q": torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32, device=DEVICE),
        "seqused_k": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "block_table": table,
        "softmax_scale": head_size**-0.5,
        "window_size": (-1, -1) if window is None else (window - 1, 0),
        "softcap": softcap or 0.0,
        **scales,
    }
    right = reference.expect_paged(q.to(dtype), *cache, **arguments)
    out = torch.full(q.shape, NAN, dtype=dtype, device=DEVICE)
    paged.attend(q, *cache, max_seqlen_q=max(new), max_seqlen_k=max(lengths), out=out, **arguments)
    return checks.deviation(out, right.output, right.output_limit).ratio


# What vLLM's and AITER's tests of unified attention vary, every two values of any two options together at least once.
UPSTREAM = {
    "heads": [(4, 4), (8, 2), (5, 1), (16, 2)],
    "head_size": [128, 256],
    "window": [None, 64, 128, 256],
    "softcap": [None, 50.0],
    "cache": [(None, None), (FP8, FP8), (None, FP8)],  # dtypes of q and of keys and values; None: the model's
    "decode": [True, False],
}


class TestUpstream:
    """On lengths that the interpreter can bear."""

    __test__ = COMPUTES

    @pytest.mark.parametrize("row", pairwise.cover(UPSTREAM), ids=lambda row: "-".join(map(str, row.values())))
    def test_unified_attention(self, row):
        sequences = ((1, 83), (1, 37), (1, 131)) if row["decode"] else ((1, 132), (5, 18), (9, 79))
        assert upstream(sequences, row, torch.float16, 40) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
class TestOnTheGpu:
    @named(workloads.sweep("large"))
    def test_sweep(self, workload):
        inputs = workload.make(0, DEVICE)
        assert_right(inputs, attend_paged(inputs))
        assert_right(inputs, attend_varlen(inputs))
        assert gather_distance(inputs, *gathered(inputs)) <= 1

    @named(workloads.adversarial("bfloat16"))
    def test_adversarial(self, workload, monkeypatch):
        inputs = workload.make(0, DEVICE)
        for splits in (1, 3):
            force_splits(monkeypatch, splits)
            assert_right(inputs, attend_paged(inputs))
        assert_right(inputs, attend_varlen(inputs))

    @pytest.mark.parametrize("blocks", [32768, 2048])  # the larger one makes indices beyond 2**31
    @pytest.mark.parametrize("row", pairwise.cover(UPSTREAM), ids=lambda row: "-".join(map(str, row.values())))
    def test_upstreams_parameters(self, row, blocks):
        sequences = ((1, 523), (1, 37), (1, 2011)) if row["decode"] else ((1, 1328), (5, 18), (129, 463))
        assert upstream(sequences, row, torch.bfloat16, blocks) <= 1

    GRAPHS = (
        Workload("decode", "decode", ((4000, 1), (17, 1), (900, 1))),
        Workload("verify", "verify", ((8000, 4), (2, 4))),
        Workload("extend", "extend", ((700, 300), (0, 40), (0, 0))),
        Workload(
            "fp8", "decode", ((4000, 1), (17, 1)), kv_dtype="float8_e4m3fn", scales="token_head", layout="SHUFFLE"
        ),
    )

    @named(GRAPHS)
    def test_a_graph_gives_the_same_numbers_also_for_other_lengths(self, workload):
        inputs = workload.make(0, DEVICE)
        launches = {attend: attend(inputs) for attend in (attend_paged, attend_varlen)}  # compiles
        out, (k, v) = torch.empty_like(inputs.q), (torch.empty_like(inputs.k), torch.empty_like(inputs.v))
        for attend, (right, right_lse) in launches.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                _, lse = attend(inputs, out=out)
            for _ in range(2):
                out.fill_(NAN)
                lse.fill_(NAN)
                graph.replay()
                assert torch.equal(out, right)
                assert torch.equal(lse, right_lse)
        once = gathered(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gathered(inputs, out=(k, v))
        graph.replay()
        assert torch.equal(k, once[0]) and torch.equal(v, once[1])

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend_paged(inputs, out=out)
        shorter = replace(workload, sequences=tuple((context // 2, new) for context, new in workload.sequences))
        inputs.seqused_k.copy_(torch.tensor(shorter.lengths))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, attend_paged(inputs)[0])
        assert_right(inputs, (replayed,))

    def test_other_batches_need_no_other_kernels(self, monkeypatch):
        """Batch size, lengths, table width, window and soft cap are arguments, not constants of a kernel."""
        from triton import knobs

        compiled = []
        monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, repr, **more: compiled.append(repr))
        force_splits(monkeypatch, 3)

        def step(count, context, new, window=33, softcap=20.0):
            inputs = extend(
                *((context + i, new) for i in range(count)),
                dtype="bfloat16",
                head_size=128,
                window=window,
                softcap=softcap,
            ).make(0, DEVICE)
            assert_right(inputs, attend_paged(inputs))
            assert_right(inputs, attend_varlen(inputs))
            assert gather_distance(inputs, *gathered(inputs)) <= 1

        step(2, 300, 1)
        known = len(compiled)
        assert known >= 4  # paged, merge, varlen, gather
        for count, context, new in ((1, 15, 1), (3, 1000, 1), (16, 77, 1), (17, 16, 1), (40, 2049, 1)):
            step(count, context, new)
        step(5, 431, 1, window=7, softcap=1.0)
        assert compiled[known:] == []


# What the launchers refuse, before a kernel is launched: needs no GPU and no interpreter


def paged_arguments(**fields):
    inputs = extend((37, 4), (0, 9), **fields).make(0)
    return {
        "q": inputs.q,
        "k_cache": inputs.k_cache,
        "v_cache": inputs.v_cache,
        "max_seqlen_q": 9,
        "max_seqlen_k": 41,
        **inputs.paged,
        **inputs.options,
    }


def _int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def _changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def _with_heads_of(size, arguments, *names):
    return {name: torch.zeros(*arguments[name].shape[:-1], size) for name in names}


def _column_first(tensor):
    return tensor.mT.contiguous().mT


BATCH = ("seqused_k", "block_table")
# what is wrong: (change of the valid arguments, words of the message)
REFUSED = {
    "q transposed": (lambda a: {"q": _column_first(a["q"])}, r"q\.stride\(2\)"),
    "q without heads": (lambda a: {"q": a["q"].flatten(1)}, "q has shape"),
    "q of another dtype": (lambda a: {"q": a["q"].float()}, r"q\.dtype is torch.float32"),
    "fp8 queries over float16": (lambda a: {"q": a["q"].to(torch.float8_e4m3fn)}, r"q\.dtype"),
    "heads that do not divide": (lambda a: {"q": a["q"][:, :3]}, "3 query heads"),
    "k_cache transposed": (lambda a: {"k_cache": _column_first(a["k_cache"])}, "k_cache"),
    "v_cache transposed": (lambda a: {"v_cache": _column_first(a["v_cache"])}, "v_cache"),
    "v_cache of another dtype": (lambda a: {"v_cache": a["v_cache"].float()}, r"v_cache\.dtype"),
    "v_cache of other pages": (lambda a: {"v_cache": a["v_cache"][:-1]}, "v_cache has shape"),
    "k_cache of one dimension less": (lambda a: {"k_cache": a["k_cache"][0]}, "k_cache has shape"),
    "float64": (lambda a: {n: a[n].double() for n in ("q", "k_cache", "v_cache")}, "float64"),
    "no such layout": (lambda a: {"layout": "nhd"}, "layout is 'nhd', not one of NHD, SHUFFLE"),
    "another layout": (lambda a: {"layout": "SHUFFLE"}, "k_cache has shape"),
    "page size 8": (lambda a: {n: a[n][:, :8] for n in ("k_cache", "v_cache")}, "page size is 8"),
    "head size 100": (lambda a: _with_heads_of(100, a, "q", "k_cache", "v_cache"), "head size 100"),
    "head size 272": (lambda a: _with_heads_of(272, a, "q", "k_cache", "v_cache"), "head size 272"),
    "block behind the cache": (lambda a: {"block_table": _changed(a["block_table"], (1, 0), len(a["k_cache"]))},
                               r"block_table\[1, 0\] is 7: the cache has blocks 0 to 6"),
    "negative block": (lambda a: {"block_table": _changed(a["block_table"], (0, 2), -1)}, r"block_table\[0, 2\] is -1"),
    "table too narrow": (lambda a: {"block_table": a["block_table"][:, :2]}, "block_table has 2 pages a row, 3 are"),
    "table of int64": (lambda a: {"block_table": a["block_table"].long()}, r"block_table\.dtype is torch.int64, not"),
    "table transposed": (lambda a: {"block_table": _column_first(a["block_table"])}, r"block_table"),
    "table of another batch": (lambda a: {"block_table": a["block_table"][:1]}, "block_table must be"),
    "table elsewhere": (lambda a: {"block_table": a["block_table"].to("meta")}, r"block_table\.device is meta"),
    "cache elsewhere": (lambda a: {"v_cache": a["v_cache"].to("meta")}, r"v_cache\.device is meta"),
    "output elsewhere": (lambda a: {"out": a["q"].to("meta")}, r"out\.device is meta"),
    "negative length": (lambda a: {"seqused_k": _int32(41, -1)}, "seqused_k: a sequence has -1 keys"),
    "lengths of int64": (lambda a: {"seqused_k": a["seqused_k"].long()}, r"seqused_k\.dtype is torch.int64"),
    "offsets short of the end": (lambda a: {"cu_seqlens_q": _int32(0, 4, 12)}, "cu_seqlens_q goes from 0 to 12, not"),
    "offsets that start late": (lambda a: {"cu_seqlens_q": _int32(1, 4, 13)}, "cu_seqlens_q goes from 1"),
    "offsets that fall": (lambda a: {"cu_seqlens_q": _int32(0, 14, 13)}, "cu_seqlens_q must not decrease"),
    "offsets of another batch": (lambda a: {"cu_seqlens_q": _int32(0, 4, 9, 13)}, "cu_seqlens_q has shape"),
    "longest query understated": (lambda a: {"max_seqlen_q": 8}, "cu_seqlens_q: a sequence has 9 tokens"),
    "longest context understated": (lambda a: {"max_seqlen_k": 40}, "41 keys, max_seqlen_k is 40"),
    "tokens of no sequence": (lambda a: {"cu_seqlens_q": _int32(0), **{n: a[n][:0] for n in BATCH}},
                              "cu_seqlens_q goes from 0 to 0, not from 0 to 13"),
    "scale 0": (lambda a: {"softmax_scale": 0.0}, "softmax_scale is 0.0"),
    "soft cap below 0": (lambda a: {"softcap": -1.0}, "softcap is -1.0"),
    "window below -1": (lambda a: {"window_size": (-2, 0)}, "window_size"),
    "slopes of another model": (lambda a: {"alibi_slopes": torch.ones(3)}, "alibi_slopes has shape"),
    "slopes of float64": (lambda a: {"alibi_slopes": torch.ones(4).double()}, r"alibi_slopes\.dtype"),
    "slopes not in a row": (lambda a: {"alibi_slopes": torch.ones(8)[::2]}, "alibi_slopes"),
    "output of another shape": (lambda a: {"out": a["q"][:-1]}, "out has shape"),
    "output transposed": (lambda a: {"out": _column_first(a["q"])}, r"out\.stride\(2\)"),
    "output of integers": (lambda a: {"out": a["q"].int()}, r"out\.dtype is torch.int32"),
    "scale of a cache that has none": (lambda a: {"k_descale": torch.ones(1)}, "k_descale is given"),
    "no such implementation": (lambda a: {"impl": "cuda"}, "impl is 'cuda', not one of triton, eager"),
}  # fmt: skip
REFUSED_QUANTISED = {
    "scales of another shape": (lambda a: {"k_descale": torch.ones(3, 5)}, "k_descale"),
    "scales of float16": (lambda a: {"v_descale": a["v_descale"].half()}, r"v_descale\.dtype"),
    "scales elsewhere": (lambda a: {"v_descale": a["v_descale"].to("meta")}, "v_descale"),
    "a scale that is no tensor": (lambda a: {"k_descale": 1.0}, "k_descale is a float"),
}


@pytest.mark.parametrize("what", [*REFUSED, *REFUSED_QUANTISED])
def test_paged_refuses(what):
    change, words = (REFUSED | REFUSED_QUANTISED)[what]
    arguments = paged_arguments(**({"kv_dtype": "int8"} if what in REFUSED_QUANTISED else {}))
    for impl in ("triton", "eager"):
        with pytest.raises((ValueError, TypeError), match=words):
            paged.attend(**(arguments | {"impl": impl} | change(arguments)))


def test_shuffled_pages_must_be_contiguous():
    arguments = paged_arguments(layout="SHUFFLE")
    arguments["k_cache"] = arguments["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="k_cache: each shuffled page and head must be contiguous"):
        paged.attend(**arguments)


VARLEN_REFUSED = {
    "k transposed": (lambda a: {"k": _column_first(a["k"])}, r"k\.stride\(2\)"),
    "v transposed": (lambda a: {"v": _column_first(a["v"])}, r"v\.stride\(2\)"),
    "q transposed": (lambda a: {"q": _column_first(a["q"])}, r"q\.stride\(2\)"),
    "v of another length": (lambda a: {"v": a["v"][1:]}, "v has shape"),
    "k of another dtype": (lambda a: {"k": a["k"].float()}, "dtype"),
    "fp8": (lambda a: {n: a[n].to(torch.float8_e4m3fn) for n in "qkv"}, "dtype"),
    "k without heads": (lambda a: {"k": a["k"].flatten(1)}, "k has shape"),
    "keys of no sequence": (lambda a: {"cu_seqlens_k": _int32(0, 41, 49)}, "cu_seqlens_k goes from 0 to 49, not"),
    "queries of no sequence": (lambda a: {"cu_seqlens_q": _int32(0, 3, 12)}, "cu_seqlens_q goes from 0 to 12"),
    "no sequence": (lambda a: {"cu_seqlens_q": _int32(0), "cu_seqlens_k": _int32(0)}, "cu_seqlens_q goes from 0 to 0"),
    "offsets of int64": (lambda a: {"cu_seqlens_k": a["cu_seqlens_k"].long()}, r"cu_seqlens_k\.dtype"),
    "offsets of another batch": (lambda a: {"cu_seqlens_k": _int32(0, 50)}, "cu_seqlens_k has shape"),
    "longest query understated": (lambda a: {"max_seqlen_q": 4}, "cu_seqlens_q: a sequence has 9 tokens"),
    "slopes not in a row": (lambda a: {"alibi_slopes": torch.ones(8)[::2]}, "alibi_slopes"),
    "head size 100": (lambda a: _with_heads_of(100, a, "q", "k", "v"), "head size 100"),
}  # fmt: skip


@pytest.mark.parametrize("what", VARLEN_REFUSED)
def test_varlen_refuses(what):
    change, words = VARLEN_REFUSED[what]
    inputs = extend((37, 4), (0, 9)).make(0)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "max_seqlen_q": 9, "max_seqlen_k": 41, **inputs.options}
    arguments |= {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_k": inputs.cu_seqlens_k}
    with pytest.raises((ValueError, TypeError), match=words):
        varlen.attend(**(arguments | change(arguments)))


GATHER_REFUSED = {
    "total understated": ({"total_tokens": 49}, "cu_seqlens_k goes from 0 to 50, not from 0 to 49"),
    "no such layout": ({"layout": "HND"}, "layout is 'HND'"),
    "block behind the cache": ({"block_table": torch.full((2, 3), 7, dtype=torch.int32)}, r"block_table\[0, 0\] is 7"),
    "table of int64": ({"block_table": torch.zeros(2, 3).long()}, r"block_table\.dtype is torch.int64"),
    "table too narrow": ({"block_table": torch.zeros(2, 2).int()}, "block_table has 2 pages a row, 3 are needed"),
    "offsets not in a row": ({"cu_seqlens_k": _int32(0, 1, 41, 1, 50)[::2]}, "cu_seqlens_k"),
    "starts of another batch": ({"seq_starts": _int32(0)}, "seq_starts"),
    "negative start": ({"seq_starts": _int32(-1, 0)}, "seq_starts"),
    "start behind the table": ({"seq_starts": _int32(9, 0)}, "block_table has 3 pages a row, 4 are needed"),
    "result of integers": ({"dtype": torch.int32}, "dtype is torch.int32"),
    "output of another shape": ({"out": (torch.zeros(50, 2, 64), torch.zeros(50, 2, 32))}, r"out\[1\] has shape"),
    "output not in a row": ({"out": (torch.zeros(50, 2, 128)[..., ::2],) * 2}, r"out\[0\] must be contiguous"),
    "no such implementation": ({"impl": "cuda"}, "impl is 'cuda'"),
    "keys of one dimension less": ({"k_cache": torch.zeros(16, 2, 64)}, "k_cache has shape"),
    "tokens of no sequence": ({"block_table": torch.zeros(0, 1).int(), "cu_seqlens_k": _int32(0)}, "from 0 to 0, not"),
}  # fmt: skip


@pytest.mark.parametrize("what", GATHER_REFUSED)
def test_gather_refuses(what):
    change, words = GATHER_REFUSED[what]
    inputs = extend((37, 4), (0, 9)).make(0)
    arguments = {"k_cache": inputs.k_cache, "v_cache": inputs.v_cache, "block_table": inputs.block_table}
    arguments |= {"cu_seqlens_k": inputs.cu_seqlens_k, "total_tokens": 50}
    with pytest.raises((ValueError, TypeError), match=words):
        gather.gather(**(arguments | change))


@pytest.mark.parametrize(
    "partial, lse, more, words",
    [
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 3, 4), {}, "partial_lse must be float32"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 4, 3).half(), {}, "partial_lse must be float32"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(4, 2, 3).transpose(0, 1), {}, "partial_lse"),
        (torch.zeros(2, 3, 64, 4).mT, torch.zeros(2, 4, 3), {}, "partial_out"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 4, 3), {"out": torch.zeros(3, 4, 32)}, "out must be"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 4, 3), {"lse": torch.zeros(2, 2)}, "lse"),
        (torch.zeros(2, 3, 4, 64), torch.zeros(2, 4, 3), {"impl": "cuda"}, "impl is 'cuda'"),
        (torch.zeros(0, 3, 4, 64), torch.zeros(0, 4, 3), {}, "part"),
    ],
)
def test_merge_refuses(partial, lse, more, words):
    with pytest.raises(ValueError, match=words):
        merge.merge(partial, lse, **more)


@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_an_empty_batch_has_an_empty_result(impl):
    q, cache, zero = torch.zeros(0, 4, 64).half(), torch.zeros(3, 16, 2, 64).half(), _int32(0)
    options = {"max_seqlen_q": 0, "max_seqlen_k": 0, "softmax_scale": 0.1, "return_lse": True, "impl": impl}
    for sequences in (0, 2):
        offsets, table = zero.expand(sequences + 1).contiguous(), torch.zeros(sequences, 1).int()
        for out, lse in (
            paged.attend(q, cache, cache, cu_seqlens_q=offsets, seqused_k=offsets[1:], block_table=table, **options),
            varlen.attend(q, q[:, :2], q[:, :2], cu_seqlens_q=offsets, cu_seqlens_k=offsets, **options),
        ):
            assert (out.shape, lse.shape, out.dtype, lse.dtype) == ((0, 4, 64), (4, 0), torch.float16, torch.float32)
        k, v = gather.gather(cache, cache, block_table=table, cu_seqlens_k=offsets, total_tokens=0, impl=impl)
        assert k.shape == v.shape == (0, 2, 64)
    out, lse = merge.merge(torch.zeros(2, 0, 4, 64), torch.zeros(2, 4, 0), return_lse=True, impl=impl)
    assert (out.shape, lse.shape) == ((0, 4, 64), (4, 0))


def test_twins_have_the_same_launcher():
    """One signature, one check of the arguments: `impl` chooses only who computes."""
    assert {name for name in vars(eager) if not name.startswith("_")} >= {"paged", "varlen", "gather", "merge"}
