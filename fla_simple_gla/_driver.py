"""Launches compiled kernels by the CUDA driver, without triton.

The driver reads the parameters of a launch from memory on the host, of which each compiled kernel has its own
(`Variant`). A `Launch` is an image of that memory in which only the addresses are missing.

The signature that triton compiled tells which parameters there are: one for each argument that is no constant, in
order. A tensor descriptor is several: the encoded descriptor, then its shape, then its strides. The last two
parameters are the addresses of scratch memory. The sizes that follow from this are compared with the sizes that the
kernel's PTX declares. Where they differ, or where a launch asks for something that is not known here, triton launches
the kernel (`Variant.is_understood`).

Memory: a launch takes some 2 KB. Each of its descriptors is kept in encoded form for the last `MAX_ADDRESSES`
addresses, at 400 bytes each.
"""

import ctypes
import functools
import math
import operator
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ._private import private
from ._triton import switched_off, warn_once, why_not

MAX_ADDRESSES = 64
# Of an encoded tensor descriptor (CUtensorMap)
TENSOR_MAP_BYTES = 128
TENSOR_MAP_ALIGNMENT_BYTES = 64
TENSOR_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
L2_PROMOTION_128 = 2
TensorMapMemory = ctypes.c_char * (TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT_BYTES - 1)
# The number types of triton's signatures, as `struct` formats
NUMBERS = {
    'i1': 'b', 'i8': 'b', 'i16': 'h', 'i32': 'i', 'i64': 'q',
    'u1': 'B', 'u8': 'B', 'u16': 'H', 'u32': 'I', 'u64': 'Q', 'fp32': 'f',
}  # fmt: skip
# CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes (there are none) and their number
LAUNCH_CONFIG = struct.Struct('<7I4xQQI4x')
STREAM_OFFSET_BYTES = 32


class Tiles(NamedTuple):
    """A tensor that a kernel reads or writes in tiles, through a descriptor (TMA) of this shape and these strides."""

    x: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any  # of a tile in shared memory

    def for_triton(self) -> Any:
        """The descriptor, as a launch by triton takes it."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(self.x, list(self.shape), list(self.strides), list(self.block_shape), self.layout)


class Driver(NamedTuple):
    """Functions of the CUDA driver."""

    launch: Callable[..., int]
    encode: Callable[..., int]
    error_name: Callable[..., int]


@functools.cache
def cuda_driver() -> Driver | None:
    """The driver's functions; None where there is no driver, or one that lacks a function."""
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
    """Why kernels are not launched by the CUDA driver; None where they are."""
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
    """Raise a `RuntimeError` that names a CUDA error, unless it is 0."""
    if error:
        driver, name = cuda_driver(), ctypes.c_char_p()
        assert driver is not None  # it has returned the error
        driver.error_name(error, ctypes.byref(name))
        raise RuntimeError(f'{what} failed with CUDA error {error} ({(name.value or b"unknown").decode()})')


class Field(NamedTuple):
    """A parameter in memory."""

    format: str  # for `struct`
    offset: int  # in bytes
    argument: int = -1  # the number of the argument that it comes from; -1 of scratch memory


def declared_sizes(ptx: str) -> list[int] | None:
    """The bytes of each parameter, as the PTX of a kernel declares them; None where the PTX is not understood."""
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
    """The part of a tile that one TMA copy moves, as triton compiled it."""

    sizes: ctypes.Array
    steps: ctypes.Array
    swizzle: int  # of a tile in shared memory

    @classmethod
    def of(cls, description: dict | None, rank: int) -> 'Box | None':
        """The box that triton describes; None where the description is not understood."""
        if not isinstance(description, dict) or description.get('fp4_padded'):
            return None
        if len(description.get('block_size', ())) != rank:
            return None
        array = ctypes.c_uint32 * rank
        return cls(array(*description['block_size'][::-1]), array(*[1] * rank), description['swizzle'])


