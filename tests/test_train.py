# SPDX-License-Identifier: Apache-2.0
"""The recipe of the bundled models: does it learn, is the export what others load, does it count as vLLM does?"""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from aiterlab.paths import project_root
from aiterlab.spec_decode.train import arithmetic
from aiterlab.spec_decode.train.batches import Windows
from aiterlab.spec_decode.train.cards import write_cards
from aiterlab.spec_decode.train.corpus import CorpusError, acceptable, licence_of, load_tokens, save_tokens
from aiterlab.spec_decode.train.draft import draft_loss, frequent_tokens
from aiterlab.spec_decode.train.evaluate import evaluate, loops, matches, rounds, summarise
from aiterlab.spec_decode.train.export import load_draft, load_target, save_draft, save_target
from aiterlab.spec_decode.train.generate import write
from aiterlab.spec_decode.train.model import DRAFTS, Shape, Target, new_draft
from aiterlab.spec_decode.train.progress import Budget
from aiterlab.spec_decode.train.target import train_target
from aiterlab.spec_decode.train.tokenizer import BOS_ID, EOS_ID, train_tokenizer

MODELS = project_root() / "models"
TINY = Shape(
    vocab_size=320, layers=3, hidden_size=64, heads=2, kv_heads=1, head_dim=32, intermediate_size=96,
    draft_intermediate_size=96, draft_vocab_size=200, aux_layers=(0, 2, 3),
)  # fmt: skip
METHODS = tuple(DRAFTS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder as `corpus` writes it, of exercises only."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = arithmetic.training_documents(40_000, seed=3)
    tokenizer = train_tokenizer(texts, TINY.vocab_size, folder / "tokenizer.json")
    ids = np.concatenate([np.asarray([*e.ids, EOS_ID], np.uint16) for e in tokenizer.encode_batch(texts)])
    names = ("train_code", "train_prose", "train_arithmetic", "heldout_code", "heldout_prose", "heldout_arithmetic")
    save_tokens(folder / "tokens.bin", {name: ids for name in names})
    return folder


def random_target(scale: float = 6.0) -> Target:
    """A target whose choices vary: weights large enough that its greedy text does not stand still."""
    target = Target(TINY).initialise(1)
    for weight in target.layers.parameters():
        if weight.dim() == 2:
            weight.data.mul_(scale)
    return target.requires_grad_(False)


def test_target_learns_and_records_its_curve(corpus, tmp_path):
    record = train_target(
        corpus, tmp_path / "target", TINY, device="cpu", tokens=30 * 8 * 64, seconds=60, batch=8, length=64, rate=3e-3,
        seed=0, compiled=False,
    )  # fmt: skip
    first, last = record["curve"][0]["loss"], record["heldout_loss_nats_per_token"]["arithmetic"]
    assert first > 5.5  # ln 320 = 5.77
    assert last < first - 1.0
    assert record["steps"] == 30
    assert json.loads((tmp_path / "target" / "training.json").read_text()) == record


def test_exported_target_equals_transformers(corpus, tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    target = random_target()
    save_target(target, tmp_path, corpus / "tokenizer.json")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_target(tmp_path, TINY)
    tokens = torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        final, aux = ours(tokens, aux=True)
        torch.testing.assert_close(ours.logits(final), expected.logits, rtol=1e-4, atol=1e-4)
    # vLLM's auxiliary states are what enters layer i; transformers lists these, but its last one is normed already.
    assert torch.allclose(aux[..., :64], expected.hidden_states[0], atol=1e-5)
    assert torch.allclose(aux[..., 64:128], expected.hidden_states[2], atol=1e-4)
    assert torch.allclose(ours.norm(aux[..., 128:]), expected.hidden_states[3], atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path)("1 + 23").input_ids[0] == BOS_ID


def test_cached_generation_is_the_argmax_of_a_full_pass():
    target = random_target()
    prompts = torch.randint(3, TINY.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 9, 12])
    written = write(target, prompts, lengths, 24, torch.zeros(3), torch.Generator())
    best = target.logits(target(written)[0]).argmax(-1)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(written[row, :length], prompts[row, :length])
        assert torch.equal(written[row, length:], best[row, length - 1 : -1])


def _norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + TINY.norm_eps) * weight


