"""The most recently used values: prompts' embeddings, buffers, compiled graphs, captured steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most `size` values by key. The least recently used one is dropped, and given to `drop`, before a new one is
    made, because both may be too large to exist together."""

    def __init__(self, size: int, drop: Callable[[V], object] | None = None) -> None:
        self._size, self._drop = size, drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[V]:
        """The values, the least recently used one first."""
        return iter(self._values.values())

    def __getitem__(self, key: K) -> V:
        """The value of a key, which becomes the most recently used one. KeyError if there is none."""
        self._values.move_to_end(key)
        return self._values[key]

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key. `make` makes it if there is none."""
        if key not in self._values:
            self._make_room()
            self._values[key] = make()
        return self[key]

    def put(self, key: K, value: V) -> None:
        """Keeps a value, as the most recently used one."""
        if key not in self._values:
            self._make_room()
        self._values[key] = value
        self._values.move_to_end(key)

    def resize(self, size: int) -> None:
        """Keeps at most `size` values from now on."""
        self._size = size
        while len(self._values) > size:
            self._drop_oldest()

    def clear(self) -> None:
        """Drops every value."""
        while self._values:
            self._drop_oldest()

    def _make_room(self) -> None:
        while len(self._values) >= self._size:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, value = self._values.popitem(last=False)
        if self._drop is not None:
            self._drop(value)
