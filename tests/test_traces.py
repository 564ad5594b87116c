"""Traces that tests share are those of equal modules, and of no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.family import STABLE_DIFFUSION
from export.graphs.denoiser import Denoiser
from export.graphs.text_encoder import TextEncoder
from tests.models import tiny_modules
from tests.traces import fingerprint

SIZES = {"context_size": 32}


def of(unet, dtype=torch.float16, fused=False, opset=18) -> str:
    return fingerprint(STABLE_DIFFUSION["denoiser"], Denoiser(unet, dtype, fused), SIZES, opset)


def unet(kind="sd1", seed=0):
    return tiny_modules(kind, seed)["unet"]


def changed_weight():
    made = unet()
    with torch.no_grad():
        made.conv_out.bias[0] += 1e-3
    return made


def test_equal_modules_have_one_fingerprint_and_others_their_own():
    assert of(unet()) == of(unet())
    others = [
        of(unet(), torch.float32),
        of(unet(), fused=True),
        of(unet(), opset=23),
        of(unet("sd2")),
        of(unet(seed=1)),
    ]
    assert len({of(unet()), of(changed_weight()), *others}) == 7


def test_a_text_encoder_with_attention_as_one_operator_is_another():
    def of_text_encoder(fused: bool) -> str:
        module = TextEncoder(tiny_modules("sd1")["text_encoder"], torch.float16, fused)
        return fingerprint(STABLE_DIFFUSION["text_encoder"], module, SIZES, 23)

    assert of_text_encoder(True) == of_text_encoder(True)
    assert of_text_encoder(True) != of_text_encoder(False)


@pytest.mark.slow
def test_it_is_the_same_in_every_process():
    """Also where sets of words come in another order."""
    code = "from tests.test_traces import of, unet; print(of(unet()))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == of(unet()), done.stderr
