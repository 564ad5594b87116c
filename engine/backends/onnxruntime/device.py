"""Values that stay on the GPU between the runs of ONNX Runtime's sessions."""

from __future__ import annotations

from typing import Any

import numpy as np

COPY = bytes.fromhex(
    "080812003a3c0a100a017812017922084964656e74697479"
    "1204636f70795a100a0178120b0a09080112050a0312016e"
    "62100a0179120b0a09080112050a0312016e42040a00100e"
)
"""An ONNX model, y [n] = Identity(x [n]), float32, opset 14: the one way in ONNX Runtime's Python to copy on a device
between places that a session did not allocate."""

Place = tuple[str, int]
"""A device in ONNX Runtime's terms: its kind and its number."""


class DeviceArray:
    """Part of a float32 OrtValue, which it keeps alive."""

    def __init__(self, value: Any, shape: tuple[int, ...], number: int) -> None:
        """Element `number` of a value whose elements have that shape."""
        self._value, self.shape = value, shape
        self.elements = int(np.prod(shape))
        self.address = value.data_ptr() + 4 * self.elements * number


class Copier:
    """Copies float32 values from one address of a device to another, in the order of the device's other work."""

    def __init__(self, library: Any, options: Any, providers: list[Any], place: Place) -> None:
        self._session, self._place = library.InferenceSession(COPY, options, providers=providers), place

    def copy(self, target: int, source: int, elements: int) -> None:
        binding = self._session.io_binding()
        binding.bind_input("x", *self._place, np.float32, [elements], source)
        binding.bind_output("y", *self._place, np.float32, [elements], target)
        self._session.run_with_iobinding(binding)


class DeviceInput:
    """An input of the denoiser on the device. It takes assignments as its NumPy array would: of arrays, which `flush`
    uploads together, and of what is on the device already."""

    def __init__(self, array: np.ndarray, value: Any, copier: Copier) -> None:
        self._array, self.value, self._copier, self._changed = array, value, copier, True

    def __setitem__(self, place: Any, content: Any) -> None:
        if isinstance(content, DeviceArray):
            self.flush()
            start = self._array[place].ctypes.data - self._array.ctypes.data
            self._copier.copy(self.value.data_ptr() + start, content.address, content.elements)
        else:
            self._array[place] = content
            self._changed = True

    def flush(self) -> None:
        """Uploads the array if it was assigned to. What was copied on the device before is overwritten then."""
        if self._changed:
            self.value.update_inplace(self._array)
            self._changed = False
