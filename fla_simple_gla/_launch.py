"""Launches of kernels that the host has made before, at a fraction of their cost.

At each launch triton binds the arguments anew, finds out what of them to specialise on, and looks for the kernel: that takes longer than
a small kernel runs. But the kernel, the grid and all its numbers follow from the layouts of the tensors. Here they are kept by these, and
a launch only puts in the addresses.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch

from ._triton import INTERPRET, triton

# Versions of triton of which it is known that a compiled kernel takes all arguments, constants too, in the order of the parameters, and
# needs only the fields of a descriptor. With others every launch goes the usual way.
VERSIONS = ('3.6', '3.7', '3.8', '3.9')
DIRECT = (
    triton is not None and not INTERPRET and torch.version.cuda is not None and '.'.join(triton.__version__.split('.')[:2]) in VERSIONS
)
# Launches that are kept of one kernel
MOST = 1024


class Launch:
    """Decorates a function that tells how to launch a kernel, and is then called as `launch(tensors, *numbers)`.

    `plan(*tensors, *numbers)` returns the kernel, a grid of three, the arguments, and the constants and options. Its tensors are the
    kernel's first arguments, in this order, each None, as it is or in a descriptor. As it is asked once, it may depend on nothing but the
    numbers, which are hashable, and of a tensor on dtype, shape, strides, device, and whether the address is a multiple of 16.
    """

    def __init__(self, plan: Callable):
        functools.update_wrapper(self, plan)
        self.plan = plan
        self.known = {}

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], *numbers) -> None:
        if not DIRECT or torch.compiler.is_compiling() or observed():
            kernel, grid, args, constants = self.plan(*tensors, *numbers)
            kernel[grid](*args, **constants)
            return
        layouts = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
        key = torch.cuda.current_device(), *numbers, *layouts
        known = self.known.get(key)
        if known is None:
            self.first(key, tensors, numbers)
            return
        run, descriptors, rest = known
        args = [*tensors, *rest]
        for i, fields in descriptors:
            args[i] = SimpleNamespace(base=tensors[i], **fields)
        run(*args)

    def first(self, key, tensors, numbers):
        """Launch the usual way, and keep what the next launches need; of the tensors nothing."""
        kernel, grid, args, constants = self.plan(*tensors, *numbers)
        compiled = kernel[grid](*args, **constants)
        if not isinstance(compiled, triton.compiler.CompiledKernel):
            return
        descriptors = [
            (i, {name: field for name, field in vars(arg).items() if name != 'base'})
            for i, (arg, x) in enumerate(zip(args, tensors)) if arg is not x
        ]
        rest = *args[len(tensors):], *(constants[name] for name in kernel.arg_names[len(args):])
        if len(self.known) >= MOST:
            self.known.clear()
        self.known[key] = compiled[grid], descriptors, rest


def observed() -> bool:
    """Whether what triton compiles is to be changed or watched."""
    knobs = triton.knobs
    return knobs.runtime.debug or knobs.compilation.instrumentation_mode or knobs.runtime.add_stages_inspection_hook is not None
