# SPDX-License-Identifier: Apache-2.0
"""The parameters of each notebook: the only place that says their names, types, bounds, choices, defaults and help.

The notebooks' own parameters cells are written from here (`python -m aiterlab.suite.rewrite`). Choices that code behind
a notebook knows are repeated, because that code would take seconds to import; a test holds both equal.
"""

import ast
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from aiterlab.suite.parameter_model import Each, NotebookParameters, ParameterError, Some, unknown, written_as

Architecture = Literal["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201"]
ArchitectureOrNative = Literal[Architecture, "native"]
ArchitectureOrNone = Literal["", Architecture]
Switch = Literal["unset", "0", "1"]
Operation = Literal["decode", "verify", "extend", "prefill", "gather"]
Dtype = Literal["bfloat16", "float16", "float32"]
Provider = Literal["reference", "suite", "aiter", "aiter_triton", "vllm_triton", "flash_attn", "torch_sdpa"]
Sweep = Literal["auto", "tiny", "small", "large", "none"]
ShapeField = Literal["heads", "kv_heads", "head_size", "page_size"]
Method = Literal["eagle", "eagle3", "ngram"]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's, which vLLM seeds too
Name = Annotated[str, Field(min_length=1)]

_TREE = (
    r"(hotfixed(-without-[1-7])?:)*"
    r"(release:\d+(\.\w+)+|regressed|hotfixed(-without-[1-7])?|path:.+|installed)"
)
_TREE_WORDS = ("regressed", "hotfixed", "installed")
_TREES = "release:X.Y.Z, regressed, hotfixed, hotfixed:TREE, hotfixed-without-N, path:DIR or installed"
_RANGE = r"releases:(all|[\d.]*\d|([\d.]*\d)?\.\.([\d.]*\d)?)"
Tree = written_as(_TREE, "tree", _TREES, _TREE_WORDS)
TreeOrRange = written_as(
    f"{_TREE}|{_RANGE}", "tree", f"{_TREES}, or releases:FIRST..LAST or releases:all", (*_TREE_WORDS, "releases:all")
)
Case = written_as(
    r"((verify|extend)_q\d+|decode|prefill|gather)_[1-9]\d*x\d+k?(_(fp8|int8|shuffle|page(32|64|128)))?",
    "case",
    "decode_64x8k, prefill_2x8k, gather_64x8k, verify_q4_1x32k or extend_q512_1x32k in any size, "
    "and _fp8, _int8, _shuffle, _page32, _page64 or _page128 behind it",
)
Cell = written_as(
    r"(8b:)?[1-9]\d*x[1-9]\d*", "cell", "sequences x context such as 4x128, or 8b:1x16384 for the shape of Llama-3.1-8B"
)
Task = written_as(
    r"code|prose|arithmetic|file:.+", "task", "code, prose, arithmetic or file:PATH", ("code", "prose", "arithmetic")
)
Test = written_as(
    r"sabotage|backends|serve|(tensor|data) [1-9]\d*",
    "test",
    "sabotage, backends, serve, tensor N or data N, with N ranks",
    ("sabotage", "backends", "serve", "tensor 2", "data 2"),
)


class ReproduceRegression(NotebookParameters):
    """Of 01_reproduce_regression."""

    trees: Some[Tree] = Field(
        ["release:0.15.1", "regressed", "release:0.16.0", "release:0.32.0"], description="states of vLLM's source"
    )
    architectures: Some[ArchitectureOrNative] = Field(
        ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"], description="simulated GPUs; also gfx1151, native"
    )
    installed: Some[bool] = Field([True, False], description="AITER on the simulated machine, present or absent")
    switches: Some[Switch] = Field(["unset", "0", "1"], description="positions of VLLM_ROCM_USE_AITER")
    workers: Count = Field(0, description="processes at a time, 0 for one per core")


class ApplyFix(NotebookParameters):
    """Of 02_apply_fix."""

    regressed: Tree = Field("regressed", description="the tree to cure")
    upstream: Tree = Field("release:0.16.0", description="the tree with upstream's own fix")
    architectures: Some[ArchitectureOrNative] = Field(
        ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"], description="simulated GPUs; also gfx1151, native"
    )
    installed: Some[bool] = Field([True, False], description="AITER on the simulated machine, present or absent")
    switches: Some[Switch] = Field(["unset", "0", "1"], description="positions of VLLM_ROCM_USE_AITER")
    machine: ArchitectureOrNative = Field(
        "gfx942",
        description="GPU of left-out parts and errors: gfx90a, gfx942, gfx950, gfx1100, gfx1151, gfx1201 or native",
    )
    workers: Count = Field(0, description="processes at a time, 0 for one per core")

    @model_validator(mode="after")
    def _three_trees(self) -> "ApplyFix":
        if self.regressed.startswith("hotfixed"):
            raise ValueError(f"regressed is {self.regressed!r}, which has the fix; name the tree before it")
        if self.upstream in (self.regressed, "hotfixed", f"hotfixed:{self.regressed}"):
            raise ValueError(f"upstream is {self.upstream!r}, which is compared already; name another tree")
        return self


