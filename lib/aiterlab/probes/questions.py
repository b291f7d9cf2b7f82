# SPDX-License-Identifier: Apache-2.0
"""What a probe asks of one tree on one machine; every answer comes from running the tree's own code.

Runs in a process of its own, after the machine has been installed and the tree put on the import path.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiterlab import hotfix, paths
from aiterlab.machines import driver, ledger
from aiterlab.probes import drive, failure, models, proposer
from aiterlab.probes.cells import EXPLICIT
from aiterlab.probes.imports import ImportLedger

FA_UTILS_NAMES = ("flash_attn_varlen_func", "get_scheduler_metadata", "reshape_and_cache_flash")


class Probe:
    """One tree on one machine; `answer` asks everything in the order in which an engine would meet it."""

    def __init__(
        self, package: Path, explicit: str | None, draft_tokens: Sequence[int] = (), *, simulated: bool
    ) -> None:
        self.package, self.explicit, self.draft_tokens = package, explicit, draft_tokens
        self.simulated = simulated
        self.imports = ImportLedger(package)

    def answer(self) -> dict:
        """All facts of the cell as JSON. A question that ends in an exception answers with the exception."""
        self.imports.watch()
        facts: dict = {"explicit": self.explicit}
        for name, question in (
            ("platform", self._platform),
            ("policy", self._policy),
            ("vit", self._vision_encoder),
            ("selection", self._selection),
            ("eagle", self._eagle),
            ("fa_utils", self._fa_utils),
            *([("proposer", self._proposer)] if self.draft_tokens else []),
        ):
            facts[name] = self._ask(name, question)
        facts["aiter_imports"] = self.imports.entries
        facts["jit_modules"] = ledger.jit_modules
        facts["stand_ins"] = sorted(ledger.stand_ins)
        return facts

    def _ask(self, name: str, question: Callable[[], dict]) -> dict:
        ledger.enter(name)
        start = time.perf_counter()
        try:
            answer = {"outcome": "ok"} | question()
        except Exception as error:
            answer = failure.describe(error, self.package)
        return answer | {"seconds": round(time.perf_counter() - start, 3)}

    def _platform(self) -> dict:
        from vllm.platforms import current_platform

        return {
            "is_rocm": current_platform.is_rocm(),
            "device_name": current_platform.get_device_name(),
            "platform_class": f"{type(current_platform).__module__}.{type(current_platform).__qualname__}",
        }

    def _policy(self) -> dict:
        """Availability, preference and the switch of the KV layout, as the tree states them once its plugins ran."""
        import vllm.plugins

        vllm.plugins.load_general_plugins()
        import vllm._aiter_ops as operators

        switches = operators.rocm_aiter_ops
        enabled = {
            name.removeprefix("is_").removesuffix("_enabled"): bool(getattr(switches, name)())
            for name in sorted(dir(switches))
            if name.startswith("is_") and name.endswith("_enabled") and name != "is_enabled"
        }
        return {
            "available": bool(operators.is_aiter_found_and_supported()),
            "enabled": bool(switches.is_enabled()),
            "enabled_features": sorted(name for name, on in enabled.items() if on),
            "shuffle_kv_cache_enabled": enabled.get("shuffle_kv_cache"),
            "fp8_dtypes": {
                name: str(getattr(operators, name)).removeprefix("torch.")
                for name in ("FP8_DTYPE", "_FP8_DTYPE", "AITER_FP8_DTYPE")
                if hasattr(operators, name)
            },
            "ops_registered": bool(operators._OPS_REGISTERED),
            "hotfix": hotfix.status,
        }

    def _vision_encoder(self) -> dict:
        """Which attention the encoder of a multimodal model gets, chosen by vLLM and asked for by name."""
        import torch
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        choose = current_platform.get_vit_attn_backend
        return {
            "auto": choose(models.HEAD_SIZE, torch.float16).name,
            "explicit": choose(models.HEAD_SIZE, torch.float16, AttentionBackendEnum[EXPLICIT]).name,
        }

    def _selection(self) -> dict:
        """Build vLLM's real attention layer; if it chose AITER's backend, drive it."""
        import torch
        from vllm.config import set_current_vllm_config

        config = self._engine_config()
        device = self._device()
        with set_current_vllm_config(config), self._memory():
            with device:  # as vLLM constructs a model; what the probe makes itself says where it lives
                layer = self._attention_layer(config)
            backend = layer.attn_backend
            chosen = next((e.name for e in type(layer.backend) if _path(e) == _qualified(backend)), backend.__name__)
            answer = {"backend": chosen, "backend_class": _qualified(backend)}
            if chosen == EXPLICIT:
                answer["drive"] = drive.run(layer, config, self.package, torch.float16, device)
        return answer

    def _memory(self):
        return driver.pageable_memory() if self.simulated else contextlib.nullcontext()

    def _attention_layer(self, config):
        import torch

        try:
            from vllm.model_executor.layers.attention import Attention
        except ImportError:
            from vllm.attention.layer import Attention

        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)  # vLLM does so around the construction of a model
        try:
            return Attention(
                models.HEADS, models.HEAD_SIZE, drive.SCALE, models.KV_HEADS,
                cache_config=config.cache_config, prefix="model.layers.0.self_attn.attn",
            )  # fmt: skip
        finally:
            torch.set_default_dtype(default)

    def _engine_config(self, **options):
        from vllm.engine.arg_utils import EngineArgs

        target, _ = models.write(paths.cache_dir() / "probe-models")
        if self.explicit:
            options["attention_config"] = {"backend": self.explicit}
        return EngineArgs(
            model=target,
            skip_tokenizer_init=True,
            dtype="float16",
            max_model_len=models.MAX_MODEL_LEN,
            enforce_eager=True,
            load_format="dummy",
            block_size=drive.PAGE,
            max_num_seqs=8,
            **options,
        ).create_engine_config()

    def _eagle(self) -> dict:
        """Construct the real EAGLE proposer and read which attention metadata it allows its draft."""
        from vllm.config import set_current_vllm_config
        from vllm.v1.spec_decode.eagle import EagleProposer

        config = self._eagle_config(draft_tokens=3)
        with set_current_vllm_config(config), self._memory():
            allowed = EagleProposer(config, self._device(), None).allowed_attn_types
        names = None if allowed is None else [kind.__name__ for kind in allowed]
        return {"allowed_metadata": names, "allows_aiter": names is None or "AiterFlashAttentionMetadata" in names}

    def _proposer(self) -> dict:
        """Let the real EAGLE proposer draft, once for each number of draft tokens, with the backend that was chosen."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.v1.spec_decode.eagle import EagleProposer

        proposals = {}
        for count in self.draft_tokens:
            config, device = self._eagle_config(count), self._device()
            with set_current_vllm_config(config), self._memory():
                with device:
                    layer = self._attention_layer(config)
                eagle = EagleProposer(config, device, None)
                proposals[str(count)] = proposer.propose(layer, config, eagle, self.package, torch.float16, device)
        return {"proposals": proposals}

    def _eagle_config(self, draft_tokens: int):
        _, draft = models.write(paths.cache_dir() / "probe-models")
        return self._engine_config(
            speculative_config={"method": "eagle", "model": draft, "num_speculative_tokens": draft_tokens}
        )

    def _device(self):
        import torch

        return torch.device("cpu" if self.simulated else "cuda")

    def _fa_utils(self) -> dict:
        """Which names the shared module of the flash-attention backends has, and which reach FlashAttention's own."""
        import vllm.v1.attention.backends.fa_utils as fa_utils
        import vllm.v1.attention.backends.flash_attn as flash_attn

        return {
            "exports": {name: hasattr(fa_utils, name) for name in FA_UTILS_NAMES},
            "varlen_func_available": bool(fa_utils.is_flash_attn_varlen_func_available()),
            "flash_attn_has": {name: hasattr(flash_attn, name) for name in FA_UTILS_NAMES},
        }


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _path(member) -> str | None:
    try:
        return member.get_path()
    except ValueError:  # CUSTOM has no path until somebody registers one
        return None
