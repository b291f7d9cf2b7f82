# SPDX-License-Identifier: Apache-2.0
"""Would the checks notice? Break one part on purpose: the draft, or the verifier inside vLLM.

A corrupted draft must cost speed alone: outputs stay, acceptance falls to nearly nothing. A broken verifier must make a
check of `lossless` fail. `break_verifier` and `bias_verifier` are hooks: name one in `EngineSpec.hooks`, and the
engine's own process calls it before vLLM is built.

A verifier is broken by what it is shown, not by code in its place: vLLM's real rejection sampler, its Triton kernel on
a GPU or its compiled one on a CPU, gets logits in which every draft token is the likeliest by far.
"""

from __future__ import annotations

import functools
import importlib
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from aiterlab.records import atomic_write_bytes

CERTAIN = 50.0  # logits above the likeliest other token: the rest of a vocabulary of any size weighs less than 1e-15
KEPT = ("embed_tokens",)  # what a draft has from its target

# vLLM's model runner V1, which every engine of this package uses (`processes.engine_environment`).
SAMPLER = "vllm.v1.sample.rejection_sampler"


class SabotageError(RuntimeError):
    """Something could not be broken as asked: one line that says why."""


# The draft


def corrupt_draft(source: Path | str, destination: Path | str, *, seed: int = 0) -> Path:
    """Write a copy of the draft in `source` whose matrices are noise; returns `destination`.

    Same files, names, shapes and dtypes, and each matrix keeps its own scale (root mean square), so that activations
    stay in range. Norms, embeddings and the map of the draft vocabulary (`d2t`, `t2d`) stay as they are.
    """
    source, destination = Path(source), Path(destination)
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise SabotageError(f"{source}: holds no *.safetensors; name the folder of a draft model")
    if destination.resolve() == source.resolve():
        raise SabotageError(f"{destination}: is the draft itself; name another folder for its corrupted copy")
    destination.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(source.iterdir()):
        if file in weights:
            atomic_write_bytes(destination / file.name, _corrupted(file, generator))
        elif file.is_file():
            shutil.copyfile(file, destination / file.name)
    return destination


def _corrupted(file: Path, generator: torch.Generator) -> bytes:
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dictionary)
        metadata = stored.metadata()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.ndim >= 2 and tensor.is_floating_point() and not any(part in name for part in KEPT):
            scale = tensor.float().square().mean().sqrt()
            noise = torch.randn(tensor.shape, generator=generator) * scale
            tensors[name] = noise.to(tensor.dtype)
    return save(tensors, metadata)


# The verifier


def break_verifier() -> None:
    """Make vLLM's verifier accept every draft token, greedy or sampled."""
    _show_drafts(sampled_alone=False)


def bias_verifier() -> None:
    """Make vLLM's verifier accept every draft token at temperatures above 0; greedy decoding stays right."""
    _show_drafts(sampled_alone=True)


def favour(logits: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return `logits` with the token of each chosen row certain; rows without a token (-1) stay.

    Args:
        logits: [rows, vocabulary]; not written to, because vLLM reports log-probabilities from it.
        tokens: [rows]
        chosen: [rows], bool
    """
    place = tokens.clamp(min=0).long().unsqueeze(1)
    certain = logits.amax(1, keepdim=True) + CERTAIN
    chosen = (chosen & (tokens >= 0)).unsqueeze(1)
    return logits.scatter(1, place, torch.where(chosen, certain, logits.gather(1, place)))


def _show_drafts(sampled_alone: bool) -> None:
    """Wrap the function in which vLLM's rejection sampler looks at the target's logits."""
    try:
        module = importlib.import_module(SAMPLER)
        original = module.rejection_sample
    except (ImportError, AttributeError) as error:
        raise SabotageError(f"this vLLM has no {SAMPLER}.rejection_sample; sabotage.py must learn its place") from error

    @functools.wraps(original)
    def rejection_sample(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs,
                         target_logits, bonus_token_ids, sampling_metadata, *others, **options):  # fmt: skip
        # One row of logits per draft token; the bonus token was sampled before, and rightly.
        chosen = torch.ones_like(draft_token_ids, dtype=torch.bool)
        if sampled_alone:
            temperature = sampling_metadata.temperature  # per request; None where all are greedy
            counts = torch.tensor(num_draft_tokens, device=chosen.device)
            chosen &= False if temperature is None else torch.repeat_interleave(temperature > 0, counts)
        shown = favour(target_logits, draft_token_ids, chosen)
        return original(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs,
                        shown, bonus_token_ids, sampling_metadata, *others, **options)  # fmt: skip

    module.rejection_sample = rejection_sample
