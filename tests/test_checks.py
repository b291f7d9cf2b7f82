# SPDX-License-Identifier: Apache-2.0
"""A check passes what a blocked kernel in low precision computes, and nothing that such a kernel may get wrong."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from aiterlab.attention import layouts, workloads
from aiterlab.attention.workloads import CPU_CASES, Workload
from aiterlab.measure import checks
from aiterlab.policy import Answer

SMALL = {"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": "float16"}
NAN = float("nan")


@dataclass
class Kernel:
    """Attention as a kernel computes it, tile by tile with an online softmax; its fields are what it may get wrong."""

    tile: int = 16
    scale: float = 1.0
    shift: int = 0  # of the position of every query
    ignore: tuple[str, ...] = ()  # options of the inputs
    swap_descales: bool = False
    read_beyond: int = 0  # keys behind each sequence, in its last page
    follow_unused: bool = False  # pages: the block table's last entry of every row
    skip_page: int | None = None
    lse_factor: float = 1.0
    triton: bool = False
    returns_lse: bool = True
    launches: int = 0

    def supports(self, workload):
        return Answer(workload.operation != "gather", "attends")

    def prepare(self, inputs, out):
        def launch():
            self.launches += 1
            lse = torch.full((inputs.q.shape[1], len(inputs.q)), NAN)
            starts = inputs.cu_seqlens_q.tolist()
            for i, (start, stop) in enumerate(itertools.pairwise(starts)):
                if start < stop:
                    out[start:stop], lse[:, start:stop] = self.sequence(inputs, i, inputs.q[start:stop])
            return out, self.lse_factor * lse

        return launch

    def keys(self, inputs, i):
        page = inputs.workload.page_size
        length = inputs.seqused_k[i : i + 1] + self.read_beyond
        table = inputs.block_table[i : i + 1]
        blocks, offsets = layouts.locate(table, length, page)
        if self.follow_unused:
            blocks[-1:] = table[0, -1]
        if self.skip_page is not None:
            kept = torch.arange(len(blocks)) // page != self.skip_page
            blocks, offsets = blocks[kept], offsets[kept]
        k_descale, v_descale = inputs.k_descale, inputs.v_descale
        if self.swap_descales:
            k_descale, v_descale = v_descale, k_descale
        dtype = inputs.q.dtype
        k_cache, v_cache = _with_the_block_behind(inputs.k_cache), _with_the_block_behind(inputs.v_cache)
        key = layouts.gather(k_cache, "k", k_descale, blocks, offsets, inputs.layout, dtype)
        return key, layouts.gather(v_cache, "v", v_descale, blocks, offsets, inputs.layout, dtype)

    def sequence(self, inputs, i, query):
        key, value = self.keys(inputs, i)
        options = {name: None if name in self.ignore else value for name, value in inputs.options.items()}
        tokens, heads, head_size = query.shape
        group = heads // key.shape[1]
        positions = torch.arange(inputs.seqused_k[i] - tokens, inputs.seqused_k[i])[:, None] + self.shift
        running_max = torch.full((heads, tokens, 1), -math.inf)
        total = torch.zeros(heads, tokens, 1)
        output = torch.zeros(heads, tokens, head_size)
        for first in range(0, len(key), self.tile):
            part = slice(first, first + self.tile)
            keys = key[part].float().repeat_interleave(group, 1)
            logits = self.scale * inputs.softmax_scale * torch.einsum("thd,shd->hts", query.float(), keys)
            if options["softcap"]:
                logits = options["softcap"] * torch.tanh(logits / options["softcap"])
            distance = torch.arange(first, first + keys.shape[0]) - positions
            if options["alibi_slopes"] is not None:
                logits = logits + options["alibi_slopes"][:, None, None] * distance
            left, right = options["window_size"] or (-1, -1)
            right = 0 if options["causal"] else right
            seen = torch.ones_like(distance, dtype=torch.bool)
            seen &= distance >= -left if left >= 0 else seen
            seen &= distance <= right if right >= 0 else seen
            logits = logits.masked_fill(~seen, -math.inf)
            largest = torch.maximum(running_max, logits.amax(-1, keepdim=True))
            known = largest.masked_fill(largest == -math.inf, 0)
            shrunk = torch.exp(running_max - known)
            weights = torch.exp(logits - known)
            total = shrunk * total + weights.sum(-1, keepdim=True)
            values = value[part].float().repeat_interleave(group, 1)
            output = shrunk * output + torch.einsum("hts,shd->htd", weights.to(query.dtype).float(), values)
            running_max = largest
        output = output / total.masked_fill(total == 0, 1)
        return output.transpose(0, 1).to(query.dtype), (running_max + total.log()).squeeze(-1)


def _with_the_block_behind(cache):
    """The cache as a kernel can address it: with the memory behind it."""
    return cache.as_strided((len(cache) + 1, *cache.shape[1:]), cache.stride())


def extend(*sequences, **fields):
    return Workload("test", "extend", sequences or ((37, 4), (0, 19)), **(SMALL | fields))


@pytest.mark.parametrize(
    "workload",
    [w for w in (*workloads.sweep(), *workloads.adversarial(), *CPU_CASES.values()) if w.operation != "gather"],
    ids=lambda workload: workload.name,
)
def test_a_blocked_kernel_passes_with_room_to_spare(workload):
    found = checks.check(Kernel(), workload.make(0))
    assert found, found
    assert found.reason == "within the limit of every row"
    assert found.error_over_tolerance < 0.8
    assert found.lse_error_over_tolerance < 0.8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tile", [32, 512])
def test_every_dtype_and_tile_passes_on_longer_contexts(dtype, tile):
    workload = extend((900, 4), (0, 70), (2000, 1), dtype=dtype)
    found = checks.check(Kernel(tile), workload.make(1))
    assert found, found
    assert found.error_over_tolerance < 0.8


MISTAKES = {
    "scale off by 3 %": (Kernel(scale=1.03), {}),
    "queries one position too late": (Kernel(shift=1), {}),
    "queries one position too early": (Kernel(shift=-1), {}),
    "window forgotten": (Kernel(ignore=("window_size",)), {"window": 7}),
    "soft cap forgotten": (Kernel(ignore=("softcap",)), {"softcap": 2.5}),
    "ALiBi forgotten": (Kernel(ignore=("alibi_slopes",)), {"alibi": True}),
    "mask forgotten": (Kernel(ignore=("causal",)), {}),
    "mask made up": (Kernel(), {"causal": False}),
    "descales exchanged": (Kernel(swap_descales=True), {"kv_dtype": "float8_e4m3fn"}),
    "descales per head exchanged": (Kernel(swap_descales=True), {"kv_dtype": "int8", "scales": "token_head"}),
    "first page left out": (Kernel(skip_page=0), {}),
    "middle page left out": (Kernel(skip_page=1), {}),
    "key behind the sequence read": (Kernel(read_beyond=1), {}),
    "key behind the sequence read, fp8": (Kernel(read_beyond=1), {"kv_dtype": "float8_e4m3fnuz"}),
    "key behind the sequence read, shuffled": (Kernel(read_beyond=1), {"layout": "SHUFFLE"}),
    "entry behind the sequence followed": (Kernel(follow_unused=True), {"sequences": ((37, 4), (40, 24))}),
    "values of a window of one": (Kernel(shift=-1), {"window": 1}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_kernel_fails(mistake):
    kernel, fields = MISTAKES[mistake]
    workload = extend(*fields.get("sequences", ()), **{k: v for k, v in fields.items() if k != "sequences"})
    inputs = workload.make(0)
    assert checks.check(Kernel(), inputs)
    if mistake == "mask made up":  # causal where it should not be
        inputs.expected()
        inputs.causal = True
    if mistake == "entry behind the sequence followed":
        inputs.block_table = torch.nn.functional.pad(inputs.block_table, (0, 1), value=len(inputs.k_cache))
    found = checks.check(kernel, inputs)
    assert found.outcome == "wrong", found
    assert not found
    assert found.error_over_tolerance is None or found.error_over_tolerance > 2
    assert "output" in found.reason


def test_a_wrong_lse_fails_beside_a_right_output():
    found = checks.check(Kernel(lse_factor=1 / math.log(2)), extend().make(0))
    assert found.outcome == "wrong"
    assert found.error_over_tolerance < 1 < found.lse_error_over_tolerance
    assert found.reason.startswith("a row of the lse misses float64 by")


def test_a_kernel_without_lse_has_no_error_of_it():
    found = checks.check(Kernel(returns_lse=False, lse_factor=7), extend().make(0))
    assert found
    assert (found.lse_error, found.lse_tolerance, found.lse_error_over_tolerance) == (None, None, None)


class Spoiling(Kernel):
    """A right kernel whose output is spoilt afterwards."""

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def prepare(self, inputs, out):
        launch = super().prepare(inputs, out)

        def spoilt():
            result = launch()
            self.spoil(self, out, result[1])
            return result

        return spoilt


def _set(value, *index):
    def spoil(kernel, out, lse):
        out[index] = value

    return spoil


def _outside(rows):
    def spoil(kernel, out, lse):
        offset = out.storage_offset() + rows * out.stride(0)
        out.as_strided((1, *out.shape[1:]), out.stride(), offset).fill_(0)

    return spoil


def _second_launch(kernel, out, lse):
    if kernel.launches == 2:
        out[0, 0, 0] += 1


SPOILT = {
    "one number not written": (_set(NAN, -1, -1, -1), "not written or are not finite"),
    "one number infinite": (_set(math.inf, 3, 0, 0), "not written or are not finite"),
    "one number off": (_set(0.5, 3, 1, 7), "misses float64 by"),
    "one row zero": (_set(0.0, 5, 2), "misses float64 by"),
    "one lse not written": (lambda kernel, out, lse: lse[1, 2].fill_(NAN), "the lse has numbers that were not written"),
    "row before the output written": (_outside(-1), "wrote outside of its output"),
    "row behind the output written": (_outside(23), "wrote outside of its output"),
    "second launch wrong": (_second_launch, "misses float64 by"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_result_fails(how):
    spoil, reason = SPOILT[how]
    found = checks.check(Spoiling(spoil), extend().make(0))
    assert found.outcome == "wrong"
    assert reason in found.reason
    numbers = (found.max_abs_error, found.error_over_tolerance, found.lse_error, found.lse_error_over_tolerance)
    assert all(number is None or math.isfinite(number) for number in numbers)


def test_an_output_that_nobody_writes_fails_in_both_launches():
    kernel = Kernel()
    kernel.prepare = lambda inputs, out: lambda: (out, torch.zeros(4, 23))
    found = checks.check(kernel, extend().make(0))
    assert found.outcome == "wrong"
    assert (found.max_abs_error, found.error_over_tolerance) == (None, None)


def test_an_output_that_becomes_a_librarys_own_tensor_is_read_where_it_is():
    class Library(Kernel):
        def prepare(self, inputs, out):
            own = torch.empty_like(out)
            launch = super().prepare(inputs, own)

            def replaced():
                result = launch()
                out.set_(own.clone())
                return result

            return replaced

    assert checks.check(Library(), extend().make(0))


def test_rows_without_keys_must_be_zero():
    inputs = extend((-3, 5), (9, 2)).make(0)
    assert checks.check(Kernel(), inputs)
    found = checks.check(Spoiling(_set(1e-4, 0, 0, 0)), inputs)
    assert found.outcome == "wrong"


def test_large_rows_do_not_hide_small_ones():
    """The error of a row that sees 3000 keys is measured beside its own size, not beside that of a row with one key."""
    inputs = extend((0, 4), (3000, 1)).make(0)
    last = inputs.expected()[0][-1, 0].abs().max().item()
    found = checks.check(Spoiling(lambda kernel, out, lse: out[-1, 0].mul_(1.1)), inputs)
    assert found.outcome == "wrong"
    assert last / 20 < inputs.limits()[0].max()  # the limit of the first rows would have let it pass
    assert found.error_over_tolerance > 5


# What is not computed


def test_an_unsupported_workload_is_refused_with_the_reason():
    kernel = Kernel()
    kernel.supports = lambda workload: Answer(False, "no page size 16")
    assert checks.check(kernel, extend().make(0)) == checks.Check("refused", "no page size 16")
    assert kernel.launches == 0


def test_bf16_is_refused_in_tritons_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = extend(dtype="bfloat16").make(0)
    refused = checks.check(Kernel(triton=True), inputs)
    assert (refused.outcome, refused.max_abs_error) == ("refused", None)
    assert "interpreter computes bf16 dot products wrongly" in refused.reason
    assert checks.check(Kernel(triton=False), inputs)  # torch computes it right
    assert checks.check(Kernel(triton=True), extend().make(0))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert checks.check(Kernel(triton=True), inputs)
    assert isinstance(checks.believable("bfloat16"), Answer)


def test_an_exception_is_an_outcome():
    class Broken(Kernel):
        def prepare(self, inputs, out):
            raise ValueError("q.stride(2) is 2\nand more")

    assert checks.check(Broken(), extend().make(0)) == checks.Check("failed", "ValueError: q.stride(2) is 2")


def test_a_result_of_another_shape_fails():
    kernel = Kernel()
    prepare = kernel.prepare
    kernel.prepare = lambda inputs, out: lambda: (out, prepare(inputs, out)()[1].T)
    assert checks.check(kernel, extend().make(0)).outcome == "failed"


# Gathering


class Gather(Kernel):
    """The cache's numbers in a row, as they should be or with `spoil` done to them."""

    def __init__(self, spoil=lambda k, v: None):
        super().__init__()
        self.spoil = spoil

    def supports(self, workload):
        return Answer(True, "gathers")

    def prepare(self, inputs, out):
        def launch():
            for i, (tensor, right) in enumerate(zip(out, (inputs.k, inputs.v), strict=True)):
                assert tensor.isnan().all(), i
                tensor.copy_(right)
            self.spoil(*out)

        self.returns_lse = False
        return launch


