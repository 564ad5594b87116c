"""The built-in model as a single file of CompVis' layout draws what it draws as a folder."""

import numpy as np
import pytest
import torch
import yaml

import build_engines
from engine import Pipeline
from export.demo.judge import judge
from export.sources.checkpoint import BUILT_IN, resolve

from .export.sources.compvis_names import compvis_state_dict

CONFIG = {
    "model": {
        "params": {
            "parameterization": "v",
            "image_size": 8,
            "scale_factor": 0.38301,
            "unet_config": {"params": {"in_channels": 4, "context_dim": 128, "num_heads": 4, "num_groups": 16}},
            "first_stage_config": {"params": {"ddconfig": {"num_groups": 8}}},
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                "params": {"num_heads": 4},
            },
        }
    }
}
"""What no tensor of the built-in model tells. Its groups and heads are not those of CompVis' classes."""


@pytest.mark.slow
def test_the_picture_is_the_folders_and_shows_what_was_asked_for(demo, tmp_path):
    built_in = resolve(None)
    tensors = compvis_state_dict({part: built_in.load(part) for part in ("unet", "vae", "text_encoder")})
    file = tmp_path / "single.ckpt"
    torch.save({"state_dict": tensors, "global_step": 5}, file)
    file.with_suffix(".yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = ["--tokenizer", str(BUILT_IN / "tokenizer"), "--scheduler", "ddim", "--output", str(tmp_path)]
    assert build_engines.main([str(file), *arguments, "--backend", "onnxruntime", "--no-verify", "--quiet"]) == 0
    call = {"prompt": "a large red circle on the left on a blue background", "num_inference_steps": 20, "seed": 1}
    with Pipeline.load(tmp_path / "single", backend="onnxruntime") as pipeline:
        image = np.asarray(pipeline(**call, guidance_scale=5.0).images[0])
    verdict = judge(image)
    assert (verdict.shape, verdict.colour) == ("circle", "red")
    assert np.array_equal(image, np.asarray(demo(**call, guidance_scale=5.0).images[0]))
