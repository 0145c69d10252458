"""Segments of the chunk mode: how many there are, which tokens they do not summarise, and anchor blocks in them."""

import pytest
import torch
from harness import (
    DEVICE,
    HALF,
    MODES,
    TOLERANCE,
    Case,
    D,
    check,
    launch_by_triton,
    make_inputs,
    mark_slow,
    reference,
    rms_error,
    run,
    segments_of,
)

from fla_simple_gla import chunk, chunk_simple_gla, fused_chunk, naive_chunk_simple_gla
from fla_simple_gla._cache import Cache
from fla_simple_gla._gates import anchor_tokens
from fla_simple_gla.chunk import Load


def test_how_many_segments(monkeypatch):
    """As many as fill the GPU. One, if the sequences and heads fill it."""
    monkeypatch.setattr(chunk, 'multiprocessors', lambda device: 132)
    monkeypatch.setattr(chunk, 'exists', lambda device: True)

    def segments(B, T, H, D, sequences=None, load=None):
        device = torch.device('cuda', 0)
        tokens = chunk.segment_tokens.__wrapped__(B, T, H, D, load or Load(-(-D // 64), 64), device, sequences)
        assert tokens is None or tokens % 128 == 0
        return 1 if tokens is None else -(-T // tokens)

    assert segments(4, 4096, 64, 128) == 1
    assert segments(1, 8192, 96, 128) == 1
    assert segments(1, 100, 1, 64) == 1
    # A segment has 16 programs, and 264 programs run at once.
    assert 14 <= segments(1, 131072, 8, 128) <= 16
    assert segments(2, 16384, 16, 128) == 4
    assert segments(1, 1_000_000, 4, 64) > 60
    # A program of the sweeps for Hopper takes a whole multiprocessor.
    d64, d128, d256, pairs = Load(1, 64, 1.0), Load(1, 64, 1.45), Load(2, 64, 2.45), Load(0.5, 64, 1.9)
    assert segments(4, 4096, 64, 128, load=d128) == 1
    assert segments(1, 131072, 8, 128, load=d128) == 16
    assert segments(2, 16384, 16, 128, load=d128) == 4
    # Here halves would save less time than their launches take.
    assert segments(4, 2048, 16, 128, load=d128) == 1
    assert segments(8, 1024, 8, 64, load=d64) == 1
    # A chunk of wide states takes longer.
    assert segments(4, 4096, 16, 128, load=d128) == 1 and segments(8, 4096, 4, 256, load=d256) == 2
    # So do states of 512 rows, which two programs hold, for each 128 columns.
    d512 = Load(8, 64, 2.45)
    assert segments(8, 4096, 4, 512, load=d512) == 1 and segments(1, 16384, 4, 512, load=d512) == 4
    # Two heads that share q and k are one program; more programs than multiprocessors share the work.
    assert segments(1, 32768, 128, 64, load=pairs) == 2 and segments(1, 4096, 80, 64, load=pairs) == 3
    assert segments(4, 4096, 80, 64, load=pairs) == 1
    # Packed sequences are cut as one sequence of that length is, unless they are many and short.
    assert segments(1, 131072, 8, 128, 20) == segments(1, 131072, 8, 128)
    assert segments(1, 131072, 8, 128, 2000) == 1


@pytest.mark.parametrize('dtype', mark_slow([torch.float32, HALF], HALF), ids=str)
def test_what_has_decayed_is_not_summarised(dtype):
    """NaN of a token does not reach the other segment if the token has decayed to zero there, forward and backward."""
    q, k, v, do = (x.to(DEVICE, dtype) for x in torch.randn(4, 1, 1280, 1, D))
    g = torch.full((1, 1280, 1), -0.5, device=DEVICE)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, _ = naive_chunk_simple_gla(*leaves, g.double())
    _, *expected_gradients = torch.autograd.grad(expected, leaves, do.double())
    k[:, 100] = do[:, 1180] = float('nan')
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with segments_of(640, Cache(1000)):
        o, _ = chunk_simple_gla(*leaves, g)
    _, *gradients = torch.autograd.grad(o, leaves, do)
    assert o[:, 100:640].isnan().any()
    assert rms_error(o[:, 640:], expected[:, 640:]) < TOLERANCE[dtype][0]
    for found, exact in zip(gradients, expected_gradients):
        assert found[:, 640:].isnan().any()
        assert rms_error(found[:, 200:640], exact[:, 200:640]) < TOLERANCE[dtype][0]


def test_anchors_fit_into_segments():
    assert [anchor_tokens(None, at_most) for at_most in (384, 256)] == [384, 256]
    segments = (128, 256, 384, 640, 768, 1024)
    assert [anchor_tokens(segment, 384) for segment in segments] == [128, 256, 384, 128, 384, 256]
    assert [anchor_tokens(segment, at_most) for segment in (4096, 8192) for at_most in (384, 256)] == [384, 256] * 2
    assert anchor_tokens(768, 256) == 256


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
def test_anchor_blocks_of_several_segments(dtype, monkeypatch):
    """As in long segments, whose length no anchor block need divide."""
    monkeypatch.setattr(fused_chunk, 'anchor_tokens', lambda *_: 384)
    launch_by_triton(monkeypatch)
    packed = dict(cu_seqlens=(0, 385, 385, 400, 690), memory=100)
    for case in (Case(500, K=D, V=D, dtype=dtype), Case(700, K=D, V=D, dtype=dtype, **packed)):
        inputs = make_inputs(case)
        check(case, run(MODES['segments'], case, inputs), reference(case, inputs))
