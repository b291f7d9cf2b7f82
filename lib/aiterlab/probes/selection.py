# SPDX-License-Identifier: Apache-2.0
"""What does vLLM's platform choose for a layer, what was it asked for, and what did it say about the others?"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from enum import Enum
from pathlib import Path

from aiterlab.probes import names

UNUSED = ("self", "cls")


class Witness:
    """Listens while the tree's platform chooses; what it answers is left as it is."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self.asked_with: dict | None = None  # None: the platform was never asked
        self.chose: str | None = None  # what it answered, whatever became of the layer then
        self.priorities: list[str] | None = None
        self.refused: dict[str, list[str]] | None = None
        self.warnings: list[str] = []

    def __enter__(self) -> Witness:
        from vllm.platforms import current_platform

        self._platform, self._kept = type(current_platform), {}
        self._listen("get_attn_backend_cls", self._note_question)
        self._listen("get_valid_backends", self._note_candidates)
        self._handle = logging.Logger.handle  # a handler would be lost where the tree configures logging anew
        witness = self

        def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and record.name.startswith("vllm"):
                witness.warnings.append(record.getMessage())
            witness._handle(logger, record)

        logging.Logger.handle = handle
        return self

    def __exit__(self, *exception) -> None:
        logging.Logger.handle = self._handle
        for name, original in self._kept.items():
            setattr(self._platform, name, original)

    def _listen(self, name: str, note) -> None:
        original = inspect.getattr_static(self._platform, name, None)
        if not isinstance(original, classmethod) or name not in vars(self._platform):
            return
        self._kept[name] = original

        @functools.wraps(original.__func__)
        def method(cls, *args, **kwargs):
            told = inspect.signature(original.__func__).bind(cls, *args, **kwargs).arguments
            return note(told, lambda: original.__func__(cls, *args, **kwargs))

        setattr(self._platform, name, classmethod(method))

    def _note_question(self, told: dict, answer):
        self.requested = getattr(told["selected_backend"], "name", None)
        asked = {name: value for name, value in told.items() if name not in (*UNUSED, "selected_backend")}
        asked |= asked.pop("attn_selector_config")._asdict() if "attn_selector_config" in asked else {}
        self.asked_with = {name: _plain(value) for name, value in asked.items()}
        path = answer()
        self.chose = _name_of_path(path)
        return path

    def _note_candidates(self, told: dict, answer):
        valid, refused = answer()
        self.refused = {backend.name: list(reasons) for backend, reasons in refused.items()}
        self.priorities = [backend.name for backend, _ in sorted(valid, key=lambda entry: entry[1])]
        return valid, refused

    def facts(self) -> dict:
        return {
            "requested": self.requested,
            "asked_with": self.asked_with,
            "chose": self.chose,
            "priorities": self.priorities,
            "refused": self.refused,
        }


def chosen(layer, package: Path) -> dict:
    """The backend of a layer that the tree has built: its name, its class and the names that its code misses."""
    paths = [f"{cls.__module__}.{cls.__qualname__}" for cls in layer.attn_backend.__mro__]
    # An encoder's backend is a subclass made on the spot; what it is made of has the name that users ask for.
    path = next((path for path in paths if _name_of_path(path)), paths[0])
    name = _name_of_path(path) or layer.attn_backend.__name__
    alike = [member.name for member in _names() if _path(member) == path] or [name]
    missed = names.unbound(layer, package)
    return {"backend": name, "backend_names": alike, "backend_class": path, "unbound": missed}


def forget() -> None:
    """Have the tree's selector decide anew; it remembers what it was asked before."""
    for name in ("vllm.v1.attention.selector", "vllm.attention.selector"):
        remembering = getattr(sys.modules.get(name), "_cached_get_attn_backend", None)
        if remembering is not None:
            remembering.cache_clear()


def _name_of_path(path: str) -> str | None:
    """The name by which a user asks for the backend of this class."""
    known = _names()
    for member in known:
        if _path(member) == path:
            return member.name
    # The oldest trees keep no table of classes; their modules bear the names that users ask for.
    name = path.rpartition(".")[0].rpartition(".")[2].upper()
    return name if name in known.__members__ else None


def _names() -> type[Enum]:
    """The tree's own list of backend names."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError:
        try:
            from vllm.attention.backends.registry import AttentionBackendEnum
        except ImportError:
            from vllm.platforms.interface import _Backend as AttentionBackendEnum
    return AttentionBackendEnum


def _path(member: Enum) -> str | None:
    try:
        return member.get_path()
    except (AttributeError, ValueError):  # CUSTOM has no path until somebody registers one
        return None


def _plain(value):
    return value if isinstance(value, (int, str, bool, type(None))) else str(value).removeprefix("torch.")
