# SPDX-License-Identifier: Apache-2.0
"""The clock of a step: on a runner whose parts take a known time, and in a real engine."""

import json
import time
from types import SimpleNamespace

import pytest

from aiterlab.spec_decode import steps
from aiterlab.spec_decode.engine import EngineSpec, Request, alive

DRAFT_S, VERIFY_S, SAMPLE_S, HOST_S = 0.004, 0.008, 0.002, 0.006
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


class PretendRunner:
    """A runner with the methods of vLLM's, each of which only takes its time."""

    def __init__(self, draft_tokens=3):
        speculative = SimpleNamespace(num_speculative_tokens=draft_tokens) if draft_tokens else None
        self.vllm_config = SimpleNamespace(speculative_config=speculative)
        self.device = SimpleNamespace(type="cpu")
        self.drafts = bool(draft_tokens)

    def execute_model(self, scheduler_output):
        time.sleep(HOST_S)
        self._model_forward(input_ids=None)

    def sample_tokens(self):
        self._sample(None, None)
        if self.drafts:
            self.propose_draft_token_ids()

    def _model_forward(self, **inputs):
        time.sleep(VERIFY_S)

    def _sample(self, logits, metadata):
        time.sleep(SAMPLE_S)

    def propose_draft_token_ids(self, *arguments):
        time.sleep(DRAFT_S)


def engine_of(runner):
    core = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))
    return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core)))


def run(runner, *batches):
    """Run steps; a batch is the number of tokens of each of its sequences, and whether one of them is new."""
    for tokens, new in batches:
        scheduled = {f"{i}": count for i, count in enumerate(tokens)}
        runner.execute_model(SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_new_reqs=["0"] * new))
        runner.sample_tokens()


DECODE = ((4, 4), False)


def test_parts_are_told_apart():
    runner = PretendRunner()
    clock = steps.install(engine_of(runner))
    clock.enabled = True
    run(runner, *[DECODE] * 5)
    found = clock.components(2)
    assert found["steps"] == 4  # the last has none after it
    for name, seconds in zip(steps.PARTS, (DRAFT_S, VERIFY_S, SAMPLE_S, HOST_S), strict=True):
        assert seconds * 1e3 <= found[name] < seconds * 1e3 + 3, name
    for step in clock.steps(2):
        assert sum(step[name] for name in steps.PARTS) == pytest.approx(step["step_ms"])


def test_only_steps_of_decode_alone_and_of_the_whole_batch_count():
    runner = PretendRunner()
    clock = steps.install(engine_of(runner))
    clock.enabled = True
    prompt, longer, other = ((4, 4), True), ((5, 4), False), ((4,), False)
    run(runner, other, other, prompt, DECODE, DECODE, longer, DECODE, other, other)
    assert clock.components(2)["steps"] == 1  # the first of the pair: the batch gathers before it, and is left after
    assert clock.components(3)["steps"] == 0


def test_vanilla_has_no_draft():
    runner = PretendRunner(draft_tokens=0)
    clock = steps.install(engine_of(runner))
    clock.enabled = True
    run(runner, ((1,), False), ((1,), False))
    assert clock.components(1)["draft_ms"] == 0
    clock.reset()
    assert clock.components(1) == {"step_ms": None} | dict.fromkeys(steps.PARTS) | {"steps": 0}


def test_a_clock_that_is_off_notes_nothing():
    runner = PretendRunner()
    clock = steps.install(engine_of(runner))
    run(runner, DECODE, DECODE)
    assert clock.components(2)["steps"] == 0


def test_an_engine_that_cannot_be_measured_is_refused():
    with pytest.raises(RuntimeError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        steps.install(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=object())))
    runner = SimpleNamespace(execute_model=None, vllm_config=None)
    with pytest.raises(RuntimeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        steps.install(engine_of(runner))


@pytest.mark.slow
def test_parts_of_a_real_engine_add_up(tmp_path):
    """vLLM's own runner, with drafts from n-grams: a prompt that repeats itself has some."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    spec = EngineSpec(
        name="ngram", target=str(tmp_path), method="ngram", draft_tokens=2, load_format="dummy", max_model_len=128,
        max_num_seqs=2, max_num_batched_tokens=64, kv_cache_bytes=1 << 24,
    )  # fmt: skip
    texts = (5, 6, 7, 8) * 5, tuple(range(20))
    prompts = [Request(id=f"{n}", task="test", token_ids=ids) for n, ids in enumerate(texts)]
    with alive([spec], tmp_path / "logs") as engines:
        plain = engines["ngram"].generate(prompts, max_tokens=24, ignore_eos=True)
        made = engines["ngram"].generate(prompts, max_tokens=24, ignore_eos=True, breakdown=True)
    found = made.components
    assert plain.components is None
    assert 5 < found["steps"] < made.steps_sequences.count(2) + 2
    assert all(found[name] > 0 for name in steps.PARTS)
    # Medians need not add up exactly; the step is no longer than the engine's own.
    assert sum(found[name] for name in steps.PARTS) == pytest.approx(found["step_ms"], rel=0.3)
