"""Places on the GPU for what outlives a run: texts' embeddings, and the states of pictures that wait."""

from __future__ import annotations

import weakref
from collections import defaultdict

from .cuda import Device, align


class Place:
    """Memory on the GPU, until nobody refers to it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes


class Places:
    """Places, in blocks of `together`. One that nobody refers to any more gives its memory to the next of its size.
    That is safe without waiting, since the stream overwrites it after all that was started before. Memory that was
    needed once is kept."""

    def __init__(self, device: Device, together: int, what: str) -> None:
        self._device, self._together, self._what = device, together, what
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def take(self, nbytes: int) -> Place:
        """A place with arbitrary content."""
        free = self._free[nbytes]
        if not free:
            pitch = align(nbytes)
            block = self._device.allocate(self._together * pitch, self._what)
            free += [block.address + i * pitch for i in range(self._together)]
        place = Place(free.pop(), nbytes)
        weakref.finalize(place, free.append, place.address)
        return place
