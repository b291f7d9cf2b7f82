# SPDX-License-Identifier: Apache-2.0
"""Which shapes and options of attention are checked and measured, and how much work is each?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from aiterlab import pairwise
from aiterlab.attention import inputs, layouts
from aiterlab.attention.inputs import Inputs

OPERATIONS = ("prefill", "extend", "decode", "verify", "gather")
DTYPES = ("bfloat16", "float16", "float32")
KV_DTYPES = ("auto", "float8_e4m3fn", "float8_e4m3fnuz", "int8")
VALUES = ("normal", "large", "outlier")


@dataclass(frozen=True)
class Workload:
    """One attention operation over a batch, before any tensor is made.

    A sequence is (context, new): tokens in the cache before the step, and the step's own tokens, which are the last
    of its context + new keys. With a negative context there are fewer keys than queries, and the first -context rows
    see none (flash-attn aligns the causal mask bottom right); such a row is 0, and its log-sum-exp -inf.

    Raises:
        ValueError: a field that no operation can have.
    """

    name: str
    operation: str  # one of OPERATIONS
    sequences: tuple[tuple[int, int], ...]
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"  # one of KV_DTYPES; auto: dtype
    scales: str = "tensor"  # of a quantised cache: one descale per "tensor", or per "token_head"
    layout: str = "NHD"
    window: int = 0  # keys that a query sees, itself included; 0: all
    softcap: float = 0.0  # 0: none
    alibi: bool = False
    causal: bool = True
    values: str = "normal"  # one of VALUES: what the tensors hold

    def __post_init__(self) -> None:
        known = {
            "operation": OPERATIONS,
            "dtype": DTYPES,
            "kv_dtype": KV_DTYPES,
            "scales": ("tensor", "token_head"),
            "layout": layouts.LAYOUTS,
            "values": VALUES,
        }
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{self.name}: {field} {getattr(self, field)!r} is not one of {', '.join(values)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: {self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        if not self.sequences or any(new < 0 or context + new < 0 for context, new in self.sequences):
            raise ValueError(f"{self.name}: each sequence needs new >= 0 and context + new >= 0: {self.sequences}")
        if self.kv_dtype == "auto" and self.scales != "tensor":
            raise ValueError(f"{self.name}: a cache that is not quantised has no scales")

    @property
    def tokens(self) -> int:
        """New tokens of all sequences: the rows of q."""
        return sum(new for _, new in self.sequences)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return tuple(context + new for context, new in self.sequences)

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as flash-attn writes it: keys to the left and right of the query's own; -1: all."""
        if not self.window:
            return -1, -1
        return self.window - 1, 0 if self.causal else self.window - 1

    def make(self, seed: int, device: torch.device | str = "cpu", poison: bool = True) -> Inputs:
        """The tensors; see `inputs.make`."""
        return inputs.make(self, seed, device, poison)

    def visible(self, context: int, new: int) -> list[range]:
        """For each new token of a sequence, the positions of the keys that it sees."""
        left, right = self.window_size
        right = 0 if self.causal else right
        length = context + new
        return [
            range(0 if left < 0 else max(0, p - left), length if right < 0 else max(0, min(length, p + right + 1)))
            for p in range(context, length)
        ]

    def flops(self) -> int:
        """Multiplications and additions of both matrix products over the pairs that the mask leaves."""
        if self.operation == "gather":
            return 0
        pairs = sum(len(keys) for sequence in self.sequences for keys in self.visible(*sequence))
        return 4 * self.head_size * self.heads * pairs

    def bytes_moved(self) -> int:
        """The fewest bytes: every visible key and value read once (with its own descale), q read, the output written.

        A gather reads every key and value and writes them in `dtype`.
        """
        itemsize = getattr(torch, self.dtype).itemsize
        stored = itemsize if self.kv_dtype == "auto" else getattr(torch, self.kv_dtype).itemsize
        row = 2 * self.kv_heads * self.head_size  # numbers in a token's key and value
        read = row * stored + (2 * 4 * self.kv_heads if self.scales == "token_head" else 0)
        if self.operation == "gather":
            return sum(self.lengths) * (read + row * itemsize)
        return self._keys_seen() * read + 2 * self.tokens * self.heads * self.head_size * itemsize

    def _keys_seen(self) -> int:
        """Keys that at least one query sees: they are consecutive."""
        seen = 0
        for sequence in self.sequences:
            if rows := [keys for keys in self.visible(*sequence) if keys]:
                seen += rows[-1].stop - rows[0].start
        return seen


