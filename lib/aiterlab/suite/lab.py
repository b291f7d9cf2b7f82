# SPDX-License-Identifier: Apache-2.0
"""Open the notebooks in JupyterLab, in this very interpreter, for whoever has the token and sits at this machine.

A setting of the user's own (a configuration without a token, an address for the network, another interpreter's kernel
called `python3`) is laid aside: what is given here goes before configuration files.
"""

import argparse
import os
import secrets
import sys
from collections.abc import Sequence

from aiterlab import paths
from aiterlab.suite.execution import KERNEL_NAME, SetupError, check_kernel

HOST = "127.0.0.1"
_SHORTEST_TOKEN = 16


def arguments(port: int, browser: bool, token: str) -> list[str]:
    """Return the command line of the server; it is never a process's own, where everyone could read the token."""
    root = paths.project_root()
    given = {
        "ServerApp.ip": HOST,
        "ServerApp.port": port,
        "ServerApp.allow_remote_access": False,
        "ServerApp.open_browser": browser,
        # The whole project, so that reports can be opened too; the notebooks are what is seen first.
        "ServerApp.root_dir": root,
        "FileContentsManager.preferred_dir": paths.notebooks_dir(),
        "IdentityProvider.token": token,
        "MultiKernelManager.default_kernel_name": KERNEL_NAME,
        "LabApp.extension_manager": "readonly",
        # Whoever is root here runs every notebook as root anyway; containers often leave no choice.
        "ServerApp.allow_root": os.geteuid() == 0,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Start JupyterLab and return its exit code; 2 where the kernel would be another interpreter."""
    parser = argparse.ArgumentParser(prog="make lab", description="Open the notebooks in JupyterLab.")
    parser.add_argument("--port", type=int, default=8888, help="the first one tried (default: 8888)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, and open nothing")
    options = parser.parse_args(argv)
    try:
        check_kernel()
    except SetupError as error:
        print(f"make lab: {error}", file=sys.stderr)
        return 2
    os.environ.pop(paths.RUN_DIR_VARIABLE, None)  # what is tried by hand is no part of a run
    token = os.environ.get("JUPYTER_TOKEN", "")
    if len(token) < _SHORTEST_TOKEN:
        token = secrets.token_hex(24)
    from jupyterlab.labapp import LabApp

    server = LabApp.initialize_server(arguments(options.port, not options.no_browser, token))
    server.identity_provider.token_generated = True  # else the address is printed without the token
    server.start()
    return 0


if __name__ == "__main__":
    sys.exit(main())
