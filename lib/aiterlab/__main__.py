# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m aiterlab audit`, `scan` and `bisect`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from aiterlab.audit import bisect_cli, cli
from aiterlab.probes.pool import ServerError
from aiterlab.scan import cli as scan_cli

FAILED, INTERRUPTED = 3, 130
ABOUT = """\
Which attention backend does vLLM choose on an AMD GPU, why, and does that agree with its documented policy?

audit   asks real vLLM code of any release or checkout on described machines; needs no GPU
scan    looks for the same class of fault in source, without running it
bisect  finds the commit of a local clone that broke a statement of the policy
"""
EPILOG = """\
examples:
  python -m aiterlab audit --tree path:. --fail-on broken
  python -m aiterlab audit --tree release:0.32.0 --arch gfx942 --switch 1
  python -m aiterlab scan vllm/
  python -m aiterlab bisect ~/src/vllm --good v0.15.0 --bad main --statement availability

`python -m aiterlab COMMAND --help` says more.
"""


def parser() -> argparse.ArgumentParser:
    """The command line with all its commands."""
    whole = argparse.ArgumentParser(
        prog="python -m aiterlab",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (cli, scan_cli, bisect_cli):
        command.add_parser(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted; answers that were given are kept", file=sys.stderr)
        return INTERRUPTED
    except ServerError as error:
        print(f"python -m aiterlab {options.command}: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled CI job tidies up as after Ctrl-C
    sys.exit(main())
