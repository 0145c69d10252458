"""Passes: recording and replay, dry runs, what a pass may do, and when a pass is not replayed.

Most tests run on the GPU of `fake_gpu`.
"""

import weakref
from unittest import mock

import pytest
import torch
from fake_gpu import Kernel, Watched, addresses
from harness import HALF, MODES, Case, assert_same_bits, launch_by_triton, make_inputs, needs_gpu, poisoned_memory, run

from fla_simple_gla import _driver, _launch, _passes, _plans
from fla_simple_gla._passes import device_pass, empty, zeros

# Records


def test_the_first_call_runs_the_second_records_and_later_ones_replay(gpu):
    a_pass, runs, seen, results = Watched(), [], [], []
    kept = [(torch.ones(4), torch.ones(3)) for _ in range(5)]
    for x, z in kept:  # each has addresses of its own
        y, given, none = a_pass(x, z)
        assert given is x and none is None and y.shape == (5,)
        runs.append(a_pass.runs)
        seen.append(addresses(x, y, z))
        results.append(y)
    assert runs == [1, 2, 2, 2, 2]
    # Triton makes the first launch of a kernel.
    assert len(a_pass.kernel.launches) == 1 and gpu.values() == seen[1:]


def test_a_first_call_that_raises_is_made_again(gpu):
    """It has not compiled the kernels. A call that records must find them compiled."""
    failures = iter([torch.OutOfMemoryError('no memory')])

    def body(tensors, *numbers):
        for failure in failures:
            raise failure
        y = empty(tensors[0], 5)
        a_pass.launch((tensors[0], y))
        return (y,)

    a_pass = Watched(body)
    with pytest.raises(torch.OutOfMemoryError):
        a_pass(torch.ones(4))
    for _ in range(5):
        a_pass(torch.ones(4))
    assert a_pass.runs == 3  # one that raised, one that compiled, one that was recorded
    assert len(a_pass.kernel.launches) == 1 and len(gpu.launches) == 4


def changed(x: torch.Tensor, z: torch.Tensor) -> dict:
    """Calls for which a record of `(x, z)` does not hold."""
    return {
        'number': ((x, z), (2,)),
        'dtype': ((x.half(), z), (1,)),
        'shape': ((torch.ones(5, 4), z), (1,)),
        'strides': ((x.clone().T, z), (1,)),
        'alignment': ((torch.ones(17)[1:].view(4, 4), z), (1,)),
        'absent': ((x, None), (1,)),
        'one tensor twice': ((x, x), (1,)),
    }


@pytest.mark.parametrize('change', changed(torch.ones(4, 4), torch.ones(4, 4)))
def test_other_calls_are_other_records(change, gpu):
    a_pass = Watched()
    x, z = torch.ones(4, 4), torch.ones(4, 4)
    for _ in range(3):
        a_pass(x, z, numbers=(1,))
    tensors, numbers = changed(x, z)[change]
    for _ in range(3):
        a_pass(*tensors, numbers=numbers)
    a_pass(x, z, numbers=(1,))
    assert a_pass.runs == 4
    *_, other, last = gpu.launches
    for found, (first, second) in ((other, tensors), (last, (x, z))):
        assert found.values[0] == first.data_ptr()
        assert second is None and len(found.values) == 2 or found.values[2] == second.data_ptr()


@pytest.mark.parametrize('cached', [True, False])
def test_a_plan_stands_for_the_layouts_if_it_is_kept(cached, gpu, monkeypatch):
    layouts = mock.Mock(side_effect=_passes.layouts)
    monkeypatch.setattr(_passes, 'layouts', layouts)
    plan, a_pass = _plans.Plan(_plans.Options(1.0)), Watched()
    plan.cached = cached
    for _ in range(4):
        a_pass(x := torch.ones(4), plan=plan if cached else _plans.Plan(plan.options))
    assert (a_pass.runs, layouts.call_count) == (2, 0 if cached else 4)
    assert gpu.values()[-1][0] == x.data_ptr()


