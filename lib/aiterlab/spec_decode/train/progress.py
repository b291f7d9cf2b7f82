# SPDX-License-Identifier: Apache-2.0
"""Keep a training run on time: learning rate and end by progress, whichever of tokens and seconds is used up first."""

import math
import time
from dataclasses import dataclass, field


@dataclass
class Budget:
    """Count tokens and seconds; the clock starts with the second step, so that compilation costs no training time."""

    label: str
    tokens: int
    seconds: float
    peak_rate: float
    warm_up_steps: int
    step: int = 0
    seen: int = 0
    compile_s: float = 0.0
    curve: list[dict] = field(default_factory=list)
    _begin: float = field(default_factory=time.perf_counter)
    _start: float | None = None
    _uncounted: int = 0

    @property
    def elapsed(self) -> float:
        """Seconds of training without the first step's compilation."""
        return 0.0 if self._start is None else time.perf_counter() - self._start

    @property
    def progress(self) -> float:
        """The part of the budget that is used up, 0 to 1."""
        return min(1.0, max(self.seen / self.tokens, self.elapsed / self.seconds))

    def rate(self) -> float:
        """Return the learning rate: linear warm-up, then a cosine to 2 % of the peak."""
        warm = min(1.0, (self.step + 1) / self.warm_up_steps)
        return self.peak_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def advance(self, tokens: int) -> None:
        """Count one step; call `start_clock` after the first one has really ended on the device."""
        self.step += 1
        self.seen += tokens

    def start_clock(self) -> None:
        """Begin to count seconds: what went before was compilation."""
        self._start, self._uncounted = time.perf_counter(), self.seen
        self.compile_s = self._start - self._begin
        print(f"{self.label}: first step after {self.compile_s:.1f} s", flush=True)

    def log(self, **values: float) -> None:
        """Keep one point of the curve and print a line with speed and remaining time."""
        point = {"step": self.step, "tokens": self.seen, "seconds": round(self.elapsed, 2)}
        self.curve.append(point | {k: round(float(v), 5) for k, v in values.items()})
        speed = (self.seen - self._uncounted) / max(self.elapsed, 1e-9)
        left = self.elapsed * (1 - self.progress) / max(self.progress, 1e-9)
        shown = " ".join(f"{k} {v:.4f}" for k, v in values.items())
        print(f"{self.label}: step {self.step} {self.seen / 1e6:.1f} Mtok {shown} "
              f"{speed / 1e6:.3f} Mtok/s left {left:.0f} s", flush=True)  # fmt: skip

    def record(self) -> dict:
        """Return what belongs into training.json."""
        speed = (self.seen - self._uncounted) / max(self.elapsed, 1e-9)
        return {
            "steps": self.step,
            "tokens": self.seen,
            "train_s": round(self.elapsed, 2),
            "compile_s": round(self.compile_s, 2),
            "tokens_per_s": round(speed),
            "peak_learning_rate": self.peak_rate,
            "warm_up_steps": self.warm_up_steps,
            "curve": self.curve,
        }
