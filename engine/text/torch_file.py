"""What `torch.save` wrote, read without torch and without running anything.

A pickle is a program. The machine here knows the instructions that make dictionaries, lists, tuples, numbers, texts
and tensors. Any other instruction, and any other function or class that a file asks for, is an error by name.

Source: Python's `pickletools`; `torch.serialization` for the two file formats; `torch._utils` for the functions.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import TensorFileError, UnsafePickleError, shown
from .tensors import BYTES, Storage, StoredTensor, naturals

STORAGES = {
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
DICTIONARY = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
PARAMETERS = "torch.nn.modules.container ParameterDict"
SET = "__builtin__ set"
GLOBALS = {*STORAGES, DICTIONARY, TENSOR, PARAMETER, PARAMETERS, SET}
"""All that a file may ask for. A ParameterDict has a set among its attributes."""

MAX_INSTRUCTIONS = 200_000
"""The most instructions of a pickle. One tensor takes about 25."""

LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

DAMAGE = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
    EOFError,
    RuntimeError,
)
"""What zipfile, pickletools and the machine raise for damaged files."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class _Global:
    """A function or class of torch, by its name: the machine knows what each gives."""

    name: str


def read_torch(data: memoryview) -> Any:
    """The dictionaries, lists, numbers, texts and `StoredTensor`s that `torch.save` wrote, with or without a zip
    archive. UnsafePickleError if the file asks for anything else, TensorFileError if it is damaged."""
    try:
        return _read_zip(data) if bytes(data[:4]) == ZIP else _read_legacy(data)
    except TensorFileError:
        raise
    except DAMAGE as error:
        raise TensorFileError(f"this is no file of torch.save, or it is damaged ({shown(error)})") from error


