"""What the kernels for Hopper share: their tasks, rings of buffers, gates, row sums, tiles and descriptors.

A kernel is cut into partitions, which run at the same time: warp groups that multiply, and single warps that load
tiles, sum gates, or add up rows. A program of a sweep takes one task after another: a head of a sequence, or of a
segment of it. All partitions go through its tasks in the same order, chunk by chunk. (The attention has tasks and gates
of its own, and shares rings, tiles and descriptors.)

**Relay.** Where the tasks are no multiple of the programs, and of equal length, programs share some: each takes as many
chunks as any other. Program p begins with the first chunks of a task that program p + 1 ends with, goes on with whole
tasks, and ends with the last chunks of a task that program p - 1 has begun. What it hands over is the fp32 state, so
that no bit depends on it. As no program has fewer chunks than a task, the state is there in time. A program waits only
for the first thing that a program before it does, and the GPU starts programs in their order: none waits forever.

**Rings.** Partitions hand each other buffers in shared memory. A ring has n buffers, and to each two barriers: `full`
completes when all producers have filled the buffer, `empty` when all consumers have read it. Whoever uses a ring goes
round it with a cursor of its own, from `producer_start` or `consumer_start`:

    producer    acquire    wait until the buffer is empty, which all are in the first round
                commit     arrive at `full`; a copy by TMA arrives by itself, when its bytes are there
    consumer    wait       wait until the buffer is full
                release    arrive at `empty`

The docstring of a kernel says who arrives at each barrier, and what the kernel takes of a multiprocessor, which has
232,448 bytes of shared memory and 65,536 registers. One thread arrives for its partition, after the partition's warps
were synchronised (bar.sync): triton 3.6 and 3.7 do that if shared memory was touched since the last time, later
versions always. With 3.6 and 3.7 two arrivals come without it, of P in `sweep.py` and of the tiles in the key partition
of `gradients.py`. They come right after a wait for wgmma, which is of the whole warp group. A tile that was loaded to
registers is released after the use of what was loaded, since an arrival waits for no load (see `row_sum_partition`).

**Tiles** end where a sequence ends. All descriptors have five dimensions. In those of packed sequences the first two
have offsets that cancel each other modulo 2^64, so that the bound of the dimension of tokens falls on any token
(`ragged` of https://github.com/triton-lang/triton, tools).
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language import core

from .._blocks import block_bounds, first_block, is_sequence, sequence_bounds, state_slot
from .._driver import Tiles
from .._gates import LOG2E, RESET
from .._layout import cdiv
from .._passes import empty, zeros
from .._sweeps import Operands, Setting
from . import CHUNK_TOKENS, is_shared

# renamed in triton 3.8
tma_load = getattr(tma, 'async_load', None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, 'async_store', None) or tma.async_copy_shared_to_global
# renamed in triton 3.7
thread_barrier = getattr(gl, 'thread_barrier', None) or gl.barrier

C = gl.constexpr(CHUNK_TOKENS)
BS = gl.constexpr(64)  # columns of V to a warp group
# Of descriptors of packed sequences: the bound of the dimension of tokens, and the stride that, less that of a token,
# the first dimension has
RAGGED_END = gl.constexpr(2**30)
RAGGED_STRIDE = 2**34


def aggregate(cls):
    """Decorates a class of values in kernels, whose annotations are their fields. It is called with the values of all
    fields, in order.

    Triton makes such an `__init__` by itself from 3.8 on.
    """
    names = tuple(cls.__annotations__)

    def __init__(self, *values):
        assert len(values) == len(names), f'{cls.__name__} takes {len(names)} values, got {len(values)}'
        for name, value in zip(names, values):
            setattr(self, name, value if isinstance(value, core.base_value) else gl.constexpr(value))

    __init__.__triton_builtin__ = True  # triton refuses other functions of Python where a kernel uses them
    cls.__init__ = __init__
    return core._aggregate(cls)


# Of fields: an integer, or a constant where triton specialises on its value; a pointer, or None; a tensor descriptor,
# or None.
Number = Pointer = Descriptor = object


@aggregate
class Cursor:
    """A place in a ring: a buffer, and the phase of its barriers."""

    i: gl.tensor
    phase: gl.tensor


@gluon.jit
def consumer_start():
    return Cursor(gl.to_tensor(0), gl.to_tensor(0))


@gluon.jit
def producer_start():
    """In the other phase, so that the first wait on `empty` passes at once.

    A partition that is a producer of one ring and a consumer of another has two cursors. To derive one phase from the
    other costs registers: 4 to 8 bytes more were spilled at D 128.
    """
    return Cursor(gl.to_tensor(0), gl.to_tensor(1))


@aggregate
class Ring:
    """The barriers of n buffers, `[n, 1]` each."""

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def acquire(self, at):
        mbarrier.wait(self.empty.index(at.i), at.phase)

    @gluon.jit
    def commit(self, at):
        mbarrier.arrive(self.full.index(at.i), count=1)

    @gluon.jit
    def wait(self, at):
        mbarrier.wait(self.full.index(at.i), at.phase)

    @gluon.jit
    def release(self, at):
        mbarrier.arrive(self.empty.index(at.i), count=1)

    @gluon.jit
    def after(self, at):
        """The next place."""
        n: gl.constexpr = self.full.shape[0]
        i = at.i
        phase = at.phase
        if n == 1:
            phase = phase ^ 1
        else:
            i += 1
            if i == n:
                i = 0
                phase = phase ^ 1
        return Cursor(i, phase)


@gluon.jit
def barriers(n: gl.constexpr, count: gl.constexpr):
    """Barriers of n buffers, each of which `count` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def ring(n: gl.constexpr, producers: gl.constexpr, consumers: gl.constexpr):
    """A ring of n buffers, with so many arrivals when one is filled and when one is read."""
    return Ring(barriers(n, producers), barriers(n, consumers))


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def not_hoisted(x):
    """x, as something that the compiler cannot compute before a loop and keep in registers."""
    return gl.inline_asm_elementwise('mov.b32 $0, $1;', '=r,r', [x], dtype=x.dtype, is_pure=False, pack=1)


