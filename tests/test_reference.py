# SPDX-License-Identifier: Apache-2.0
"""The float64 formula equals torch's own attention, and its tolerance tells a right kernel from a wrong one."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import softmax as torch_softmax

from aiterlab.attention import reference
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
