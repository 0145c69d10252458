"""The cache of plans and of recorded passes: its size, and which entries it keeps."""

import pytest
import torch
from fake_gpu import Watched

from fla_simple_gla import _passes, _plans
from fla_simple_gla._cache import Cache
from fla_simple_gla._validation import Call


def test_a_cache_is_bounded():
    cache = Cache(100)
    for i in range(1000):
        cache[i] = i
        assert cache.get(i // 2) in (None, i // 2) and len(cache) <= 200
    assert len(cache) > 100


def test_what_is_looked_up_again_survives_what_comes_once():
    cache = Cache(100)
    for i in range(40):
        cache[('again', i)] = i
        assert cache.get(('again', i)) == i
    for i in range(10_000):
        assert cache.get(i) is None
        cache[i] = 'once'
    assert [cache.get(('again', i)) for i in range(40)] == [*range(40)]
    assert cache.get(9_999) == 'once' and cache.get(0) is None


def test_the_least_recently_used_is_dropped():
    cache = Cache(100)
    for i in range(1000):
        cache[i] = str(i)
        cache.get(i)
        cache.get(7)
    assert len(cache) <= 100 and cache.get(7) == '7'
    assert [cache.get(i) for i in range(960, 1000)] == [str(i) for i in range(960, 1000)]
    assert all(cache.get(i) is None for i in range(800) if i != 7)


@pytest.mark.parametrize('lookups', [0, 1, 60])
def test_a_new_value_takes_the_place_of_the_old(lookups):
    cache = Cache(100)
    cache['key'] = 'old'
    for i in range(lookups):
        cache.get('key')
        if i:  # the key gets older than these
            cache[i] = i
            cache.get(i)
    cache['key'] = 'new'
    assert cache.get('key') == 'new' and len(cache) == max(lookups, 1)


@pytest.mark.parametrize('lookups', [0, 1, 60])
def test_a_default_takes_the_place_of_no_value(lookups):
    cache = Cache(100)
    cache.setdefault('key', 'first')
    for i in range(lookups):
        cache.get('key')
        if i:
            cache[i] = i
            cache.get(i)
    cache.setdefault('key', 'second')
    assert cache.get('key') == 'first' and len(cache) == max(lookups, 1)


def test_a_plan_survives_ten_thousand_other_lengths(monkeypatch):
    monkeypatch.setattr(_plans, 'plans', Cache(1024))
    memory, gates = torch.zeros(1, 10_001, 1, 1), torch.zeros(1, 10_001, 1)

    def plan_of(T):
        q = memory[:, :T]
        return _plans.plan_for(Call(q, q, q, gates[:, :T], output_final_state=True))

    plans = [plan_of(1), plan_of(1), *(plan_of(T) for T in range(2, 10_002)), plan_of(1)]
    assert plans[0] is plans[1] is plans[-1] and plans[0].cached
    assert len({*plans}) == 10_001 and len(_plans.plans) <= 2048


def test_a_record_survives_ten_thousand_other_calls(gpu):
    a_pass = Watched()
    for _ in range(2):
        a_pass(torch.ones(4), numbers=('of a token',))
    for i in range(10_000):
        a_pass(torch.ones(4), numbers=(i,))
    runs = a_pass.runs
    a_pass(torch.ones(4), numbers=('of a token',))
    assert a_pass.runs == runs == 10_002 and len(_passes.records) <= 2048