def _rope(x, position):
    """Rotate one head's vector, pair by pair: the textbook's form, independent of the tables in model.py."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = torch.tensor(position * TINY.rope_theta ** (-2 * i / len(x)))
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def _reference_chain(folder, method, target, tokens, steps):
    """Draft as vLLM does, one token and one cache entry at a time, from the exported file's tensors."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        w = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    w = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in w.items()}
    layer = "midlayer." if method == "eagle3" else "layers.0."
    final, aux = target(tokens[None, :-1], aux=True)
    keys, values = [], []

    def step(token, hidden, position):
        embed = target.embed_tokens.weight[token]
        if method == "eagle3":
            residual = hidden
            x = torch.cat(
                (_norm(embed, w[layer + "input_layernorm.weight"]), _norm(hidden, w[layer + "hidden_norm.weight"]))
            )
        else:
            x = residual = w["fc.weight"] @ torch.cat((embed, hidden))
        q, k, v = (w[f"{layer}self_attn.{n}_proj.weight"] @ x for n in "qkv")
        keys.append(_rope(k, position))
        values.append(v)
        heads = [_rope(part, position) for part in q.split(TINY.head_dim)]
        seen, held = torch.stack(keys), torch.stack(values)
        attended = torch.cat([(seen @ head * TINY.head_dim**-0.5).softmax(0) @ held for head in heads])
        residual = residual + w[layer + "self_attn.o_proj.weight"] @ attended
        y = _norm(residual, w[layer + "post_attention_layernorm.weight"])
        gated = torch.nn.functional.silu(w[layer + "mlp.gate_proj.weight"] @ y) * (w[layer + "mlp.up_proj.weight"] @ y)
        out = residual + w[layer + "mlp.down_proj.weight"] @ gated
        if method == "eagle":
            return int((target.embed_tokens.weight @ out).argmax()), out
        best = int((w["lm_head.weight"] @ _norm(out, w["norm.weight"])).argmax())
        return best + int(w["d2t"][best]), out

    states = final[0] if method == "eagle" else aux[0] @ w["fc.weight"].T
    for position in range(len(tokens) - 1):
        token, hidden = step(int(tokens[position + 1]), states[position], position)
    drafted = [token]
    while len(drafted) < steps:
        token, hidden = step(token, hidden, len(tokens) - 2 + len(drafted))
        drafted.append(token)
    return drafted


@pytest.mark.parametrize("method", METHODS)
def test_exported_draft_equals_a_token_by_token_computation(method, tmp_path):
    target, draft = random_target(), new_draft(method, TINY, 2)
    for weight in draft.parameters():
        weight.data.mul_(3.0) if weight.dim() == 2 else weight.data.uniform_(0.5, 1.5)
    if method == "eagle3":
        draft.draft_tokens.copy_(torch.arange(TINY.draft_vocab_size) + 50 * (torch.arange(TINY.draft_vocab_size) > 90))
    save_draft(draft, tmp_path)
    draft = load_draft(tmp_path, method, TINY)
    steps, prefix = 4, torch.randint(3, TINY.vocab_size, (9,), generator=torch.Generator().manual_seed(4))
    drafted = _reference_chain(tmp_path, method, target, prefix, steps)
    # The evaluator must find that the whole chain agrees if the target had written it, and only up to a changed token.
    row = torch.cat((prefix, torch.tensor([*drafted, 3])))
    assert matches(draft, target, row[None], steps)[0, len(prefix) - 2].tolist() == [True] * steps
    row[len(prefix) + 1] = (row[len(prefix) + 1] + 1) % TINY.vocab_size
    assert matches(draft, target, row[None], steps)[0, len(prefix) - 2, :2].tolist() == [True, False]


