# SPDX-License-Identifier: Apache-2.0
"""Provider `reference`: the float64 formula itself, rounded once. The zero line of every error figure."""

from __future__ import annotations

from aiterlab.attention.inputs import Inputs
from aiterlab.attention.providers.provider import ATTEND, TENSOR_FP8, TOKEN_HEAD, Implementation, Limits, Provider
from aiterlab.policy import Answer

_ALL = TENSOR_FP8 | TOKEN_HEAD | {("int8", "tensor")}


def _attend(inputs: Inputs, out):
    return lambda: out.copy_(inputs.expected()[0])


def _gather(inputs: Inputs, out):
    def launch() -> None:
        out[0].copy_(inputs.k)
        out[1].copy_(inputs.v)

    return launch


REFERENCE = Provider(
    "reference",
    (
        Implementation(
            "reference",
            "formula",
            Limits(ATTEND, quantised=_ALL, layouts=("NHD", "SHUFFLE"), non_causal=True),
            _attend,
            note="float64, not timed",
            timed=False,
        ),
        Implementation(
            "reference",
            "gather",
            Limits(("gather",), quantised=_ALL, layouts=("NHD", "SHUFFLE")),
            _gather,
            note="indexing in torch, not timed",
            timed=False,
        ),
    ),
    available=lambda: Answer(True, "plain torch"),
)
