"""Files of textual inversion as torch, safetensors and A1111 write them, and files that are none."""

import base64
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from engine.errors import InversionError, InversionWidthError, TensorFileError, UnsafePickleError
from engine.text import torch_file
from engine.text.chunks import chunked
from engine.text.emphasis import EMPHASES, sections
from engine.text.inversion import Inversion, load_inversion
from engine.text.tokenizer import ClipTokenizer
from tests.models import diffusers_pipeline, tiny_modules

ONE = torch.arange(4.0) / 3
TWO = torch.stack([ONE, -ONE])
FIRST = "text_encoder"


def a1111(tensor, name="cat-toy"):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": name, "step": 500}


def parameter(tensor):
    """What the first implementation of the paper writes."""
    return {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)})}


def loaded(path, token=None):
    """The word and the vectors as lists."""
    inversion = load_inversion(path, token)
    return inversion.word, {encoder: array.tolist() for encoder, array in inversion.vectors.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (a1111(TWO), "cat-toy"),
        (a1111(torch.nn.Parameter(TWO), None), "file"),
        (parameter(TWO), "file"),
        ({"<toy>": TWO}, "<toy>"),
        (OrderedDict({"<toy>": torch.cat([TWO, TWO])[2:]}), "<toy>"),
        (TWO, "file"),
    ],
)
def test_files_of_torch_save(tmp_path, content, word, zipped):
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    assert loaded(tmp_path / "file.pt") == (word, {FIRST: TWO.tolist()})
    assert load_inversion(tmp_path / "file.pt", "word").word == "word"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types_become_float32(tmp_path, dtype):
    torch.save({"a": TWO.to(dtype)}, tmp_path / "a.bin")
    save_file({"a": TWO.to(dtype)}, tmp_path / "a.safetensors")
    expected = ("a", {FIRST: TWO.to(dtype).float().tolist()})
    assert loaded(tmp_path / "a.bin") == loaded(tmp_path / "a.safetensors") == expected


@pytest.mark.parametrize(
    ("tensors", "token", "expected"),
    [
        ({"<toy>": ONE}, None, ("<toy>", {FIRST: [ONE.tolist()]})),
        ({"emb_params": TWO}, None, ("file", {FIRST: TWO.tolist()})),
        (
            {"clip_l": TWO, "clip_g": torch.ones(2, 5)},
            None,
            ("file", {FIRST: TWO.tolist(), "text_encoder_2": [[1.0] * 5] * 2}),
        ),
        (
            {"lora_a": ONE, "bundle_emb.x.string_to_param.*": TWO, "bundle_emb.y.string_to_param.*": TWO + 1},
            "y",
            ("y", {FIRST: (TWO + 1).tolist()}),
        ),
        ({"bundle_emb.x.clip_l": ONE, "bundle_emb.x.clip_g": TWO[1]}, None, ("x", None)),
    ],
)
def test_layouts_of_safetensors(tmp_path, tensors, token, expected):
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    word, vectors = loaded(tmp_path / "file.safetensors", token)
    assert word == expected[0]
    assert vectors == (expected[1] or {FIRST: [ONE.tolist()], "text_encoder_2": [(-ONE).tolist()]})


def test_vectors_in_a_picture_of_a1111(tmp_path):
    content = a1111({"TORCHTENSOR": TWO.tolist()})
    text = PngInfo()
    text.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()).decode())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    word, vectors = loaded(tmp_path / "a.png")
    assert word == "cat-toy"
    assert np.array_equal(vectors[FIRST], TWO)