class AuditBackendSelection(NotebookParameters):
    """Of 03_audit_backend_selection."""

    trees: Some[TreeOrRange] = Field(
        ["release:0.15.1", "regressed", "release:0.16.0", "release:0.19.0", "release:0.32.0"],
        description="oldest first",
    )
    architectures: Some[Architecture] = Field(
        ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201"], description="GPUs, with gfx942"
    )
    looked_at: str = Field("", description="the tree that is shown cell by cell, empty for the last")
    compared: list[str] = Field([], description="two trees whose answers are compared, empty for the last two")
    cold_share: Share = Field(0.005, description="of the cells, 0 to 1, asked again in a new interpreter each")
    seed: Seed = Field(0, description="chooses the cells that are asked again")
    workers: Count = Field(0, description="processes at a time, 0 for one per core")

    @model_validator(mode="after")
    def _shown_trees_are_asked(self) -> "AuditBackendSelection":
        if len(self.compared) not in (0, 2):
            raise ValueError(f"compared is {self.compared}; name two trees, or none for the last two")
        if "gfx942" not in self.architectures:
            raise ValueError(f"architectures: {self.architectures} lacks gfx942, on which most is varied; add it")
        if any(tree.startswith("releases:") for tree in self.trees):
            return self  # which releases there are, the package index knows
        for name, tree in (("looked_at", self.looked_at), *(("compared", tree) for tree in self.compared)):
            if tree and tree not in self.trees:
                raise ValueError(unknown(f"{name}: not among trees:", tree, self.trees))
        return self


class RunAttentionKernels(NotebookParameters):
    """Of 04_run_attention_kernels."""

    operations: Each[Operation] = Field(
        ["decode", "verify", "extend", "prefill", "gather"], description="all of their cases, where cases is empty"
    )
    cases: Each[Case] = Field([], description="names such as verify_q4_16x4k: 16 sequences of 4096 keys, 4 of them new")
    shape: dict[ShapeField, Positive] = Field(
        {}, description="heads, kv_heads, head_size, page_size other than the cases' own"
    )
    dtypes: Each[Dtype] = Field(
        [], description="bfloat16, float16, float32: checked, the first timed; empty for what suits the machine"
    )
    providers: Each[Provider] = Field(
        [], description="reference suite aiter aiter_triton vllm_triton flash_attn torch_sdpa; empty: the preferred"
    )
    machine: ArchitectureOrNone = Field(
        "", description="simulated GPU, as in architectures; empty for the one here, or else a simulated MI300X"
    )
    checks: Sweep = Field("auto", description="sweep of shapes and options: auto, tiny, small, large or none")
    rounds: Count = Field(0, description="samples of each timing, 0 for what suits the machine")
    architectures: Some[Architecture] = Field(
        ["gfx942", "gfx950"], description="that kernels are compiled for; also gfx90a, gfx1100, gfx1151, gfx1201"
    )
    compiled: Some[Case] = Field(
        ["decode_64x8k", "verify_q4_1x32k", "extend_q512_1x32k", "prefill_2x8k", "gather_64x8k"], description="cases"
    )
    seed: Seed = Field(0, description="of every tensor")

    @model_validator(mode="after")
    def _something_is_asked(self) -> "RunAttentionKernels":
        if not self.operations and not self.cases:
            raise ValueError("operations and cases are both empty; name one operation or case")
        heads, shared = self.shape.get("heads"), self.shape.get("kv_heads")
        if heads and shared and heads % shared:
            raise ValueError(f"shape: {heads} heads cannot share {shared} kv_heads evenly")
        return self