def _uniform(operation: str, count: int, length: int, new: int, variant: str = "", **fields) -> Workload:
    """A batch of equal sequences, named by what it is: decode_64x8k_page128."""
    context = length if operation in ("extend", "gather") else length - new  # extend: on top of `length` cached tokens
    size = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    step = f"_q{new}" if operation in ("extend", "verify") else ""
    name = f"{operation}{step}_{count}x{size}{variant and '_' + variant}"
    return Workload(name, operation, ((context, new),) * count, **fields)


K = 1024
CONTEXTS = ((1, 8 * K), (1, 32 * K), (8, 16 * K), (64, 8 * K))  # (sequences, length) of decode and verify

# What the suite's kernels are measured on: bf16, 32 / 8 heads of 128, pages of 16 tokens, unless the name says more.
CASES = {
    workload.name: workload
    for workload in (
        *(_uniform("verify", count, length, new) for new in (4, 8) for count, length in CONTEXTS),
        *(_uniform("decode", count, length, 1) for count, length in CONTEXTS),
        *(_uniform("extend", count, 32 * K, 512) for count in (1, 8)),
        *(_uniform("prefill", count, length, length) for count, length in ((8, 2 * K), (2, 8 * K), (1, 16 * K))),
        *(_uniform("gather", count, length, 0) for count, length in ((1, 32 * K), (8, 16 * K), (64, 8 * K))),
        _uniform("gather", 64, 8 * K, 0, "shuffle", layout="SHUFFLE"),
        _uniform("decode", 8, 16 * K, 1, "fp8", kv_dtype="float8_e4m3fn"),
        _uniform("decode", 64, 8 * K, 1, "fp8", kv_dtype="float8_e4m3fn"),
        _uniform("decode", 64, 8 * K, 1, "page64", page_size=64),
        _uniform("decode", 64, 8 * K, 1, "page128", page_size=128),
        _uniform("decode", 64, 8 * K, 1, "shuffle", layout="SHUFFLE"),
    )
}

_TINY = {"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": "float16"}

# The same operations for Triton's interpreter, which needs about a second each.
CPU_CASES = {
    workload.name: workload
    for workload in (
        _uniform("verify", 2, 64, 4, **_TINY),
        _uniform("verify", 1, 96, 8, **_TINY),
        _uniform("decode", 2, 64, 1, **_TINY),
        _uniform("extend", 1, 48, 16, **_TINY),
        _uniform("prefill", 2, 32, 32, **_TINY),
        _uniform("gather", 2, 64, 0, **_TINY),
        _uniform("gather", 2, 64, 0, "shuffle", layout="SHUFFLE", **_TINY),
        _uniform("decode", 2, 64, 1, "fp8", kv_dtype="float8_e4m3fn", **_TINY),
        _uniform("decode", 2, 64, 1, "page64", page_size=64, **_TINY),
        _uniform("decode", 2, 64, 1, "shuffle", layout="SHUFFLE", **_TINY),
    )
}

CACHES = (  # kv_dtype, scales
    ("auto", "tensor"),
    ("float8_e4m3fn", "tensor"),
    ("float8_e4m3fn", "token_head"),
    ("float8_e4m3fnuz", "tensor"),
    ("int8", "tensor"),
    ("int8", "token_head"),
)
CONTEXT_EDGES = ("0", "1", "page-1", "page", "page+1", "long")


