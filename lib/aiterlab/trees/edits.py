# SPDX-License-Identifier: Apache-2.0
"""Source edits that turn a release into the regressed state, and fail loudly where the source does not match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class EditError(ValueError):
    """The source does not look the way an edit expects it."""


@dataclass(frozen=True)
class Edit:
    """Replace `old`, which must stand exactly once in the file, by `new`."""

    file: str  # relative to the folder that holds the package `vllm`
    old: str
    new: str
    why: str

    def apply(self, folder: Path) -> None:
        """Edit the file below `folder` in place (as a new file, so hard links stay untouched).

        Raises:
            EditError: the file is missing, does not hold `old` exactly once, or is no longer Python afterwards.
        """
        path = folder / self.file
        if not path.is_file():
            raise EditError(f"{self.file}: no such file; this edit belongs to another source ({self.why})")
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise EditError(f"{self.file}: expected this text once, found it {count} times ({self.why}):\n{self.old}")
        edited = source.replace(self.old, self.new)
        try:
            compile(edited, str(path), "exec")
        except SyntaxError as error:
            raise EditError(f"{self.file}: no longer Python after this edit ({self.why}): {error}") from error
        path.unlink()
        path.write_text(edited, encoding="utf-8")


# What vllm-project/vllm#32902 ("Remove unconditional aiter import") changed, laid over release 0.15.1, which the
# pull request never reached: it was merged to main after the release branch was cut.
REGRESSION = (
    Edit(
        "vllm/_aiter_ops.py",
        "    if current_platform.is_rocm() and IS_AITER_FOUND:\n",
        "    if current_platform.is_rocm() and IS_AITER_FOUND and envs.VLLM_ROCM_USE_AITER:\n",
        "availability starts to read the user's preference",
    ),
    Edit(
        "vllm/_aiter_ops.py",
        "    AITER_FP8_DTYPE = dtypes.fp8\n",
        "    AITER_FP8_DTYPE = dtypes.fp8\nelse:\n    AITER_FP8_DTYPE = _FP8_DTYPE\n",
        "the FP8 dtype falls back to the platform's",
    ),
    Edit(
        "vllm/v1/attention/backends/rocm_aiter_fa.py",
        "if current_platform.is_rocm():\n    import aiter\n",
        "if current_platform.is_rocm():\n    if rocm_aiter_ops.is_enabled():\n        import aiter\n",
        "the backend imports aiter only if preferred; its uses of the name stay",
    ),
    Edit(
        "vllm/v1/spec_decode/eagle.py",
        "            if find_spec(\n"
        "                AttentionBackendEnum.ROCM_AITER_FA.get_path(include_classname=False)\n            ):\n",
        "            if rocm_aiter_ops.is_enabled() and find_spec(\n"
        "                AttentionBackendEnum.ROCM_AITER_FA.get_path(include_classname=False)\n            ):\n",
        "Eagle allows AITER's metadata only if preferred",
    ),
    Edit(
        "vllm/v1/spec_decode/eagle.py",
        "from vllm.config import (\n",
        "from vllm._aiter_ops import rocm_aiter_ops\nfrom vllm.config import (\n",
        "the name that Eagle's new condition reads",
    ),
)