def test_the_word_becomes_the_tokens_and_vectors_that_diffusers_gives_it(tmp_path, tiny_bundles):
    from engine import Bundle

    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.save({"<toy>": vectors}, tmp_path / "learned_embeds.bin")
    theirs = diffusers_pipeline(tiny_modules("sd1"))
    theirs.load_textual_inversion(tmp_path / "learned_embeds.bin")
    text = "a <toy> on a table"
    ids = theirs.tokenizer(theirs.maybe_convert_prompt(text, theirs.tokenizer), padding="max_length").input_ids
    table = theirs.text_encoder.get_input_embeddings().weight.detach().numpy()

    ours = load_inversion(tmp_path / "learned_embeds.bin")
    ours.check({FIRST: 32})
    bundle = Bundle.open(tiny_bundles["sd1"])
    tokenizer = ClipTokenizer(bundle.tokenizer_file, bundle.special_tokens)
    first_new = len(table) - ours.count
    inversions = {ours.word: range(first_new, len(table))}
    found = chunked(sections(text), tokenizer, EMPHASES["original"], inversions)
    assert found.ids[0].tolist() == ids
    assert np.array_equal(ours.vectors[FIRST], table[first_new:])


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_pickle(path, data):
    """A file of torch.save with another pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
    return path


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Evil(print, "run"), "__builtin__.print"),
        (Evil(eval, "print('run')"), "__builtin__.eval"),
        (Evil(__import__("os").system, "echo run"), "posix.system"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (torch.float32, "torch.float32"),
    ],
)
def test_whatever_is_no_tensor_is_refused_by_name_and_not_run(tmp_path, capfd, thing, name):
    torch.save({"a": ONE, "b": thing}, tmp_path / "zip.pt")
    torch.save({"a": ONE, "b": thing}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(thing, protocol=2))
    for file in ("zip.pt", "old.pt", "plain.pt"):
        with pytest.raises(UnsafePickleError, match=rf"{file}: the file asks for {name}, .* it was not loaded. Get"):
            load_inversion(tmp_path / file)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps({"a": {1, 2}}, 4), "the instruction EMPTY_SET, which no file of tensors needs"),
        (pickle.dumps(Evil(exec, "1"), 4), "asks for builtins.exec"),
        (b"\x80\x02ctorch\nFloatStorage\n(X\x01\x00\x00\x00atR.", "calls torch.FloatStorage as torch.save does not"),
        (b"\x80\x02]}(K\x01K\x02ub.", "sets what torch.save does not"),
        (b"\x80\x02}(NK\x02u.", "keys that are no texts"),
        (b"\x80\x02}K\x01a.", "appends to what is no list"),
        (b"\x80\x02" + b"]" * 300_000 + b".", "more than 200000 instructions"),
        (b"\x80\x02.", "IndexError"),
        (b"\x80\x02N", "ValueError"),
        (b"\x80\x02h\x07.", "KeyError"),
        (b"\x80\x02" + b"(" * 1000 + b"t" * 1001 + b".", "IndexError"),
        (b"\x80\x02K\x01Q.", "TypeError"),
    ],
)
def test_pickles_that_torch_does_not_write(tmp_path, data, words):
    with pytest.raises(TensorFileError, match=words):
        load_inversion(with_pickle(tmp_path / "a.pt", data))


def test_nested_tuples_that_would_take_forever_to_print_or_compare(tmp_path):
    nest = b"q\x01h\x01\x86" * 100
    for end in (b".", b"Q.", b"}(" + b"h\x01K\x01u.", b")R."):
        data = b"\x80\x02)" + nest + end
        with pytest.raises((TensorFileError, InversionError)):
            load_inversion(with_pickle(tmp_path / "a.pt", data))
    numbers = [pickle.dumps(value, 2) for value in (torch_file.LEGACY_MAGIC, torch_file.LEGACY_VERSION, {}, {})]
    (tmp_path / "old.pt").write_bytes(b"".join(numbers) + b"\x80\x02])" + nest + b"a.")
    with pytest.raises(TensorFileError, match="a storage whose key is no text"):
        load_inversion(tmp_path / "old.pt")


def test_archives_that_torch_does_not_write(tmp_path):
    file = tmp_path / "a.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(TensorFileError, match=r"is compressed, which torch\.save never does"):
        load_inversion(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b.pkl", b"")
    with pytest.raises(TensorFileError, match=r"no data\.pkl"):
        load_inversion(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/byteorder", "big")
    with pytest.raises(TensorFileError, match="is big-endian"):
        load_inversion(file)


def test_an_archive_whose_entry_is_nowhere(tmp_path):
    """The central directory says that data.pkl begins at 2**63 - 1."""
    file = tmp_path / "a.pt"
    entry = zipfile.ZipInfo("a/data.pkl")
    entry.extra = struct.pack("<HHQ", 1, 8, 2**63 - 1)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(entry, pickle.dumps({}, 2))
    data = bytearray(file.read_bytes())
    place = data.index(b"PK\x01\x02") + 42
    data[place : place + 4] = b"\xff" * 4
    file.write_bytes(data)
    with pytest.raises(TensorFileError, match=r"no file of torch\.save, or it is damaged"):
        load_inversion(file)


@pytest.mark.parametrize(
    ("shape", "strides", "words"),
    [
        ((10**9,), (0,), "not contiguous"),
        ((10**9,), (1,), "takes 4000000000 bytes, and the file has 16"),
        ((2, 2), (1, 2), "not contiguous"),
        ((-1,), (1,), "can't be read"),
        ((1,) * 9, (1,) * 9, "can't be read"),
    ],
)
def test_tensors_larger_than_their_file(tmp_path, monkeypatch, shape, strides, words):
    changed = io.BytesIO()
    torch.save({"a": Rebuilt(shape, strides)}, changed)
    (tmp_path / "a.pt").write_bytes(changed.getvalue())
    with pytest.raises((TensorFileError, InversionError), match=words):
        torch_file.read_torch(memoryview(changed.getvalue()))["a"].values()


class Rebuilt:
    """A tensor of four values that says that it has another shape."""

    def __init__(self, shape, strides):
        self.shape, self.strides = shape, strides

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (
            torch.storage.TypedStorage(wrap_storage=ONE.untyped_storage(), dtype=ONE.dtype, _internal=True),
            0,
            self.shape,
            self.strides,
            False,
            OrderedDict(),
        )


def safetensors(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"abc", "no safetensors file"),
        (struct.pack("<Q", 2**60) + b"{}", "the header would take 1152921504606846976 bytes"),
        (safetensors(b"{"), "is not JSON"),
        (safetensors(b"[" * 100_000), "is not JSON"),
        (safetensors([]), "no JSON object"),
        (safetensors({"a": 1}), "'a' is not described"),
        (safetensors(entry(shape=[True])), "'a' is not described"),
        (safetensors(entry(shape=[-1])), "'a' is not described"),
        (safetensors(entry(data_offsets=[0, 17])), "'a' is not described"),
        (safetensors(entry(data_offsets=[16, 0])), "'a' is not described"),
        (safetensors(entry(shape=[5])), "takes 20 bytes, and the file has 16"),
        (safetensors(entry(dtype="F64", shape=[2])), "the type F64; save it as float32, float16 or bfloat16"),
        (safetensors(entry(dtype="I64", shape=[2])), "the type I64"),
    ],
)
def test_safetensors_that_are_damaged(tmp_path, data, words):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(TensorFileError, match=words):
        load_inversion(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": ONE, "b": TWO}, "it holds 'a, b'. Known are {word: vectors}, string_to_param"),
        ({"a": torch.zeros(76, 4)}, r"the shape \(76, 4\); it must be \[width\], or \[n, width\] with n from 1 to 75"),
        ({"a": torch.zeros(0, 4)}, r"the shape \(0, 4\)"),
        ({"a": torch.zeros(2, 2, 2)}, r"the shape \(2, 2, 2\)"),
        ({"a": torch.tensor(1.0)}, r"the shape \(\)"),
        ({"a": torch.zeros(0)}, "are empty or hold values that are not finite"),
        ({"a": torch.tensor([1, torch.nan])}, "not finite"),
        ({"clip_l": ONE, "clip_g": TWO}, "different numbers of vectors"),
        ({"bundle_emb.x.a": ONE, "bundle_emb.y.a": TWO}, "vectors for x, y; pass one of these as token"),
        ({"\n": ONE}, r"the word '\\n' can't stand in a prompt; pass token='<my-word>'"),
    ],
)
def test_files_of_other_things(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(InversionError, match=words):
        load_inversion(tmp_path / "file.safetensors")


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "empty.pt").touch()
    for name, words in {
        "none.pt": "none.pt is no file, or is empty; pass a .safetensors, .pt, .bin or .png",
        ".": "is no file, or is empty",
        "empty.pt": "is no file, or is empty",
        "a\0.pt": "is no file's name",
        "n" * 300: "can't be read",
    }.items():
        with pytest.raises(TensorFileError, match=words):
            load_inversion(tmp_path / name)
    with open(tmp_path / "large.pt", "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**30)
    with pytest.raises(TensorFileError, match="has 1024 MiB, and at most 32 are read"):
        load_inversion(tmp_path / "large.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InversionError, match="the picture has no text 'sd-ti-embedding'"):
        load_inversion(tmp_path / "a.png")


def test_vectors_for_another_model_are_refused():
    small = Inversion("x", {FIRST: np.zeros((1, 768), np.float32)})
    small.check({FIRST: 768})
    with pytest.raises(
        InversionWidthError,
        match=r"the vectors of 'x' are for text_encoder of width 768 \(SD 1.x\), and this model takes vectors for "
        r"text_encoder of width 1024 \(SD 2.x\); load an inversion that was trained for this kind",
    ):
        small.check({FIRST: 1024})
    with pytest.raises(InversionWidthError, match=r"text_encoder_2 of width 1280 \(SDXL"):
        small.check({FIRST: 768, "text_encoder_2": 1280})


def good_files():
    files = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(a1111(TWO), file, _use_new_zipfile_serialization=zipped)
        files.append(file.getvalue())
    return [*files, safetensors(entry())]


GOOD = good_files()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=4), st.data())
def test_damaged_files_are_errors_by_name(tmp_path_factory, data, changes, draw):
    changed = bytearray(data[: draw.draw(st.integers(1, len(data)))] if draw.draw(st.booleans()) else data)
    for place, value in changes:
        changed[place % len(changed)] = value
    file = tmp_path_factory.getbasetemp() / "damaged.pt"
    file.write_bytes(changed)
    with suppress(TensorFileError, InversionError):
        assert load_inversion(file).count >= 1
