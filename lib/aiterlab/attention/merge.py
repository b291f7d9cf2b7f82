# SPDX-License-Identifier: Apache-2.0
"""Join attention over parts of the keys into attention over all of them, weighing each part by its LSE."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from aiterlab.attention import eager, tuning
from aiterlab.attention.tiles import LN2, LOG2E


@triton.jit(do_not_specialize=["tokens", "parts"])
def _merge_kernel(
    partial, partial_lse, out, lse, tokens, parts, stride_ps, stride_pt, stride_ph, stride_ot, stride_oh,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, LSE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_wait()  # this kernel was started while the one that writes the parts was still at it
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    row = head * tokens + token
    heads = tl.num_programs(1)
    weight = tl.load(
        partial_lse + part.to(tl.int64) * heads * tokens + row, mask=part < parts, other=float("-inf")
    ) * LOG2E  # fmt: skip
    # A part without keys has LSE -inf (flash-attn 2 writes +inf) and was never written: it is not read either.
    seen = tl.abs(weight) < float("inf")
    weight = tl.where(seen, weight, float("-inf"))
    values = tl.load(
        partial + part.to(tl.int64)[:, None] * stride_ps + token * stride_pt + head * stride_ph + dim[None, :],
        mask=seen[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    largest = tl.max(weight, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp2(weight - largest)
    total = tl.sum(weight, 0)
    result = tl.sum(values * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + token * stride_ot + head * stride_oh + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)
    if LSE:
        whole = (largest + tl.log2(tl.where(total > 0, total, 1.0))) * LN2
        tl.store(lse + row, tl.where(total > 0, whole, float("-inf")))


def merge(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    return_lse: bool = False,
    impl: str = "triton",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge S partial results of the same queries over disjoint sets of keys.

    Args:
        partial_out: [S, T, H, D], each normalised by its own softmax sum; where the LSE is infinite it is not read
        partial_lse: [S, H, T] float32, natural logarithm of each part's softmax sum; infinite for a part without keys
        out: [T, H, D] to write into
        lse: [H, T] float32 to write into
        dtype: of the output where it is made here; float32 if not given
        return_lse: also return the LSE of the whole, [H, T] float32
        impl: "triton", or "eager" for the formula in plain torch

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    if partial_out.ndim != 4 or not partial_out.shape[0]:
        raise ValueError(f"partial_out has shape {tuple(partial_out.shape)}, not [parts, tokens, heads, head_size]")
    parts, tokens, heads, head_size = partial_out.shape
    if tuple(partial_lse.shape) != (parts, heads, tokens) or partial_lse.dtype != torch.float32:
        raise ValueError(f"partial_lse must be float32 {(parts, heads, tokens)}, not {tuple(partial_lse.shape)}")
    if not partial_lse.is_contiguous() or partial_out.stride(3) != 1:
        raise ValueError("partial_lse must be contiguous, and partial_out along its last dimension")
    if out is None:
        out = torch.empty(tokens, heads, head_size, dtype=dtype or torch.float32, device=partial_out.device)
    if tuple(out.shape) != (tokens, heads, head_size) or out.stride(2) != 1:
        raise ValueError(f"out must be {(tokens, heads, head_size)}, contiguous along its last dimension")
    for name, tensor in (("partial_lse", partial_lse), ("out", out), ("lse", lse)):
        if tensor is not None and tensor.device != partial_out.device:
            raise ValueError(f"{name} is on {tensor.device}, partial_out on {partial_out.device}")
    if lse is not None and (lse.shape != (heads, tokens) or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {(heads, tokens)}, not {lse.dtype} {tuple(lse.shape)}")
    if lse is None and return_lse:
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=partial_out.device)
    if impl == "eager":
        eager.merge(partial_out, partial_lse, out, lse)
    elif impl != "triton":
        raise ValueError(f"impl is {impl!r}, not one of triton, eager")
    elif out.numel():
        _merge_kernel[(tokens, heads)](
            partial_out, partial_lse, out, lse, tokens, parts, *partial_out.stride()[:3], *out.stride()[:2],
            HEAD_SIZE=head_size, BLOCK_D=triton.next_power_of_2(head_size), BLOCK_S=triton.next_power_of_2(parts),
            LSE=lse is not None, CHAINED=tuning.chained(), num_warps=4,
            **({"launch_pdl": True} if tuning.chained() else {}),
        )  # fmt: skip
    return (out, lse) if return_lse else out