class RunEagleSpecDecode(NotebookParameters):
    """Of 05_run_eagle_spec_decode."""

    models: dict[Literal["target", "eagle", "eagle3"], Name] = Field(
        {}, description="folder or hub id of target, eagle, eagle3; empty for those that ship"
    )
    methods: Some[Method] = Field(
        ["eagle", "eagle3", "ngram"], description="who drafts; the last draft model is put to the further tests"
    )
    draft_tokens: Some[Positive] = Field([2, 4], description="K, each an engine of its own for every draft model")
    tasks: Some[Task] = Field(
        ["code", "prose", "arithmetic"], description="held-out prompts, or file:PATH with one prompt a line"
    )
    count: Positive = Field(12, description="prompts of each task")
    output_tokens: Positive = Field(64, description="of each prompt")
    temperatures: Some[Temperature] = Field(
        [0.0, 1.0], description="acceptance is measured at each; 0 must be among them"
    )
    samples: Positive = Field(300, description="of each of four prompts, for the test of distributions")
    rounds: Positive = Field(6, description="interleaved short rounds of each timing; their 20th percentile counts")
    cells: Each[Cell] = Field(
        ["1x128", "4x128"], description="sequences x context, timed; 8b: before one for the shape of Llama-3.1-8B"
    )
    accuracy: dict[Name, Count] = Field(
        {"aiterlab_arithmetic": 50}, description="task of lm-eval and how many of its questions"
    )
    beside: Each[Test] = Field(
        ["sabotage", "backends", "serve", "tensor 2", "data 2"], description="further tests; tensor N, data N: ranks"
    )
    trees: Each[Tree] = Field(
        ["regressed", "hotfixed", "release:0.16.0"], description="states of vLLM whose EAGLE proposer is asked"
    )
    seed: Seed = Field(0, description="of prompts, samples and engines")

    @model_validator(mode="after")
    def _drafts_are_there(self) -> "RunEagleSpecDecode":
        drafted = [method for method in self.methods if method != "ngram"]
        if not drafted:
            raise ValueError(f"methods is {self.methods}; name eagle or eagle3 among them")
        if 0 not in self.temperatures:
            raise ValueError(f"temperatures is {self.temperatures}; 0 must be among them, losses are compared there")
        if self.models and (missing := [name for name in ("target", *drafted) if name not in self.models]):
            raise ValueError(f"models names no {' and no '.join(missing)}; name it too, or none for those that ship")
        return self


class PlotAccuracyLatency(NotebookParameters):
    """Of 06_plot_accuracy_latency."""

    runs: Each[Name] = Field(
        [],
        description="result folders to read beside the reference records, oldest first; empty for this run alone",
    )
    reference: bool = Field(True, description="draw the reference records too")


MODELS: dict[str, type[NotebookParameters]] = {
    "01_reproduce_regression": ReproduceRegression,
    "02_apply_fix": ApplyFix,
    "03_audit_backend_selection": AuditBackendSelection,
    "04_run_attention_kernels": RunAttentionKernels,
    "05_run_eagle_spec_decode": RunEagleSpecDecode,
    "06_plot_accuracy_latency": PlotAccuracyLatency,
}

# What `papermill -p` makes of values; by the type of pydantic's error.
_PAPERMILL_HINTS = {
    "string_type": "; papermill's -p reads numbers, True and None out of a text, -r NAME VALUE leaves it as it is",
    "bool_type": "; with papermill: -p NAME True or -p NAME False",
    "list_type": "; with papermill: -y 'NAME: [...]'",
    "dict_type": "; with papermill: -y 'NAME: {...}'",
}


def schema(stem: str) -> dict[str, Any]:
    """Return the JSON Schema of a notebook's parameters; raises ParameterError if no model has this stem."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_model(stem).model_json_schema()}


def check_parameters(stem: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return a running notebook's parameters, checked, for its record.

    The notebook's own gate: `papermill` and an editor run it without any other check.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        ParameterError: one has no value yet, is wrong, or was injected and is not known.
    """
    model = _model(stem)
    for name in model.model_fields:
        if name not in namespace:
            raise ParameterError(f"{stem}: {name} has no value; run the parameters cell first")
    names = dict.fromkeys([*model.model_fields, *_injected(namespace)])
    return model.checked({name: namespace[name] for name in names}, stem, _PAPERMILL_HINTS)


def _model(stem: str) -> type[NotebookParameters]:
    if stem not in MODELS:
        raise ParameterError(unknown("no parameters are known of a notebook", stem, MODELS))
    return MODELS[stem]


def _injected(namespace: Mapping[str, Any]) -> list[str]:
    """Names in the cell that papermill adds: it puts unknown ones there as well, with no more than a warning."""
    cells = [source for source in namespace.get("In", ()) if re.match(r"# Parameters\n", source)]
    statements = ast.parse(cells[-1]).body if cells else []
    return [target.id for one in statements if isinstance(one, ast.Assign) for target in one.targets]