GATHER = Workload("test", "gather", ((40, 0), (0, 0), (17, 0)), **SMALL)


@pytest.mark.parametrize("kv_dtype", workloads.KV_DTYPES)
def test_a_gather_is_held_against_the_cache(kv_dtype):
    inputs = replace(GATHER, kv_dtype=kv_dtype).make(0)
    found = checks.check(Gather(), inputs)
    assert (found.outcome, found.max_abs_error) == ("ok", 0)
    assert found.lse_error is None
    missing = checks.check(Gather(lambda k, v: v[-1, -1].fill_(NAN)), inputs)
    swapped = checks.check(Gather(lambda k, v: k[:2].copy_(k[:2].flip(0))), inputs)
    exchanged = checks.check(Gather(lambda k, v: k.copy_(v)), inputs)
    assert {missing.outcome, swapped.outcome, exchanged.outcome} == {"wrong"}


def test_what_was_not_quantised_must_be_gathered_bit_by_bit():
    off_by_a_rounding = Gather(lambda k, v: k[3, 1, 5].mul_(1 + 2**-10))
    found = checks.check(off_by_a_rounding, GATHER.make(0))
    assert found.outcome == "wrong"
    assert "differs from numbers that it must equal" in found.reason
    assert checks.check(off_by_a_rounding, replace(GATHER, kv_dtype="int8").make(0))


