# SPDX-License-Identifier: Apache-2.0
"""The float64 formula equals torch's own attention, and its tolerance tells a right kernel from a wrong one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import softmax as torch_softmax

from aiterlab.attention import reference
from aiterlab.attention.workloads import Workload
from aiterlab.machines import extensions
from aiterlab.probes.drive import BATCHES, Batch

SHAPES = [  # tokens, length, heads, kv_heads, head_size
    (5, 5, 4, 4, 64),
    (3, 29, 4, 2, 64),
    (1, 41, 8, 1, 128),
    (7, 7, 6, 2, 16),
    (1, 1, 2, 1, 64),
]


def make(tokens, length, heads, kv_heads, head_size, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, head_size), (length, kv_heads, head_size), (length, kv_heads, head_size)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def plain(query, key, value, scale, causal=True):
    """Attention in the inputs' own dtype, rounded after every operation, as a kernel without float32 would."""
    tokens, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for part in (key, value))
    logits = (query.transpose(0, 1) @ key.transpose(1, 2)) * scale
    if causal:
        mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        logits = logits.masked_fill(~mask, float("-inf"))
    return (torch_softmax(logits, dim=-1) @ value).transpose(0, 1)


def distance(output, expected):
    return (output.double() - expected).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_torchs_attention_causal_from_the_bottom_right(shape):
    query, key, value = make(*shape, dtype=torch.float64)
    tokens, length, scale = shape[0], shape[1], 0.3
    mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
    batched = (part.transpose(0, 1)[None] for part in (query, key, value))
    expected = scaled_dot_product_attention(*batched, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(reference.attend(query, key, value, scale), expected, rtol=0, atol=1e-13)


def test_half_precision_inputs_are_computed_in_float64():
    query, key, value = make(3, 29, 4, 2, 64)
    expected = reference.attend(query.double(), key.double(), value.double(), 0.125)
    assert torch.equal(reference.attend(query, key, value, 0.125), expected)
    assert expected.dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_implementation_in_the_inputs_dtype_is_within_the_tolerance(shape, dtype):
    query, key, value = make(*shape, dtype=dtype)
    scale = shape[-1] ** -0.5
    expected, limit = reference.attend(query, key, value, scale), reference.tolerance(query, key, value, scale)
    # As a kernel does it: float32 inside, rounded once at the end.
    computed = plain(query.float(), key.float(), value.float(), scale).to(dtype)
    assert distance(computed, expected) <= limit
    assert 0 < limit < {torch.float16: 0.02, torch.float32: 1e-5, torch.bfloat16: 0.15}[dtype]


def test_a_float16_implementation_that_rounds_after_every_step_is_within_the_tolerance():
    query, key, value = make(3, 29, 4, 2, 64)
    limit = reference.tolerance(query, key, value, 0.125)
    assert distance(plain(query, key, value, 0.125), reference.attend(query, key, value, 0.125)) <= limit


MISTAKES = {
    "scale without the root": lambda q, k, v: reference.attend(q, k, v, 1 / 64),
    "scale off by a tenth": lambda q, k, v: reference.attend(q, k, v, 0.125 * 1.1),
    "no mask": lambda q, k, v: plain(q.double(), k.double(), v.double(), 0.125, causal=False),
    "one token too early": lambda q, k, v: reference.attend(q, k[:-1], v[:-1], 0.125),
    "two pages swapped": lambda q, k, v: reference.attend(q, *(_swap_pages(part) for part in (k, v)), 0.125),
    "keys' pages swapped": lambda q, k, v: reference.attend(q, _swap_pages(k), v, 0.125),
    "values shifted by one": lambda q, k, v: reference.attend(q, k, v.roll(1, 0), 0.125),
    "heads in another order": lambda q, k, v: reference.attend(q, k.flip(1), v.flip(1), 0.125),
}


def _swap_pages(part, page=16):
    """The second, half-filled page before the first: under a causal mask the order of tokens matters."""
    return torch.cat([part[page:], part[:page]])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerance_rejects(mistake):
    query, key, value = make(7, 29, 4, 2, 64)
    limit = reference.tolerance(query, key, value, 0.125)
    wrong = MISTAKES[mistake](query, key, value)
    assert distance(wrong, reference.attend(query, key, value, 0.125)) > 3 * limit


def test_the_tolerance_does_not_depend_on_what_is_checked():
    query, key, value = make(3, 29, 4, 2, 64)
    assert reference.tolerance(query, key, value, 0.125) == reference.tolerance(query, key, value, 0.125)
    doubled = reference.tolerance(query, key, 2 * value, 0.125)
    assert doubled == pytest.approx(2 * reference.tolerance(query, key, value, 0.125), rel=0.01)


@pytest.mark.parametrize("step", BATCHES)
def test_a_step_is_measured_over_every_sequence(step):
    """The error of a step is the worst over its sequences; where nothing was written it is infinite."""
    batch = Batch.make(BATCHES[step], torch.float16, seed=3)
    exact, start = [], 0
    for keys, values, (_, new) in zip(batch.keys, batch.values, batch.lengths, strict=True):
        exact.append(reference.attend(batch.query[start : start + new], keys, values, 64**-0.5))
        start += new
    exact = torch.cat(exact)
    assert batch.error(exact)[0] == 0
    assert 0 < batch.error(exact)[1] < 0.02
    for token in (0, len(exact) - 1):
        off, unwritten = exact.clone(), exact.clone()
        off[token, -1, -1] += 0.5
        unwritten[token, 0, 0] = float("nan")
        assert batch.error(off)[0] == pytest.approx(0.5)
        assert batch.error(unwritten)[0] == float("inf")


def test_the_steps_cross_page_boundaries_and_scatter_their_pages():
    for lengths in BATCHES.values():
        batch = Batch.make(lengths, torch.float16, seed=0)
        used = batch.block_table.flatten().tolist()
        assert len(used) == len(set(used))
        assert used != sorted(used)
        keys, _, slots = batch.new()
        assert keys.shape[0] == slots.shape[0] == sum(new for _, new in lengths)
        assert len(set(slots.tolist())) == len(slots)
    assert any(context % 16 + new > 16 for lengths in BATCHES.values() for context, new in lengths)


def test_merging_two_halves_is_attending_to_the_whole():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(n, 2, 8, generator=generator).double() for n in (1, 12, 12))
    halves = [(key[:7], value[:7]), (key[7:], value[7:])]
    outputs = [reference.attend(query, *half, 0.3) for half in halves]
    sums = [torch.logsumexp(0.3 * torch.einsum("thd,shd->hts", query, half), dim=-1) for half, _ in halves]
    output, lse = torch.empty(1, 2, 8), torch.empty(2, 1)
    extensions.merge_attn_states(output, lse, outputs[0], sums[0], outputs[1], sums[1])
    torch.testing.assert_close(output, reference.attend(query, key, value, 0.3).float())
    torch.testing.assert_close(lse, torch.logaddexp(*sums).float())
    with pytest.raises(NotImplementedError, match="merges whole"):
        extensions.merge_attn_states(output, lse, outputs[0], sums[0], outputs[1], sums[1], 0)