def _read_zip(data: memoryview) -> Any:
    """Files since torch 1.6: an archive of NAME/data.pkl and, for each storage, NAME/data/KEY."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries.values()) > len(data):
            raise TensorFileError("the archive is compressed, which torch.save never does; save the file again")
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise TensorFileError("the archive has no data.pkl: torch.save did not write it")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "byteorder" in entries and archive.read(folder + "byteorder") != b"little":
            raise TensorFileError("the file is big-endian; save it again on a little-endian machine")
        storages: dict[str, Storage] = {}

        def storage(dtype: str, key: str) -> Storage:
            if key not in storages:
                storages[key] = Storage(dtype, memoryview(archive.read(f"{folder}data/{key}")))
            return storages[key]

        return _Machine(storage).run(io.BytesIO(archive.read(pickles[0])))


def _read_legacy(data: memoryview) -> Any:
    """Files before torch 1.6: five pickles (a number, a version, sizes, the content, keys), then the storages."""
    stream = io.BytesIO(data)
    storages: dict[str, Storage] = {}

    def storage(dtype: str, key: str) -> Storage:
        return storages.setdefault(key, Storage(dtype, memoryview(b"")))

    machine = _Machine(storage)
    magic, version, _, content, keys = (machine.run(stream) for _ in range(5))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
        raise TensorFileError("this is a pickle, and not one of torch.save")
    for key in map(_text, keys):
        count = int.from_bytes(stream.read(8), "little")
        start = stream.tell()
        end = start + count * BYTES[storages[key].dtype]
        if end > len(data):
            raise TensorFileError("the file ends within a tensor: it is damaged; get it again")
        storages[key].data = data[start:end]
        stream.seek(end)
    return content


def _text(key: Any) -> str:
    if type(key) is not str:
        raise TensorFileError("the file has a storage whose key is no text: it is damaged")
    return key


@dataclass
class _Machine:
    """Runs pickles. `storage(dtype, key)` gives the storages that they name. A mark puts the stack away into `outer`
    and begins a new one.

    Nothing here compares, hashes or prints what a file made, but for texts and numbers: tuples of tuples can take
    forever.
    """

    storage: Callable[[str, str], Storage]
    stack: list[Any] = field(default_factory=list)
    outer: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, stream: io.BytesIO) -> Any:
        """The value of one pickle. The stream is then behind it."""
        self.stack, self.outer, self.memo = [], [], {}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_INSTRUCTIONS:
                raise TensorFileError(f"the file has more than {MAX_INSTRUCTIONS} instructions; a few hundred suffice")
            self._execute(opcode.name, argument)
        return self.stack.pop()

    def _execute(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "TUPLE":
            values = tuple(self._marked())
            self.stack.append(values)
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in ("APPEND", "APPENDS"):
            self._append(self._marked() if name == "APPENDS" else [stack.pop()])
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._marked() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1])
        else:
            self._construct(name, argument)

    def _construct(self, name: str, argument: Any) -> None:
        """The instructions that ask for functions and classes, and those that do nothing."""
        if name == "GLOBAL":
            self.stack.append(_allowed(argument))
        elif name == "STACK_GLOBAL":
            name, module = self.stack.pop(), self.stack.pop()
            self.stack.append(_allowed(f"{module} {name}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(_called(function, arguments))
        elif name == "BUILD":
            state = self.stack.pop()
            self._set([part for item in _parameters(state).items() for part in item])
        elif name == "BINPERSID":
            self.stack.append(self._named(self.stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UnsafePickleError(
                f"the file has the instruction {name}, which no file of tensors needs; it was not run. Get the vectors "
                "as .safetensors"
            )

    def _marked(self) -> list[Any]:
        """Takes what is above the last mark."""
        values, self.stack = self.stack, self.outer.pop()
        return values

    def _append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TensorFileError("the file appends to what is no list: it is damaged")
        target.extend(values)

    def _set(self, items: list[Any]) -> None:
        """Keys and values in turn."""
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict or len(items) % 2 or not all(type(key) in (str, int) for key in keys):
            raise TensorFileError("the file has a dictionary with keys that are no texts, or it is damaged")
        target.update(zip(keys, items[1::2]))

    def _named(self, identity: Any) -> Storage | _Global:
        """("storage", class, key, device, count), with a view in old files, which no vectors need; or, in old files,
        ("module", class, source file, source)."""
        kind, storage, key, *_ = identity
        if kind == "module" and type(storage) is _Global:
            return storage
        view = identity[5:]
        dtype = STORAGES.get(storage.name) if type(storage) is _Global else None
        if kind != "storage" or dtype is None or type(key) is not str or any(part is not None for part in view):
            raise TensorFileError("the file names a storage that can't be read: it is damaged")
        return self.storage(dtype, key)


def _allowed(name: str) -> _Global:
    if name not in GLOBALS:
        raise UnsafePickleError(
            f"the file asks for {name.replace(' ', '.')}, which no file of tensors needs; it was not loaded. Get the "
            "vectors as .safetensors"
        )
    return _Global(name)


def _called(function: Any, arguments: Any) -> Any:
    """What the allowed functions and classes give."""
    name = function.name if type(function) is _Global else type(function).__name__
    given = arguments if type(arguments) is tuple else ()
    if name in (DICTIONARY, PARAMETERS) and not given:
        return {}
    if name == TENSOR and len(given) >= 4:
        return _tensor(*given[:4])
    if name == PARAMETER and given:
        return given[0]
    if name == SET:
        return []
    raise TensorFileError(f"the file calls {name.replace(' ', '.')} as torch.save does not: it is damaged")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    sizes, steps, start = naturals(shape), naturals(strides), naturals((offset,))
    if type(storage) is not Storage or sizes is None or steps is None or start is None:
        raise TensorFileError("the file has a tensor that can't be read: it is damaged")
    expected = 1
    for size, step in zip(reversed(sizes), reversed(steps)):
        if size != 1 and step != expected:
            raise TensorFileError("the file has a tensor that is not contiguous; save tensor.contiguous()")
        expected *= size
    return StoredTensor(storage, sizes, start[0])


def _parameters(state: Any) -> dict[Any, Any]:
    """The tensors of a ParameterDict, whose state is the attributes of a module."""
    found = state.get("_parameters") if type(state) is dict else None
    if type(found) is not dict:
        raise TensorFileError("the file sets what torch.save does not: it is damaged")
    return found
