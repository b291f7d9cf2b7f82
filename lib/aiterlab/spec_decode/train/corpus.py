# SPDX-License-Identifier: Apache-2.0
"""Collect openly licensed Python code and documentation, hold whole projects out, tokenise the rest into one file.

Three kinds of source: the running interpreter's standard library, installed distributions (INSTALLED), and source
distributions in a folder (`pip download --no-deps --no-binary :all: ARCHIVES`), which bring the documentation. A file
enters only if its project's metadata names a permissive licence and the file itself names no other. Projects in
HELD_OUT give the held-out prompts and nothing else.
"""

import ast
import hashlib
import json
import lzma
import platform
import random
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import numpy as np

from aiterlab.records import atomic_write_bytes, atomic_write_text, dump_json
from aiterlab.spec_decode.train import arithmetic
from aiterlab.spec_decode.train.tokenizer import EOS_ID, train_tokenizer

TASKS = ("code", "prose", "arithmetic")
HELD_OUT = {"click", "flask", "mkdocs", "networkx", "pytest", "scrapy", "tornado"}
CODE_SHARE, PROSE_SHARE, ARITHMETIC_SHARE = 0.55, 0.30, 0.15

# Installed distributions worth reading: much code, or docstrings that are good prose.
INSTALLED = (
    "accelerate", "aiohttp", "anyio", "asttokens", "bokeh", "compressed-tensors", "datasets", "diskcache",
    "einops", "evaluate", "fonttools", "fsspec", "httpcore", "huggingface-hub", "ipykernel", "ipython", "jedi",
    "joblib", "jsonschema", "jupyter-client", "jupyter-server", "jupyterlab-server", "lm-eval", "markdown-it-py",
    "matplotlib", "mpmath", "nbclient", "nbconvert", "nbformat", "networkx", "nltk", "numpy", "pandas",
    "papermill", "parso", "peft", "pip", "prompt-toolkit", "ptyprocess", "pydantic", "pygments", "pytest",
    "requests", "rich", "sacrebleu", "safetensors", "scikit-learn", "scipy", "setuptools", "sqlalchemy",
    "starlette", "sympy", "tornado", "torch", "traitlets", "transformers", "triton", "urllib3", "uvicorn", "vllm",
    "wheel", "xgrammar",
)  # fmt: skip
# Source distributions with documentation, for `pip download`.
ARCHIVES = (
    "aiohttp", "attrs", "babel", "black", "bokeh", "boto3", "celery", "click", "coverage", "dask", "distributed",
    "django", "djangorestframework", "fastapi", "flask", "gunicorn", "httpx", "ipython", "jinja2", "kombu",
    "mkdocs", "mypy", "networkx", "nltk", "pip", "pydantic", "pytest", "requests", "rich", "scrapy", "setuptools",
    "sphinx", "sqlalchemy", "starlette", "sympy", "tornado", "twisted", "urllib3", "wagtail", "werkzeug",
    "xarray",
)  # fmt: skip

_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|ISC|Apache(?: Software)?|PSF|Python Software Foundation|HPND|Unlicense|BSD-[23]-Clause)\b", re.I
)
_OTHER = re.compile(
    r"\b(A?GPL|LGPL|GNU (Lesser|Affero|General)|MPL|Mozilla|EUPL|CC[- ]BY|Creative Commons|Propriet|SSPL)", re.I
)
_SKIPPED_FOLDERS = {
    "_vendor", "_vendored", "vendor", "vendored", "_vendored_packages", "third_party", "thirdparty", "externals",
    "extern", "node_modules", "locale", "locales", "locale-data", "site-packages", "__pycache__", "static", "lib2to3",
    "_pyrepl", "typeshed", "testdata", "test-data", "fixtures", "data",
}  # fmt: skip
_CODE, _PROSE = {".py"}, {".rst", ".md", ".txt"}
_LARGEST_FILE = 250_000
_PER_PROJECT = {"code": 3_500_000, "prose": 5_000_000}
_CHUNK = (1_500, 9_000)  # characters; every chunk starts with a BOS, as every prompt does


class CorpusError(ValueError):
    """A corpus that cannot be built or read, with the mend."""


