# SPDX-License-Identifier: Apache-2.0
"""AMD code generation without a GPU: is the assembly read right, and do our kernels stay what they were tuned to be?"""

import importlib.util
import textwrap

import pytest

from aiterlab import plots
from aiterlab.attention import findings, isa, tables
from aiterlab.attention.isa import assembly, bounds
from aiterlab.attention.isa.launches import shapes
from aiterlab.attention.isa.occupancy import occupancy
from aiterlab.attention.workloads import CASES, Workload


def listing(body: str, arch: str = "gfx942", **note) -> str:
    """One kernel as Triton prints it, cut down to what is read."""
    note = {
        "agpr_count": 0,
        "group_segment_fixed_size": 0,
        "private_segment_fixed_size": 0,
        "sgpr_count": 50,
        "sgpr_spill_count": 0,
        "vgpr_count": 100,
        "vgpr_spill_count": 0,
        "wavefront_size": 64,
    } | note
    if note["agpr_count"] is None:
        first = "  - .args:\n      - .offset:         0\n        .size:           8\n"
        del note["agpr_count"]
    else:
        first = f"  - .agpr_count:     {note.pop('agpr_count')}\n    .args:\n      - .offset:         0\n"
    fields = "".join(f"    .{name}: {value}\n" for name, value in note.items())
    return (
        f'\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n\t.text\nkernel:  ; @kernel\n; %bb.0:\n{body}'
        "\t.section\t.rodata\n; codeLenInByte = 1234\n\t.amdgpu_metadata\n---\namdhsa.kernels:\n"
        f"{first}    .name:           kernel\n{fields}    .symbol: kernel.kd\n...\n\t.end_amdgpu_metadata\n"
    )


CDNA = """\
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_load_ushort v5, v6, s[4:7], 0 offen
\t.loc\t1 1 1
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[8:11], v12, s[4:7], 0 offen ; 16-byte Folded Reload
\tv_mfma_f32_32x32x8_bf16 v[66:81], v[80:81], v[98:99], 0
\tv_mfma_f32_16x16x16_bf16 v[66:69], v[80:81], v[98:99], 0
\tv_exp_f32_e32 v1, v2
\tv_add_u32_e32 v1, v2, v3
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
\tds_read2_b64 v[0:3], v4 offset1:8
\tds_read_b64_tr_b16 v[0:1], v4
\tds_write2st64_b64 v4, v[0:1], v[2:3] offset1:1
\ts_waitcnt lgkmcnt(0)
\ts_barrier
\ts_cbranch_scc1 .LBB0_1
; %bb.3:
\tscratch_store_dwordx2 off, v[82:83], off offset:56
\tv_accvgpr_write_b32 a0, v1
\tglobal_store_dwordx2 v0, v[2:3], s[0:1]
\ts_endpgm
"""


def test_metadata_and_counts_of_a_cdna_kernel():
    code = assembly.parse(listing(CDNA, vgpr_spill_count=18, agpr_count=8, private_segment_fixed_size=76))
    assert (code.name, code.arch, code.wavefront) == ("kernel", "gfx942", 64)
    assert (code.vgprs, code.agprs, code.sgprs, code.vgpr_spills, code.sgpr_spills) == (100, 8, 50, 18, 0)
    assert (code.scratch_bytes, code.static_lds_bytes, code.code_bytes) == (76, 0, 1234)
    whole = code.whole
    assert whole.global_loads == {128: 2, 16: 1}
    assert whole.global_stores == {64: 1}
    assert (whole.scratch_accesses, whole.accumulator_moves) == (1, 1)
    assert whole.share_of_bytes(128) == 256 / 272


def test_the_loop_has_the_blocks_that_the_compiler_says_are_in_it():
    loop = assembly.parse(listing(CDNA)).loop
    assert loop.instructions == 11
    assert loop.matrix == {"v_mfma_f32_32x32x8_bf16": 1, "v_mfma_f32_16x16x16_bf16": 1}
    assert loop.flops_by_instruction() == {"v_mfma_f32_32x32x8_bf16": 16384, "v_mfma_f32_16x16x16_bf16": 8192}
    assert (loop.vector, loop.transcendental, loop.exponentials) == (1, 1, 1)
    assert loop.lds_reads == {64: 3}  # read2 is two of its width; a transposing read is as wide as it says first
    assert loop.lds_writes == {64: 2}
    assert (loop.waits, loop.barriers, loop.scratch_accesses) == (1, 1, 0)
    spent = bounds.cycles("gfx942", loop)
    assert (spent.matrix, spent.vector) == (32 + 16, 4 + 16)
    assert bounds.cycles("gfx950", loop).matrix == 24
    assert bounds.cycles("gfx1201", loop) is None