def one_by_one(query, key, value, scale, causal, window, softcap, slopes):
    """Attention from its definition, row by row and key by key, in Python's own floating-point numbers."""
    tokens, heads, _ = query.shape
    length, group = len(key), heads // key.shape[1]
    output, lse = torch.zeros(query.shape).double(), torch.full((heads, tokens), -math.inf).double()
    for t in range(tokens):
        position = length - tokens + t
        left = 0 if window[0] < 0 else position - window[0]
        right = length - 1 if window[1] < 0 else position + window[1]
        right = min(right, position) if causal else right
        seen = [j for j in range(length) if left <= j <= right]
        for h in range(heads) if seen else ():
            logits = []
            for j in seen:
                logit = scale * sum(
                    a * b for a, b in zip(query[t, h].tolist(), key[j, h // group].tolist(), strict=True)
                )
                logit = softcap * math.tanh(logit / softcap) if softcap else logit
                logits.append(logit + (slopes[h].item() * (j - position) if slopes is not None else 0.0))
            total = sum(math.exp(logit) for logit in logits)
            lse[h, t] = math.log(total)
            for j, logit in zip(seen, logits, strict=True):
                output[t, h] += math.exp(logit) / total * value[j, h // group]
    return output, lse


WINDOWS = st.tuples(st.integers(-1, 5), st.integers(-1, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 9), st.sampled_from([(1, 1), (4, 1), (4, 2), (5, 1)]), st.booleans(), WINDOWS,
    st.sampled_from([0.0, 0.7, 20.0]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_formula_is_the_definition(tokens, length, heads, causal, window, softcap, alibi, seed):
    """With every option, also where queries outnumber keys or a window lies outside of the sequence."""
    query, key, value = make(tokens, length, *heads, 3, dtype=torch.float64, seed=seed)
    slopes = torch.linspace(0.1, 2, heads[0]) if alibi else None
    options = {"causal": causal, "window_size": window, "softcap": softcap, "alibi_slopes": slopes}
    output, lse = reference.attend(query, key, value, 0.8, **options, return_lse=True)
    expected_output, expected_lse = one_by_one(query, key, value, 0.8, causal, window, softcap, slopes)
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


def test_rows_without_keys_are_zero():
    query, key, value = make(5, 2, 4, 2, 64)
    output, lse = reference.attend(query, key, value, 0.125, return_lse=True)
    assert not output[:3].any()
    assert bool((lse[:, :3] == -math.inf).all() and lse[:, 3:].isfinite().all())
    output, lse = reference.attend(query, key[:0], value[:0], 0.125, causal=False, return_lse=True)
    assert not output.any()
    assert bool((lse == -math.inf).all())


def test_no_query_is_no_output():
    query, key, value = make(3, 7, 4, 2, 64)
    output, lse = reference.attend(query[:0], key, value, 0.125, return_lse=True)
    assert (output.shape, lse.shape) == ((0, 4, 64), (4, 0))


def test_the_result_does_not_depend_on_the_memory_it_is_computed_in(monkeypatch):
    query, key, value = make(7, 29, 4, 2, 64)
    options = {"window_size": (8, 0), "softcap": 3.0}
    whole = reference.expect(query, key, value, 0.125, **options)
    monkeypatch.setattr(reference, "CHUNK", 2 * 4 * 29)  # two rows at a time
    parts = reference.expect(query, key, value, 0.125, **options)
    for part, limited in zip(parts[:2], whole[:2], strict=True):
        torch.testing.assert_close(part, limited, rtol=0, atol=1e-13)
    for part, limited in zip(parts[2:], whole[2:], strict=True):  # they hold rounding errors of float32
        torch.testing.assert_close(part, limited, rtol=0, atol=2e-6)


def test_huge_logits_do_not_overflow():
    query, key, value = make(3, 29, 4, 2, 64)
    output, lse = reference.attend(1000 * query.double(), 1000 * key.double(), value, 0.125, return_lse=True)
    assert bool(output.isfinite().all() and lse.isfinite().all())
    assert lse.abs().max() > 1e5


# A batch in a paged cache


@pytest.mark.parametrize("layout", ["NHD", "SHUFFLE"])
@pytest.mark.parametrize("cache", [("auto", "tensor"), ("float8_e4m3fn", "token_head"), ("int8", "tensor")])
def test_a_paged_batch_is_its_sequences(cache, layout):
    sequences = ((20, 3), (0, 0), (15, 1), (5, 0), (0, 33))
    batch = Workload(
        "batch", "extend", sequences, heads=4, kv_heads=2, head_size=64, dtype="float32",
        kv_dtype=cache[0], scales=cache[1], layout=layout, window=9, softcap=2.5, alibi=True,
    )  # fmt: skip
    inputs = batch.make(0)
    (output, lse), (output_limit, lse_limit) = inputs.expected(), inputs.limits()
    assert output.shape == (37, 4, 64)
    assert output.dtype == lse.dtype == torch.float64
    assert (lse.shape, output_limit.shape, lse_limit.shape) == ((4, 37), (37, 4), (4, 37))
    row = key = 0
    for context, new in sequences:
        rows, keys = slice(row, row + new), slice(key, key + context + new)
        row, key = rows.stop, keys.stop
        alone = reference.attend(inputs.q[rows], inputs.k[keys], inputs.v[keys], **inputs.options, return_lse=True)
        torch.testing.assert_close(output[rows], alone[0], rtol=0, atol=1e-6)  # inputs.k is rounded to float32
        torch.testing.assert_close(lse[:, rows], alone[1], rtol=0, atol=1e-6)


# The limits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_row_has_its_own_limit(dtype):
    """The first rows of a prompt see few keys and are large, the last are small: so are their limits."""
    query, key, value = make(400, 400, 2, 1, 64, dtype=dtype)
    found = reference.expect(query, key, value, 0.125)
    first, last = found.output_limit[:4].mean(), found.output_limit[-4:].mean()
    assert 3 * last < first < 100 * last
    relative = found.output_limit / found.output.abs().amax(dim=-1)
    assert bool((relative < 8 * torch.finfo(dtype).eps).all())
    assert bool((found.lse_limit < 2e-5).all())
    assert bool((found.lse_limit > 0).all())


def test_dequantising_to_the_querys_dtype_is_allowed():
    """An exact key of float64 that float16 rounds: a kernel that dequantises to float16 first is right."""
    query, key, value = make(3, 29, 4, 2, 64)
    key, value = key.double() * 1.0003, value.double() * 1.0003
    found = reference.expect(query, key, value, 0.125)
    rounded = reference.attend(query, key.half(), value.half(), 0.125, return_lse=True)
    assert bool(((rounded[0] - found.output).abs().amax(dim=-1) <= found.output_limit).all())
    assert bool(((rounded[1] - found.lse).abs() <= found.lse_limit).all())


OPTIONS = {"window_size": (9, 0), "softcap": 2.5, "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.004])}
WRONG_OPTIONS = {
    "window one key too wide": {"window_size": (10, 0)},
    "window one key too narrow": {"window_size": (8, 0)},
    "no window": {"window_size": (-1, -1)},
    "no soft cap": {"softcap": 0.0},
    "soft cap off by a tenth": {"softcap": 2.75},
    "no ALiBi": {"alibi_slopes": None},
    "ALiBi of the heads in another order": {"alibi_slopes": OPTIONS["alibi_slopes"].flip(0)},
    "ALiBi the other way": {"alibi_slopes": -OPTIONS["alibi_slopes"]},
    "not causal": {"causal": False, "window_size": (9, -1)},
}


@pytest.mark.parametrize("mistake", WRONG_OPTIONS)
def test_the_limits_reject_a_wrong_option(mistake):
    query, key, value = make(7, 29, 4, 2, 64)
    found = reference.expect(query, key, value, 0.125, **OPTIONS)
    output, lse = reference.attend(query, key, value, 0.125, **(OPTIONS | WRONG_OPTIONS[mistake]), return_lse=True)
    assert ((output - found.output).abs().amax(dim=-1) / found.output_limit).max() > 3
    assert ((lse - found.lse).abs() / found.lse_limit).max() > 100


def test_the_limits_reject_a_page_that_is_left_out_of_a_long_context():
    query, key, value = make(4, 8192, 2, 1, 64, dtype=torch.bfloat16)
    found = reference.expect(query, key, value, 0.125)
    kept = torch.cat([torch.arange(4096), torch.arange(4112, 8192)])
    output, lse = reference.attend(query, key[kept], value[kept], 0.125, return_lse=True)
    assert ((output - found.output).abs().amax(dim=-1) / found.output_limit).max() > 2
    assert ((lse - found.lse).abs() / found.lse_limit).max() > 100
