# SPDX-License-Identifier: Apache-2.0
"""vLLM looks at a model's class in a process of its own; here that process is forked instead of started anew.

It starts one so that looking does not initialise a GPU, and keeps the answer on disk. A new interpreter takes it 10 to
30 s for every model of every new tree; a fork of a process that has imported vLLM takes about one. The code that looks
is the tree's own. What it saw is kept here, not where the tree would: it imports its model loader for that alone.

The models have most of what they import in common, so a process that looks at one looks at the others, too, that will
be asked for in the same place. A cell in a new interpreter has each looked at by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from aiterlab import importing, records

REGISTRY = "vllm.model_executor.models.registry"
_expected: tuple[str, ...] = ()


def fork() -> None:
    """Have this process fork where vLLM would start an interpreter. Not on a real GPU: a fork cannot use one."""
    importing.after_import(REGISTRY, _replace)


def expect(architectures: Iterable[str]) -> None:
    """Say which models, as the tree's registry names them, will be looked at here and in what is forked from here."""
    global _expected
    _expected = tuple(architectures)


class _Unseen(BaseException):
    """Nobody has looked at this class: raised where vLLM would start a process, past its handlers of errors."""


def _replace(registry: ModuleType) -> None:
    inspect = registry._LazyRegisteredModel.inspect_model_cls

    def not_here(look: Callable[[], object]):
        raise _Unseen

    def look_here(model) -> dict[str, dict]:
        registry._run_in_subprocess = lambda look: look()
        type(model)._save_modelinfo_to_cache = lambda *asked: None
        seen = {_name(model): dataclasses.asdict(inspect(model))}
        for other in map(registry.ModelRegistry.models.get, _expected):
            if isinstance(other, registry._LazyRegisteredModel) and _name(other) not in seen:
                with contextlib.suppress(Exception):  # whoever asks for it is told why
                    seen[_name(other)] = dataclasses.asdict(inspect(other))
        return seen

    @functools.wraps(inspect)
    def one_at_a_time(model):
        folder = Path(os.environ["VLLM_CACHE_ROOT"])
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / _name(model)
        with (folder / "inspection.lock").open("w") as lock:  # who waited finds the answer on disk
            fcntl.flock(lock, fcntl.LOCK_EX)
            if kept.exists():
                return registry._ModelInfo(**json.loads(kept.read_text()))
            try:
                return inspect(model)
            except _Unseen:
                seen = _in_a_fork(lambda: look_here(model))
                for name, fields in seen.items():
                    records.atomic_write_text(folder / name, json.dumps(fields))
                return registry._ModelInfo(**seen[kept.name])

    registry._run_in_subprocess = not_here
    registry._LazyRegisteredModel.inspect_model_cls = one_at_a_time


def _name(model) -> str:
    return f"{model.module_name}.{model.class_name}.json"


def _in_a_fork(look: Callable[[], dict]) -> dict:
    """What `look` returns, handed on as JSON: as vLLM's own cache keeps it."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as channel:
                try:
                    said = {"seen": look()}
                    status = 0
                except BaseException:
                    said = {"failure": traceback.format_exc()}
                channel.write(json.dumps(said))
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as channel:
        answer = json.loads(channel.read() or '{"failure": "the process ended without an answer"}')
    os.waitpid(pid, 0)
    if "failure" in answer:
        raise RuntimeError(f"Error raised in subprocess:\n{answer['failure']}")
    return answer["seen"]