@dataclass
class Project:
    """One project and the texts taken from it."""

    name: str
    version: str
    licence: str
    sha256: str  # of the archive, or over the files of an installed project
    texts: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {"code": [], "prose": []})


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(headers) -> str | None:
    """Return the permissive licence that a project's metadata names, or None."""
    stated = [headers.get("License-Expression") or "", headers.get("License") or ""]
    stated += [c for c in headers.get_all("Classifier") or [] if c.startswith("License")]
    words = " | ".join(s.splitlines()[0][:100] for s in stated if s.strip())
    if _OTHER.search(words) or not _PERMISSIVE.search(words):
        return None
    named = next(line for s in stated if s.strip() and _PERMISSIVE.search(line := s.splitlines()[0][:100]))
    return named.removeprefix("License :: OSI Approved :: ")


def acceptable(text: str, kind: str) -> bool:
    """Say whether a file is text worth learning from: no other licence, no tables of data, mostly ASCII."""
    if not 400 <= len(text) <= _LARGEST_FILE or _OTHER.search(text[:3000]):
        return False
    lines = text.splitlines()
    if max(map(len, lines)) > 1000 or len(text) / len(lines) > (100 if kind == "code" else 400):
        return False
    odd = sum(not c.isascii() for c in text[:20000]) / len(text[:20000])
    digits = sum(c.isdigit() for c in text[:20000]) / len(text[:20000])
    return odd < 0.02 and digits < 0.12


def _kind(path: str) -> str | None:
    parts = Path(path).parts
    if _SKIPPED_FOLDERS & set(parts[:-1]) or re.match(r"(?i)(licen|copying|authors|requirements|top_level)", parts[-1]):
        return None
    suffix = Path(path).suffix
    return "code" if suffix in _CODE else "prose" if suffix in _PROSE else None


def docstrings(text: str) -> str:
    """Return a module's longer docstrings, one after the other: prose with examples."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n\n".join(doc for doc in found if doc and len(doc) > 500)


def _add(project: Project, path: str, raw: bytes, seen: set[str], documentation: bool) -> None:
    kind = _kind(path)
    if kind is None or len(raw) > _LARGEST_FILE:
        return
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").replace("\t", "    ")
    except UnicodeDecodeError:
        return
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest in seen or not acceptable(text, kind):
        return
    seen.add(digest)
    project.texts[kind].append((path, text))
    if kind == "code" and documentation:
        prose = docstrings(text)
        if acceptable(prose or " ", "prose"):
            project.texts["prose"].append((f"{path} (docstrings)", prose))


def standard_library(seen: set[str]) -> Project:
    """Read the standard library of the running interpreter."""
    root = Path(sysconfig.get_paths()["stdlib"])
    project = Project("cpython", platform.python_version(), "PSF-2.0", "")
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        raw = path.read_bytes()
        total.update(raw)
        _add(project, str(path.relative_to(root)), raw, seen, documentation=True)
    topics = (root / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    for key, text in ast.literal_eval(topics[topics.index("{") :]).items():
        project.texts["prose"].append((f"pydoc_data/topics.py:{key}", text))
    project.sha256 = total.hexdigest()
    return project


def source_archives(folder: Path, seen: set[str]) -> Iterator[Project]:
    """Read every source distribution in a folder."""
    for archive in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(archive) as tar:
            files = [m for m in tar.getmembers() if m.isfile()]
            info = next((m for m in files if re.fullmatch(r"[^/]+/PKG-INFO", m.name)), None)
            if info is None:
                continue
            headers = HeaderParser().parsestr(tar.extractfile(info).read().decode("utf-8", "replace"))
            licence = licence_of(headers)
            if licence is None:
                print(f"corpus: {archive.name} left out: no permissive licence in its metadata", flush=True)
                continue
            digest = hashlib.sha256(archive.read_bytes()).hexdigest()
            project = Project(_canonical(headers["Name"]), headers["Version"], licence, digest)
            for member in sorted(files, key=lambda m: m.name):
                if _kind(member.name) and member.size <= _LARGEST_FILE:
                    _add(
                        project, member.name.split("/", 1)[-1], tar.extractfile(member).read(), seen, documentation=True
                    )
        yield project


def installed(names: tuple[str, ...] | list[str], seen: set[str]) -> Iterator[Project]:
    """Read installed distributions, as far as they are installed and permissively licensed."""
    for name in names:
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        licence = licence_of(dist.metadata)
        if licence is None:
            print(f"corpus: {name} left out: no permissive licence in its metadata", flush=True)
            continue
        project, total = Project(_canonical(name), dist.version, licence, ""), hashlib.sha256()
        for entry in sorted(dist.files or (), key=str):
            path = Path(dist.locate_file(entry))
            if (
                _kind(str(entry))
                and ".." not in entry.parts
                and path.is_file()
                and path.stat().st_size <= _LARGEST_FILE
            ):
                raw = path.read_bytes()
                total.update(raw)
                _add(project, str(entry), raw, seen, documentation=True)
        project.sha256 = total.hexdigest()
        yield project


def _long_lines(text: str) -> set[int]:
    return {hash(line.strip()) for line in text.splitlines() if len(line.strip()) >= 50}


def _take(texts: list[tuple[str, str]], limit: int, rng: random.Random) -> list[tuple[str, str]]:
    texts = texts[:]
    rng.shuffle(texts)
    taken, size = [], 0
    for path, text in texts:
        if size + len(text) <= limit:
            taken.append((path, text))
            size += len(text)
    return taken


def _chunks(text: str, rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Cut a document at line ends; says with every piece whether the document ends there."""
    lines, piece, size, limit = text.splitlines(keepends=True), [], 0, rng.randint(*_CHUNK)
    for index, line in enumerate(lines):
        piece.append(line)
        size += len(line)
        if size >= limit or index == len(lines) - 1:
            yield "".join(piece), index == len(lines) - 1
            piece, size, limit = [], 0, rng.randint(*_CHUNK)