def test_a_kernel_is_compiled_again_for_what_triton_specialises_on(gpu):
    kernel, x = Kernel(), torch.ones(5)
    launch = _launch.launcher(lambda tensors, number: (kernel, (1, 1, 1), (*tensors, number), {}))
    a_pass = device_pass(lambda tensors, number: launch(tensors, number) or ())
    launched = []
    for tensor, number in (
        (x, 3),
        (x[1:], 3),
        (x.half(), 3),
        (x, 16),
        (x, 1),
        (x, 2**40),
        (x, 2**63),
        (x, 0.5),
        (x, False),
        (x, 0),
    ):
        before = len(kernel.launches)
        a_pass((tensor,), number)
        launched.append(len(kernel.launches) - before)
    # Zero is a multiple of 16, as 16 is.
    assert launched == [1] * 9 + [0]
    for parameter in kernel.params:
        parameter.do_not_specialize = True
    _launch.specialization_rules.cache_clear()
    _launch.variants.clear()
    for number in (3, 16, 1, 0):
        a_pass((x[2:],), number)
    assert len(kernel.launches) == 9 + 1


@needs_gpu
@pytest.mark.parametrize('mode', MODES)
def test_recorded_passes(mode, monkeypatch):
    """A replay gives the bits of a pass that runs and whose kernels triton launches, whichever calls came before."""
    layouts = [dict(layout=layout) for layout in ('contiguous', 'wide', 'odd', 'heads_first', 'qkv')]
    others = [
        dict(T=1),
        dict(H=1),
        dict(gate=None),
        dict(scale=1.0),
        dict(cu_seqlens=(0, 130, 250)),
        dict(dtype=torch.float32),
    ]
    cases = [Case(**dict(T=300, K=64, V=64, dtype=HALF) | change).of(mode) for change in layouts + others]
    with monkeypatch.context() as patch:
        launch_by_triton(patch)
        expected = [run(MODES[mode], case) for case in cases]
    kept, replay = [], _passes.RecordedPass.replay
    replays = mock.Mock(side_effect=replay)
    monkeypatch.setattr(_passes.RecordedPass, 'replay', lambda *args: replays(*args))
    for i in range(4):
        for case, results in zip(cases, expected):
            kept.append(make_inputs(case))  # each has addresses of its own
            replays.reset_mock()
            assert_same_bits(run(MODES[mode], case, kept[-1]), results)
            # Forward and backward are replayed in every case.
            assert i < 2 or replays.call_count == 2 or _driver.why_not_direct() is not None


# Memory of a replay


def test_a_replay_allocates_anew(gpu):
    a_pass, x = Watched(), torch.ones(4)
    results = [a_pass(x)[0] for _ in range(5)]
    assert len({*addresses(*results)}) == 5


def test_zeros_are_zero_each_time(gpu):
    """So are zeros with the dtype of the given tensor."""

    def body(tensors):
        y, z = zeros(tensors[0], 3, dtype=torch.int32), zeros(tensors[0], 4)
        a_pass.launch((*tensors, y))
        return y, z

    a_pass, kept = Watched(body), []
    for _ in range(4):
        with poisoned_memory():
            y, z = a_pass(torch.ones(4))
        assert (y.tolist(), y.dtype, z.tolist(), z.dtype) == ([0] * 3, torch.int32, [0.0] * 4, torch.float32)
        kept.append(y.fill_(9))


@pytest.mark.parametrize('contiguous', [True, False])
def test_a_result_like_a_given_tensor_is_contiguous_and_its_own(contiguous, gpu):
    x = torch.ones(4, 6) if contiguous else torch.ones(6, 4).T
    a_pass = Watched(lambda tensors: (empty(tensors[0], 4, 6), empty(tensors[0], 4, 6)))
    for _ in range(4):
        a, b = a_pass(x)
        assert len({*addresses(x, a, b)}) == 3
        assert all(y.shape == (4, 6) and y.is_contiguous() and y.dtype == x.dtype for y in (a, b))


def test_what_is_no_result_is_freed_after_its_last_launch(gpu, monkeypatch):
    monkeypatch.setattr(_passes, 'MAX_SHARING_BYTES', 0)
    made, alive = [], []

    def body(tensors):
        (x,) = tensors
        a = empty(x, 5)
        a_pass.launch((x, a))
        b = empty(x, 6)
        a_pass.launch((a, b))
        c = empty(x, 7)
        del a
        a_pass.launch((b, c))
        return (c,)

    a_pass = Watched(body)
    for _ in range(2):
        a_pass(torch.ones(4))
    allocate, launch = torch.Tensor.new_empty_strided, gpu.launch

    def watched_empty(*args, **kwargs):
        made.append(weakref.ref(x := allocate(*args, **kwargs)))
        return x

    def watched_launch(*args):
        alive.append([tensor() is not None for tensor in made])
        return launch(*args)

    monkeypatch.setattr(torch.Tensor, 'new_empty_strided', watched_empty)
    for variant in _launch.variants.values():
        monkeypatch.setattr(variant, 'call', watched_launch)
    result = a_pass(torch.ones(4))
    assert alive == [[True], [True, True], [False, True, True]]
    assert [tensor() is not None for tensor in made] == [False, False, True] and len(result) == 1 and a_pass.runs == 2


