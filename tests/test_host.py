# SPDX-License-Identifier: Apache-2.0
"""The machine, read from the files of drivers and cgroups as they look on other machines."""

import os
import sys
from types import SimpleNamespace

import pytest

from aiterlab import host
from aiterlab.suite import gpus, runs, schedule, status
from aiterlab.suite.job import Job

INSTINCT = "cpu_cores_count 0\nsimd_count 1216\ngfx_target_version 90402\ndrm_render_minor 128\n"
SMI = '#!/bin/sh\necho "NVIDIA H200, 143771, 9.0, 580.82.07"\necho "NVIDIA H200, 143771, 9.0, 580.82.07"\n'


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine without anything, in the role of this one."""
    monkeypatch.setattr(host, "_SYSTEM", tmp_path / "system")
    return tmp_path / "system"


def test_a_machine_without_a_gpu_has_none_rather_than_an_unknown_number(system):
    missing = {}
    facts = host.gpus(missing)
    assert (facts["accelerators"], facts["gpu_count"], facts["gpu_driver"]) == ([], 0, None)
    assert missing == {"gpu_driver": host.NO_GPU}


def test_nvidia_gpus_are_asked_of_the_driver(system, tmp_path, monkeypatch):
    write(system, "proc/driver/nvidia/version", "NVRM version")
    write(tmp_path, "bin/nvidia-smi", SMI).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    missing = {}
    assert host.gpus(missing) == {
        "accelerators": ["NVIDIA H200"] * 2,
        "gpu_count": 2,
        "gpu_memory_bytes": [143771 * 2**20] * 2,
        "gpu_architectures": ["sm_90"] * 2,
        "gpu_driver": "NVIDIA 580.82.07",
    }
    assert missing == {}


@pytest.mark.parametrize("program", [None, "#!/bin/sh\nexit 9\n", "#!/bin/sh\necho nonsense\n"])
def test_a_driver_that_does_not_answer_leaves_nulls_with_the_reason(system, tmp_path, monkeypatch, program):
    write(system, "proc/driver/nvidia/version", "NVRM version")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if program:
        write(tmp_path, "bin/nvidia-smi", program).chmod(0o755)
    missing = {}
    facts = host.gpus(missing)
    assert facts["accelerators"] is None and facts["gpu_count"] is None
    assert missing["accelerators"].startswith("the GPU driver does not answer: ")


def test_amd_gpus_are_read_from_the_kernel_driver(system):
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(system, f"{nodes}/0/properties", "cpu_cores_count 96\nsimd_count 0\ngfx_target_version 0\n")
    write(system, f"{nodes}/2/properties", INSTINCT + "unique_id 1311768467463790320\n")
    write(system, f"{nodes}/10/properties", "gfx_target_version 90010\ndrm_render_minor 129\n")
    write(system, "sys/class/drm/renderD128/device/product_name", "AMD Instinct MI300X OAM\n")
    write(system, "sys/class/drm/renderD128/device/mem_info_vram_total", f"{192 * 2**30}\n")
    write(system, "sys/module/amdgpu/version", "6.16.6\n")
    assert host.gpus({}) == {
        "accelerators": ["AMD Instinct MI300X OAM", "AMD gfx90a"],
        "gpu_count": 2,
        "gpu_memory_bytes": [192 * 2**30, None],
        "gpu_architectures": ["gfx942", "gfx90a"],
        "gpu_driver": "amdgpu 6.16.6",
    }
    assert host.amd_gpus(system)[0]["uuid"] == "GPU-123456789abcdef0"


def test_memory_that_is_taken_on_amd_gpus_is_read_anew_each_time(system, monkeypatch):
    write(system, "sys/class/kfd/kfd/topology/nodes/2/properties", INSTINCT)
    used = "sys/class/drm/renderD128/device/mem_info_vram_used"
    read = host.amd_gpus
    monkeypatch.setattr(host, "amd_gpus", lambda: read(system))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert host.gpu_memory_used(["0"]) is None
    for size in (5, 3):
        write(system, used, f"{size * 2**30}\n")
        assert host.gpu_memory_used(["0"]) == size * 2**30
    assert host.gpu_memory_used(["1"]) is None


def test_memory_that_is_taken_on_nvidia_gpus_is_that_of_the_chosen_ones(monkeypatch):
    taken = {0: 7, 1: 11, 2: 13}  # by NVML's index, whose order need not be that of the device files
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(taken),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMinorNumber=lambda handle: 2 - handle,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=taken[handle]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert host.gpu_memory_used(["0", "1"]) == 13 + 11
    assert host.gpu_memory_used([]) is None
    del nvml.nvmlDeviceGetMemoryInfo  # a driver that does not answer
    assert host.gpu_memory_used(["0"]) is None

    def refuse():
        raise OSError("no such device")

    monkeypatch.setattr(host, "amd_gpus", refuse)
    assert host.gpu_memory_used(["0"]) is None


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/a/b", {"a/memory.max": "1000", "a/b/memory.max": "max", "a/b/cpu.max": "150000 100000"}, 1.5, 1000),
        ("0::/", {"memory.max": "2000", "cpu.max": "max 100000"}, None, 2000),
        (
            "4:cpu,cpuacct:/c\n3:memory:/c",
            {
                "memory/c/memory.limit_in_bytes": "3000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu/c/cpu.cfs_quota_us": "200000",
                "cpu/c/cpu.cfs_period_us": "100000",
            },
            2.0,
            3000,
        ),
        ("", {}, None, None),
    ],
    ids=["version 2", "in a container", "version 1", "none"],
)
def test_the_limits_of_a_container_are_facts_of_the_machine(system, groups, files, cores, memory):
    write(system, "proc/self/cgroup", groups)
    for name, text in files.items():
        write(system, f"sys/fs/cgroup/{name}", text + "\n")
    missing = {}
    facts = host.processor(missing)
    assert (facts["cpu_limit_cores"], facts["memory_limit_bytes"]) == (cores, memory)
    assert ("memory_limit_bytes" in missing) == (memory is None)
    assert facts["cpu_count"] >= facts["cpu_usable_count"] >= 1 and facts["memory_bytes"] > 2**28


STAT = "anon 1\ninactive_file {}\nactive_file 7\n"


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/", {"memory.max": "8000", "memory.current": "5000"}, 3000),
        ("0::/", {"memory.max": "8000", "memory.current": "5000", "memory.stat": STAT.format(4000)}, 7000),
        ("0::/", {"memory.max": "8000", "memory.current": "9000"}, 0),
        ("0::/", {"memory.max": "8000"}, 8000),
        ("0::/", {"memory.max": "20000", "memory.current": "5000"}, 10_000),
        (
            "0::/a/b",
            {"a/memory.max": "9000", "a/memory.current": "8500", "a/b/memory.max": "1000", "a/b/memory.current": "1"},
            500,
        ),
        (
            "3:memory:/",
            {
                "memory/memory.limit_in_bytes": "8000",
                "memory/memory.usage_in_bytes": "5000",
                "memory/memory.stat": STAT.format(1) + "total_inactive_file 2000\n",
            },
            5000,
        ),
        ("", {}, 10_000),
    ],
    ids=["a limit", "cached files", "over it", "no use said", "of a larger one", "nested", "version 1", "none"],
)
def test_memory_that_is_left_is_the_container_s_where_that_is_less(system, monkeypatch, groups, files, left):
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    write(system, "proc/self/cgroup", groups)
    for name, text in files.items():
        write(system, f"sys/fs/cgroup/{name}", text + "\n")
    assert host.available_memory() == left


@pytest.mark.parametrize(("limit", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 6)])
def test_cores_are_the_container_s_where_those_are_fewer(system, monkeypatch, limit, cores):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(6)))
    write(system, "proc/self/cgroup", "0::/")
    write(system, "sys/fs/cgroup/cpu.max", limit)
    assert host.usable_cores() == cores


def test_the_runner_starts_no_more_than_a_container_has_cores_for(system, tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(schedule.Graph, "run", lambda graph: graphs.append(graph) or iter(()))
    write(system, "proc/self/cgroup", "0::/")
    write(system, "sys/fs/cgroup/cpu.max", "100000 100000")
    list(runs.run_plans([], runs.Run(tmp_path, "smoke"), print))
    assert graphs[0].at_once == 2


def test_the_runner_starts_nothing_that_a_container_has_no_memory_for(system, tmp_path):
    write(system, "proc/self/cgroup", "0::/")
    write(system, "sys/fs/cgroup/memory.max", "1000")
    node = schedule.Node(Job(tmp_path / "01_a.ipynb", tmp_path, "smoke", {}, {}, 60, {}), memory_bytes=2000)
    graph = schedule.Graph([node], lambda job: pytest.fail("it was started"), 1, print, lambda *_: None)
    assert [ending.status for ending in graph.run()] == [status.SKIPPED]


@pytest.mark.parametrize("error", [OSError("no answer"), ValueError("an odd node")])
def test_a_driver_that_does_not_answer_offers_no_gpu(monkeypatch, error):
    def refuse():
        raise error

    monkeypatch.setattr(gpus, "_nvidia", list)
    monkeypatch.setattr(host, "amd_gpus", refuse)
    assert gpus.visible() == []
    monkeypatch.setattr(host, "amd_gpus", lambda: [{}, {}])
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert gpus.visible() == ["1"]


LISTED = """GPU 0: NVIDIA H200 (UUID: GPU-05355a11-9317)
GPU 1: NVIDIA H200 (UUID: GPU-77aa0000-0001)
  MIG 1g.18gb     Device  0: (UUID: MIG-c6d4f1ef-42e4)
  MIG 1g.18gb     Device  1: (UUID: MIG-cba663e8-9bed)
