"""Launches of compiled kernels by the CUDA driver, without triton.

The parameters of a kernel lie in memory of its own, and of a `Launch` all of them are ready but the addresses. What the parameters are
follows from the signature that triton compiled: what is not constant, in order; of a descriptor the encoded one, its shape and its
strides; and at last the addresses of two scratches. Their sizes are compared with those that the kernel's PTX declares, and where these
differ, or a launch asks for more than is known here, triton launches the kernel (`Variant.is_understood`).

Memory: a launch has some 2 KB, and of each of its descriptors the encoded ones of the last `MAX_ADDRESSES` addresses, 400 bytes each.
"""

import ctypes
import functools
import math
import operator
import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ._private import private
from ._triton import switched_off, warn_once, why_not

MAX_ADDRESSES = 64
TENSOR_MAP = 128  # bytes of an encoded descriptor, which lies at a multiple of 64
# The numbers among the parameters, by the types of triton's signatures.
NUMBERS = {'i1': 'b', 'i8': 'b', 'i16': 'h', 'i32': 'i', 'i64': 'q', 'u1': 'B', 'u8': 'B', 'u16': 'H', 'u32': 'I', 'u64': 'Q', 'fp32': 'f'}
# CUtensorMapDataType
TENSOR_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
L2_PROMOTION_128 = 2
MAP_MEMORY = ctypes.c_char * (TENSOR_MAP + 63)
# CUlaunchConfig: grid, block, bytes of shared memory; stream; attributes, of which there are none
LAUNCH_CONFIG = struct.Struct('<7I4xQQI4x')
STREAM_OFFSET = 32


class Tiles(NamedTuple):
    """A tensor that a kernel reads or writes in tiles through a descriptor (TMA), with the shape and strides that the kernel is to see."""

    x: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: object  # of a tile in shared memory

    def for_triton(self):
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(self.x, list(self.shape), list(self.strides), list(self.block_shape), self.layout)


class Driver(NamedTuple):
    """Functions of the CUDA driver."""

    launch: object
    encode: object
    error_name: object


@functools.cache
def cuda_driver() -> Driver | None:
    """The driver's functions; None where it is not found or lacks one."""
    try:
        library = ctypes.CDLL('libcuda.so.1')
        launch, encode, error_name = library.cuLaunchKernelEx, library.cuTensorMapEncodeTiled, library.cuGetErrorName
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    launch.argtypes = [pointer] * 4
    encode.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    error_name.argtypes = [number, ctypes.POINTER(ctypes.c_char_p)]
    return Driver(launch, encode, error_name)


@functools.cache
def why_not_direct() -> str | None:
    """Why the CUDA driver is not called directly; None where it is."""
    if torch.version.cuda is None:
        return 'PyTorch is not built for CUDA'
    if switched_off('FLA_SIMPLE_GLA_DIRECT'):
        return 'FLA_SIMPLE_GLA_DIRECT=0 is in the environment'
    if private('triton.compiler.CompiledKernel') is None:
        return 'triton has no CompiledKernel'
    reason = why_not('direct')
    if reason is not None:
        warn_once('direct')
        return reason
    return None if cuda_driver() is not None else 'the CUDA driver (libcuda.so.1) is not found, or too old'


def check_error(error: int, what: str) -> None:
    if error:
        name = ctypes.c_char_p()
        cuda_driver().error_name(error, ctypes.byref(name))
        raise RuntimeError(f'{what} failed with CUDA error {error} ({(name.value or b"unknown").decode()})')


class Field(NamedTuple):
    """A parameter in memory: its format for `struct`, where it begins, and which argument it is taken from."""

    format: str
    offset: int
    argument: int | None = None