@pytest.mark.parametrize('scratch', [0, 50])
def test_small_ones_share_an_allocation(scratch, gpu, monkeypatch):
    monkeypatch.setattr(_passes, 'MAX_SHARING_BYTES', 400)

    def body(tensors):
        (x,) = tensors
        a, b, c, large, result = (empty(x, n) for n in (3, 100, 70, 101, 7))
        a_pass.launch((a, b, c))
        a_pass.launch((large, result, zeros(x, 2)))
        return (result,)

    a_pass = Watched(body, Kernel(global_scratch_size=scratch))
    for _ in range(2):
        a_pass(torch.ones(4))
    sizes, allocate = [], torch.Tensor.new_empty_strided

    def watched(*args, **kwargs):
        sizes.append((x := allocate(*args, **kwargs)).nbytes)
        return x

    monkeypatch.setattr(torch.Tensor, 'new_empty_strided', watched)
    gpu.launches.clear()
    (result,) = a_pass(torch.ones(4))
    (a, b, c), (large, last, _) = gpu.values()
    # 12, 400 and 280 bytes, each rounded up to a multiple of 256.
    assert (b - a, c - b, last) == (256, 512, result.data_ptr())
    assert not a <= large < a + 1280
    assert sorted(size for size in sizes if size != scratch * 3) == [4 * 7, 4 * 101, 1280]


# What a pass may do


COMPUTATIONS = {
    'fills': lambda x, y: y.fill_(3),
    'adds': lambda x, y: x + 1,
    'adds in place': lambda x, y: x.add_(1),
    'copies into': lambda x, y: y.copy_(x),
    'clones': lambda x, y: x.clone(),
    'casts': lambda x, y: x.half(),
    'copies a transposed one': lambda x, y: x.T.contiguous(),
    'allocates by other functions': lambda x, y: torch.empty_like(x),
    'allocates ones': lambda x, y: x.new_ones(3),
    'reads a number': lambda x, y: x[0, 0].item(),
    'writes to an element': lambda x, y: x.__setitem__(0, 7),
    'changes a shape': lambda x, y: y.unsqueeze_(0),
    'writes by out': lambda x, y: torch.add(x, 1, out=y),
}


def computing_pass(name: str) -> Watched:
    def body(tensors):
        (x,) = tensors
        y = empty(x, 4, 4)
        COMPUTATIONS[name](x, y)
        return (y,)

    return Watched(body)


@pytest.mark.parametrize('name', COMPUTATIONS)
def test_a_pass_that_computes_is_an_error_when_it_is_recorded(name, gpu):
    a_pass, x = computing_pass(name), torch.ones(4, 4)
    a_pass(x.clone())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'a pass only allocates, takes views and launches, but calls aten\.\w+'):
            a_pass(x)
    assert torch.equal(x, torch.ones(4, 4))


@pytest.mark.parametrize('name', COMPUTATIONS)
def test_a_pass_that_computes_is_an_error_in_a_dry_run(name, gpu):
    a_pass, x = computing_pass(name), torch.ones(4, 4)
    this = _passes.Pass(a_pass.call.__wrapped__, ((x,),), -1, True)
    with pytest.raises(RuntimeError, match='a pass only allocates, takes views and launches'):
        _passes.dry_run(this)
    assert torch.equal(x, torch.ones(4, 4)) and _passes.thread.running is this
    _passes.thread.running = None


def test_views_are_allowed(gpu):
    def body(tensors):
        (x,) = tensors
        y = empty(x, 4, 6)
        views = (
            x.mT,
            x[:2],
            x.view(-1),
            x.unflatten(1, (2, 2)),
            y.detach(),
            y[0].expand(3, 6),
            y.view(2, 12),
            y.as_strided((2,), (1,)),
        )
        a_pass.launch(views)
        return x, y

    a_pass = Watched(body)
    for _ in range(4):
        x, y = a_pass(torch.ones(4, 4))
        launched = (gpu.values() or [None])[-1]
        assert launched in (None, [x.data_ptr()] * 4 + [y.data_ptr()] * 4)
    assert a_pass.runs == 2 and launched