class Variant:
    """A compiled kernel, and the memory from which the driver reads the parameters of its launches."""

    def __init__(self, compiled: Any, arguments: int):
        """`arguments` is the number of positional arguments. Those after them are constants."""
        metadata = compiled.metadata
        self.compiled = compiled  # keeps the kernel on the device
        self.name, self.function = compiled.name, compiled.function
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared
        self.scratch = metadata.global_scratch_size
        self.fields: list[Field] = []
        self.end = 0
        self.taken: list[tuple[str, int]] = []  # kind and number of each argument that is no constant
        self.pointers: list[Field] = []
        self.tiles: list[tuple[Field, Box]] = []
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
                field = self.add(f'{TENSOR_MAP_BYTES}s', TENSOR_MAP_ALIGNMENT_BYTES, i)
                box = Box.of(next(descriptions, None), rank)
                if box is None:
                    self.known = False
                else:
                    self.tiles.append((field, box))
                for number in 'i' * rank + 'q' * rank:
                    self.add(number, struct.calcsize(number), i)
            elif kind in NUMBERS:
                self.taken.append(('number', i))
                self.add(NUMBERS[kind], struct.calcsize(NUMBERS[kind]), i)
            else:
                self.known = False
        self.scratch_offset = self.add('Q', 8).offset
        self.add('Q', 8)  # scratch memory of a profiler
        plain = metadata.num_ctas == 1 and not (
            metadata.profile_scratch_size or metadata.launch_cooperative_grid or metadata.launch_pdl
        )
        # one call writes all pointers: they have to lie side by side
        together = all(a.offset + 8 == b.offset for a, b in zip(self.pointers, self.pointers[1:]))
        sizes = [struct.calcsize(field.format) for field in self.fields]
        self.is_understood = bool(self.known and plain and together and sizes == declared_sizes(compiled.asm['ptx']))

        self.memory = (ctypes.c_char * self.end)()
        self.view = memoryview(self.memory).cast('B')
        self.config = (ctypes.c_char * LAUNCH_CONFIG.size)()
        # The addresses of the parameters. (The driver can also be given the memory as a whole, but then driver 580
        # starts kernels that find no descriptor in it.)
        start = ctypes.addressof(self.memory)
        self.parameters = (ctypes.c_void_p * len(self.fields))(*(start + field.offset for field in self.fields))
        self.arguments = ctypes.addressof(self.config), self.function, ctypes.addressof(self.parameters), None
        self.places = {field.offset: place for place, field in enumerate(self.fields)}
        self.write_pointers = struct.Struct(f'<{len(self.pointers)}Q').pack_into
        self.first_pointer = self.pointers[0].offset if self.pointers else 0
        self.pack = struct.Struct('<' + ''.join(self.padded_formats())).pack
        driver = cuda_driver()
        assert driver is not None  # `why_not_direct` has found it
        self.write_stream, self.call = struct.Struct('<Q').pack_into, driver.launch
        self.filled_for: Launch | None = None  # the launch whose numbers are in the memory
        self.lock = threading.Lock()  # for the memory: the driver reads it while other threads run

    def add(self, format: str, alignment: int, argument: int = -1) -> Field:
        """Add a parameter after those so far, and return it."""
        field = Field(format, -(-self.end // alignment) * alignment, argument)
        self.fields.append(field)
        self.end = field.offset + struct.calcsize(format)
        return field

    def padded_formats(self) -> Iterator[str]:
        """The formats of the fields, each after the padding before it."""
        end = 0
        for field in self.fields:
            yield f'{field.offset - end}x{field.format}'
            end = field.offset + struct.calcsize(field.format)

    def fill(self, launch: 'Launch') -> None:
        """Write all of a launch into the memory but its addresses and its stream."""
        self.view[:] = launch.image
        LAUNCH_CONFIG.pack_into(self.config, 0, *launch.grid, self.threads, 1, 1, self.shared, 0, 0, 0)
        self.filled_for = launch

    def image(self, args: tuple) -> bytes:
        """The memory of a launch with these arguments. Its addresses are zero."""
        values: list[Any] = []
        for kind, i in self.taken:
            if kind == 'pointer':
                values.append(0)
            elif kind == 'number':
                values.append(args[i])
            else:
                values += (b'', *args[i].shape, *args[i].strides)
        return self.pack(*values, 0, 0)


def picker(numbers: Sequence[int]) -> Callable[[Sequence], tuple]:
    """A function that returns the items with these numbers."""
    return operator.itemgetter(*numbers) if len(numbers) > 1 else lambda items: tuple([items[i] for i in numbers])


class Launch(NamedTuple):
    """A launch of which only the addresses and the stream are missing."""

    variant: Variant
    grid: tuple[int, int, int]
    image: bytes  # of the parameters; the addresses are zero
    pointers: tuple[int, ...]  # the numbers of the tensors whose addresses the kernel takes
    pick: Callable  # takes the addresses of all tensors, returns those of `pointers`
    # for each descriptor the number of the parameter, the number of the tensor, and how it is encoded
    maps: tuple[tuple[int, int, 'TensorMaps'], ...]

    @classmethod
    def of(cls, variant: Variant, grid: tuple[int, int, int], args: tuple) -> 'Launch':
        """The launch with these arguments. A tensor has the number of its argument."""
        maps = [
            (variant.places[field.offset], field.argument, TensorMaps(args[field.argument], box))
            for field, box in variant.tiles
        ]
        pointers = tuple(field.argument for field in variant.pointers)
        return cls(variant, grid, variant.image(args), pointers, picker(pointers), tuple(maps))

    def renumbered(self, numbers: Sequence[Any]) -> 'Launch':
        """The same launch, where tensor i has the number `numbers[i]`. The numbers of absent tensors are None."""
        maps = ((place, numbers[i], maps) for place, i, maps in self.maps)
        pointers = tuple(numbers[i] for i in self.pointers)
        return self._replace(pointers=pointers, pick=picker(pointers), maps=tuple(maps))

    def start(self, addresses: Sequence[Any], like: torch.Tensor, stream: int) -> None:
        """Launch on this stream. Addresses of absent tensors are None. Scratch memory is on the device of `like`."""
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
            variant.write_stream(variant.config, STREAM_OFFSET_BYTES, stream)
            error = variant.call(*variant.arguments)
        if error:
            check_error(error, f'the launch of {variant.name}')


class TensorMaps:
    """Encoded descriptors of tensors of one layout. Used by one thread at a time: the caller holds a variant's lock."""

    def __init__(self, tiles: Tiles, box: Box):
        x, shape, strides, *_ = tiles
        rank, size = len(shape), x.itemsize
        # The driver counts dimensions from the last one. It takes no stride for that one, which is contiguous.
        self.shape = struct.pack(f'<{rank}Q', *shape[::-1])
        self.strides = struct.pack(f'<{rank - 1}Q', *[stride * size for stride in strides[-2::-1]])
        self.type, self.rank, self.box = TENSOR_MAP_TYPES[x.dtype], rank, box
        driver = cuda_driver()
        assert driver is not None  # `why_not_direct` has found it
        self.call = driver.encode
        self.places: dict[int, int] = {}  # by the address of the tensor, the address of its descriptor
        self.memory: list[ctypes.Array] = []  # which the descriptors lie in

    def encode(self, address: int) -> int:
        """The address of a new descriptor, of the tensor at `address`."""
        memory = TensorMapMemory()
        place = -(-ctypes.addressof(memory) // TENSOR_MAP_ALIGNMENT_BYTES) * TENSOR_MAP_ALIGNMENT_BYTES
        # the last line: no interleaving, and zeros outside of the tensor
        error = self.call(
            place, self.type, self.rank, address, self.shape, self.strides, self.box.sizes, self.box.steps,
            0, self.box.swizzle, L2_PROMOTION_128, 0,
        )  # fmt: skip
        if error:
            shape, strides = (struct.unpack(f'<{len(x) // 8}Q', x)[::-1] for x in (self.shape, self.strides))
            check_error(error, f'a tensor descriptor of shape {[*shape]}, strides {[*strides]} in bytes')
        if len(self.places) >= MAX_ADDRESSES:
            self.places, self.memory = {}, []
        self.places[address] = place
        self.memory.append(memory)
        return place