def declared_sizes(ptx: str) -> list[int] | None:
    """Bytes of each parameter of the kernel that PTX describes, as it declares them."""
    entry = re.search(r'\.entry\s+[\w$]+\s*\((.*?)\)\s*(?:\.|\{)', ptx, re.DOTALL)
    if entry is None:
        return None
    sizes = []
    for parameter in filter(None, map(str.strip, entry[1].split(','))):
        found = re.fullmatch(r'\.param\s+(?:\.align\s+\d+\s+)?\.[a-z](\d+)\s+[^\[]*(?:\[(\d+)\])?', parameter)
        if found is None:
            return None
        sizes.append(int(found[1]) // 8 * int(found[2] or 1))
    return sizes


class Box(NamedTuple):
    """What one copy of a tile takes, as triton compiled it."""

    sizes: ctypes.Array
    steps: ctypes.Array
    swizzle: int  # of a tile in shared memory

    @classmethod
    def of(cls, description: dict | None, rank: int) -> 'Box | None':
        """None where it is not known what triton says of it."""
        if not isinstance(description, dict) or len(description.get('block_size', ())) != rank or description.get('fp4_padded'):
            return None
        array = ctypes.c_uint32 * rank
        return cls(array(*description['block_size'][::-1]), array(*[1] * rank), description['swizzle'])


class Variant:
    """One compiled kernel, and the memory from which the driver takes the parameters of its launches."""

    def __init__(self, compiled, arguments: int):
        """`arguments` is the number of those that are given in order; those after them are constants."""
        metadata = compiled.metadata
        self.compiled = compiled  # keeps the kernel on the device
        self.name, self.function = compiled.name, compiled.function
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared
        self.scratch = metadata.global_scratch_size
        self.fields, self.end = [], 0
        self.taken = []  # kind and number of the arguments that are no constants
        self.pointers, self.tiles = [], []
        descriptions = iter(getattr(metadata, 'tensordesc_meta', None) or ())
        self.known = True
        for i, kind in enumerate(compiled.src.signature.values()):
            if kind == 'constexpr':
                continue
            if i >= arguments or not isinstance(kind, str):
                self.known = False
            elif kind[0] == '*':
                self.taken.append(('pointer', i))
                self.pointers.append(self.add('Q', 8, i))
            elif kind.startswith('tensordesc'):
                self.taken.append(('tiles', i))
                rank = kind.split(']')[0].count(',') + 1
                self.tiles.append((self.add(f'{TENSOR_MAP}s', 64, i), Box.of(next(descriptions, None), rank)))
                for number in 'i' * rank + 'q' * rank:
                    self.add(number, struct.calcsize(number), i)
            elif kind in NUMBERS:
                self.taken.append(('number', i))
                self.add(NUMBERS[kind], struct.calcsize(NUMBERS[kind]), i)
            else:
                self.known = False
        self.scratch_offset = self.add('Q', 8).offset
        self.add('Q', 8)  # of a profiler
        plain = metadata.num_ctas == 1 and not (metadata.profile_scratch_size or metadata.launch_cooperative_grid or metadata.launch_pdl)
        # The pointers lie side by side, so that one call writes them.
        together = all(a.offset + 8 == b.offset for a, b in zip(self.pointers, self.pointers[1:]))
        described = all(box is not None for _, box in self.tiles)
        sizes = [struct.calcsize(field.format) for field in self.fields]
        self.is_understood = bool(self.known and plain and together and described and sizes == declared_sizes(compiled.asm['ptx']))

        self.memory = (ctypes.c_char * self.end)()
        self.view = memoryview(self.memory).cast('B')
        self.config = (ctypes.c_char * LAUNCH_CONFIG.size)()
        # Where each parameter lies. (Told of the memory as a whole, driver 580 starts kernels that find no descriptor in it.)
        self.parameters = (ctypes.c_void_p * len(self.fields))(*(ctypes.addressof(self.memory) + field.offset for field in self.fields))
        self.arguments = ctypes.addressof(self.config), self.function, ctypes.addressof(self.parameters), None
        self.places = {field.offset: place for place, field in enumerate(self.fields)}
        self.write_pointers = struct.Struct(f'<{len(self.pointers)}Q').pack_into
        self.first_pointer = self.pointers[0].offset if self.pointers else 0
        self.pack = struct.Struct('<' + ''.join(self.padded_formats())).pack
        self.write_stream, self.call = struct.Struct('<Q').pack_into, cuda_driver().launch
        self.filled_for = None  # the launch whose numbers are in the memory
        self.lock = threading.Lock()  # of the memory: the driver reads it while other threads run

    def add(self, format: str, alignment: int, argument: int | None = None) -> Field:
        field = Field(format, -(-self.end // alignment) * alignment, argument)
        self.fields.append(field)
        self.end = field.offset + struct.calcsize(format)
        return field

    def padded_formats(self):
        end = 0
        for field in self.fields:
            yield f'{field.offset - end}x{field.format}'
            end = field.offset + struct.calcsize(field.format)

    def fill(self, launch: 'Launch') -> None:
        """Put a launch into the memory, but for addresses and the stream."""
        self.view[:] = launch.image
        LAUNCH_CONFIG.pack_into(self.config, 0, *launch.grid, self.threads, 1, 1, self.shared, 0, 0, 0)
        self.filled_for = launch

    def image(self, args: tuple) -> bytes:
        """The memory of a launch with these arguments, its addresses left zero."""
        values = []
        for kind, i in self.taken:
            if kind == 'pointer':
                values.append(0)
            elif kind == 'number':
                values.append(args[i])
            else:
                values += (b'', *args[i].shape, *args[i].strides)
        return self.pack(*values, 0, 0)


def picker(numbers: Sequence[int]) -> Callable[[Sequence], tuple]:
    """A function that picks the items of these numbers."""
    return operator.itemgetter(*numbers) if len(numbers) > 1 else lambda items: tuple([items[i] for i in numbers])


class Launch(NamedTuple):
    """A launch of which only the addresses are open."""

    variant: Variant
    grid: tuple[int, int, int]
    image: bytes  # of the parameters, the addresses left zero
    pointers: tuple[int, ...]  # whose addresses the kernel takes, by their number among the tensors
    pick: Callable  # those addresses, from all
    maps: tuple[tuple[int, int, 'TensorMaps'], ...]  # which parameters are descriptors, of which tensor, and how they are encoded

    @classmethod
    def of(cls, variant: Variant, grid: tuple[int, int, int], args: tuple) -> 'Launch':
        """The launch with these arguments, whose tensors are numbered as they come."""
        maps = [
            (variant.places[field.offset], field.argument, TensorMaps(args[field.argument], box)) for field, box in variant.tiles
        ]
        pointers = tuple(field.argument for field in variant.pointers)
        return cls(variant, grid, variant.image(args), pointers, picker(pointers), tuple(maps))

    def renumbered(self, numbers: list[int | None]) -> 'Launch':
        """The same launch where tensor i of these is number `numbers[i]` of others."""
        maps = ((place, numbers[i], maps) for place, i, maps in self.maps)
        pointers = tuple(numbers[i] for i in self.pointers)
        return self._replace(pointers=pointers, pick=picker(pointers), maps=tuple(maps))

    def start(self, addresses: list[int | None], like: torch.Tensor, stream: int) -> None:
        """Launch on this stream; memory that the kernel needs is allocated as like's is."""
        variant, grid, _, _, pick, maps = self
        if variant.scratch:
            scratch = like.new_empty(variant.scratch * math.prod(grid), dtype=torch.int8)
        with variant.lock:
            if variant.filled_for is not self:
                variant.fill(self)
            variant.write_pointers(variant.view, variant.first_pointer, *pick(addresses))
            for place, i, encoded in maps:
                address = addresses[i]
                variant.parameters[place] = encoded.places.get(address) or encoded.encode(address)
            if variant.scratch:
                struct.pack_into('<Q', variant.view, variant.scratch_offset, scratch.data_ptr())
            variant.write_stream(variant.config, STREAM_OFFSET, stream)
            error = variant.call(*variant.arguments)
        if error:
            check_error(error, f'the launch of {variant.name}')


class TensorMaps:
    """The descriptors of tensors of one layout, encoded by the driver. Used by one thread at a time, that of a launch."""

    def __init__(self, tiles: Tiles, box: Box):
        x, shape, strides, *_ = tiles
        rank, size = len(shape), x.itemsize
        # the driver counts dimensions from the last one, and leaves out its stride, which is one
        self.shape = struct.pack(f'<{rank}Q', *shape[::-1])
        self.strides = struct.pack(f'<{rank - 1}Q', *[stride * size for stride in strides[-2::-1]])
        self.type, self.rank, self.box = TENSOR_MAP_TYPES[x.dtype], rank, box
        self.places = {}  # of those that are encoded, by address of the tensor
        self.memory = []  # which they lie in

    def encode(self, address: int) -> int:
        """Where the descriptor of the tensor at an address lies."""
        memory = MAP_MEMORY()
        place = -(-ctypes.addressof(memory) // 64) * 64
        error = cuda_driver().encode(
            place, self.type, self.rank, address, self.shape, self.strides, self.box.sizes, self.box.steps,
            0, self.box.swizzle, L2_PROMOTION_128, 0,
        )
        if error:
            shape, strides = (struct.unpack(f'<{len(x) // 8}Q', x)[::-1] for x in (self.shape, self.strides))
            check_error(error, f'a tensor descriptor of shape {[*shape]}, strides {[*strides]} in bytes')
        if len(self.places) >= MAX_ADDRESSES:
            self.places, self.memory = {}, []
        self.places[address] = place
        self.memory.append(memory)
        return place
