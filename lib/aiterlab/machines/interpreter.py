# SPDX-License-Identifier: Apache-2.0
"""Have Triton kernels run in Triton's interpreter, without what it computes and throws away.

A small kernel of attention spends half its time there in work that is done anew for every operation and comes out the
same: tables of types, the types of shapes, the list of what has to be patched. Every number stays what it was.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from aiterlab import importing


def choose() -> None:
    """Let this process interpret kernels; before Triton is imported, which decides then."""
    os.environ["TRITON_INTERPRET"] = "1"
    importing.after_import("triton.runtime.interpreter", _leave_out)


@functools.cache  # what is wrapped already would be wrapped again
def _leave_out(interpreter: ModuleType) -> None:
    _leave_overflow_unchecked(interpreter)
    for name, lean in (("_get_np_dtype", _known_by_name), ("_patch_builtin", _listed_once)):
        if hasattr(interpreter, name):  # another Triton may do without it
            setattr(interpreter, name, lean(interpreter))
    _share_shapes()
    _share_types()
    _let_equals_pass()


def _leave_overflow_unchecked(interpreter: ModuleType) -> None:
    """Triton repeats each product and sum of integers in 64 bits for an assertion that it makes in debug mode alone.

    Without debug mode the interpreter does all of that but the assertion, which takes a fifth of its time.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def _known_by_name(interpreter: ModuleType) -> Callable:
    """NumPy's type for one of Triton's: its own function fills a table of all of them to read one."""
    read, known = interpreter._get_np_dtype, {}

    def by_name(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = read(kind)
        return known[name]

    return by_name


def _listed_once(interpreter: ModuleType) -> Callable:
    """Put the interpreter's functions in the place of Triton's: before each call, its own looks through all members."""
    from triton.language.core import is_builtin
    from triton.language.semantic import TritonSemantic

    builtins: dict[object, list[str]] = {}

    def patch(owner, builder, scope) -> None:
        if owner not in builtins:
            builtins[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        semantic = TritonSemantic(builder)
        for name in builtins[owner]:
            if is_builtin(member := getattr(owner, name)):  # within another call it has been replaced already
                scope.set_attr(owner, name, meaning(member, semantic))

    def meaning(member: Callable, semantic) -> Callable:
        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        return call

    return patch


def _share_shapes() -> None:
    """Let tensors of one shape have one tuple for it: Triton makes it anew, with its type and that one's name."""
    from triton.language import core

    make, shapes = core.tensor.__init__, {}

    def __init__(self, handle, type) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            make(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    theirs, ours = (core.tensor.__new__(core.tensor) for _ in range(2))
    make(theirs, None, core.int32)
    __init__(ours, None, core.int32)
    if vars(ours).keys() == vars(theirs).keys():  # another Triton may put more into a tensor
        core.tensor.__init__ = __init__


def _share_types() -> None:
    """Let types of blocks be worked out once: Triton writes the name of each, and that of its shape's type."""
    from triton.language import core

    make, known = core.block_type.__init__, {}

    def __init__(self, element_ty, shape) -> None:
        key = type(element_ty), element_ty.name, tuple([getattr(size, "value", size) for size in shape])
        if key not in known or known[key]["element_ty"] != element_ty:  # pointers of one name may differ
            make(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    core.block_type.__init__ = __init__


def _let_equals_pass() -> None:
    """Let operands of one type pass, and offsets beside pointers: checked and cast, they stay as they are."""
    from triton.language.core import tensor
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_type_checking_impl

    def let_pass(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if type(lhs) is tensor and type(rhs) is tensor:
            one, other = lhs.type, rhs.type
            if one is other and not div_or_mod and not lhs.dtype.is_ptr():
                return lhs, rhs
            if allow_lhs_ptr and one.is_ptr() and other.is_int():  # neither is a block: what a block is, it says itself
                return lhs, rhs
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    if list(inspect.signature(let_pass).parameters) == list(inspect.signature(check).parameters):  # of this Triton
        TritonSemantic.binary_op_type_checking_impl = let_pass
