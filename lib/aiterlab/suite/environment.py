# SPDX-License-Identifier: Apache-2.0
"""Is this interpreter of the stack that a run is meant for? On another one it would answer another question."""

from aiterlab.suite.parameters import ParameterError, unknown

STACKS = ("cpu", "cuda", "rocm")  # each a folder under environments/


def require(stack: str) -> None:
    """Raise ParameterError, with the reason in one line, unless this torch is of `stack` and finds its GPU.

    "cpu" is the stack without a GPU: where there is one, kernels would run on it.
    """
    if stack not in STACKS:
        raise ParameterError(unknown("unknown environment", stack, STACKS))
    import torch  # seconds, so only for those who ask

    build = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    here = build if torch.cuda.is_available() else "cpu"
    if here == stack:
        return
    what = f"torch {torch.__version__} of this environment"
    if stack == "cpu":
        raise ParameterError(f"--environment cpu: {what} finds a GPU ({here}); hide it, or leave the option out")
    why = f"is built for {build}" if build != stack else "finds no GPU"
    raise ParameterError(f"--environment {stack}: {what} {why}; see environments/{stack}/README.md")
