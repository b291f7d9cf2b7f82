# SPDX-License-Identifier: Apache-2.0
"""What in this vLLM has to be mended before its speculative decoding can be judged? Each fault is tried, then mended.

A repair is applied only where the fault shows itself, and an engine reports the repairs that it needed.

    expand   vLLM 0.32.0 on a CPU. Verification divides each draft position's logits by its request's temperature. The
             C++ stand-in for the Triton kernel that copies temperatures to positions gets a converted copy of its
             output tensor and fills that; the real one stays uninitialised memory. Sampling at any temperature above 0
             then follows another distribution than the target's wherever a draft token is verified. Greedy decoding
             never comes here.
"""

from __future__ import annotations

EXPAND = "expand: temperatures of draft positions were uninitialised memory (vLLM's CPU stand-in for a Triton kernel)"


def apply() -> tuple[str, ...]:
    """Mend what is broken in this process, whose `vllm.LLM` is built; return what was mended."""
    from vllm.platforms import current_platform

    return _expand() if current_platform.is_cpu() else ()


def expanded(llm=None) -> list[float]:
    """Let vLLM copy two temperatures to three positions; 3, 5, 5 is right."""
    import torch
    from vllm.v1.sample import rejection_sampler

    values, ends = torch.tensor([3.0, 5.0]), torch.tensor([1, 3], dtype=torch.int32)
    return rejection_sampler.expand_batch_to_tokens(values, ends, 3).tolist()


def _expand() -> tuple[str, ...]:
    from vllm.v1.sample import rejection_sampler

    if expanded() == [3.0, 5.0, 5.0]:
        return ()

    def expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        positions = x.repeat_interleave(counts, output_size=num_tokens)
        return positions.masked_fill(positions == replace_from, replace_to)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return (EXPAND,)