@pytest.mark.parametrize("method", METHODS)
def test_draft_learns_to_follow_the_target(method):
    target, draft = random_target(2.0), new_draft(method, TINY, 2)
    rows = torch.randint(3, TINY.vocab_size, (16, 8), generator=torch.Generator().manual_seed(5))
    rows = write(target, rows, torch.full((16,), 8), 32, torch.zeros(16), torch.Generator())
    if method == "eagle3":
        draft.draft_tokens.copy_(frequent_tokens(rows.numpy(), TINY.vocab_size, TINY.draft_vocab_size))
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        final, aux = target(rows, aux=True)
        loss, _ = draft_loss(draft, target, rows, final, aux, 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_rounds_of_a_perfect_and_of_a_useless_draft():
    steps, prompt, new = 5, 10, 60
    length = prompt + new
    perfect, useless = np.ones((length, steps), bool), np.zeros((length, steps), bool)
    assert summarise([rounds(perfect, prompt, length)], steps)["acceptance_length"] == steps + 1
    summary = summarise([rounds(useless, prompt, length)], steps)
    assert summary["acceptance_length"] == 1.0
    assert summary["per_position"] == [0.0] * steps
    assert summarise([], steps)["acceptance_length"] is None
    # Agreement after a rejected draft does not count.
    late = perfect.copy()
    late[:, 1] = False
    assert set(rounds(late, prompt, length)) == {1}


def test_loops_are_short_periods_of_the_end():
    period = list(range(16))
    assert loops([99, *period, *period])
    assert loops([7] * 32)
    assert not loops([*period, *period[:-1], 99])
    assert not loops(list(range(17)) * 3)
    assert not loops([7] * 31)  # too short to tell


def test_spread_of_trials_is_wider_than_the_standard_error_and_holds_the_mean():
    rng = np.random.default_rng(0)
    found = summarise([rng.integers(0, 4, size=20) for _ in range(100)], 3)
    assert found["p10_of_16_prompts"] < found["acceptance_length"] < found["p90_of_16_prompts"]
    width = found["p90_of_16_prompts"] - found["p10_of_16_prompts"]
    assert width == pytest.approx(2 * 1.28 * found["standard_error"] * (100 / 16) ** 0.5, rel=0.15)


def test_evaluation_and_cards_of_a_toy_pair(corpus, tmp_path):
    """Every number of new tokens is the beginning of one text; the cards are made of the record alone."""
    target = random_target(2.0)
    save_target(target, tmp_path / "target", corpus / "tokenizer.json")
    for method in METHODS:
        save_draft(new_draft(method, TINY, 2), tmp_path / method)
    exercises = arithmetic.test_records(4, 2, seed=1)
    for task in ("code", "prose", "arithmetic"):
        lines = [json.dumps(r | {"source": f"project-{i % 2} 1.0: a.py"}) for i, r in enumerate(exercises)]
        (tmp_path / "heldout").mkdir(exist_ok=True)
        (tmp_path / "heldout" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")

    def measured(*new_tokens):
        return evaluate(tmp_path, TINY, device="cpu", new_tokens=new_tokens, temperatures=(0.0, 1.0), seed=3, limit=3)[
            "acceptance"
        ]

    greedy = [r for r in measured(8, 24) if r["temperature"] == 0 and r["new_tokens"] == 8]
    assert greedy == [r for r in measured(8) if r["temperature"] == 0]
    assert {r["prompts"] for r in greedy} == {3}

    record = {"device": "a machine", "seed": 0, "parameters": 10, "tokens": 100, "steps": 2, "train_s": 1.0,
              "wall_s": 3.0, "length": 64, "shape": TINY.as_record(), "unrolled_steps": 6,
              "draft_vocabulary_coverage": 0.9, "heldout_loss_nats_per_token": {"code": 1.0}}  # fmt: skip
    for name in ("target", *METHODS):
        (tmp_path / name / "training.json").write_text(json.dumps(record | {"model": name}))
    data = {"held_out_projects": ["b", "b", "a"], "sources": [], "text_bytes": dict.fromkeys(("code", "prose"), 1)}
    data["text_bytes"]["arithmetic"] = 1
    measured(8, 24)
    write_cards(tmp_path, data, "two runs")
    write_cards(tmp_path, data)  # knows from the manifest how the weights were made
    assert "two runs" in (tmp_path / "README.md").read_text()
    assert "24 new tokens" in (tmp_path / "eagle3" / "README.md").read_text()
    assert json.loads((tmp_path / "manifest.json").read_text())["data"]["held_out_projects"] == ["a", "b"]


def test_arithmetic_split_is_disjoint_and_answers_are_right():
    records = arithmetic.test_records(100, 3, seed=1)
    training = "".join(arithmetic.training_documents(300_000, seed=0))
    solved = {line.removeprefix("Question: ").removesuffix(" = ?") for line in training.splitlines() if "?" in line}
    asked = {r["text"].splitlines()[-2].removeprefix("Question: ").removesuffix(" = ?") for r in records}
    assert len(asked) == 100
    assert not asked & solved
    assert {r["setting"] for r in records} == {"zero-shot", "few-shot"}
    for r in records:
        a, sign, b = r["text"].splitlines()[-2].removeprefix("Question: ").removesuffix(" = ?").split()
        assert r["answer"] == str({"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign])
        assert arithmetic.is_held_out(int(a), sign, int(b))
    rng = random.Random(0)
    for _ in range(200):
        a, b = rng.randrange(1000), rng.randrange(1000)
        assert arithmetic.is_held_out(a, "+", b) == arithmetic.is_held_out(b, "+", a)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ("License-Expression: MIT\n", "MIT"),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: BSD License\n", "BSD License"),
        ("License-Expression: MIT OR GPL-3.0-only\n", None),
        ("License: GPLv3\nClassifier: License :: OSI Approved :: MIT License\n", None),
        ("Name: x\n", None),
    ],
)
def test_only_permissive_projects_enter(headers, expected):
    from email.parser import HeaderParser

    assert licence_of(HeaderParser().parsestr(headers)) == expected


def test_files_under_another_licence_do_not_enter():
    body = "def f(x):\n    return x + 1\n\n" * 40
    assert acceptable(body, "code")
    assert not acceptable("# GNU General Public License, version 3\n" + body, "code")


def test_token_file_round_trip_and_refusal(tmp_path):
    arrays = {"a": np.arange(5, dtype=np.uint16), "b": np.asarray([4095], np.uint16)}
    read = load_tokens(save_tokens(tmp_path / "t.bin", arrays))
    assert {k: v.tolist() for k, v in read.items()} == {"a": [0, 1, 2, 3, 4], "b": [4095]}
    (tmp_path / "t.bin").write_bytes(b"nothing")
    with pytest.raises(CorpusError, match="not a token file"):
        load_tokens(tmp_path / "t.bin")


def test_windows_are_seeded_and_prompts_begin_with_bos(corpus):
    arrays, cpu = load_tokens(corpus / "tokens.bin"), torch.device("cpu")
    first, second = (Windows(arrays, cpu, 7).draw(20, 33) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (20, 33)
    assert (Windows(arrays, cpu, 8).prompts(20, 9)[:, 0] == BOS_ID).all()


def test_budget_ends_by_tokens_and_the_rate_falls():
    budget = Budget("test", tokens=100, seconds=1e6, peak_rate=1.0, warm_up_steps=2)
    rates = []
    while budget.progress < 1:
        rates.append(budget.rate())
        budget.advance(10)
    assert len(rates) == 10
    assert rates[0] == 0.5
    assert rates[1] > rates[-1]


def test_bundled_files_are_those_of_the_manifest():
    if not (MODELS / "manifest.json").is_file():
        pytest.skip("no trained models here yet")
    manifest = json.loads((MODELS / "manifest.json").read_text())
    files = {
        p.relative_to(MODELS).as_posix(): p for p in MODELS.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    assert set(files) == set(manifest["files"])
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["files"][name]["sha256"], name
        assert path.stat().st_size < 16_000_000, name
    assert {s["name"] for s in manifest["data"]["sources"] if s["split"] == "train"}.isdisjoint(
        manifest["data"]["held_out_projects"]
    )