def test_the_dry_run_of_a_pass_neither_allocates_nor_launches(gpu):
    a_pass, x = Watched(), torch.ones(4)
    this = _passes.Pass(a_pass.call.__wrapped__, ((x, None),), -1, True)
    ((kernel, grid, args, constants),) = _passes.dry_run(this)
    assert (kernel, grid, constants) == (a_pass.kernel, (1, 3, 1), {})
    assert args[0] is x and args[1].is_meta and args[1].shape == (5,) and args[2] is None
    assert not kernel.launches and not gpu.launches
    _passes.thread.running = None


FOREIGN = {
    'a launch of a tensor from elsewhere': lambda x, y, other: ((x, other), (y,)),
    'a launch of a view elsewhere in a tensor': lambda x, y, other: ((x, x[1:]), (y,)),
    'a result from elsewhere': lambda x, y, other: ((x, y), (other,)),
    'a view as a result': lambda x, y, other: ((x, y), (y[1:],)),
}


@pytest.mark.parametrize('name', FOREIGN)
def test_a_pass_with_tensors_of_unknown_origin_runs_every_time(name, gpu):
    others = iter([torch.ones(3) for _ in range(5)])

    def body(tensors):
        (x,) = tensors
        launched, results = FOREIGN[name](x, empty(x, 4), next(others))
        a_pass.launch(launched)
        expected.append(addresses(*launched))
        return results

    a_pass, expected = Watched(body), []
    for i in range(5):
        (result,) = a_pass(torch.ones(4))
        assert result.shape == ((3,) if 'result' in name else (4,)) and a_pass.runs == i + 1
    assert gpu.values() == expected[1:]


def test_an_error_in_a_pass_leaves_the_thread_as_it_was(gpu):
    def body(tensors, fails):
        if fails:
            raise KeyError('a test')
        a_pass.launch(tensors)
        return tensors

    a_pass, x = Watched(body), torch.ones(4)
    for numbers in (True, True, False, False):
        if numbers:
            with pytest.raises(KeyError, match='a test'):
                a_pass(x, numbers=(numbers,))
        else:
            a_pass(x, numbers=(numbers,))
        assert _passes.thread.running is None
    assert gpu.values() == [[x.data_ptr()]]


def test_a_pass_inside_of_another_is_part_of_it(gpu):
    inner = Watched(lambda tensors: inner.launch(tensors) or tensors[:1])

    def body(tensors):
        x, z = tensors
        y = empty(x, 5)
        inner(x, y)
        inner(z, y)
        outer.launch((x, z))
        return (y,)

    outer = Watched(body)
    for i in range(4):
        x, z = torch.ones(4), torch.ones(4)
        (y,) = outer(x, z)
        found = gpu.values()
        expected = [addresses(x, y), addresses(z, y), addresses(x, z)]
        # Triton makes the first launch of each kernel.
        assert found == (expected if i else expected[1:2])
    assert (outer.runs, inner.runs) == (2, 4)


# Passes that run each time


def test_a_kernel_that_a_hook_took_away_is_launched_by_triton(gpu, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(Kernel, '__getitem__', lambda self, grid: lambda *args, **constants: self.launches.append(args))
    a_pass = Watched(kernel=kernel)
    for _ in range(3):
        a_pass(torch.ones(4))
    assert len(kernel.launches) == a_pass.runs == 3 and not gpu.launches and not _launch.variants


@pytest.mark.parametrize('name', ['why_not_direct', 'launches_are_observed'])
def test_passes_run_each_time_where_the_driver_is_not_for_them(name, gpu, monkeypatch):
    monkeypatch.setattr(_passes, name, lambda: 'a reason')
    a_pass = Watched()
    for i in range(4):
        y, x, _ = a_pass(torch.ones(4))
        assert (
            a_pass.kernel.launches[-1] == ((1, 3, 1), (x, y), {})
            and len(a_pass.kernel.launches) == a_pass.runs == i + 1
        )
    assert not gpu.launches and not len(_passes.records)
    # The driver is called as soon as that is allowed.
    monkeypatch.setattr(_passes, name, lambda: None)
    for _ in range(3):
        a_pass(torch.ones(4))
    assert a_pass.runs == 6 and len(gpu.launches) == 2


def test_a_record_is_not_replayed_while_triton_is_watched(gpu, monkeypatch):
    a_pass = Watched()
    for _ in range(3):
        a_pass(torch.ones(4))
    monkeypatch.setattr(_passes, 'launches_are_observed', lambda: True)
    a_pass(torch.ones(4))
    assert (a_pass.runs, len(gpu.launches), len(a_pass.kernel.launches)) == (3, 2, 2)
