# SPDX-License-Identifier: Apache-2.0
"""Start kernels from a process that has done the slow imports already.

The runner imports once what every notebook imports first, then forks a process for each notebook, and that one forks
its kernel before it has a thread. Such a kernel differs from a new interpreter in what `sys.modules` holds, and nothing
that an investigation observes (vLLM, AITER, Triton) is among that. Where there is a GPU nothing is forked: a fork of a
process that has touched one is unusable.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from aiterlab import children, garbage
from aiterlab.suite import gpus

# What the runner needs to run a notebook and what a notebook imports before its first own question. Not pyplot: it
# binds to the kernel's figures when it is imported.
MODULES = (
    "papermill",
    "nbconvert",
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "IPython.display",
    "pandas.io.formats.style",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "aiterlab.suite.execution",
    "aiterlab.suite.report",
)
SHARED = ("torch",)  # takes seconds, so only where several notebooks share it
OBSERVED = ("aiter", "triton", "vllm")  # importing them is an event in what is investigated
_NAME = "aiterlab-warm"
_INLINE = "module://matplotlib_inline.backend_inline"  # what ipykernel sets; matplotlib reads it when it is imported


def preload(*, shared: bool) -> bool:
    """Import what kernels start with, and tell whether they can be forked from this process.

    They cannot where there is a GPU, where this process has threads, where it holds what an investigation observes, or
    where a package is broken: the notebook that needs that one has to say so, not the runner.

    Args:
        shared: several notebooks will run, so what only some of them import is worth importing too.
    """
    # Whoever has computed here has left threads that Python does not count, and a fork's own would wait for them.
    if sys.platform != "linux" or gpus.visible() or len(os.listdir("/proc/self/task")) > 1:
        return False
    before = os.environ.get("MPLBACKEND")
    os.environ.setdefault("MPLBACKEND", _INLINE)
    broken = False
    with garbage.uncollected():
        for name in MODULES + (SHARED if shared else ()):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                pass
            except Exception:  # OSError and RuntimeError too: a torch whose libraries are not there
                broken = True
        if shared and not broken:
            sys.modules["aiterlab.suite.report"].prepare()
    if before is None:
        del os.environ["MPLBACKEND"]
    if broken or threading.active_count() > 1 or not sys.modules.keys().isdisjoint(OBSERVED):
        return False
    gc.collect()
    gc.freeze()  # children share these pages; a collection in a child would copy them
    return True


class Kernel:
    """A forked child that waits to become a kernel. Make it before any thread; it ends with this process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self._control.close()
            children.run_to_end(lambda: _become(theirs))
        theirs.close()
        self.returncode: int | None = None
        self.stdin = self.stdout = self.stderr = None  # as subprocess.Popen has them

    def launch(self, cmd: list[str], **options: Any) -> Kernel:
        """Become the kernel that `cmd` would start; takes the options of subprocess.Popen that jupyter_client gives."""
        numbers = [options["stdout"], options["stderr"], *options["pass_fds"]]
        environment = {**options["env"], "JPY_PARENT_PID": str(os.getpid())}
        request = {
            "argv": cmd,
            "environment": environment,
            "cwd": str(options.get("cwd") or os.getcwd()),
            "numbers": [1, 2, *numbers[2:]],
        }
        socket.send_fds(self._control, [json.dumps(request).encode()], numbers)
        self._control.close()
        return self

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, ending = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(ending) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; jupyter_client calls it once `poll` has told of it."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Provisioner(LocalProvisioner):
    """jupyter_client's provisioner, which gives its first kernel the process that waits to become one."""

    waiting: Kernel | None = None

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        """Launch a kernel: the waiting process, a new interpreter where there is none."""
        kernel, Provisioner.waiting = Provisioner.waiting, None
        if kernel is None:
            return await super().launch_kernel(cmd, **options)
        self.process = kernel.launch(cmd, **options)
        self.pid = self.pgid = kernel.pid
        self.cwd = options.get("cwd") or os.getcwd()
        return self.connection_info


def offer(kernel: Kernel) -> None:
    """Let the next kernel that this process starts be `kernel`."""
    factory = KernelProvisionerFactory.instance()
    factory.provisioners[_NAME] = EntryPoint(_NAME, f"{__name__}:{Provisioner.__name__}", factory.GROUP_NAME)
    factory.default_provisioner_name = _NAME
    Provisioner.waiting = kernel


def _become(control: socket.socket) -> int:
    """Wait for the request, then be the kernel until it ends; returns its exit code."""
    os.setsid()
    children.end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    message, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 8)
    control.close()
    if message:
        _settle(json.loads(message), descriptors)
        from ipykernel.kernelapp import IPKernelApp

        try:
            IPKernelApp.launch_instance()
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


def _settle(request: dict[str, Any], descriptors: list[int]) -> None:
    """Take on what a new process would have been given: files, environment, folder, arguments, import path."""
    # Upwards first: a number that is wanted may be one that was received.
    kept = [os.dup(descriptor) for descriptor in descriptors]
    high = [os.dup2(descriptor, 200 + place) for place, descriptor in enumerate(kept)]
    for descriptor, number in zip(high, request["numbers"], strict=True):
        os.dup2(descriptor, number)
    for descriptor in {*descriptors, *kept, *high} - set(request["numbers"]):
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    program = request["argv"].index("ipykernel_launcher")
    # ipykernel reads its parent from the environment when it is imported, which was too early here.
    sys.argv = [*request["argv"][program:], f"--IPKernelApp.parent_handle={os.getppid()}"]
    scripts = os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", "")))
    sys.path[:] = [folder for folder in sys.path if folder not in ("", scripts)]
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # or every kernel would draw the same numbers
    gc.enable()