def _encode(tokenizer, documents: list[str], rng: random.Random) -> np.ndarray:
    pieces = [piece for text in documents for piece in _chunks(text, rng)]
    rng.shuffle(pieces)
    parts = []
    for start in range(0, len(pieces), 2048):
        batch = pieces[start : start + 2048]
        for encoding, (_, ends) in zip(tokenizer.encode_batch([text for text, _ in batch]), batch, strict=True):
            parts.append(np.asarray([*encoding.ids, EOS_ID] if ends else encoding.ids, dtype=np.uint16))
    return np.concatenate(parts)


def _prompts(tokenizer, task: str, projects: list[Project], count: int, rng: random.Random) -> list[dict]:
    """Cut held-out prompts of 128 to 256 tokens, as many from every project, with what really follows them."""
    records, used, order = [], set(), sorted(projects, key=lambda p: p.name)
    order = [p for p in order if p.texts[task]]
    tries = 0
    while len(records) < count:
        tries += 1
        if tries > 200 * count:
            raise CorpusError(f"{task}: the held-out projects are too small for {count} prompts; add one to HELD_OUT")
        project = order[len(records) % len(order)]
        path, text = rng.choice(project.texts[task])
        lines = text.splitlines(keepends=True)
        begin = rng.randrange(max(1, len(lines) - 20))
        ids = tokenizer.encode("".join(lines[begin:]), add_special_tokens=False).ids
        length = rng.randint(128, 256)
        if len(ids) < length + 128 or (path, begin) in used:
            continue
        prompt = tokenizer.decode(ids[:length])
        if tokenizer.encode(prompt, add_special_tokens=False).ids != ids[:length]:
            continue
        used.add((path, begin))
        records.append(
            {
                "id": f"{task}-{len(records):03d}",
                "task": task,
                "text": prompt,
                "reference": tokenizer.decode(ids[length : length + 128]),
                "source": f"{project.name} {project.version}: {path}, line {begin + 1}",
                "licence": project.licence,
            }
        )
    return records


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Write one JSON object per line."""
    return atomic_write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def read_jsonl(path: Path) -> list[dict]:
    """Read one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build(out: Path, archives: Path | None, size_bytes: int, vocab_size: int, seed: int) -> dict:
    """Write tokenizer.json, heldout/*.jsonl, data.json (the manifest of sources) and tokens.npz into `out`."""
    rng, seen = random.Random(seed), set()
    projects = [standard_library(seen)]
    if archives:
        projects += source_archives(archives, seen)
    projects += installed(INSTALLED, seen)
    test = [p for p in projects if p.name in HELD_OUT]
    train = [p for p in projects if p.name not in HELD_OUT]
    if not test:
        raise CorpusError(f"no held-out project found; download at least one of {', '.join(sorted(HELD_OUT))}")

    # A copy of a held-out file inside another project would leak: drop what shares many long lines.
    secret = set().union(*(_long_lines(text) for p in test for texts in p.texts.values() for _, text in texts))
    leaked = 0
    for project in train:
        for kind, texts in project.texts.items():
            kept = [(path, text) for path, text in texts if len(_long_lines(text) & secret) < 6]
            leaked += len(texts) - len(kept)
            project.texts[kind] = kept

    chosen: dict[str, list[str]] = {"code": [], "prose": []}
    sources = []
    for task, share in (("code", CODE_SHARE), ("prose", PROSE_SHARE)):
        capped = [(p, _take(p.texts[task], _PER_PROJECT[task] * (4 if p.name == "cpython" else 1), rng)) for p in train]
        available = sum(len(text) for _, texts in capped for _, text in texts)
        ratio = min(1.0, size_bytes * share / max(available, 1))
        for project, texts in capped:
            texts = _take(texts, int(ratio * sum(len(t) for _, t in texts)) + 1, rng) if ratio < 1 else texts
            chosen[task] += [text for _, text in texts]
            if texts:
                sources.append(_source(project, task, "train", texts))
    sources += [_source(p, task, "held-out", texts) for p in test for task, texts in p.texts.items() if texts]
    exercises = arithmetic.training_documents(int(size_bytes * ARITHMETIC_SHARE), seed)

    sample = [t for texts in chosen.values() for t in _take([("", x) for x in texts], 12_000_000, rng)]
    tokenizer = train_tokenizer([t for _, t in sample] + exercises[:200], vocab_size, out / "tokenizer.json")
    tokens = {f"train_{task}": _encode(tokenizer, texts, rng) for task, texts in chosen.items()}
    tokens["train_arithmetic"] = _encode(tokenizer, exercises, rng)
    for task in ("code", "prose"):
        held = [text for p in test for _, text in _take(p.texts[task], 300_000, rng)]
        tokens[f"heldout_{task}"] = _encode(tokenizer, held, rng)
        write_jsonl(out / "heldout" / f"{task}.jsonl", _prompts(tokenizer, task, test, 96, rng))
    records = arithmetic.test_records(200, 5, seed + 1)
    write_jsonl(out / "heldout" / "arithmetic.jsonl", records)
    held = [r["text"] + r["reference"] + "\n" for r in records]
    tokens["heldout_arithmetic"] = _encode(tokenizer, held, rng)
    save_tokens(out / "tokens.bin", tokens)
    manifest = {
        "seed": seed,
        "python": platform.python_version(),
        "vocab_size": tokenizer.get_vocab_size(),
        "tokens": {name: len(array) for name, array in tokens.items()},
        "text_bytes": {
            "code": sum(map(len, chosen["code"])),
            "prose": sum(map(len, chosen["prose"])),
            "arithmetic": sum(map(len, exercises)),
        },
        "held_out_projects": sorted({p.name for p in test}),
        "files_dropped_for_sharing_lines_with_held_out": leaked,
        "tokens_sha256": hashlib.sha256((out / "tokens.bin").read_bytes()).hexdigest(),
        "sources": sources,
    }
    atomic_write_text(out / "data.json", dump_json(manifest))
    return manifest


