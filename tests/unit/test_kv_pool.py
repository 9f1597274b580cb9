"""The pool never promises more than it has, and gives back exactly what was reserved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmlm.errors import PoolFull
from swarmlm.kernels.kv_pool import KVPool

steps = st.lists(st.tuples(st.sampled_from(["reserve", "release"]), st.integers(0, 5), st.integers(0, 60)))


@given(st.integers(0, 100), steps)
def test_the_books_balance(budget: int, script: list[tuple[str, int, int]]) -> None:
    pool, promised = KVPool(budget), dict[int, int]()
    for action, key, size in script:
        if action == "release":
            pool.release(key)
            promised.pop(key, None)
        elif key not in promised:
            free = budget - sum(promised.values())
            if size <= free:
                pool.reserve(key, size)
                promised[key] = size
            else:
                with pytest.raises(PoolFull) as refused:
                    pool.reserve(key, size)
                assert refused.value.details == {"needed": size, "free": free, "total": budget}
        assert pool.used == sum(promised.values()) <= budget
        assert pool.free == budget - pool.used


def test_a_key_holds_one_reservation() -> None:
    pool = KVPool(10)
    pool.reserve("a", 1)
    with pytest.raises(ValueError, match="already"):
        pool.reserve("a", 1)
    with pytest.raises(ValueError, match="cannot reserve"):
        pool.reserve("b", -1)
    with pytest.raises(ValueError, match="no budget"):
        KVPool(-1)
