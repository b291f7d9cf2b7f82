# SPDX-License-Identifier: Apache-2.0
"""The cache layouts are vLLM's, what is written is read back, and quantising rounds as little as it can."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiterlab.attention import layouts

BLOCKS, HEADS, HEAD_SIZE = 5, 3, 64
DTYPES = [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8]


def numbered(tokens, dtype):
    """Tokens whose every number differs from its neighbours, in bytes that are no NaN."""
    count = tokens * HEADS * HEAD_SIZE
    return (torch.arange(count) % 113).to(torch.int8 if dtype == torch.int8 else dtype).view(tokens, HEADS, HEAD_SIZE)


def caches(layout, page, dtype):
    sizes = layouts.shapes(layout, BLOCKS, page, HEADS, HEAD_SIZE, dtype.itemsize)
    return [torch.zeros(shape, dtype=dtype) for shape in sizes]


def in_vllms_kernel(part, slot, head, dim, page, x):
    """Where `reshape_and_cache_shuffle_kernel` stores one number of a dense cache: its expressions, in its order."""
    block, offset = slot // page, slot % page
    start = block * page * HEADS * HEAD_SIZE + head * HEAD_SIZE * page
    if part == "k":
        return start + dim // x * page * x + offset * x + dim % x
    return start + offset // x * HEAD_SIZE * x + dim * x + offset % x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [16, 64])
def test_shuffle_is_where_vllms_kernel_stores_each_number(page, dtype):
    slots = torch.tensor([0, 7, 15, 16, 3 * page + 5, BLOCKS * page - 1])
    tokens = numbered(len(slots), dtype)
    x = 16 // dtype.itemsize
    for part, cache in zip("kv", caches("SHUFFLE", page, dtype), strict=True):
        layouts.write(cache, part, tokens, slots // page, slots % page, "SHUFFLE")
        flat = cache.view(-1).float()
        for row, slot in enumerate(slots.tolist()):
            for head, dim in ((0, 0), (1, 1), (2, x), (0, x + 3), (2, HEAD_SIZE - 1)):
                assert flat[in_vllms_kernel(part, slot, head, dim, page, x)] == tokens[row, head, dim].float()
        assert cache.float().count_nonzero() == tokens.float().count_nonzero()


def test_nhd_keeps_a_token_and_head_together():
    tokens = numbered(4, torch.float16)
    cache, _ = caches("NHD", 16, torch.float16)
    layouts.write(cache, "k", tokens, torch.tensor([4, 0, 0, 2]), torch.tensor([15, 0, 9, 1]), "NHD")
    assert torch.equal(cache[4, 15], tokens[0])
    assert torch.equal(cache[0, 9], tokens[2])
    assert torch.equal(cache.view(-1)[(2 * 16 + 1) * HEADS * HEAD_SIZE :][: HEADS * HEAD_SIZE], tokens[3].view(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_what_is_written_is_read_back_and_nothing_else_is_touched(layout, dtype):
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(BLOCKS * 32, generator=generator)[:70]
    tokens = numbered(len(slots), dtype)
    for part, cache in zip("kv", caches(layout, 32, dtype), strict=True):
        layouts.write(cache, part, tokens, slots // 32, slots % 32, layout)
        found = layouts.read(cache, part, slots // 32, slots % 32, layout)
        assert found.dtype == dtype
        assert torch.equal(found.float(), tokens.float())
        rest = torch.tensor(sorted(set(range(BLOCKS * 32)) - set(slots.tolist())))
        assert not layouts.read(cache, part, rest // 32, rest % 32, layout).float().any()


def test_a_cache_may_be_a_part_of_a_larger_tensor():
    """vLLM keeps keys and values of a block beside each other: neither of the two is contiguous."""
    both = torch.zeros(BLOCKS, 16, HEADS, 2 * HEAD_SIZE)
    k_cache, v_cache = both.split(HEAD_SIZE, dim=-1)
    tokens, where = numbered(3, torch.float32), (torch.tensor([0, 1, 4]), torch.tensor([3, 0, 15]))
    layouts.write(k_cache, "k", tokens, *where, "NHD")
    layouts.write(v_cache, "v", -tokens, *where, "NHD")
    assert torch.equal(both[where], torch.cat([tokens, -tokens], dim=-1))
    assert torch.equal(layouts.read(v_cache, "v", *where, "NHD"), -tokens)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from([1, 4, 16]))
def test_tokens_are_located_through_the_block_table(lengths, page):
    pages = max(1, -(-max(lengths) // page))
    table = torch.arange(len(lengths) * pages, dtype=torch.int32).flip(0).view(len(lengths), pages)
    blocks, offsets = layouts.locate(table, torch.tensor(lengths, dtype=torch.int32), page)
    expected = [(table[i, j // page].item(), j % page) for i, length in enumerate(lengths) for j in range(length)]
    assert list(zip(blocks.tolist(), offsets.tolist(), strict=True)) == expected


@pytest.mark.parametrize("scales", ["tensor", "token_head"])
@pytest.mark.parametrize("dtype", layouts.QUANTISED)
def test_quantising_fills_the_range_and_rounds_once(dtype, scales):
    values = torch.randn(40, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    values *= torch.tensor([1.0, 9, 80])[:, None]  # heads of different size
    stored, descale = layouts.quantise(values, dtype, scales)
    assert stored.dtype == dtype
    assert descale.dtype is torch.float32
    assert descale.shape == ((1,) if scales == "tensor" else (40, HEADS))
    largest = {torch.float8_e4m3fn: 448, torch.float8_e4m3fnuz: 240, torch.int8: 127}[dtype]
    amplitudes = stored.float().abs().amax(dim=-1)
    assert amplitudes.max() == largest
    assert scales == "tensor" or bool((amplitudes == largest).all())
    wide = descale if scales == "tensor" else descale[..., None]
    # The distance of neighbours: of int8 1; of float8 an eighth of the number at most, and 2 ** -9 near 0.
    step = wide.expand_as(values) if dtype is torch.int8 else torch.maximum(values.abs() / 8, wide * 2.0**-9)
    assert bool(((stored.float() * wide - values).abs() <= 0.51 * step).all())


@pytest.mark.parametrize("scales", ["tensor", "token_head"])
def test_zeros_and_nothing_can_be_quantised(scales):
    for tokens in (0, 2):
        stored, descale = layouts.quantise(torch.zeros(tokens, HEADS, HEAD_SIZE), torch.int8, scales)
        assert not stored.any()
        assert bool(descale.isfinite().all() and (descale > 0).all())


def test_each_token_and_head_has_its_own_descale():
    stored = torch.full((2, HEADS, HEAD_SIZE), 3, dtype=torch.int8)
    descale = torch.arange(BLOCKS * 16 * HEADS, dtype=torch.float32).view(BLOCKS, 16, HEADS)
    where = torch.tensor([1, 4]), torch.tensor([0, 15])
    found = layouts.dequantise(stored, descale, *where, torch.float64)
    assert found.dtype is torch.float64
    for token, (block, offset) in enumerate(zip(*where, strict=True)):
        assert found[token, :, 0].tolist() == [3 * ((block * 16 + offset) * HEADS + head) for head in range(HEADS)]
    assert layouts.dequantise(stored, torch.tensor([0.5]), *where, torch.float16).unique().tolist() == [1.5]
    assert layouts.dequantise(stored, None, *where, torch.float32).unique().tolist() == [3]


def test_the_product_with_the_descale_is_rounded_once():
    """In bfloat16 a product of rounded factors would be off by more than its own rounding."""
    stored, descale = torch.full((1, 1, 8), 13.0, dtype=torch.float8_e4m3fn), torch.tensor([0.0123])
    where = torch.tensor([0]), torch.tensor([0])
    exact = torch.tensor(13.0) * descale
    assert torch.equal(layouts.dequantise(stored, descale, *where, torch.bfloat16)[0, 0, :1], exact.to(torch.bfloat16))


def test_what_is_no_layout_is_refused():
    with pytest.raises(ValueError, match="'HND' is not one of NHD, SHUFFLE"):
        layouts.shapes("HND", 1, 16, 1, 64, 2)
    with pytest.raises(ValueError, match="page size 8 to be multiples of 16"):
        layouts.shapes("SHUFFLE", 1, 8, 1, 64, 1)
    with pytest.raises(ValueError, match="is not one of"):
        layouts.read(torch.zeros(1, 1, 1, 1), "k", torch.tensor([0]), torch.tensor([0]), "HND")


VLLMS_FUNCTIONS = {
    "reshape_and_cache_shuffle_kernel",
    "reshape_and_cache_shuffle_triton",
    "cp_mha_gather_cache_kernel",
    "cp_mha_gather_cache",
}

VLLM = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import vllms_kernels as vllm
from aiterlab.attention import layouts

blocks, heads, head_size, answers = 4, 2, 64, {}
for page in (16, 64):
    generator = torch.Generator().manual_seed(page)
    k, v = torch.randn(2, 2 * page + 3, heads, head_size, generator=generator).half()
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    lengths = torch.tensor([page + 1, page + 2], dtype=torch.int32)
    where = layouts.locate(table, lengths, page)
    slots = where[0] * page + where[1]
    theirs = [torch.zeros(blocks, page, heads, head_size, dtype=torch.half) for _ in "kv"]
    one = torch.ones(1)
    vllm.reshape_and_cache_shuffle_triton(k, v, *theirs, slots, "auto", one, one)
    ours = [torch.zeros(shape, dtype=torch.half)
            for shape in layouts.shapes("SHUFFLE", blocks, page, heads, head_size, 2)]
    for part, cache, tokens in zip("kv", ours, (k, v)):
        layouts.write(cache, part, tokens, *where, "SHUFFLE")
    answers[f"written {page}"] = [torch.equal(a.view(-1), b.view(-1)) for a, b in zip(ours, theirs)]
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    gathered = [torch.zeros_like(k), torch.zeros_like(v)]
    as_nhd = [cache.view(blocks, page, heads, head_size) for cache in ours]
    vllm.cp_mha_gather_cache(*as_nhd, *gathered, table, one, one, offsets,
                             torch.repeat_interleave(torch.arange(2, dtype=torch.int32), lengths),
                             torch.zeros(2, dtype=torch.int32), False, "SHUFFLE", len(slots))
    answers[f"read {page}"] = [torch.equal(a, b) for a, b in zip(gathered, (k, v))]
print(json.dumps(answers))
"""


def test_vllms_own_kernels_write_and_read_the_same_shuffled_cache(run_python, tmp_path):
    """Their source, cut out of the installed vLLM, which defines them on ROCm alone, in Triton's interpreter."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("vLLM is not installed")
    source = (Path(found.origin).parent / "v1/attention/backends/rocm_aiter_fa.py").read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    cut = [ast.unparse(node) for node in functions if node.name in VLLMS_FUNCTIONS]
    assert len(cut) == len(VLLMS_FUNCTIONS)
    header = (
        "import torch, triton\nimport triton.language as tl\ndef is_quantized_kv_cache(name): return name != 'auto'\n"
    )
    (tmp_path / "vllms_kernels.py").write_text(header + "\n".join(cut))
    answers = json.loads(run_python(VLLM, str(tmp_path), TRITON_INTERPRET="1"))
    assert answers == {f"{what} {page}": [True, True] for page in (16, 64) for what in ("written", "read")}
