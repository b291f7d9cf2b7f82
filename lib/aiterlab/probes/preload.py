# SPDX-License-Identifier: Apache-2.0
"""What is imported before cells are asked: by all of them, and by those of one tree.

It makes answers faster and never different: a list that fits badly costs time.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from aiterlab import paths, records

# In these the machines differ, so a module that asks for one while it is imported holds an answer of the wrong machine.
_OF_MACHINES = ("aiter", "aiter_meta", "amdsmi", "csrc", "flash_attn", "vllm")
# What vLLM's releases, AITER and the simulated machine import of others, and the configurations of the models that
# probes ask about, with all that these import: 5,000 modules.
# Not among it is what takes no time, and what asks for a part of a machine.
MODULES = (
    "torch", "torch._dynamo", "torch._export.serde.schema", "torch._inductor.codegen.triton",
    "torch._inductor.compile_fx", "torch._inductor.fx_passes.b2b_gemm", "torch._inductor.kernel.flex.common",
    "torch.ao.quantization.fx._decomposed", "torch.utils.cpp_extension", "torch.utils.mkldnn", "triton",
    "triton.experimental.gluon.language", "transformers.convert_slow_tokenizer",
    "transformers.generation.continuous_batching.requests", "transformers.image_transforms",
    "transformers.integrations.peft", "transformers.loss.loss_utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.configuration_bert",
    "transformers.models.deepseek_v2.configuration_deepseek_v2",
    "transformers.models.deepseek_v3.configuration_deepseek_v3", "transformers.models.qwen3.configuration_qwen3",
    "transformers.models.siglip.configuration_siglip",
    "transformers.models.whisper.tokenization_whisper", "transformers.quantizers.quantizers_utils",
    "transformers.video_utils", "aiohttp", "cachetools", "cbor2", "cpuinfo", "einops", "fastapi.requests",
    "fsspec.caching", "gguf", "grpc", "huggingface_hub.hf_file_system", "llguidance", "logging.config", "msgspec",
    "networkx", "openai", "openai_harmony", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.propagate", "opentelemetry.sdk.metrics",
    "pandas", "partial_json_parser", "PIL.ImageOps", "prometheus_client", "pybase64", "scipy.optimize", "scipy.signal",
    "setuptools.command.build_ext", "sklearn.metrics", "sqlite3", "tvm_ffi.libinfo", "xgrammar", "xxhash",
    "zmq.asyncio",
)  # fmt: skip
# Of the same, what asks for a part of a machine: it is imported on each, once for all cells there.
ON_A_MACHINE = ("transformers.models.llama.configuration_llama",)


class Names:
    """A list of a tree's modules in the cache.

    Args:
        basis: all that the list depends on.
    """

    def __init__(self, basis: str) -> None:
        self.file = Path(paths.cache_dir() / f"preload-tree-{hashlib.sha256(basis.encode()).hexdigest()[:16]}.json")
        self.known = self.file.exists()
        self.names: list[str] = json.loads(self.file.read_text()) if self.known else []

    def replace(self, names: list[str]) -> None:
        self.known, self.names = True, names
        self.file.parent.mkdir(parents=True, exist_ok=True)
        records.atomic_write_text(self.file, json.dumps(names))

    def forget(self) -> None:
        self.names = []
        self.file.unlink(missing_ok=True)


class _AskedForMachine(BaseException):
    """Ends an import that would otherwise go on with what is installed here."""


class _Refuser(importlib.abc.MetaPathFinder):
    """Finds nothing, and lets nobody look for what is part of a machine."""

    asked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in _OF_MACHINES:
            self.asked = True
            raise _AskedForMachine(fullname)


def import_all(names: Iterable[str]) -> str | None:
    """Import what does not depend on the machine; the rest is left to the processes that need it.

    Returns:
        The first name that asked for a part of a machine and got over the refusal: this process is spoilt.
    """
    refuser = _Refuser()
    sys.meta_path.insert(0, refuser)
    try:
        for name in names:
            refuser.asked = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    importlib.import_module(name)
                except (Exception, _AskedForMachine):
                    sys.modules.pop(name, None)
                    continue
            if refuser.asked:
                return name
    finally:
        sys.meta_path.remove(refuser)
    return None


def imported_after(last: str | None) -> list[str]:
    """Names of the modules imported after the module `last`, or of all; the others are not touched."""
    names = []
    for name in reversed(sys.modules):
        if name == last:
            break
        names.append(name)
    return names[::-1]
