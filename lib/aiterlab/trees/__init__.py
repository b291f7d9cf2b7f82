# SPDX-License-Identifier: Apache-2.0
"""States of vLLM's source that a question can be put to: releases, the regressed state, a user's own checkout."""

from aiterlab.trees.edits import EditError
from aiterlab.trees.tree import Tree, TreeError, forget, get, get_all

__all__ = ["EditError", "Tree", "TreeError", "forget", "get", "get_all"]
