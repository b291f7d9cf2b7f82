# SPDX-License-Identifier: Apache-2.0
"""Draw training windows on the device: no loader process, no copy, one seeded generator."""

import numpy as np
import torch
from torch import Tensor

from aiterlab.spec_decode.train.corpus import ARITHMETIC_SHARE, CODE_SHARE, PROSE_SHARE, TASKS
from aiterlab.spec_decode.train.tokenizer import BOS_ID

SHARES = (CODE_SHARE, PROSE_SHARE, ARITHMETIC_SHARE)


class Windows:
    """Windows of the training text, mixed by task; half of them begin where a document begins."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device, seed: int):
        parts = [arrays[f"train_{task}"] for task in TASKS]
        self.tokens = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device)
        ends = np.cumsum([len(part) for part in parts])
        self.ranges = [(int(end - len(part)), int(end)) for part, end in zip(parts, ends, strict=True)]
        self.documents = [torch.nonzero(self.tokens[a:b] == BOS_ID).flatten() + a for a, b in self.ranges]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def _random(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=self.device, generator=self.generator)

    def draw(self, batch: int, length: int, at_document: float = 0.5) -> Tensor:
        """Return [batch, length] tokens (int64); the tasks' rows are contiguous, in the order of TASKS."""
        counts = [round(batch * share) for share in SHARES]
        counts[0] += batch - sum(counts)
        starts = []
        for (begin, end), documents, count in zip(self.ranges, self.documents, counts, strict=True):
            snapped = round(count * at_document)
            chosen = documents[self._random(len(documents), snapped)]
            starts += [
                chosen.clamp(max=end - length),
                begin + self._random(max(1, end - begin - length), count - snapped),
            ]
        index = torch.cat(starts)[:, None] + torch.arange(length, device=self.device)
        return self.tokens[index].long()

    def prompts(self, batch: int, length: int) -> Tensor:
        """Return prompts as users write them: a BOS, then text from anywhere."""
        rows = self.draw(batch, length, at_document=0.3)
        return torch.cat((torch.full_like(rows[:, :1], BOS_ID), rows[:, 1:]), dim=1)
