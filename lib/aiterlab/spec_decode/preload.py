# SPDX-License-Identifier: Apache-2.0
"""A process that has imported vLLM once, and forks engines from there.

Run as `python -m aiterlab.spec_decode.preload FD`, where FD is a socket of packets. Importing vLLM takes longer than
all the rest of a small engine's start, and half of that rest is the garbage collector walking over what was imported:
both are done once here. Only imports happen before a fork, in a single thread and without a GPU, so a child is as
clean as a new interpreter that has just said `import vllm`; whoever wants other variables of the environment gets one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from functools import partial

from aiterlab import children, garbage
from aiterlab.spec_decode import processes, worker

# What an engine on the CPU imports beyond `vllm.LLM`; a name that a version does not have is left out.
MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.llama_eagle",
    "vllm.model_executor.models.llama_eagle3",
    "vllm.transformers_utils.tokenizer",
    "vllm.tokenizers.hf",
    "transformers.models.llama.tokenization_llama",
)


def main() -> None:
    """Import, say so, then fork one engine per request until the other side is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    began = time.monotonic()
    with garbage.uncollected():  # a fifth of the time
        for name in MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    worker.inspect_here()
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise SystemExit(f"importing vLLM started threads ({names}), which a fork cannot carry over")
    gc.collect()
    gc.freeze()  # children share these pages, and no collection in a child walks over them
    import_s = time.monotonic() - began
    control.send(json.dumps({"import_s": import_s}).encode())
    living: dict[int, str] = {}  # pid -> its temporary folder
    try:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 2)
            if not message:
                return
            request = json.loads(message)
            if "status_of" in request:
                _, status = os.waitpid(request["status_of"], 0)
                living.pop(request["status_of"], None)
                control.send(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())
                continue
            pid = os.fork()
            if pid == 0:
                become = partial(_become_engine, control, *descriptors, request["environment"], import_s)
                children.run_to_end(become)
            living[pid] = request["environment"]["TMPDIR"]
            for descriptor in descriptors:
                os.close(descriptor)
            control.send(json.dumps({"pid": pid}).encode())
    finally:
        for pid, folder in living.items():  # only where the other side is gone without a word
            processes.kill_group(pid)
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def _become_engine(
    control: socket.socket, channel: int, log: int, environment: dict[str, str], import_s: float
) -> None:
    """Be an engine until it ends."""
    os.setsid()
    control.close()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(environment)
    os.chdir(environment["TMPDIR"])
    worker.serve(socket.socket(fileno=channel), import_s=import_s)


if __name__ == "__main__":
    main()
