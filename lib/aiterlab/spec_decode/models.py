# SPDX-License-Identifier: Apache-2.0
"""Which target and which draft, and do they fit? The bundled models, shapes for dummy weights, and a check beforehand.

vLLM finds most of what is wrong with a draft, but late, in a stack trace of another process, or not at all: a draft of
another vocabulary runs and is never accepted. `check_fit` reads configurations and the headers of weights, nothing
else, and says in one line what does not fit.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiterlab import paths
from aiterlab.records import atomic_write_text, dump_json

METHODS = ("vanilla", "eagle", "eagle3", "ngram")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LARGEST_HEADER = 100 * 2**20  # the format's own limit


class ModelError(ValueError):
    """A model that cannot be used, in one line."""


@dataclass(frozen=True)
class Pair:
    """A target and, unless the method needs none, the draft that speculates for it."""

    method: str
    target: Path
    draft: Path | None = None


def bundled() -> dict[str, Pair]:
    """Return the models that ship with the project, by method.

    Raises:
        ModelError: the folder is not there, or its models do not fit each other.
    """
    folder = paths.models_dir()
    pairs = {
        "vanilla": Pair("vanilla", folder / "target"),
        "ngram": Pair("ngram", folder / "target"),
        "eagle": Pair("eagle", folder / "target", folder / "eagle"),
        "eagle3": Pair("eagle3", folder / "target", folder / "eagle3"),
    }
    for pair in pairs.values():
        check_fit(pair.target, pair.draft, pair.method)
    return pairs


def check_fit(target: Path | str, draft: Path | str | None, method: str, *, weights: bool = True) -> None:
    """Check that `draft` can speculate for `target` by `method`; a Hub id is left to vLLM.

    Args:
        weights: False where only shapes are wanted (dummy weights).

    Raises:
        ModelError: what does not fit, and what would.
    """
    if method not in METHODS:
        raise ModelError(f"{method}: no such method; there are {', '.join(METHODS)}")
    if method in ("vanilla", "ngram"):
        if draft is not None:
            raise ModelError(f"{draft}: {method} takes no draft model; leave it out or choose eagle or eagle3")
        _read(target, weights)
        return
    if draft is None:
        raise ModelError(f"{method} needs a draft model; name its folder")
    base, head = _read(target, weights), _read(draft, weights)
    if base is None or head is None:
        return
    _check_method(Path(draft), head, method)
    _check_sizes(Path(draft), head, base, method)


def is_folder(model: Path | str) -> bool:
    """Tell a folder from an id of the Hugging Face Hub.

    Raises:
        ModelError: neither.
    """
    if Path(model).is_dir():
        return True
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return False
    raise ModelError(f"{model}: no such folder; name one that holds config.json and model.safetensors")


@dataclass(frozen=True)
class _Model:
    config: dict
    shapes: dict[str, tuple[int, ...]]  # empty where weights were not asked for

    @property
    def architecture(self) -> str:
        return next(iter(self.config.get("architectures") or ()), "")


def _read(model: Path | str, weights: bool) -> _Model | None:
    """Read a folder's configuration and the shapes of its weights; None for a Hub id."""
    if not is_folder(model):
        return None
    folder = Path(model)
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: there is no config.json in it; name the folder of a model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error}); copy the model again") from None
    for key in ("hidden_size", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise ModelError(f"{file}: it has no {key}; this is not the configuration of a language model")
    return _Model(config, _shapes(folder) if weights else {})


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next((file.name for file in sorted(folder.iterdir()) if file.suffix in _PICKLED), None)
        if pickled:
            raise ModelError(
                f"{folder / pickled}: pickled weights run code when they are read and are refused; "
                "convert them to model.safetensors"
            )
        raise ModelError(f"{folder}: there is no model.safetensors in it; copy the model's weights there")
    return {name: shape for file in files for name, shape in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from a safetensors file without its tensors, and see that it is whole."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LARGEST_HEADER, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != file.stat().st_size:
            raise ValueError(f"{end} bytes expected, {file.stat().st_size} there")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); copy the weights again") from None


def _check_method(draft: Path, head: _Model, method: str) -> None:
    is_eagle3 = "eagle3" in head.architecture.lower() or "d2t" in head.shapes or "draft_vocab_size" in head.config
    if is_eagle3 != (method == "eagle3"):
        right = "eagle3" if is_eagle3 else "eagle"
        raise ModelError(
            f"{draft}: a draft for the method {right} ({head.architecture or 'no architecture named'}), not {method}; "
            f"choose method={right!r} or another draft"
        )
    if head.shapes and not any(name.endswith("fc.weight") for name in head.shapes):
        raise ModelError(
            f"{draft}: its weights have no fc.weight, which joins the target's hidden states; "
            f"this is not an {method} draft ({head.architecture})"
        )


def _check_sizes(draft: Path, head: _Model, base: _Model, method: str) -> None:
    def refuse(what: str, of_draft, of_target) -> None:
        raise ModelError(
            f"{draft}: does not fit its target: {what} {of_draft}, the target's is {of_target}; "
            "use the draft that was trained on this target"
        )

    hidden, vocabulary = base.config["hidden_size"], base.config["vocab_size"]
    wanted = head.config.get("target_hidden_size", head.config["hidden_size"])
    if wanted != hidden:
        refuse("hidden size", wanted, hidden)
    if head.config["vocab_size"] != vocabulary:
        refuse("vocabulary", head.config["vocab_size"], vocabulary)
    if head.config.get("draft_vocab_size", 0) > vocabulary:
        refuse("draft vocabulary", head.config["draft_vocab_size"], vocabulary)
    for name, shape in head.shapes.items():
        if name.endswith("fc.weight"):
            # EAGLE joins an embedding and one hidden state; EAGLE-3 the hidden states of its auxiliary layers.
            layers = len(head.config.get("eagle_aux_hidden_state_layer_ids") or (0, 0, 0))
            columns = hidden + head.config["hidden_size"] if method == "eagle" else layers * hidden
            if shape != (head.config["hidden_size"], columns):
                refuse(f"{name} joins {shape[-1] - columns + hidden} channels of hidden states,", "", hidden)
        if name == "d2t" and shape != (head.config.get("draft_vocab_size", vocabulary),):
            refuse("d2t of length", shape[0], head.config.get("draft_vocab_size", vocabulary))
        if name == "t2d" and shape != (vocabulary,):
            refuse("t2d of length", shape[0], vocabulary)
        if name.endswith("embed_tokens.weight") and shape[0] != vocabulary:
            refuse("embedding of rows", shape[0], vocabulary)


_LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_3_1_8b_shape(folder: Path | str) -> Path:
    """Write a folder with the shape of Llama-3.1-8B and no weights, for `load_format="dummy"`; return it.

    There is no tokenizer: requests come as token ids.
    """
    return _write_shape(folder, architectures=["LlamaForCausalLM"], num_hidden_layers=32)


def eagle3_head_shape(folder: Path | str) -> Path:
    """Write the shape of Llama-3.1-8B's published EAGLE-3 head, for `load_format="dummy"`; return the folder."""
    return _write_shape(
        folder, architectures=["Eagle3LlamaForCausalLM"], num_hidden_layers=1, draft_vocab_size=32000, rope_scaling=None
    )


def eagle_head_shape(folder: Path | str) -> Path:
    """Write the shape of Llama-3.1-8B's published EAGLE head, for `load_format="dummy"`; return the folder."""
    return _write_shape(folder, architectures=["EagleLlamaForCausalLM"], num_hidden_layers=1, rope_scaling=None)


def _write_shape(folder: Path | str, **changes) -> Path:
    # The published heads say max_position_embeddings 2048, and vLLM drafts no further: here a head keeps the target's.
    config: Mapping = {key: value for key, value in (_LLAMA_3_1_8B | changes).items() if value is not None}
    atomic_write_text(Path(folder) / "config.json", dump_json(config))
    return Path(folder)