def sweep(size: str = "small") -> tuple[Workload, ...]:
    """Workloads among which every pair of settings of any two options occurs at least once.

    Args:
        size: "small" for Triton's interpreter, in float16 and float32; "large" for a GPU, in bfloat16 and float16
    """
    small = {"small": True, "large": False}[size]
    rows = pairwise.cover(
        {
            "dtype": ("float16", "float32") if small else ("bfloat16", "float16"),
            "head_size": (64, 96, 128, 256),
            "group": (1, 4, 5, 8, "MQA"),
            "page_size": (16, 32, 64, 128),
            "window": ("none", "within a page", "pages"),
            "queries": ("1", "2-8", "16", "ragged"),
            "context": CONTEXT_EDGES,
            "cache": CACHES,
            "layout": layouts.LAYOUTS,
            "softcap": (0.0, 2.5),  # low enough to bend ordinary logits
            "alibi": (False, True),
        }
    )
    drafted = itertools.cycle(range(2, 9))  # every length in turn
    return tuple(
        _swept(f"sweep_{index}", row, small, next(drafted) if row["queries"] == "2-8" else None)
        for index, row in enumerate(rows)
    )


def _swept(name: str, row: dict, small: bool, drafted: int | None) -> Workload:
    """One workload of the sweep; its other sequences have the row's neighbours among the contexts."""
    page = row["page_size"]
    contexts = dict(zip(CONTEXT_EDGES, (0, 1, page - 1, page, page + 1, 2 * page + 7 if small else 4133), strict=True))
    first = CONTEXT_EDGES.index(row["context"])
    count = 2 if small else 6
    rotated = [contexts[CONTEXT_EDGES[(first + i) % len(CONTEXT_EDGES)]] for i in range(count)]
    ragged = (7, 18) if small else (7, 130, 1, 33, 0, 300)
    new = {"1": (1,), "2-8": (drafted,), "16": (16,), "ragged": ragged}[row["queries"]]
    kv_heads, heads = (1, 6) if row["group"] == "MQA" else (2, 2 * row["group"])
    kv_dtype, scales = row["cache"]
    return Workload(
        name=name,
        operation={"1": "decode", "2-8": "verify"}.get(row["queries"], "extend"),
        sequences=tuple((context, new[i % len(new)]) for i, context in enumerate(rotated)),
        heads=heads,
        kv_heads=kv_heads,
        head_size=row["head_size"],
        page_size=page,
        dtype=row["dtype"],
        kv_dtype=kv_dtype,
        scales=scales,
        layout=row["layout"],
        window={"none": 0, "within a page": 5, "pages": page + 3}[row["window"]],
        softcap=row["softcap"],
        alibi=row["alibi"],
    )


def adversarial(dtype: str = "float16") -> tuple[Workload, ...]:
    """Batches that break kernels which are right on ordinary ones; small enough for every machine."""
    mixed = ((37, 4), (0, 9), (150, 1))

    def case(name: str, sequences=mixed, **fields) -> Workload:
        return Workload(name, "extend", sequences, **(_TINY | {"dtype": dtype} | fields))

    return (
        case("large_logits", values="large"),
        case("large_logits_capped", values="large", softcap=30.0),
        case("outlier", values="outlier"),
        case("no_new_tokens", ((5, 0), (33, 3), (16, 0), (0, 1))),
        case("empty_sequences", ((0, 0), (20, 4), (0, 0), (0, 0))),
        case("window_of_one", window=1),  # each token sees itself alone
        case("window_ends_on_a_page", ((48, 1), (47, 2)), window=17),
        case("rows_without_keys", ((-3, 5), (-1, 1), (20, 4))),
        case("queries_without_keys", ((-4, 4), (21, 3)), causal=False),  # a chunk of context that is empty
        case("every_key", ((29, 4), (0, 5)), causal=False),
        case("window_on_both_sides", ((29, 4), (0, 9)), causal=False, window=4),
        case("many_short_sequences", ((0, 1),) * 19),
    )