def test_names_of_rdna_and_nested_loops():
    body = """\
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_2 Depth 2
\tglobal_load_b128 v[0:3], v[4:5], off
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tglobal_load_d16_u8 v0, v[4:5], off
\tds_load_u16_d16_hi v1, v2
\tds_load_2addr_b32 v[1:2], v3 offset1:1
\tv_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
\tv_dual_mul_f32 v0, v1, v2 :: v_dual_add_f32 v3, v4, v5
\ts_cbranch_scc0 .LBB0_2
"""
    code = assembly.parse(listing(body, "gfx1100", wavefront_size=32, agpr_count=None))
    assert (code.agprs, code.wavefront) == (None, 32)
    assert code.loop.global_loads == {8: 1}
    assert code.loop.lds_reads == {16: 1, 32: 2}
    assert code.whole.global_loads == {128: 1, 8: 1}
    assert bounds.cycles("gfx1100", code.loop) == bounds.Cycles(32, 1)


def test_straight_line_code_has_no_loop_and_other_text_is_refused():
    assert assembly.parse(listing("\ts_endpgm\n")).loop is None
    with pytest.raises(ValueError, match="metadata of one kernel"):
        assembly.parse("\ts_endpgm\n")
    with pytest.raises(ValueError, match="unknown width"):
        assembly.parse(listing("\tglobal_load_odd v0, v1, off\n"))


@pytest.mark.parametrize(
    ("arch", "needs", "waves", "limit"),
    [
        ("gfx942", {"vgprs": 64}, 8, "waves"),
        ("gfx942", {"vgprs": 65}, 7, "VGPRs"),
        ("gfx942", {"vgprs": 128}, 4, "VGPRs"),
        ("gfx942", {"vgprs": 168}, 3, "VGPRs"),
        ("gfx942", {"vgprs": 256}, 2, "VGPRs"),
        ("gfx942", {"vgprs": 257}, 1, "VGPRs"),
        ("gfx942", {"vgprs": 64, "sgprs": 102}, 7, "SGPRs"),
        ("gfx942", {"vgprs": 64, "lds_bytes": 65536}, 1, "LDS"),
        ("gfx942", {"vgprs": 64, "lds_bytes": 32768}, 2, "LDS"),
        ("gfx942", {"vgprs": 64, "lds_bytes": 32769}, 1, "LDS"),
        ("gfx942", {"vgprs": 64, "lds_bytes": 16512, "num_warps": 2}, 1.5, "LDS"),
        ("gfx942", {"vgprs": 64, "lds_bytes": 98304}, 0, "LDS"),
        ("gfx942", {"vgprs": 170, "num_warps": 8}, 2, "VGPRs"),  # three waves' registers, but workgroups are whole
        ("gfx950", {"vgprs": 64, "lds_bytes": 65536}, 2, "LDS"),
        ("gfx950", {"vgprs": 256, "lds_bytes": 98304}, 1, "LDS"),
        ("gfx90a", {"vgprs": 257}, 1, "VGPRs"),
        ("gfx1100", {"vgprs": 96}, 16, "waves"),
        ("gfx1100", {"vgprs": 256}, 5, "VGPRs"),
        ("gfx1100", {"vgprs": 96, "lds_bytes": 32768}, 4, "LDS"),
    ],
)
def test_occupancy(arch, needs, waves, limit):
    found = occupancy(arch, **({"sgprs": 50, "lds_bytes": 0, "num_warps": 4} | needs))
    assert (found.waves, found.limited_by) == (waves, limit)


def test_what_is_not_known_is_none():
    assert occupancy("gfx1201", vgprs=100, sgprs=50, lds_bytes=0, num_warps=4) is None


def test_lower_bounds_of_time():
    decode, prefill = CASES["decode_64x8k"], CASES["prefill_1x16k"]
    assert bounds.lower_bound_us(decode, "MI300X") == pytest.approx(decode.bytes_moved() / 5.3e6)
    assert bounds.lower_bound_us(prefill, "MI355X") == pytest.approx(prefill.flops() / 2516.6e6)


def test_shapes_take_no_memory_and_caches_are_as_large_as_served_ones():
    x = shapes(CASES["decode_64x8k_fp8"])
    assert x.q.is_meta and x.k_cache.is_meta
    assert x.k_cache.untyped_storage().size() > 2**31  # below, Triton addresses with 32 bits: other code


