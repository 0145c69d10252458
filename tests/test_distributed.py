"""A model computes the same with its heads or parameters on two processes as on one: on the CPU, over gloo.

This file is also what those processes run: each compares its part with the same computation in one piece.
"""

import copy
import datetime
import functools
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from harness import TOLERANCE, rms_error
from torch import nn

from fla_simple_gla import chunk_simple_gla

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason='needs torch.distributed with gloo',
)

ROOT = pathlib.Path(__file__).parent.parent
RANKS = 2
TIMEOUT = 120
WIDTH, HEADS, D = 48, 4, 12


class SimpleGLA(nn.Module):
    """The layer of the README with projections for q, k and v. Their sizes give the number of heads."""

    def __init__(self, heads_of_q=HEADS):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, heads_of_q * D, bias=False), nn.Linear(WIDTH, heads_of_q * D, bias=False)
        self.v, self.gate = nn.Linear(WIDTH, HEADS * D, bias=False), nn.Linear(WIDTH, HEADS)
        nn.init.normal_(self.gate.bias, 3.0)  # each head has a different memory
        self.out = nn.Linear(HEADS * D, WIDTH, bias=False)

    def forward(self, x):
        """The outputs, and the state after the last token."""
        q, k, v = (projection(x).unflatten(-1, (-1, D)) for projection in (self.q, self.k, self.v))
        o, state = chunk_simple_gla(q, k, v, F.logsigmoid(self.gate(x).float()), output_final_state=True)
        return self.out(o.flatten(2)), state


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(WIDTH), SimpleGLA()

    def forward(self, x):
        return x + self.layer(self.norm(x))[0]


def assert_close(what, found, expected):
    assert found.shape == expected.shape, f'{what}: {found.shape}, expected {expected.shape}'
    error = rms_error(found, expected)
    assert error <= TOLERANCE[torch.float32][0], f'{what}: {error}'


def tensor_parallel(rank, heads_of_q):
    """Each rank has some of the heads, with their rows and columns of the projections."""
    # Only the ranks import these: not every build of PyTorch has them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    whole = SimpleGLA(heads_of_q)
    plan = {name: ColwiseParallel() for name in ('q', 'k', 'v', 'gate')} | {'out': RowwiseParallel()}
    sharded = parallelize_module(copy.deepcopy(whole), init_device_mesh('cpu', (RANKS,)), plan)

    def part(x, dim):
        return x.chunk(RANKS, dim)[rank]

    x, dy = torch.randn(2, 2, 100, WIDTH)
    dstate = torch.randn(2, HEADS, D, D)
    x_whole, x_sharded = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, expected_state = whole(x_whole)
    found, found_state = sharded(x_sharded)
    assert found_state.shape[1] == HEADS // RANKS
    torch.autograd.backward([expected, expected_state], [dy, dstate])
    torch.autograd.backward([found, found_state], [dy, part(dstate, 1)])

    assert_close('output', found, expected)
    assert_close('state', found_state, part(expected_state, 1))
    assert_close('gradient of the input', x_sharded.grad, x_whole.grad)
    for (name, p), e in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        dim = 1 if name == 'out.weight' else 0
        assert torch.equal(p.to_local(), part(e, dim)), name
        assert_close(f'gradient of {name}', p.grad.to_local(), part(e.grad, dim))


def fully_sharded(rank, compiled):
    """FSDP: each rank has a part of every parameter, and its own sequences. One process has the sequences of all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = nn.Sequential(Block(), Block())
    blocks = copy.deepcopy(whole)
    if compiled:
        blocks = [torch.compile(block, fullgraph=True, backend='aot_eager') for block in blocks]
    mesh = init_device_mesh('cpu', (RANKS,))
    sharded = fully_shard(nn.Sequential(*(fully_shard(block, mesh=mesh) for block in blocks)), mesh=mesh)
    for block in sharded:
        block.set_force_sum_reduction_for_comms(True)  # with torch 2.8 gloo sums when it should average
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (whole, sharded)]
    parameters = [(name, p, e) for (name, e), p in zip(whole.named_parameters(), sharded.parameters(), strict=True)]

    own = slice(2 * rank, 2 * rank + 2)
    losses = []
    for step in range(3):
        x, target = torch.randn(2, 2 * RANKS, 70, WIDTH)
        expected = F.mse_loss(whole(x), target)
        found = F.mse_loss(sharded(x[own]), target[own])
        expected.backward()
        found.backward()

        loss = found.detach() / RANKS
        torch.distributed.all_reduce(loss)
        assert_close(f'loss in step {step}', loss, expected.detach())
        losses.append(loss.item())
        for name, p, e in parameters:
            assert p.to_local().numel() == e.numel() // RANKS, name
            assert_close(f'gradient of {name} in step {step}', p.grad.full_tensor(), e.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, p, e in parameters:
            assert_close(f'{name} after step {step}', p.detach().full_tensor(), e.detach())
    assert losses[-1] < 0.9 * losses[0], losses


CHECKS = {
    'tensor parallel': functools.partial(tensor_parallel, heads_of_q=HEADS),
    'tensor parallel, grouped heads': functools.partial(tensor_parallel, heads_of_q=HEADS // 2),
    'fully sharded': functools.partial(fully_sharded, compiled=False),
    'fully sharded, compiled': functools.partial(fully_sharded, compiled=True),
}


@pytest.mark.slow
@pytest.mark.parametrize('check', CHECKS)
def test_as_in_one_process(check, tmp_path):
    # Without the interpreter and without GPUs the calls take the CPU path.
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    environment |= {'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    logs = [tmp_path / f'rank{rank}' for rank in range(RANKS)]
    processes = []
    deadline = time.monotonic() + TIMEOUT
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, check, str(rank), str(tmp_path / 'rendezvous')]
            with log.open('w') as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        # If one process fails, the connection of the other breaks, and it ends too.
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [process.poll() for process in processes]  # None if it has not ended in time
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = '\n'.join(f'--- rank {rank}:\n{log.read_text()}' for rank, log in enumerate(logs))
    assert codes == [0] * RANKS, f'exit codes {codes}\n{output}'


def run_rank(check, rank, rendezvous):
    torch.set_num_threads(1)
    # It is shorter than the time of a rank, so that a rank which waits in vain can still report that.
    timeout = datetime.timedelta(seconds=TIMEOUT / 2)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{rendezvous}', rank=rank, world_size=RANKS, timeout=timeout
    )
    torch.manual_seed(0)
    CHECKS[check](rank)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    run_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    # The usual exit may abort: a thread of gloo may free its last work while Python shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
