# SPDX-License-Identifier: Apache-2.0
"""Run the recipe: collect text, train the target, let it write, train both drafts, measure, describe.

corpus     needs the package index and a CPU: writes one folder that travels to the GPU
all        needs one GPU and that folder, no network: everything after it, under ten minutes
target | generate | draft | evaluate | cards     the steps of `all`, one at a time
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from aiterlab.spec_decode.train.cards import ONE_RUN
from aiterlab.spec_decode.train.corpus import ARCHIVES
from aiterlab.spec_decode.train.model import Shape

ARCHIVES_COMMAND = "pip download --no-deps --no-binary :all: -d FOLDER " + " ".join(ARCHIVES)
TINY = Shape(layers=2, hidden_size=64, heads=2, kv_heads=1, head_dim=32, intermediate_size=128,
             draft_intermediate_size=128, aux_layers=(0, 1, 2))  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aiterlab.spec_decode.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder that `corpus` writes")
        sub.add_argument("--seed", type=int, default=0, help="of every random choice")
        if name != "corpus":
            sub.add_argument("--models", type=Path, default=Path("models"), help="folder of the trained models")
            sub.add_argument("--work", type=Path, default=Path("work"), help="scratch folder for generations")
            sub.add_argument("--device", default="cuda", help="torch device")
            sub.add_argument("--no-compile", action="store_true", help="run eagerly (slower; for debugging)")
            sub.add_argument("--tiny", action="store_true", help="a toy shape, to try the recipe on a CPU")
        return sub

    sub = command("corpus", "collect permissively licensed text, hold projects out, tokenise")
    sub.add_argument("--archives", type=Path, help=f"folder of source distributions: {ARCHIVES_COMMAND}")
    sub.add_argument("--megabytes", type=int, default=85, help="text to collect, all tasks")
    sub.add_argument("--vocabulary", type=int, default=4096, help="tokens of the byte-level BPE")
    whole = command("all", "train, generate, draft, evaluate and describe on one GPU")
    for sub in (command("target", "train the target"), whole):
        sub.add_argument("--target-tokens", type=int, default=1_000_000_000, help="end after so many tokens ...")
        sub.add_argument("--target-seconds", type=float, default=150, help="... or so many seconds without compilation")
        sub.add_argument("--target-batch", type=int, default=64, help="windows in a step")
        sub.add_argument("--length", type=int, default=1024, help="tokens in a window")
        sub.add_argument("--target-rate", type=float, default=2.5e-3, help="peak learning rate")
    for sub in (command("generate", "let the target continue training prompts"), whole):
        sub.add_argument("--generated-tokens", type=int, default=26_000_000, help="prompts and continuations together")
        sub.add_argument("--generate-batch", type=int, default=8192, help="rows written side by side")
        sub.add_argument("--draft-length", type=int, default=520, help="tokens in a row")
    single = command("draft", "train one draft")
    single.add_argument("--method", choices=("eagle", "eagle3"), required=True, help="which draft")
    for sub in (single, whole):
        sub.add_argument("--draft-tokens", type=int, default=1_000_000_000, help="end after so many tokens ...")
        sub.add_argument("--draft-seconds", type=float, default=125, help="... or so many seconds without compilation")
        sub.add_argument("--draft-batch", type=int, default=64, help="rows in a step")
        sub.add_argument("--draft-rate", type=float, default=2e-3, help="peak learning rate")
        sub.add_argument("--steps", type=int, default=6, help="unrolled draft steps")
    for sub in (command("evaluate", "measure acceptance and exact match on held-out prompts"), whole):
        sub.add_argument("--evaluate-tokens", type=int, nargs="+", default=[32, 64, 128, 192], help="new tokens")
        sub.add_argument("--limit", type=int, default=96, help="prompts of each task, for acceptance")
    for sub in (command("cards", "write the model cards and the manifest from the records"), whole):
        sub.add_argument("--runs", help="which runs made the weights, in words (default: as the manifest says)")
    return parser


def _target(a: argparse.Namespace, shape: Shape) -> None:
    from aiterlab.spec_decode.train.target import train_target

    if not (a.corpus / "tokens.bin").is_file():
        raise SystemExit(f"{a.corpus}: no tokens.bin here; build the corpus first or name its folder with --corpus")
    train_target(
        a.corpus, a.models / "target", shape, device=a.device, tokens=a.target_tokens, seconds=a.target_seconds,
        batch=a.target_batch, length=a.length, rate=a.target_rate, seed=a.seed, compiled=not a.no_compile,
    )  # fmt: skip
    shutil.copytree(a.corpus / "heldout", a.models / "heldout", dirs_exist_ok=True)


def _generate(a: argparse.Namespace, shape: Shape) -> None:
    from aiterlab.spec_decode.train.generate import generate_corpus

    generate_corpus(
        a.corpus, a.models / "target", a.work / "generations.npy", shape, device=a.device, tokens=a.generated_tokens,
        length=a.draft_length, batch=a.generate_batch, seed=a.seed + 1,
    )  # fmt: skip


def _draft(a: argparse.Namespace, shape: Shape) -> None:
    from aiterlab.spec_decode.train.draft import train_draft

    train_draft(
        a.method, a.work / "generations.npy", a.models / "target", a.models / a.method, shape, device=a.device,
        tokens=a.draft_tokens, seconds=a.draft_seconds, batch=a.draft_batch, steps=a.steps, rate=a.draft_rate,
        seed=a.seed + 2, compiled=not a.no_compile,
    )  # fmt: skip


def _evaluate(a: argparse.Namespace, shape: Shape) -> None:
    from aiterlab.spec_decode.train.evaluate import evaluate

    evaluate(a.models, shape, device=a.device, new_tokens=tuple(a.evaluate_tokens), temperatures=(0.0, 0.7, 1.0),
             seed=a.seed + 3, limit=a.limit)  # fmt: skip


def _cards(a: argparse.Namespace, shape: Shape) -> None:
    from aiterlab.spec_decode.train.cards import read_data_manifest, write_cards

    write_cards(a.models, read_data_manifest(a.corpus), a.runs)


def _all(a: argparse.Namespace, shape: Shape) -> None:
    begin = time.perf_counter()
    _target(a, shape)
    print(f"all: target done after {time.perf_counter() - begin:.0f} s", flush=True)
    _generate(a, shape)
    print(f"all: generations done after {time.perf_counter() - begin:.0f} s", flush=True)
    # Both drafts at once: each alone leaves much of a large GPU idle.
    passed_on = ("corpus", "models", "work", "device", "seed", "steps")
    passed_on += ("draft-tokens", "draft-seconds", "draft-batch", "draft-rate")
    common = [f"--{name}={getattr(a, name.replace('-', '_'))}" for name in passed_on]
    common += ["--no-compile"] * a.no_compile + ["--tiny"] * a.tiny
    # The children train on the same device: free what the target's training has cached.
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    children = [
        subprocess.Popen([sys.executable, "-m", "aiterlab.spec_decode.train", "draft", "--method", method, *common])
        for method in ("eagle", "eagle3")
    ]
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if any(codes):
        raise SystemExit("all: a draft's training failed; its message is above")
    print(f"all: drafts done after {time.perf_counter() - begin:.0f} s", flush=True)
    _evaluate(a, shape)
    # Not what the manifest of an earlier training says.
    a.runs = a.runs or ONE_RUN
    _cards(a, shape)
    print(f"all: done after {time.perf_counter() - begin:.0f} s; models in {a.models}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run one command of the recipe."""
    a = _parser().parse_args(arguments)
    try:
        if a.command == "corpus":
            from aiterlab.spec_decode.train.corpus import build

            build(a.corpus, a.archives, a.megabytes * 1_000_000, a.vocabulary, a.seed)
            return
        if a.device.startswith("cuda"):
            import torch

            # cuDNN's attention plans anew for every length, and generation has a new length in every step.
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.set_float32_matmul_precision("high")
        steps = {
            "target": _target,
            "generate": _generate,
            "draft": _draft,
            "evaluate": _evaluate,
            "cards": _cards,
            "all": _all,
        }
        steps[a.command](a, TINY if a.tiny else Shape())
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"{a.command}: {error}") from error


if __name__ == "__main__":
    main()