# The comparison itself


def test_deviation_is_the_worst_row_beside_its_own_limit():
    expected = torch.zeros(3, 2, 4, dtype=torch.float64)
    output = torch.zeros(3, 2, 4)
    output[0, 0, 1], output[2, 1, 3] = 0.5, -0.1
    limit = torch.full((3, 2), 1.0)
    limit[2, 1] = 0.01
    found = checks.deviation(output, expected, limit)
    assert (found.largest, found.tolerance) == (0.5, 1.0)
    assert found.ratio == pytest.approx(10)


def test_numbers_agree_only_with_themselves():
    infinite = torch.tensor([[-math.inf, 1.0]])
    assert checks.deviation(infinite, infinite.double(), torch.zeros(1)).ratio == 0
    assert checks.deviation(torch.tensor([[0.0, 1.0]]), infinite.double(), torch.ones(1)).ratio == math.inf
    assert checks.deviation(torch.tensor([[NAN]]), torch.tensor([[NAN]]).double(), torch.ones(1)).ratio == math.inf
    assert checks.deviation(torch.tensor([[1.0]]), torch.tensor([[NAN]]).double(), torch.ones(1)).ratio == math.inf
    assert checks.deviation(torch.tensor([[1.0]]), torch.tensor([[1.5]]).double(), torch.zeros(1)).ratio == math.inf
    assert checks.deviation(torch.empty(0, 4), torch.empty(0, 4).double(), torch.empty(0)).ratio == 0


def test_deviation_sees_every_row_of_a_long_output(monkeypatch):
    monkeypatch.setattr(checks, "CHUNK", 4)
    output = torch.zeros(11, 1, 2)
    for row in range(11):
        spoilt = output.clone()
        spoilt[row, 0, 1] = 3
        assert checks.deviation(spoilt, output.double(), torch.ones(11, 1)).ratio == 3