def native_fp8(arch: str) -> str:
    return {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn"}[arch]


def representative(arch: str) -> list[Workload]:
    """Every head size and operation, and each of the other options once."""
    steps = {
        "decode": ((8191, 1),) * 64,
        "verify": ((8184, 8),) * 8,
        "extend": ((32768, 512),),
        "prefill": ((0, 8192),) * 2,
    }
    heads = [Workload(f"{step}_d{d}", step, steps[step], head_size=d) for step in steps for d in (64, 96, 128, 256)]
    fp8 = {"kv_dtype": native_fp8(arch)}
    return [
        *heads,
        *(Workload(f"{step}_fp8_d{d}", step, steps[step], head_size=d, **fp8) for step in steps for d in (128, 256)),
        Workload("verify_q4", "verify", ((32764, 4),)),
        Workload("decode_page64", "decode", steps["decode"], page_size=64),
        Workload("gather", "gather", ((32768, 0),)),
        Workload("gather_shuffle", "gather", ((32768, 0),), layout="SHUFFLE"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_our_kernels_neither_spill_nor_starve(arch):
    """What the tuning tables promise: no spill, no scratch memory, two waves per SIMD, matrix units, wide loads."""
    launches = [launch for workload in representative(arch) for launch in isa.launches_of(workload, ("suite",))]
    rows = isa.table(isa.compile_launches(launches, [arch]))
    assert rows["reason"].isna().all(), rows.loc[rows["reason"].notna(), ["workload", "launcher", "reason"]].to_string()
    needs = [
        "workload",
        "kernel",
        "vgprs",
        "vgpr_spills",
        "sgpr_spills",
        "scratch_bytes",
        "lds_bytes",
        "waves_per_simd",
    ]
    wrong = (rows[["vgpr_spills", "sgpr_spills", "scratch_bytes"]].max(axis=1) > 0) | (rows["waves_per_simd"] < 2)
    assert not wrong.any(), rows.loc[wrong, needs].to_string()
    attends = rows[rows["kernel"].isin(["_paged_kernel", "_varlen_kernel"])]
    assert attends["matrix_instructions"].notna().all()
    narrow = attends[attends["load_128bit_share"] < 0.6]  # the rest: pages and lengths, which every lane loads
    assert narrow.empty, narrow[["workload", "kernel", "load_128bit_share"]].to_string()


@pytest.mark.slow
def test_other_architectures_and_the_reason_where_a_launcher_refuses():
    decode = CASES["decode_64x8k"]
    launches = [isa.Launch("suite", "paged", decode), isa.Launch("aiter_triton", "varlen", CASES["prefill_8x2k"])]
    seen = []
    rows = isa.table(
        isa.compile_launches(
            launches, ["gfx90a", "gfx1100"], progress=lambda done, total, _: seen.append((done, total))
        )
    )
    assert sorted(seen) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    ours, aiter = rows[rows["provider"] == "suite"], rows[rows["provider"] == "aiter_triton"]
    assert set(ours["arch"]) == {"gfx90a", "gfx1100"} and ours["reason"].isna().all()
    assert ours.loc[ours["arch"] == "gfx1100", "agprs"].isna().all()
    assert aiter["reason"].str.contains("get_device").all()  # AITER's tuning knows two architectures
    fig = plots.occupancy(rows, "a title")
    assert len(fig.axes) == 2
    assert any("KeyError" in text.get_text() for text in fig.axes[0].texts)


@pytest.mark.slow
def test_without_aiter_the_kernels_of_the_others_are_compiled(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "aiter" else find(name, *rest))
    case = CASES["verify_q4_1x32k"]
    launches = [isa.Launch(who, name, case) for who, name in (("suite", "paged"), ("aiter_triton", "unified"))]
    rows = isa.table(isa.compile_launches(launches, ["gfx942"]))
    assert rows.loc[rows["provider"] == "suite", "reason"].isna().all()
    assert rows.loc[rows["provider"] == "aiter_triton", "reason"].str.contains("No module named 'aiter").all()


def test_a_kernel_made_to_spill_is_seen(run_python, tmp_path):
    (tmp_path / "greedy.py").write_text(
        textwrap.dedent("""
        import triton
        import triton.language as tl

        @triton.jit
        def greedy(x, y, SIZE: tl.constexpr):
            at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            tile = tl.load(x + at)
            for _ in range(8):
                tile = tl.dot(tile, tile).to(tl.float16)
            tl.store(y + at, tile)
        """)
    )
    asked = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import triton
        from greedy import greedy
        from triton.backends.compiler import GPUTarget
        from aiterlab.attention.isa import assembly

        source = triton.compiler.ASTSource(greedy, {"x": "*fp16", "y": "*fp16", "SIZE": "constexpr"}, {"SIZE": 128})
        options = {"num_warps": 1, "waves_per_eu": 2}  # one wave may take 256 registers and needs 500
        kernel = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
        code = assembly.parse(kernel.asm["amdgcn"])
        assert code.vgpr_spills > 0 and code.scratch_bytes > 0 and code.whole.scratch_accesses > 0, code
    """
    run_python(asked, str(tmp_path), TRITON_INTERPRET="0")


def test_a_compiler_that_dies_is_an_answer_and_the_rest_goes_on(monkeypatch, tmp_path):
    """The child is replaced by a program that aborts at its second launch, as LLVM does."""
    (tmp_path / "python").write_text('#!/bin/sh\ncat > /dev/null\necho "LLVM ERROR: cannot select" >&2\nexit 134\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    launches = isa.launches_of(CASES["gather_1x32k"], ("suite", "vllm_triton"))
    compiled = isa.compile_launches(launches, ["gfx942"])
    assert [answer.error for answer in compiled] == ["the process ended with status 134: LLVM ERROR: cannot select"] * 2
    rows = isa.table(compiled)
    assert len(rows) == 2 and rows["waves_per_simd"].isna().all()
    # All that shows kernels shows that there are none, and why.
    assert findings.code(rows).startswith("No kernel of the suite was compiled")
    assert tables.bounds(rows).empty
    assert tables.kernels(rows)["kernel"].str.contains("LLVM ERROR: cannot select").all()
    assert tables.plain(rows)["waves_per_simd"] == [None, None]
    assert any("ended with status 134" in text.get_text() for text in plots.occupancy(rows, "a title").axes[0].texts)
