# SPDX-License-Identifier: Apache-2.0
"""The paged kernel as vLLM's attention backend: registered, chosen, described and computed as vLLM's runner would.

Without a GPU the backend computes with the kernel's eager twin; a process of its own has the kernel itself, in Triton's
interpreter.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aiterlab.attention import merge, paged, reference, tuning

vllm = pytest.importorskip("vllm")
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from aiterlab.spec_decode import paged_backend  # noqa: E402
from aiterlab.spec_decode.paged_backend import SuitePagedBackend, SuitePagedImpl  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HEADS, KV_HEADS, HEAD_SIZE, PAGE, LONGEST = 8, 2, 16, 16, 256
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HEADS * HEAD_SIZE,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE, "vocab_size": 64, "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-5,
}  # fmt: skip
# Context and new tokens of each sequence: what a runner hands over in one step.
BATCHES = {
    "prefill": [(0, 40), (0, 16)],
    "extend": [(64, 33), (5, 1)],
    "decode": [(99, 1), (15, 1), (16, 1)],
    "verify": [(120, 5), (31, 5)],
    "mixed": [(0, 20), (77, 5), (40, 1)],
}
INVALID = {
    "head size": {"head_size": 100},
    "head size above 256": {"head_size": 512},
    "page": {"block_size": 8},
    "fp8 format": {"kv_cache_dtype": "fp8_e5m2"},
    "sinks": {"has_sink": True},
    "MLA": {"use_mla": True},
    "encoder": {"attn_type": "encoder"},
    "not causal": {"use_non_causal": True},
    "batch invariance": {"use_batch_invariant": True},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A real engine configuration that names the backend; takes vLLM some seconds."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    paged_backend.register()
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", dtype="float32", enforce_eager=True,
        max_model_len=LONGEST, max_num_seqs=4, max_num_batched_tokens=LONGEST, attention_backend="CUSTOM",
    )  # fmt: skip
    return arguments.create_engine_config()


@pytest.fixture
def builder(config):
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.float32)
    return SuitePagedBackend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))


class Step:
    """One step's tensors, as the runner makes them, and the layer's cache with its history in it."""

    def __init__(self, sequences, layout="packed", dtype=torch.float32):
        generator = torch.Generator().manual_seed(3)
        contexts, new = (torch.tensor(column, dtype=torch.int32) for column in zip(*sequences, strict=True))
        self.tokens = int(new.sum())
        starts = torch.nn.functional.pad(new.cumsum(0, dtype=torch.int32), (1, 0))
        pages = -(-LONGEST // PAGE)
        blocks = 1 + len(sequences) * pages  # vLLM keeps page 0 for padding
        table = 1 + torch.randperm(blocks - 1, generator=generator).to(torch.int32).view(len(sequences), pages)
        positions = torch.cat([torch.arange(c, c + n) for c, n in sequences])
        rows = torch.repeat_interleave(torch.arange(len(sequences)), new)
        slots = table[rows, positions // PAGE].long() * PAGE + positions % PAGE
        self.common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=contexts + new, num_reqs=len(sequences),
            num_actual_tokens=self.tokens, max_query_len=int(new.max()), max_seq_len=int((contexts + new).max()),
            block_table_tensor=table, slot_mapping=slots,
        )  # fmt: skip

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        packed = (blocks, KV_HEADS, PAGE, 2 * HEAD_SIZE)
        self.cache = random(*packed) if layout == "packed" else random(blocks, 2, PAGE, KV_HEADS, HEAD_SIZE)
        # The runner pads: more rows than tokens.
        self.query = random(self.tokens + 3, HEADS, HEAD_SIZE)
        self.key, self.value = (random(self.tokens + 3, KV_HEADS, HEAD_SIZE) for _ in range(2))
        self.output = torch.full_like(self.query, float("nan"))

    def run(self, builder, **options):
        arguments = {
            "num_heads": HEADS, "head_size": HEAD_SIZE, "scale": HEAD_SIZE**-0.5, "num_kv_heads": KV_HEADS,
            "alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto",
        }  # fmt: skip
        layer = SuitePagedImpl(**arguments | options)
        layer.do_kv_cache_update(layer, self.key, self.value, self.cache, self.common.slot_mapping)
        metadata = builder.build(0, self.common)
        layer.forward(layer, self.query, self.key, self.value, self.cache, metadata, self.output)
        return layer

    def expected(self, keys, values, **options):
        return reference.expect_paged(
            self.query[: self.tokens], keys, values, cu_seqlens_q=self.common.query_start_loc,
            seqused_k=self.common.seq_lens, block_table=self.common.block_table_tensor,
            softmax_scale=HEAD_SIZE**-0.5, **options,
        )  # fmt: skip


def assert_close(step, expected):
    error = (step.output[: step.tokens].double() - expected.output).abs().amax(-1)
    assert (error <= expected.output_limit).all()
    assert step.output[step.tokens :].isnan().all()  # padding is left alone


@pytest.mark.parametrize("layout", ["packed", "apart"])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_is_that_of_the_reference(builder, batch, layout):
    step = Step(BATCHES[batch], layout)
    step.run(builder)
    if layout == "packed":
        keys, values = step.cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    else:
        keys, values = step.cache.unbind(1)
    assert_close(step, step.expected(keys, values))


@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        ({"sliding_window": 24}, {"window_size": (23, 0)}),
        ({"logits_soft_cap": 5.0}, {"softcap": 5.0}),
        ({"alibi_slopes": [0.1 * head for head in range(HEADS)]}, {"alibi_slopes": 0.1 * torch.arange(HEADS)}),
    ],
    ids=["sliding window", "soft cap", "ALiBi"],
)
def test_options_have_vllms_meaning(builder, options, meaning):
    step = Step(BATCHES["mixed"])
    step.run(builder, **options)
    keys, values = step.cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    assert_close(step, step.expected(keys, values, **meaning))


def test_a_padded_slot_is_not_written(builder):
    step = Step(BATCHES["decode"])
    step.common.slot_mapping[1] = -1
    before = step.cache.clone()
    step.run(builder)
    changed = (step.cache != before).flatten(2).any(-1).any(-1).sum()
    assert changed == 2  # one page for each of the other two sequences


def test_metadata_is_the_runners(builder):
    step = Step(BATCHES["verify"])
    metadata = builder.build(0, step.common)
    assert isinstance(metadata, TritonAttentionMetadata)  # the drafter on ROCm takes no other kind
    assert metadata.query_start_loc is step.common.query_start_loc
    assert metadata.seq_lens is step.common.seq_lens
    assert metadata.block_table is step.common.block_table_tensor
    assert metadata.slot_mapping is step.common.slot_mapping
    assert (metadata.num_actual_tokens, metadata.max_query_len, metadata.max_seq_len) == (10, 5, 125)
    drafting = builder.build_for_drafting(step.common, draft_index=1)
    assert {field.name for field in dataclasses.fields(drafting)} >= {"cut", "partial", "partial_lse"}
    assert drafting.seq_lens is step.common.seq_lens


class Compiled:
    """Stands for what Triton's launch returns on a GPU: takes every argument again, in the kernel's order."""

    def __init__(self, kernel):
        self.kernel, self.launched, self.again = kernel, 0, 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched += 1
            self.kernel[grid](*arguments)
            return Again(self)

        return launch


class Again:
    def __init__(self, compiled):
        self.compiled = compiled

    def __getitem__(self, grid):
        def launch(*arguments):
            self.compiled.again += 1
            self.compiled.kernel[grid](*arguments)

        return launch


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_a_variant_is_launched_again_with_the_new_tensors(builder, monkeypatch):
    kernels = {"attend": Compiled(paged._paged_kernel), "merge": Compiled(merge._merge_kernel)}
    monkeypatch.setattr(paged, "_paged_kernel", kernels["attend"])
    monkeypatch.setattr(merge, "_merge_kernel", kernels["merge"])
    config = tuning.Config(16, 32)
    monkeypatch.setattr(tuning, "paged", lambda **case: config)  # as from a table: one object, again and again
    first = Step([(200, 1)])
    layer = first.run(builder)
    # Another length, another number of sequences and, behind a cache of the same layer, other tensors.
    for sequences in ([(130, 1)], [(255, 1)], [(7, 1), (140, 1)]):
        step = Step(sequences)
        keys, values = first.cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
        step.common.block_table_tensor %= len(first.cache)
        metadata = builder.build(0, step.common)
        assert metadata.cut.splits == 2
        layer.forward(layer, step.query, None, None, first.cache, metadata, step.output)
        assert_close(step, step.expected(keys, values))
    assert [(kernel.launched, kernel.again) for kernel in kernels.values()] == [(1, 3), (1, 3)]


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_decode_has_the_same_memory_in_every_step(builder):
    """A graph that was captured once goes on using it."""
    step = Step([(200, 1)])
    first, later = builder.build(0, step.common), builder.build(0, step.common)
    assert first.cut.splits == 2
    assert first.partial.data_ptr() == later.partial.data_ptr() == builder._buffer.data_ptr()
    step.common.max_seq_len = 17  # does not decide how keys are split
    assert builder.build(0, step.common).cut is first.cut


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is that process, or has a GPU")
def test_in_the_interpreter():
    """Once more with the kernel in place of its twin."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    choice = ["-k", "(reference and packed) or meaning or launched_again or same_memory"]
    ended = subprocess.run(
        command + choice,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert "10 passed" in ended.stdout


@pytest.mark.slow
def test_a_real_engine_runs_on_it(run_python, tmp_path):
    """vLLM's own runner and drafter, target and draft on this backend: on a CPU, whose platform is told to allow it."""
    shape = MODEL | {"num_hidden_layers": 3, "dtype": "float32"}
    head = shape | {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    for name, content in {"target": shape, "draft": head}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    output = run_python(
        """
        import sys
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        from aiterlab.spec_decode import paged_backend

        paged_backend.register()
        if not current_platform.is_cuda_alike():
            path = classmethod(lambda cls, *arguments, **options: AttentionBackendEnum.CUSTOM.get_path())
            type(current_platform).get_attn_backend_cls = path
        llm = LLM(
            f"{sys.argv[1]}/target", load_format="dummy", dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
            max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=1 << 26, block_size=16,
            gpu_memory_utilization=0.01, attention_backend="CUSTOM", disable_log_stats=False, speculative_config={
                "method": "eagle", "model": f"{sys.argv[1]}/draft", "num_speculative_tokens": 2,
            },
        )
        prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 33, 59)]
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        lengths = [len(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]
        drafted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_drafts")
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        print("RESULT", lengths, drafted > 0, [type(layer.impl).__name__ for layer in layers])
        """,
        str(tmp_path),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="0",
        OMP_NUM_THREADS="1",
    )
    assert f"RESULT [8, 8, 8] True {['SuitePagedImpl'] * 4}" in output


def test_vllm_takes_it_by_name(config):
    backend = config.attention_config.backend
    assert backend.name == "CUSTOM"
    assert backend.get_class() is SuitePagedBackend
    assert issubclass(SuitePagedBackend, TritonAttentionBackend)
    assert SuitePagedBackend.get_name() == backend.name  # vLLM looks a layer's backend up by this


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID)
def test_what_it_cannot_is_refused_with_a_reason(changes):
    asked = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": None, "attn_type": "decoder",
    }  # fmt: skip
    assert SuitePagedBackend.validate_configuration(**asked) == []
    assert len(SuitePagedBackend.validate_configuration(**asked | changes)) == 1


def test_a_layer_with_sinks_is_refused():
    with pytest.raises(NotImplementedError, match="attention sinks"):
        SuitePagedImpl(HEADS, HEAD_SIZE, 1.0, KV_HEADS, None, None, "auto", sinks=torch.zeros(HEADS))


def test_profiling_without_metadata_writes_zeros():
    step = Step(BATCHES["decode"])
    layer = SuitePagedImpl(HEADS, HEAD_SIZE, 1.0, KV_HEADS, None, None, "auto")
    layer.forward(layer, step.query, step.key, step.value, step.cache, None, step.output)
    assert (step.output == 0).all()