"""


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Choose GPUs by variables; nothing of this machine counts."""
    gpus._nvidia_ids.cache_clear()
    write(tmp_path, "bin/nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "_LOCKS", tmp_path)

    def choose(**variables):
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
        return gpus.visible()

    yield choose
    gpus._nvidia_ids.cache_clear()


def test_an_amd_gpu_has_one_number_however_it_is_chosen(chosen, monkeypatch):
    monkeypatch.setattr(gpus, "_nvidia", list)
    monkeypatch.setattr(host, "amd_gpus", lambda: [{"uuid": f"GPU-{number:016x}"} for number in range(4)])
    assert chosen() == ["0", "1", "2", "3"]
    assert chosen(ROCR="1") == chosen(ROCR="1", HIP="0") == chosen(HIP="1") == chosen(CUDA="1") == ["1"]
    assert chosen(ROCR="3,1", HIP="1") == chosen(ROCR="GPU-0000000000000001") == ["1"]
    assert chosen(ROCR="2,3", CUDA="1") == chosen(HIP="3", CUDA="0") == ["3"]
    assert chosen(ROCR="1", HIP="1") == chosen(HIP="") == chosen(HIP="-1,0") == chosen(HIP="4") == []


def test_an_nvidia_gpu_has_one_number_however_it_is_chosen(chosen, monkeypatch):
    monkeypatch.setattr(gpus, "_nvidia", lambda: ["4", "5"])  # a container was given these two
    assert chosen() == chosen(HIP="0") == ["4", "5"]
    assert chosen(CUDA="1") == chosen(CUDA="GPU-77aa0000-0001") == chosen(CUDA="GPU-77") == ["5"]
    assert chosen(CUDA="MIG-c6d4f1ef-42e4,MIG-cba663e8-9bed") == ["5"]
    assert chosen(CUDA="1, 0,-1") == ["5", "4"] and chosen(CUDA="GPU-99") == ["GPU-99"]


def test_nvidia_smi_is_asked_for_ids_alone_and_need_not_be_there(chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "_nvidia", lambda: ["0", "1"])
    (tmp_path / "bin/nvidia-smi").unlink()
    assert chosen(CUDA="1") == ["1"] and gpus._nvidia_ids.cache_info().misses == 0
    assert chosen(CUDA="GPU-77aa0000-0001") == ["GPU-77aa0000-0001"]


def test_a_gpu_is_locked_for_every_user_and_no_link_is_followed(chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "_nvidia", lambda: ["0", "1", "2"])
    monkeypatch.setenv("AITERLAB_CACHE", str(tmp_path / "somebody's"))
    chosen(CUDA="1")
    before = os.umask(0o077)
    try:
        held = gpus.lock()
    finally:
        os.umask(before)
    monkeypatch.setenv("AITERLAB_CACHE", str(tmp_path / "somebody else's"))
    chosen(CUDA="GPU-77aa0000-0001")
    assert gpus.lock() is None
    assert (tmp_path / "aiterlab-gpu-1").stat().st_mode & 0o777 == 0o666
    held.close()
    with gpus.lock():
        chosen(CUDA="0")
        gpus.lock().close()
    (tmp_path / "aiterlab-gpu-2").symlink_to(tmp_path / "victim")
    chosen(CUDA="2")
    with pytest.raises(OSError, match="symbolic links"):
        gpus.lock()
    assert not (tmp_path / "victim").exists()