@aggregate
class Task:
    """A head of a sequence, or of a segment of it; or some heads next to each other."""

    i_s: gl.tensor  # the number of the sequence or segment among all that are swept
    i_h: gl.tensor  # the head, or the first of them
    i_b: gl.tensor  # the row of the batch
    i_n: gl.tensor  # the number of the sequence (`_blocks.py`)
    first: gl.tensor  # its first token
    end: gl.tensor  # the one after its last; there are none of padding, nor of what lies in no sequence
    bos: gl.tensor  # first token of the sequence
    eos: gl.tensor  # the one after its last

    @gluon.jit
    def tokens(self):
        return self.end - self.first

    @gluon.jit
    def chunk(self, t, REVERSE: gl.constexpr):
        """First token of the chunk that a sweep comes to after so many tokens, counted from that of the task."""
        return ((self.tokens() - 1) // C * C - t) if REVERSE else t


@aggregate
class Work:
    """The tasks of a launch."""

    cu_seqlens: Pointer  # [N + 1] or None
    indices: Pointer  # [N]: the slots of the sequences' states in a pool, or None
    tasks: Number
    N: Number  # sequences
    T: Number  # tokens to a row of the batch
    P: Number  # slots of the pool
    segment: Number  # tokens to a segment
    relay: Pointer  # fp32 [programs, numbers of a state]: what programs hand over; or None
    flags: Pointer  # int32 [programs, threads with a state]: whether it is there, zeros at first; or None
    share: Number  # chunks to a program in a relay
    H: gl.constexpr
    HEADS: gl.constexpr  # heads of a task
    SEGMENTS: gl.constexpr  # whether sequences are swept in segments

    @gluon.jit
    def task(self, i):
        i_s = i // (self.H // self.HEADS)
        i_h = i % (self.H // self.HEADS) * self.HEADS
        if self.SEGMENTS:
            i_b, i_n, first, end, bos, eos = block_bounds(self.cu_seqlens, i_s, self.N, self.T, self.segment)
            end = gl.where(is_sequence(i_n, self.N), gl.maximum(first, end), first)
        else:
            i_n = i_s
            if self.cu_seqlens is None:
                i_b = i_n.to(gl.int64)
                bos = i_n * 0
                eos = bos + self.T
                end = eos
            else:
                i_n -= 1
                i_b = (i_n * 0).to(gl.int64)
                bos, eos = sequence_bounds(self.cu_seqlens, i_n, self.N, self.T)
                end = gl.where(is_sequence(i_n, self.N), eos, bos)
            first = bos
        if self.indices is not None:
            end = gl.where(self.slot(i_n) < 0, first, end)
        return Task(i_s, i_h, i_b, i_n, first, end, bos, eos)

    @gluon.jit
    def count(self):
        """How many sequences or segments are swept."""
        return self.tasks // (self.H // self.HEADS)

    @gluon.jit
    def range(self):
        """The first chunk of this program in a relay, among those of all tasks, and the one after its last."""
        chunks = self.tasks * ((self.T + C - 1) // C)
        begin = gl.minimum(gl.program_id(0) * self.share, chunks)
        return begin, gl.minimum(begin + self.share, chunks)

    @gluon.jit
    def start(self):
        """With `stop` and `step`, the numbers that this program takes."""
        return gl.program_id(0) if self.relay is None else gl.to_tensor(0)

    @gluon.jit
    def stop(self):
        if self.relay is None:
            return self.tasks
        else:
            NT = (self.T + C - 1) // C
            begin, end = self.range()
            whole = end // NT - (begin + NT - 1) // NT
            return gl.where(begin < end, whole + (end % NT != 0).to(gl.int32) + (begin % NT != 0).to(gl.int32), 0)

    @gluon.jit
    def step(self):
        return gl.num_programs(0) if self.relay is None else gl.to_tensor(1)

    @gluon.jit
    def take(self, j):
        """The task of number j; and from where to where to sweep, in tokens that the whole sweep comes to before."""
        if self.relay is None:
            task = self.task(j)
            return task, gl.to_tensor(0), task.tokens()
        else:
            NT = (self.T + C - 1) // C
            begin, end = self.range()
            shared = (end % NT != 0).to(gl.int32)
            i = (begin + NT - 1) // NT + j - shared
            starts = j < shared
            ends = i >= end // NT
            task = self.task(gl.where(starts, end // NT, gl.where(ends, begin // NT, i)))
            first = gl.where(ends & ~starts, begin % NT * C, 0)
            return task, first, gl.where(starts, end % NT * C, task.tokens())

    @gluon.jit
    def handed_over(self, b_s, i_p, W: gl.constexpr, NW: gl.constexpr):
        """Where the pieces of a state of warp group W are that program i_p hands over; and flags, one to a thread."""
        PIECES: gl.constexpr = len(b_s)
        layout: gl.constexpr = b_s[0].type.layout
        ROWS: gl.constexpr = b_s[0].shape[0]
        COLUMNS: gl.constexpr = b_s[0].shape[1]
        i = (gl.program_id(1) * gl.num_programs(0) + i_p) * NW + W
        o_r = not_hoisted(gl.arange(0, ROWS, gl.SliceLayout(1, layout)))[:, None] * COLUMNS
        o_c = not_hoisted(gl.arange(0, COLUMNS, gl.SliceLayout(0, layout)))[None, :]
        p = self.relay + i.to(gl.int64) * (PIECES * ROWS * COLUMNS)
        flags = self.flags + i * 128 + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
        return p + (o_r + o_c), ROWS * COLUMNS, flags

    @gluon.jit
    def hand_over(self, b_s, W: gl.constexpr, NW: gl.constexpr):
        """Leave a state for the next program. A thread reads what the thread in its place has written, and so no thread
        waits for others here.
        """
        p, SIZE, flags = self.handed_over(b_s, gl.program_id(0), W, NW)
        for j in gl.static_range(len(b_s)):
            gl.store(p + j * SIZE, b_s[j])
        gl.inline_asm_elementwise(
            'st.release.gpu.global.b32 [$1], 1; mov.b32 $0, 0;', '=r,l', [flags.to(gl.int64, bitcast=True)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @gluon.jit
    def take_over(self, b_s, W: gl.constexpr, NW: gl.constexpr):
        """The state that the program before has left, in tensors like these."""
        p, SIZE, flags = self.handed_over(b_s, gl.program_id(0) - 1, W, NW)
        gl.inline_asm_elementwise(
            '{ .reg .pred p; wait: ld.acquire.gpu.global.b32 $0, [$1]; setp.eq.b32 p, $0, 0; @p bra wait; }', '=r,l',
            [flags.to(gl.int64, bitcast=True)], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        found = ()
        for j in gl.static_range(len(b_s)):
            found = found + (gl.load(p + j * SIZE),)
        return found

    @gluon.jit
    def slot(self, i_n):
        """Where the state of sequence i_n lies; -1 where it has none."""
        return state_slot(self.indices, i_n, self.N, self.P)

    @gluon.jit
    def tile(self, task, end, i_h, i_t, i_d):
        """Coordinates of a tile of head i_h, from token i_t of a task and column i_d on. It ends before token `end`."""
        if self.cu_seqlens is None:
            return [task.i_b.to(gl.int32), 0, i_h, task.first + i_t, i_d]
        else:
            return [RAGGED_END, end, i_h, RAGGED_END - (end - task.first) + i_t, i_d]

    @gluon.jit
    def columns(self, task, i_t, w, GROUP: gl.constexpr):
        """Coordinates of the tile of 64 columns that warp group w has, of a tensor with a head for each GROUP heads:
        from column w * 64 of the task's head on, or from the first column of its own head on.
        """
        if self.HEADS == 2:
            return self.tile(task, task.end, (task.i_h + w) // GROUP, i_t, 0)
        else:
            return self.tile(task, task.end, task.i_h // GROUP, i_t, w * BS)

    @gluon.jit
    def clear(self, task, desc, buf, i_h, i_d):
        """Zeros in the rows of head i_h of a task that is padding, or lies in no sequence."""
        COLUMNS: gl.constexpr = buf.shape[1]
        if self.cu_seqlens is not None or self.indices is not None:
            if ~is_sequence(task.i_n, self.N) | (self.slot(task.i_n) < 0):
                end = gl.minimum(task.first + self.segment, task.eos) if self.SEGMENTS else task.eos
                tma.store_wait(0)
                buf.store(gl.zeros([C, COLUMNS], buf.dtype, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
                fence_async_shared()
                for i_t in range(0, end - task.first, C):
                    tma_store(desc, self.tile(task, end, i_h, i_t, i_d), buf)

    @gluon.jit
    def anchor(self, task, i_c, blocks, BA: gl.constexpr):
        """Whether there is an anchor for chunk i_c of a task (`_gates.py`), and its number. Anchor blocks are the
        sequence's, not the task's.
        """
        i_c += (task.first - task.bos) // C
        last = (task.eos - task.bos + C - 1) // C - 1
        ends_block = ((i_c + 1) % (BA // C) == 0) | (i_c == last)
        i_a = first_block(self.cu_seqlens, task.i_n, task.bos, self.T, BA) + i_c // (BA // C)
        return ends_block | (i_c == last - 1), gl.where(ends_block, i_a, blocks + task.i_n)


@aggregate
class States:
    """States in memory, `[., H, K, V]` with any strides; or None."""

    p: Pointer
    s_n: Number
    s_h: Number
    s_k: Number
    s_v: Number

    @gluon.jit
    def of(self, i, i_h):
        return self.p + i * self.s_n + i_h.to(gl.int64) * self.s_h

    @gluon.jit
    def load(self, p, o_v, o_k, V, K):
        """Columns o_v and rows o_k of the state at p, transposed as states are in registers; zero from V and K on."""
        o_v = not_hoisted(o_v)[:, None]
        o_k = not_hoisted(o_k)[None, :]
        p += o_v.to(gl.int64) * self.s_v + o_k.to(gl.int64) * self.s_k
        return gl.load(p, mask=(o_v < V) & (o_k < K), other=0.0).to(gl.float32)

    @gluon.jit
    def store(self, p, o_v, o_k, b_s, V, K):
        o_v = not_hoisted(o_v)[:, None]
        o_k = not_hoisted(o_k)[None, :]
        gl.store(p + (o_v.to(gl.int64) * self.s_v + o_k.to(gl.int64) * self.s_k), b_s, mask=(o_v < V) & (o_k < K))


@aggregate
class Skip:
    """The factors of v that are added to o, `[H, V]` with any strides; or None."""

    p: Pointer
    s_h: Number
    s_v: Number

    @gluon.jit
    def load(self, i_h, o_v, V):
        return gl.load(self.p + i_h * self.s_h + o_v * self.s_v, mask=o_v < V, other=0.0).to(gl.float32)


@aggregate
class Gates:
    """Of each chunk in a ring, and of each head of a task, the sums of its gates `[C]`, and the decays from its start
    `[C]`, times the scale, to its end `[C]`, and over all of it `[1]`. Where there are step sizes, which are factors of
    the tokens of k, they are in the decays to the end, and `key_sums` are the sums less their logarithms. Elsewhere
    `key_sums` are the sums.
    """

    sums: gl.shared_memory_descriptor
    key_sums: gl.shared_memory_descriptor
    from_start: gl.shared_memory_descriptor
    to_end: gl.shared_memory_descriptor
    decays: gl.shared_memory_descriptor
    ring: Ring


@gluon.jit
def gate_buffers(n: gl.constexpr, ring, STEPS: gl.constexpr = False):
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    sums = gl.allocate_shared_memory(gl.float32, [n, C], row)
    key_sums = sums
    if STEPS:
        key_sums = gl.allocate_shared_memory(gl.float32, [n, C], row)
    from_start = gl.allocate_shared_memory(gl.float32, [n, C], row)
    to_end = gl.allocate_shared_memory(gl.float32, [n, C], row)
    decays = gl.allocate_shared_memory(gl.float32, [n, 1], row)
    return Gates(sums, key_sums, from_start, to_end, decays, ring)


@aggregate
class GatesOfTokens:
    """What the gates of chunks are made of."""

    g: Pointer  # [B, T, H], any strides; or None
    dt: Pointer  # step sizes, of the same strides; or None
    s_b: Number
    s_t: Number
    s_h: Number
    scale: Number


@gluon.jit
def load_gates(p, offsets, stride, mask, other, N: gl.constexpr):
    """Those of N heads, a stride apart; nothing of None."""
    found = ()
    if p is not None:
        for h in gl.static_range(N):
            found = found + (gl.load(p + offsets + h * stride, mask=mask, other=other),)
    return found


@gluon.jit
def gate_partition(work, gates, tokens, REVERSE: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr):
    """The gates of every chunk, of N heads of a task from FIRST on. One warp.

    Those of one head are asked for a chunk ahead. Two take too many registers for that, and their chunks take longer
    than a load.
    """
    AHEAD: gl.constexpr = N == 1
    step = -C if REVERSE else C
    layout: gl.constexpr = gl.BlockedLayout([C // 32], [32], [1], [0])
    r = gl.arange(0, C, layout)
    at = producer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        L = task.tokens()
        o_t = task.chunk(first, REVERSE) + r
        o_g = task.i_b * tokens.s_b + (task.i_h + FIRST).to(gl.int64) * tokens.s_h
        o_g += (task.first + o_t).to(gl.int64) * tokens.s_t
        if AHEAD:
            # (back in time o_t is negative where there are no tokens)
            mask = (o_t >= 0) & (o_t < L)
            gates_of = load_gates(tokens.g, o_g, tokens.s_h, mask, 0.0, N)
            steps_of = load_gates(tokens.dt, o_g, tokens.s_h, mask, 1.0, N)
        for _ in range(first, last, C):
            if AHEAD:
                these = gates_of
                these_steps = steps_of
                o_t += step
                o_g += step * tokens.s_t
            mask = (o_t >= 0) & (o_t < L)
            gates_of = load_gates(tokens.g, o_g, tokens.s_h, mask, 0.0, N)
            steps_of = load_gates(tokens.dt, o_g, tokens.s_h, mask, 1.0, N)
            if not AHEAD:
                these = gates_of
                these_steps = steps_of
                o_t += step
                o_g += step * tokens.s_t
            for h in gl.static_range(N):
                b_g = gl.zeros([C], gl.float32, layout)
                if tokens.g is not None:
                    b_g = these[h].to(gl.float32) * LOG2E
                    b_g = gl.where(b_g < RESET, RESET, b_g)  # NaN stays NaN
                whole = gl.floor(b_g + 0.5)
                sums = gl.associative_scan(whole, 0, add) + gl.associative_scan(b_g - whole, 0, add)
                end = gl.sum(whole, 0) + gl.sum(b_g - whole, 0)
                to_end = gl.exp2(end - sums)
                if h == 0:
                    gates.ring.acquire(at)
                n = at.i * work.HEADS + FIRST + h
                gates.sums.index(n).store(sums)
                gates.from_start.index(n).store(gl.exp2(sums) * tokens.scale)
                gates.decays.index(n).store(gl.full([1], 0.0, gl.float32, layout) + gl.exp2(end))
                if tokens.dt is not None:
                    to_end = to_end * these_steps[h]
                    gates.key_sums.index(n).store(sums - gl.log2(these_steps[h]))
                gates.to_end.index(n).store(to_end)
            gates.ring.commit(at)
            at = gates.ring.after(at)


@aggregate
class Sums:
    """Of each chunk in a ring partial sums of its rows, `[buffers, rows, C]`: one buffer of each warp group, or two."""

    partial: gl.shared_memory_descriptor
    ring: Ring

    @gluon.jit
    def buffer(self, at, i):
        """Buffer i of a chunk."""
        return self.partial.index(at.i * (self.partial.shape[0] // self.ring.full.shape[0]) + i)


@gluon.jit
def sum_parts(partial, start, PARTS: gl.constexpr):
    """The rows of PARTS buffers added up to four, `[4, C]`, which the caller adds up."""
    # A warp has half of the columns, and a thread 4 of them in 2 rows of a slice: few, as it has few registers.
    layout: gl.constexpr = gl.BlockedLayout([2, 4], [4, 8], [1, 2], [1, 0])
    SLICES: gl.constexpr = partial.shape[1] // 8
    total = gl.sum(partial.index(start).slice(0, 8, dim=0).load(layout).reshape([4, 2, C]), 1)
    for j in gl.static_range(1, SLICES * PARTS):
        rows = partial.index(start + j // SLICES).slice(j % SLICES * 8, 8, dim=0).load(layout)
        total += gl.sum(rows.reshape([4, 2, C]), 1)
    return total


@gluon.jit
def row_sum_partition(work, sums, x_o, pairs, REVERSE: gl.constexpr):
    """Rows x . o of each chunk, to `x_o [B, H, T]`. Two warps. The heads of a task have buffers one after the other.

    With `pairs [B, H, T]` there are two such o, and the buffers of a head are those of the first and then of the
    second: x_o gets the rows of the first, and pairs what those of the second have more.
    """
    BUFFERS: gl.constexpr = sums.partial.shape[0] // (sums.ring.full.shape[0] * work.HEADS)
    PARTS: gl.constexpr = BUFFERS if pairs is None else BUFFERS // 2
    at = consumer_start()
    for j in range(work.start(), work.stop(), work.step()):
        task, first, last = work.take(j)
        for t in range(first, last, C):
            i_t = task.chunk(t, REVERSE)
            sums.ring.wait(at)
            for h in gl.static_range(work.HEADS):
                start = (at.i * work.HEADS + h) * BUFFERS
                b_x = gl.sum(sum_parts(sums.partial, start, PARTS), 0)
                r = gl.arange(0, C, b_x.type.layout)
                o_x = (task.i_b * work.H + task.i_h + h) * work.T + task.first + i_t + r
                mask = r < task.end - task.first - i_t
                # A buffer is released after something that needs what was read of it. An arrival does not wait for the
                # loads before it: where x was released right after them, its sums were now and then those of the next
                # tile, which TMA had put there meanwhile (triton 3.6 on H200; ptxas leaves the last load under way
                # across the barrier and the arrival).
                gl.store(x_o + o_x, b_x, mask=mask)
                if pairs is not None:
                    b_all = gl.sum(sum_parts(sums.partial, start + PARTS, PARTS), 0)
                    gl.store(pairs + o_x, b_all - b_x, mask=mask)
            sums.ring.release(at)
            at = sums.ring.after(at)


@gluon.jit
def add_rows(x, ROWS: gl.constexpr):
    """Rows of `x [64, N]`, in the layout of a product, added up to `[ROWS, N]`: 32, 16 or 8. A thread has two of 16
    rows, which it adds up; fewer than 32 are left if 2 or 4 threads add up theirs too.
    """
    N: gl.constexpr = x.shape[1]
    x = gl.sum(x.reshape([4, 2, 8, N]), 1)
    if ROWS == 32:
        return x.reshape([32, N])
    else:
        return gl.sum(x.reshape([4, 32 // ROWS, ROWS // 4, N]), 1).reshape([ROWS, N])


@gluon.jit
def thread_sums(x):
    """The sum of what each thread has of `x [64, 64]`, in the layout of a product: `[128]`."""
    # warp, which 8 rows, row; which 8 columns, pair, number
    x = x.reshape([4, 2, 8, 8, 4, 2])
    return gl.sum(gl.sum(gl.sum(x, 5), 3), 1).reshape([128])


@gluon.jit
def decay_of_pairs(gates, i, o_i, o_j, J: gl.constexpr, N: gl.constexpr, scale, REVERSE: gl.constexpr):
    """The decays of pairs of tokens in a chunk, in columns J to J + N, times the scale, from gates in buffer i."""
    sums_i = gates.key_sums if REVERSE else gates.sums
    sums_j = gates.sums if REVERSE else gates.key_sums
    c_i = sums_i.index(i).load(o_i.type.layout)
    c_j = sums_j.index(i).slice(J, N, dim=0).load(o_j.type.layout)
    if REVERSE:
        before = o_i[:, None] <= o_j[None, :] + J
        d = c_j[None, :] - c_i[:, None]
    else:
        before = o_i[:, None] >= o_j[None, :] + J
        d = c_i[:, None] - c_j[None, :]
    return gl.where(before, gl.exp2(d), 0.0) * scale


@gluon.jit
def as_tuple(x, n: gl.constexpr):
    """What a wait for n products returns: of one it is no tuple."""
    if n == 1:
        return (x,)
    else:
        return x


@gluon.jit
def fragment_indices(n: gl.constexpr):
    """Thread and number of `[128, n]`, a thread to a row."""
    layout: gl.constexpr = gl.BlockedLayout([1, n], [32, 1], [4, 1], [1, 0])
    return gl.arange(0, 128, gl.SliceLayout(1, layout))[:, None], gl.arange(0, n, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def to_fragments(x):
    """`x [64, N]`, in the layout of a product, as `[128, N // 2]`: row t is what thread t holds of it, the 8 numbers of
    a tile of 16 x 16 side by side, those of its first 8 columns before the others, and of these those of its first 8
    rows.
    """
    n: gl.constexpr = x.shape[1] // 2
    # warp, which 8 rows, row; which 16 columns, which 8, pair, number
    x = x.reshape([4, 2, 8, n // 8, 2, 4, 2]).permute((0, 2, 5, 3, 4, 1, 6)).reshape([128, n])
    return gl.convert_layout(x, gl.BlockedLayout([1, n], [32, 1], [4, 1], [1, 0]), assert_trivial=True)


@gluon.jit
def from_fragments(x, layout: gl.constexpr, TURNED: gl.constexpr):
    """The inverse of `to_fragments`. With TURNED, of a thread's 8 numbers those of the first 8 rows come first: a tile
    that was transposed 8 x 8 by 8 x 8 is then read as the whole transposed.
    """
    n: gl.constexpr = x.shape[1]
    x = x.reshape([4, 8, 4, n // 8, 2, 2, 2])
    if TURNED:
        x = x.permute((0, 4, 1, 3, 5, 2, 6))
    else:
        x = x.permute((0, 5, 1, 3, 4, 2, 6))
    return gl.convert_layout(x.reshape([64, 2 * n]), layout, assert_trivial=True)


@gluon.jit
def fragment_offsets(n: gl.constexpr, SIZE: gl.constexpr):
    """Where the numbers of `[128, n]` lie in memory so that a warp moves 512 bytes side by side: SIZE numbers of a
    thread, which are 16 bytes, then as many of the next thread, and so on.
    """
    t, x = fragment_indices(n)
    return (x // SIZE * 128 + t) * SIZE + x % SIZE


@gluon.jit
def store_sum(s_ds, x, W, i_a, i_h, anchors, H: gl.constexpr):
    """To s_ds, the sum of x over each warp of warp group W (in `wide.py` counted over all parts): none waits."""
    x = gl.sum(x.reshape([4, x.shape[0] // 4]), 1)
    w = W * 4 + gl.arange(0, 4, x.type.layout)
    gl.store(s_ds + (w * anchors + i_a) * H + i_h, x)


@gluon.jit
def prefetch(p, size: gl.constexpr):
    """Bring `size` bytes from p on, in 32 pieces, to the L2 cache."""
    p = p.to(gl.int64, bitcast=True) + gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0])) * (size // 32)
    gl.inline_asm_elementwise(
        'cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;', '=r,l,r',
        [p, gl.full(p.shape, size // 32, gl.int32, p.type.layout)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@functools.cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    number = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 1, 1, rows, columns], number)


def descriptor(x: torch.Tensor, columns: int, cu_seqlens: torch.Tensor | None, rows: int = CHUNK_TOKENS) -> Tiles:
    """Of tiles `[1, 1, 1, rows, columns]` of `x [B, T, H, D]`, at coordinates as `Work.tile` makes them."""
    B, T, H, D = x.shape
    # a dimension of one may have any stride
    b, t, h = (stride if size > 1 else 64 for stride, size in zip(x.stride(), (B, T, H)))
    if cu_seqlens is None:
        shape, strides = (B, 1, H, T, D), (b, t, h, t, 1)
    else:
        shape, strides = (2**31 - 1, 2**31 - 1, H, RAGGED_END.value, D), (RAGGED_STRIDE - t, t, h, t, 1)
    return Tiles(x, shape, strides, (1, 1, 1, rows, columns), tile_layout(rows, columns, x.dtype))


def relay_buffers(operands: Operands, setting: Setting, tasks: int, grid: tuple[int, int], numbers: int) -> tuple:
    """Where the programs of a launch hand over states, and the flags for it; None and None if they share no task. A
    program holds a state of so many numbers.
    """
    programs, blocks = grid
    have_equal_lengths = operands.cu_seqlens is None and operands.indices is None and setting.segment is None
    if not have_equal_lengths or not is_shared(tasks, programs):
        return None, None
    states = empty(operands.q, programs * blocks, numbers, dtype=torch.float32)
    # two warp groups have 64 columns of it each
    return states, zeros(operands.q, programs * blocks, 256, dtype=torch.int32)


def chunks_to_a_program(relay: torch.Tensor | None, tasks: int, programs: int, T: int) -> int:
    """How many each takes in a relay; 0 if there is none."""
    return 0 if relay is None else cdiv(tasks * cdiv(T, CHUNK_TOKENS), programs)


def count_pair(q: torch.Tensor, v: torch.Tensor) -> int:
    """Heads of a task of the sweeps up to 128: two that share q and k, if v fills one warp group, else one."""
    K, V = q.shape[-1], v.shape[-1]
    return 2 if is_paired(K, V, v.shape[2] // q.shape[2]) else 1


def is_paired(K: int, V: int, sharing: int) -> bool:
    """Whether tasks have two heads, where so many share q and k."""
    return V <= BS.value < K <= 128 and sharing > 1 and sharing % 2 == 0


def padded(K: int, V: int) -> tuple[int, int]:
    """Rows and columns of a state `[K, V]` in the sweeps up to 128."""
    return 64 if K <= 64 else 128, 64 if V <= 64 else 128
