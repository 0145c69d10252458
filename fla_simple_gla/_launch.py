"""Launches of kernels that the host has made before, at a fraction of their cost.

At each launch triton binds the arguments anew, finds out what of them to specialise on, looks for the kernel, and encodes the tensor
descriptors: that takes longer than a small kernel runs. But the kernel, the grid and all its numbers follow from the layouts of the
tensors, and an encoded descriptor from these and the address. Here they are kept, and a launch only puts in the addresses.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace

import torch

from ._triton import INTERPRET, triton

# Versions of triton of which it is known that a compiled kernel takes all arguments, constants too, in the order of the parameters,
# addresses as integers, and in the place of a descriptor the encoded one, its shape and its strides. With others every launch goes the
# usual way.
VERSIONS = ('3.6', '3.7', '3.8', '3.9')
DIRECT = (
    triton is not None and not INTERPRET and torch.version.cuda is not None and '.'.join(triton.__version__.split('.')[:2]) in VERSIONS
)
# Launches that are kept of one kernel, and encoded descriptors of one argument of a launch
MOST = 1024
MOST_ADDRESSES = 64


def launcher(*made: str):
    """Decorates a function that tells how to launch a kernel, which is then called as `launch(tensors, *numbers)`.

    The function, `plan(*tensors, *numbers)`, returns the kernel, a grid of three, the arguments, and the constants and options. Its
    tensors are the kernel's first arguments, in this order, each None, as it is or in a descriptor. As it is asked once, it may depend on
    nothing but the numbers, which are hashable, and of a tensor on dtype, shape, strides, device, and whether the address is a multiple
    of 16. Of the tensors `made` for the launch this follows from the others, so that only whether they are None is looked at.
    """
    return functools.partial(Launch, made=made)


class Launch:
    def __init__(self, plan: Callable, made: tuple[str, ...]):
        functools.update_wrapper(self, plan)
        self.plan = plan
        names = list(inspect.signature(plan).parameters)
        self.made = {names.index(name) for name in made}
        self.known = {}

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], *numbers) -> None:
        if not DIRECT or torch.compiler.is_compiling() or observed():
            kernel, grid, args, constants = self.plan(*tensors, *numbers)
            kernel[grid](*args, **constants)
            return
        device = torch.cuda.current_device()
        key = device, *numbers, *map(self.layout, range(len(tensors)), tensors)
        known = self.known.get(key)
        if known is None:
            self.first(key, tensors, numbers)
        else:
            known(tensors, device)

    def layout(self, i, x):
        return x if x is None else True if i in self.made else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16)

    def first(self, key, tensors, numbers):
        """Launch the usual way, and keep what the next launches need; of the tensors nothing."""
        kernel, grid, args, constants = self.plan(*tensors, *numbers)
        compiled = kernel[grid](*args, **constants)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            if len(self.known) >= MOST:
                self.known.clear()
            args = *args, *(constants[name] for name in kernel.arg_names[len(args):])
            self.known[key] = Known(compiled, grid, args, tensors)


class Known:
    """A launch of which only the addresses are open."""

    def __init__(self, compiled, grid, args, tensors):
        self.compiled, self.grid = compiled, grid
        self.args = []
        self.pointers = []  # which tensor, and the place of its address in args
        self.descriptors = []  # which tensor, the place of the encoded descriptor, how to encode one, and those of some addresses
        metadata = iter(getattr(compiled.metadata, 'tensordesc_meta', None) or ())
        for i, arg in enumerate(args):
            if i >= len(tensors) or tensors[i] is None:
                self.args.append(arg)
            elif arg is tensors[i]:
                self.pointers.append((i, len(self.args)))
                self.args.append(0)
            else:
                fields = {name: field for name, field in vars(arg).items() if name != 'base'}
                self.descriptors.append((i, len(self.args), functools.partial(encode, fields, next(metadata)), {}))
                self.args += [None, *arg.shape, *arg.strides]
        self.launch = compiled.run
        if self.descriptors:
            # triton's own encodes the descriptors and goes on with another one
            self.launch = copy.copy(compiled.run)
            self.launch.launch = inspect.getclosurevars(compiled.run.launch).nonlocals['launcher']

    def __call__(self, tensors, device):
        args = self.args.copy()
        for i, place in self.pointers:
            args[place] = tensors[i].data_ptr()
        for i, place, encoder, encoded in self.descriptors:
            address = tensors[i].data_ptr()
            descriptor = encoded.get(address)
            if descriptor is None:
                if len(encoded) >= MOST_ADDRESSES:
                    encoded.clear()
                descriptor = encoded[address] = encoder(tensors[i])
            args[place] = descriptor
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled = self.compiled
        self.launch(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def encode(fields, metadata, x: torch.Tensor):
    """The encoded descriptor of x."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    # from triton 3.8 on there is a third argument, not used on this backend
    unused = (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
    return make_tensordesc_arg(SimpleNamespace(base=x, **fields), metadata, *unused)[0]


def observed() -> bool:
    """Whether what triton compiles is to be changed or watched, or its launches are."""
    knobs = triton.knobs
    return bool(
        knobs.runtime.debug
        or knobs.compilation.instrumentation_mode
        or knobs.runtime.add_stages_inspection_hook is not None
        or getattr(knobs.runtime.launch_enter_hook, 'calls', True)
        or getattr(knobs.runtime.launch_exit_hook, 'calls', True)
    )
