# SPDX-License-Identifier: Apache-2.0
"""The command `python -m aiterlab.leaks PATH ...`: may these files be shown around?"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aiterlab.security import scan_folder

FOUND, BAD_INPUT = 1, 2
ABOUT = """\
Look for what must not be shown around: values of secret-named environment variables, tokens by their shape, private
keys, passwords in addresses, and your home directory. Says where and of what kind, never the value.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per leak; return 1 if there is one, 2 if a path does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m aiterlab.leaks", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", type=Path, help="a file, or a folder with all that is in it"
    )
    paths = parser.parse_args(argv).paths
    for path in paths:
        if not path.exists():
            print(f"{parser.prog}: {path}: there is no such file or folder", file=sys.stderr)
            return BAD_INPUT
    found = 0
    for path in paths:
        for leak in scan_folder(path.resolve() if path.is_dir() else path):
            print(path / str(leak) if path.is_dir() else path.with_name(str(leak)))
            found += 1
    return FOUND if found else 0


if __name__ == "__main__":
    sys.exit(main())
