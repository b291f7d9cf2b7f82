# SPDX-License-Identifier: Apache-2.0
"""What a probe asks of one tree on one machine; every answer comes from running the tree's own code.

Runs in a process of its own, after the machine has been installed and the tree put on the import path.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from aiterlab import hotfix
from aiterlab.machines import aiter_jit, driver, extensions, ledger
from aiterlab.probes import drive, engine, environment, failure, inspection, models, proposer, selection
from aiterlab.probes.cells import EXPLICIT
from aiterlab.probes.imports import ImportLedger
from aiterlab.probes.layer import Layer

FA_UTILS_NAMES = ("flash_attn_varlen_func", "get_scheduler_metadata", "reshape_and_cache_flash")
AFTERWARDS = ("target_choice", "environment")  # further questions, whose imports are not those of the cell


class Probe:
    """One tree on one machine; asked in the order in which an engine would meet the questions.

    `begin` asks what neither the user's choice nor the layer can change, so that cells that differ only in these can
    share a process up to there; `finish` asks the rest. Each is called once in a process.
    """

    def __init__(self, package: Path, *, simulated: bool) -> None:
        self.package, self.simulated = package, simulated
        self.imports = ImportLedger(package)
        self.facts: dict = {}
        self.explicit: str | None = None
        self.draft_tokens: Sequence[int] = ()
        self.layer = Layer()
        self.witness = selection.Witness()

    def begin(self, drive: bool = True) -> None:
        """Ask for the platform and the policy.

        Args:
            drive: False: also import what an engine has imported when it first looks at a choice. A driven cell meets
                these imports later, and its answer says when.
        """
        self.imports.watch()
        if self.simulated:
            inspection.fork()
        self._ask_all(platform=self._platform, policy=self._policy)
        if not drive:
            if self.simulated:
                self._bring_aiter_up_to_date()
            self._ask_all(engine=self._engine)

    def finish(
        self,
        explicit: str | None = None,
        draft_tokens: Sequence[int] = (),
        layer: Layer | None = None,
        drive: bool = True,
    ) -> dict:
        """All facts of the cell as JSON. A question that ends in an exception answers with the exception."""
        self.explicit, self.draft_tokens, self.layer = explicit, draft_tokens, layer or Layer()
        if drive:
            self._ask_all(vit=self._vision_encoder, selection=self._driven_selection, eagle=self._eagle)
            self._ask_all(fa_utils=self._fa_utils)
            if draft_tokens:
                self._ask_all(proposer=self._proposer)
        else:
            self._ask_all(selection=self._selection)
            self.facts["selection"] |= self.witness.facts()
            if self.layer.role == "draft" and explicit:
                self._ask_all(target_choice=self._target_choice)
            self._ask_all(environment=self._environment)
        for name, entries in (("aiter_imports", self.imports.entries), ("jit_modules", ledger.jit_modules)):
            self.facts[name] = [entry for entry in entries if entry["step"] not in AFTERWARDS]
        return {"explicit": explicit} | self.facts | {"stand_ins": sorted(ledger.stand_ins)}

    def _ask_all(self, **questions: Callable[[], dict]) -> None:
        for name, question in questions.items():
            self.facts[name] = self._ask(name, question)

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
        try:
            import vllm._aiter_ops as operators
        except ModuleNotFoundError as error:
            if error.name != "vllm._aiter_ops":
                raise
            return {"available": None, "enabled": None, "missing": error.name}  # the tree states no policy as a whole

        available, switches = _available(operators), operators.rocm_aiter_ops
        enabled = {
            name.removeprefix("is_").removesuffix("_enabled"): bool(getattr(switches, name)())
            for name in sorted(dir(switches))
            if name.startswith("is_") and name.endswith("_enabled") and name != "is_enabled"
        }
        return {
            "available": next(iter(available.values())),
            "available_by": available,
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

    def _bring_aiter_up_to_date(self) -> None:
        """Let the simulated machine have the AITER that this tree was written for, as far as a choice depends on it."""
        aiter_jit.have_later_modules(self.package)
        if any(self.facts["policy"].get("available_by", {}).values()):
            aiter_jit.know_architecture(os.environ["AITERLAB_ARCH"])

    def _engine(self) -> dict:
        """Import the modules in which an engine reads its options and builds attention."""
        importlib.import_module("vllm.engine.arg_utils")
        engine.attention_class()
        return {}

    def _selection(self) -> dict:
        """Build the real attention layer as an engine would, and say which backend the tree chose for it."""
        with self.witness:
            return self._choose(self.explicit, for_draft=engine.drafts_choose_themselves())

    def _target_choice(self) -> dict:
        """Which backend the draft gets when the choice is made for the engine and not for the draft."""
        selection.forget()
        with selection.Witness() as witness:
            answer = self._choose(self.explicit, for_draft=False)
        return answer | witness.facts()

    def _choose(self, explicit: str | None, *, for_draft: bool) -> dict:
        from vllm.config import set_current_vllm_config

        if self.layer.role == "target":
            through, options = engine.choose(explicit)
            config = engine.configuration(self.layer, **options)
        elif for_draft and explicit:
            through, options = f"speculative_config.{engine.DRAFT_CHOICE}", {engine.DRAFT_CHOICE: explicit}
            config = self._draft_config(**engine.speculation(self.layer, 1, **options))
        else:
            through, options = engine.choose(explicit)
            config = self._draft_config(**options, **engine.speculation(self.layer, 1))
        with set_current_vllm_config(config), self._memory(), self._device():
            layer = engine.build(self.layer, config)
        return selection.chosen(layer, self.package) | {"asked_through": through}

    def _draft_config(self, **options):
        from vllm.config import set_current_vllm_config

        config = engine.configuration(self.layer, **options)
        named = extensions.operators_by_name() if self.simulated else contextlib.nullcontext()
        with set_current_vllm_config(config), self._memory(), named:
            return engine.draft_configuration(config, self._device())

    def _environment(self) -> dict:
        return environment.ask(self.layer, self.witness.warnings)

    def _driven_selection(self) -> dict:
        """Build vLLM's real attention layer; if it chose AITER's backend, drive it."""
        import torch
        from vllm.config import set_current_vllm_config

        config = self._engine_config()
        device = self._device()
        with set_current_vllm_config(config), self._memory():
            with device:  # as vLLM constructs a model; what the probe makes itself says where it lives
                layer = engine.build(self.layer, config)
            answer = selection.chosen(layer, self.package)
            if answer["backend"] == EXPLICIT:
                answer["drive"] = drive.run(layer, config, self.package, torch.float16, device)
        return answer

    def _memory(self):
        return driver.pageable_memory() if self.simulated else contextlib.nullcontext()

    def _engine_config(self, **options):
        return engine.configuration(self.layer, **engine.choose(self.explicit)[1], **options)

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
                    layer = engine.build(self.layer, config)
                eagle = EagleProposer(config, device, None)
                proposals[str(count)] = proposer.propose(layer, config, eagle, self.package, torch.float16, device)
        return {"proposals": proposals}

    def _eagle_config(self, draft_tokens: int):
        return self._engine_config(**engine.speculation(self.layer, draft_tokens))

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


def _available(operators: ModuleType) -> dict[str, bool]:
    """The tree's own answers, the main one first; where it has no such function, of the decorator in its place."""
    asked = sorted(name for name in dir(operators) if name.startswith("is_aiter_found_and_supported"))
    if asked:
        return {name: bool(getattr(operators, name)()) for name in asked}
    return {"if_aiter_supported": bool(operators.if_aiter_supported(lambda: True)())}