def _source(project: Project, task: str, split: str, texts: list[tuple[str, str]]) -> dict:
    return {
        "name": project.name,
        "version": project.version,
        "licence": project.licence,
        "sha256": project.sha256,
        "task": task,
        "split": split,
        "files": len(texts),
        "bytes": sum(len(text.encode()) for _, text in texts),
    }


# One file: a JSON line naming the arrays, then their low bytes and their high bytes, each run through xz together.
def save_tokens(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write token arrays compactly; nothing pickled."""
    header = json.dumps({name: len(array) for name, array in arrays.items()}).encode() + b"\n"
    whole = np.concatenate(list(arrays.values())).astype("<u2")
    return atomic_write_bytes(path, header + lzma.compress(whole.tobytes(), preset=3))


def load_tokens(path: Path) -> dict[str, np.ndarray]:
    """Read what `save_tokens` wrote."""
    try:
        header, packed = Path(path).read_bytes().split(b"\n", 1)
        sizes = json.loads(header)
        whole = np.frombuffer(lzma.decompress(packed), dtype="<u2")
    except (OSError, ValueError, lzma.LZMAError) as error:
        raise CorpusError(f"{path}: not a token file ({error}); build it with `corpus`") from error
    ends = np.cumsum(list(sizes.values()))
    return {name: whole[end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)}
