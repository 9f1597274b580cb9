"""The KV budget of a device: memory is promised before it is used, and a promise is kept until it is given back."""

from __future__ import annotations

from collections.abc import Hashable

from swarmlm.errors import PoolFull


class KVPool:
    """Bytes reserved by key, never more than the budget in all. Nothing waits and nothing is evicted."""

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"a budget of {budget} bytes is no budget")
        self._budget = budget
        self._reserved: dict[Hashable, int] = {}
        self._used = 0

    @property
    def total(self) -> int:
        """Bytes."""
        return self._budget

    @property
    def used(self) -> int:
        """Bytes reserved."""
        return self._used

    @property
    def free(self) -> int:
        """Bytes not reserved."""
        return self._budget - self._used

    def reserve(self, key: Hashable, nbytes: int) -> None:
        """Promise `nbytes` to `key`. Raises `PoolFull` at once if they are not free."""
        if key in self._reserved:
            raise ValueError(f"{key!r} holds a reservation already")
        if nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes")
        if nbytes > self.free:
            raise PoolFull(
                f"the session needs {nbytes:,} bytes of KV memory and {self.free:,} of {self._budget:,} are free",
                needed=nbytes,
                free=self.free,
                total=self._budget,
            )
        self._reserved[key] = nbytes
        self._used += nbytes

    def release(self, key: Hashable) -> None:
        """Give the reservation back. An unknown key is ignored."""
        self._used -= self._reserved.pop(key, 0)
