# SPDX-License-Identifier: Apache-2.0
"""On what are acceptance and speed measured? Held-out prompts by task, never trained on, or a file of one's own.

`models/heldout/` holds one file per task. `models/manifest.json` fixes each by its SHA-256: a changed file is refused,
because numbers from it could not be compared with those of the model card.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiterlab import paths
from aiterlab.spec_decode.engine import Request

TASKS = ("code", "prose", "arithmetic")
OWN = "own"  # the task of prompts from a user's file


class PromptError(ValueError):
    """Prompts that cannot be had as asked for: one line, with the mend."""


@dataclass(frozen=True)
class Prompt:
    """One text and where it comes from; `reference` is what should follow, None where nothing is right or wrong."""

    id: str
    task: str
    text: str
    reference: str | None = None
    source: str | None = None
    licence: str | None = None


def load(
    task: str,
    count: int | None = None,
    *,
    max_prompt_tokens: int | None = None,
    path: Path | str | None = None,
    tokenizer: Path | str | None = None,
    seed: int = 0,
) -> list[Request]:
    """Return requests for one task: the same ones for the same arguments, in the order of the file.

    Args:
        task: one of TASKS; with `path`, any name for what the file holds.
        count: how many; None for all.
        max_prompt_tokens: keep that many tokens from the start of each text.
        path: a file of one's own: one text per line, or JSON lines with `text` (and, as you like, `id`).
        tokenizer: folder of the model whose tokens are counted; the bundled target if None.
        seed: another seed, another choice.
    """
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise PromptError(f"max_prompt_tokens={max_prompt_tokens}: a prompt has at least one token")
    prompts = choose(held_out(task) if path is None else read(path, task), count, seed)
    if max_prompt_tokens is None:
        return [Request(id=one.id, task=one.task, text=one.text) for one in prompts]
    encode = tokenizer_of(tokenizer or paths.models_dir() / "target")
    return [Request(id=one.id, task=one.task, token_ids=encode(one.text)[:max_prompt_tokens]) for one in prompts]


def held_out(task: str, models: Path | None = None) -> list[Prompt]:
    """Read all held-out prompts of a task, after a check that the file is the one that the manifest names."""
    models = models or paths.models_dir()
    if task not in TASKS:
        raise PromptError(f"{task}: no such task; there are {', '.join(TASKS)}, or name a file of your own with path")
    name = f"heldout/{task}.jsonl"
    expected = _manifest_hash(models / "manifest.json", name)
    try:
        found = hashlib.sha256((models / name).read_bytes()).hexdigest()
    except OSError as error:
        raise PromptError(f"{models / name}: {error.strerror}; restore the bundled models") from error
    if found != expected:
        raise PromptError(
            f"{models / name}: was changed (SHA-256 {found[:12]}…, the manifest says {expected[:12]}…); restore it, or "
            f"name your own prompts with path"
        )
    return read(models / name, task)


def read(path: Path | str, task: str = OWN) -> list[Prompt]:
    """Read prompts from a file: JSON lines if its name ends in .jsonl, one text per line if not."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    parse = _parsed if path.suffix == ".jsonl" else _plain
    prompts = [parse(line, path, number, task) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise PromptError(f"{path}: holds no prompt")
    ids = [one.id for one in prompts]
    if twice := next((one for one in ids if ids.count(one) > 1), None):
        raise PromptError(f"{path}: two prompts have the id {twice}")
    return prompts


def choose(prompts: list[Prompt], count: int | None, seed: int = 0) -> list[Prompt]:
    """Choose `count` prompts at random but always the same, and keep their order."""
    if count is None:
        return prompts
    if not 0 < count <= len(prompts):
        raise PromptError(f"{count} prompts asked for, but {prompts[0].task} has 1 to {len(prompts)}")
    chosen = random.Random(seed).sample(range(len(prompts)), count)
    return [prompts[index] for index in sorted(chosen)]


def _plain(line: str, path: Path, number: int, task: str) -> Prompt:
    return Prompt(f"{path.stem}-{number}", task, line)


def _parsed(line: str, path: Path, number: int, task: str) -> Prompt:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{path}, line {number}: is not JSON ({error})") from error
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text:
        raise PromptError(f'{path}, line {number}: needs an object with "text", such as {{"text": "def main():"}}')
    known = {name: fields.get(name) for name in ("reference", "source", "licence")}
    return Prompt(str(fields.get("id", f"{path.stem}-{number}")), str(fields.get("task", task)), text, **known)


def _manifest_hash(path: Path, name: str) -> str:
    manifest = _json(path)
    try:
        return manifest["files"][name]["sha256"]
    except (KeyError, TypeError) as error:
        raise PromptError(f"{path}: names no SHA-256 for {name}; restore the bundled models") from error


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror}; restore the bundled models") from error
    except ValueError as error:
        raise PromptError(f"{path}: is not JSON ({error})") from error


def tokenizer_of(model: Path | str) -> Callable[[str], tuple[int, ...]]:
    """Return how a model, a folder or a Hub id, turns text into token ids."""
    file = Path(model) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        own = Tokenizer.from_file(str(file))
        return lambda text: tuple(own.encode(text).ids)
    if isinstance(model, Path) or Path(model).is_dir():
        raise PromptError(f"{model}: has no tokenizer.json, which prompts of a given length need; add it")
    from transformers import AutoTokenizer

    from_hub = AutoTokenizer.from_pretrained(str(model))
    return lambda text: tuple(from_hub(text)["input_ids"])
