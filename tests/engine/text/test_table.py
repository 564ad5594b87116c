"""The vectors of tokens, the model's and those that were added."""

import numpy as np
import pytest

from engine.errors import InversionError, InversionWidthError, ManifestError
from engine.text.inversion import Inversion
from engine.text.table import TokenTable

MODEL = np.arange(12, dtype=np.float16).reshape(6, 2)


@pytest.fixture
def table(tmp_path):
    np.save(tmp_path / "table.npy", MODEL)
    return TokenTable(tmp_path / "table.npy")


def inversion(word, *vectors):
    return Inversion(word, {"text_encoder": np.array(vectors, np.float32)})


def test_ids_become_the_vectors_of_the_model_and_of_added_words(table):
    table.add(inversion("toy", [20, 21], [22, 23]))
    assert table.words == {"toy": range(6, 8)}
    found = table(np.array([[5, 6], [7, 0]]))
    assert found.dtype == np.float32
    assert found.tolist() == [[[10, 11], [20, 21]], [[22, 23], [0, 1]]]


def test_ids_of_a_removed_word_are_not_given_out_again(table):
    """Embeddings are kept by their ids."""
    table.add(inversion("toy", [20, 21]))
    table.remove("TOY")
    assert table.words == {}
    table.add(inversion("toy", [30, 31]))
    assert table.words == {"toy": range(7, 8)}


def test_words_and_widths_that_do_not_fit(table):
    table.add(inversion("toy", [20, 21]))
    with pytest.raises(InversionError, match="'Toy' has vectors already"):
        table.add(inversion("Toy", [20, 21]))
    with pytest.raises(InversionError, match="no textual inversion has the word 'cat'; loaded are: 'toy'"):
        table.remove("cat")
    with pytest.raises(
        InversionWidthError, match=r"text_encoder of width 3, and this model takes vectors for .* width 2"
    ):
        table.add(inversion("cat", [1, 2, 3]))


@pytest.mark.parametrize("content", [b"", b"vectors", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_array(tmp_path, content):
    (tmp_path / "table.npy").write_bytes(content)
    with pytest.raises(ManifestError, match=r"table.npy is no array of NumPy"):
        TokenTable(tmp_path / "table.npy")


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2)), np.zeros((0, 2), np.float32)])
def test_an_array_that_is_no_table(tmp_path, array):
    np.save(tmp_path / "table.npy", array)
    with pytest.raises(ManifestError, match="instead of vectors of tokens"):
        TokenTable(tmp_path / "table.npy")
