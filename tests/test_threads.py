"""Threads: calls at the same time, kernels that are compiled in parallel, and threads that have not used a GPU."""

import sys
import threading
import time
from unittest import mock

import pytest
import torch
from fake_gpu import Compiled, Kernel, Watched, addresses, signature_of, simple_launch
from harness import GPU, HALF, MODES, STATEFUL, Case, assert_same_bits, launch_by_triton, make_inputs, needs_gpu, run

from fla_simple_gla import _launch, _passes
from fla_simple_gla._cache import Cache
from fla_simple_gla._passes import empty


def in_threads(calls: list) -> None:
    """Make the calls at the same time, each in a thread of its own. An error of one of them is raised."""
    start, raised = threading.Barrier(len(calls), timeout=30), []

    def guarded(call):
        try:
            start.wait()
            call()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in raised:
        raise error


@pytest.fixture
def threads_that_take_turns():
    """The interpreter of Python switches between threads every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_cache_in_threads(threads_that_take_turns):
    cache, wrong = Cache(20), []

    def use(seed):
        numbers = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in numbers:
            value = cache.get(i)
            if value is None:
                cache[i] = str(i)
            elif value != str(i):
                wrong.append((i, value))

    in_threads([lambda seed=seed: use(seed) for seed in range(4)])
    assert not wrong and len(cache) <= 40
    kept = [*cache.new, *cache.young, *cache.old]
    assert len({*kept}) == len(kept)


def test_first_calls_of_threads_at_once_compile_a_kernel_once(gpu):
    class SlowKernel(Kernel):
        def __getitem__(self, grid):
            time.sleep(0.02)
            return super().__getitem__(grid)

    a_pass, launched = Watched(kernel=SlowKernel()), []

    def call():
        for _ in range(20):
            x = torch.ones(4)
            y, given, _ = a_pass(x)
            assert given is x
            launched.append((x, y))
            assert _passes.thread.running is None

    in_threads([call] * 4)
    ((_, by_triton, _),) = a_pass.kernel.launches
    assert sorted([*gpu.values(), addresses(*by_triton)]) == sorted(addresses(*tensors) for tensors in launched)
    # A thread runs the pass twice at most, and replays the record of another thread if there is one.
    assert 2 <= a_pass.runs <= 8


@pytest.mark.parametrize('planned', [False, True])
def test_a_slow_first_call_does_not_drop_the_record_of_another_thread(gpu, planned):
    begun, recorded = threading.Event(), threading.Event()

    def body(tensors, *numbers):
        if not begun.is_set():
            begun.set()
            assert recorded.wait(timeout=30)
        return tensors[0], None

    a_pass, plan = Watched(body), mock.Mock(cached=True, records={}) if planned else None

    def call(times):
        for _ in range(times):
            a_pass(torch.ones(4), plan=plan)

    def record():
        assert begun.wait(timeout=30)
        call(3)
        assert a_pass.runs == 3
        recorded.set()

    in_threads([lambda: call(1), record])
    call(3)
    assert a_pass.runs == 3


def test_threads_that_replay_at_once_get_their_own_addresses(gpu, threads_that_take_turns):
    """The parameters of a launch are in memory that all threads share."""
    a_pass, seen = Watched(), {}
    for _ in range(2):
        a_pass(torch.ones(4))
    gpu.launches.clear()
    gpu.wait = 1e-4

    def call():
        for _ in range(50):
            x = torch.ones(4)
            y, *_ = a_pass(x)
            seen.setdefault(threading.current_thread(), []).append(addresses(x, y))

    in_threads([call] * 4)
    for thread, expected in seen.items():
        assert [launch.values for launch in gpu.launches if launch.thread is thread] == expected
    assert len(gpu.launches) == 200 and a_pass.runs == 2


def kernels_compiled_ahead(count, futures, monkeypatch):
    """Kernels that triton can compile ahead, if all of them are compiled at the same time.

    Returns them, the threads in which they are loaded, and the events of their compilation.
    """
    loaded, events = [], []
    together = threading.Barrier(count, timeout=30)

    class Future:
        def __init__(self, kernel):
            self.result = lambda: kernel

    class Mode:
        def __init__(self, pool):
            self.pool = pool

        def __enter__(self):
            events.append('begin')

        def __exit__(self, *args):
            events.append('end')

    class CompiledAhead(Compiled):
        @property
        def run(self):
            loaded.append(threading.current_thread())
            return 'launcher'

    class KernelAhead(Kernel):
        def warmup(self, *args, grid, **constants):
            events.append((self, args[1].is_meta, grid, constants))
            compiled = CompiledAhead(signature_of((args[0], args[0])))
            return Future(compiled) if futures else compiled

    monkeypatch.setattr(_launch, 'private', {
        'triton.compiler.CompiledKernel': Compiled, 'triton.AsyncCompileMode': Mode, 'triton.FutureKernel': Future,
        'triton.runtime.driver.active.launcher_cls': lambda src, metadata: together.wait(),
    }.get)  # fmt: skip
    return [KernelAhead() for _ in range(count)], loaded, events


@pytest.mark.parametrize('futures', [True, False])
def test_kernels_are_compiled_side_by_side_and_loaded_one_by_one(futures, gpu, monkeypatch):
    kernels, loaded, events = kernels_compiled_ahead(3, futures, monkeypatch)

    def body(tensors):
        (x,) = tensors
        y = empty(x, 5)
        for kernel in kernels:
            simple_launch(kernel)((x, y))
            simple_launch(kernel)((x, y))
        return (y,)

    a_pass = Watched(body)
    for _ in range(3):  # the kernels are known from the second call on
        a_pass(torch.ones(4))
    assert events == ['begin', *[(kernel, True, (1, 3, 1), {}) for kernel in kernels], 'end']
    assert loaded == [threading.current_thread()] * 3
    assert [len(kernel.launches) for kernel in kernels] == [1] * 3
    # One dry run, and two runs.
    assert a_pass.runs == 3


def test_a_kernel_alone_is_not_compiled_ahead(gpu, monkeypatch):
    mode = mock.Mock()
    monkeypatch.setattr(_launch, 'private', lambda name: Compiled if name == 'triton.compiler.CompiledKernel' else mode)
    a_pass = Watched()
    for _ in range(2):
        a_pass(torch.ones(4))
    assert not mode.mock_calls and a_pass.runs == 3 and len(a_pass.kernel.launches) == 1


@pytest.mark.skipif(GPU, reason='needs the interpreter')
def test_threads_share_the_interpreter():
    """The interpreter replaces functions of `triton.language` while a kernel runs, so only one pass runs at a time."""
    cases = [Case(9, K=16, V=16, seed=seed).of(mode) for seed, mode in enumerate(MODES)]
    inputs = [make_inputs(case) for case in cases]
    expected = [run(MODES[mode], case, x) for mode, case, x in zip(MODES, cases, inputs)]
    found = [None] * len(cases)

    def call(i, mode):
        for _ in range(2):
            x = inputs[i]
            leaves = [x[name].detach().requires_grad_() for name in ('q', 'k', 'v', 'g')]
            options = dict(initial_state=x['initial_state'], output_final_state=True) if mode in STATEFUL else {}
            o, ht = MODES[mode](*leaves, **options)
            outputs, given = ([o, ht], [x['do'], x['dht']]) if mode in STATEFUL else ([o], [x['do']])
            gradients = torch.autograd.grad(outputs, leaves, given)
            found[i] = dict(zip(('o', 'dq', 'dk', 'dv', 'dg'), (o.detach(), *gradients)))

    in_threads([lambda i=i, mode=mode: call(i, mode) for i, mode in enumerate(MODES) if mode != 'segments'])
    for mode, results, exact in zip(MODES, found, expected):
        if mode != 'segments':  # the harness patches the package for it, which is not for several threads
            assert_same_bits(results, {name: exact[name] for name in results})


@needs_gpu
@pytest.mark.parametrize('direct', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_thread_without_a_context(mode, direct, monkeypatch):
    """A call may be the first use of a GPU by its thread. PyTorch gives it memory that is allocated already."""
    if not direct:
        launch_by_triton(monkeypatch)
    case = Case(200, K=64, V=64, dtype=HALF)
    first, *others = (make_inputs(case) for _ in range(4))  # no descriptor is encoded for their addresses
    results = []

    def call(inputs):
        with torch.no_grad():
            results.append(MODES[mode](*(inputs[name] for name in ('q', 'k', 'v', 'g')))[0].cpu())

    call(first)
    for inputs in others:  # the calls record and replay
        in_threads([lambda inputs=inputs: call(inputs)])
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)
