"""Repairs of Triton's interpreter (seen in 3.9): it truncates to bfloat16, and its products take bfloat16 for integers.

A GPU rounds to nearest even and multiplies bfloat16 exactly. Importing this module gives the interpreter the same numbers. In 3.6
its numbers are arrays of one element, which NumPy from 2.4 on refuses to take for an index. It is also spared a slow step: at
every call of a device function it looks through all of triton.language for what it has to replace, which it has replaced already.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor


def _cast_rounded(self, source, target):
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):  # right in the interpreter, and slow
        return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return _cast(self, source, target)


def _dot_of_values(self, a, b, accumulator, *options):
    a, b = (self.cast_impl(each, tl.float32) if each.dtype.scalar == tl.bfloat16 else each for each in (a, b))
    return _dot(self, a, b, accumulator, *options)


def _call_device_function(self, *args, **kwargs):
    if any(tl.core.is_builtin(module.load) for module in (tl, tl.core)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _patch_tensor_and_index(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast_rounded, _dot_of_values
InterpretedFunction.__call__ = _call_device_function
interpreter._patch_lang_tensor = _patch_tensor_and_index
