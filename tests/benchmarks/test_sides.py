"""What the other sides load."""

import torch
from safetensors import safe_open
from transformers import CLIPTextModel

from benchmarks.sides import for_transformers_4


def names_of(model):
    with safe_open(model / "text_encoder" / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_transformers_4_finds_every_weight_of_the_text_encoder(tiny_sources, tmp_path):
    model = tiny_sources["sd1"].folder
    written = for_transformers_4(model, tmp_path)
    assert all(name.startswith("text_model.") for name in names_of(written))
    assert {file.relative_to(model) for file in model.glob("*/*")} == {
        file.relative_to(written) for file in written.glob("*/*")
    }
    before, after = (CLIPTextModel.from_pretrained(folder / "text_encoder") for folder in (model, written))
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


def test_a_model_that_it_can_read_is_left_alone(tiny_sources, tmp_path):
    written = for_transformers_4(tiny_sources["sd1"].folder, tmp_path)
    assert for_transformers_4(written, tmp_path / "again") == written
    assert for_transformers_4(tmp_path / "no text encoder", tmp_path / "again") == tmp_path / "no text encoder"
