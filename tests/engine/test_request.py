"""What a call may ask for: every message names the value, the rule and the remedy."""

import numpy as np
import pytest

from engine import EngineError, InputError, Pipeline
from engine import errors as e
from engine.checks import check_shapes
from engine.contract import Range, Shapes

EMBEDDING = np.zeros((1, 77, 128), np.float32)


def message(demo, error, **arguments):
    with pytest.raises(error) as raised:
        demo(**{"prompt": "a ring", "num_inference_steps": 1, "seed": 0, **arguments})
    assert isinstance(raised.value, (EngineError, InputError, ValueError))
    assert raised.value.exit_code == 2
    return str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompt": None}, e.PromptError, "prompt is missing"),
        ({"prompt": 7}, e.PromptError, "prompt is a int, not a string"),
        ({"prompt": b"ring"}, e.PromptError, "prompt is a bytes"),
        ({"prompt": []}, e.PromptError, "empty list"),
        ({"prompt": ["a", 3]}, e.PromptError, "is a int"),
        ({"prompt": "a" * 10_001}, e.PromptError, "10001 characters; at most 10000"),
        ({"prompt": "a \ud800 ring"}, e.PromptError, "not valid UTF-8: character 2"),
        ({"negative_prompt": ["a", "b"]}, e.PromptError, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": 3}, e.PromptError, "negative_prompt is a int"),
        (
            {"height": 60},
            e.SizeError,
            "height 60 is not a multiple of 8; the nearest sizes that this bundle allows are 56 and 64",
        ),
        (
            {"width": 500},
            e.SizeError,
            "width 500 is not a multiple of 8; the nearest size that this bundle allows is 128",
        ),
        ({"height": 512}, e.SizeError, "multiples of 8 from 32 to 128"),
        (
            {"height": 8},
            e.SizeError,
            "not a size that this bundle was built for; the nearest size that this bundle allows is 32",
        ),
        ({"height": "64"}, e.SizeError, "'64', not an integer"),
        ({"height": 64.0}, e.SizeError, "64.0, not an integer"),
        ({"height": -64}, e.SizeError, "-64"),
        ({"num_images_per_prompt": 0}, e.BatchError, "integer from 1 to 1024"),
        ({"num_images_per_prompt": 9}, e.BatchError, "are 9 pictures in one call; this bundle was built for 1 to 8"),
        ({"num_inference_steps": 0}, e.StepsError, "num_inference_steps is 0; it must be an integer from 1 to 1000"),
        ({"num_inference_steps": 1001}, e.StepsError, "from 1 to 1000"),
        ({"num_inference_steps": 2.5}, e.StepsError, "2.5"),
        ({"num_inference_steps": True}, e.StepsError, "True"),
        (
            {"guidance_scale": float("nan")},
            e.GuidanceError,
            "guidance_scale is nan; it must be a number from -1000 to 1000",
        ),
        ({"guidance_scale": float("inf")}, e.GuidanceError, "inf"),
        ({"guidance_scale": "7"}, e.GuidanceError, "'7'"),
        (
            {"guidance_scale": [7.0, 5.0]},
            e.GuidanceError,
            "guidance_scale has 2 numbers; pass 1, one for each step, or one",
        ),
        (
            {"guidance_scale": [7.0] * 9, "num_inference_steps": 3, "scheduler": "pndm"},
            e.GuidanceError,
            "has 9 numbers; pass 3, one for each step, or 4, one for each evaluation of the U-Net, or one number",
        ),
        ({"guidance_scale": []}, e.GuidanceError, "guidance_scale has 0 numbers"),
        (
            {"guidance_scale": ["7"]},
            e.GuidanceError,
            "guidance_scale[0] is '7'; it must be a number",
        ),
        (
            {"guidance_scale": lambda: 7.0},
            e.GuidanceError,
            "called with (evaluation, timestep), which it does not take",
        ),
        ({"guidance_scale": lambda i, t: None}, e.GuidanceError, "guidance_scale(0, 1) is None; it must be a number"),
        ({"guidance_rescale": 1.5}, e.GuidanceError, "guidance_rescale is 1.5; it must be a number from 0 to 1"),
        ({"guidance_rescale": None}, e.GuidanceError, "guidance_rescale is None"),
        (
            {"guidance_interval": 0.5},
            e.GuidanceError,
            "guidance_interval is 0.5; it must be (start, end)",
        ),
        ({"guidance_interval": (0.1, 0.2, 0.3)}, e.GuidanceError, "it must be (start, end)"),
        (
            {"guidance_interval": (0.1, 2)},
            e.GuidanceError,
            "guidance_interval[1] is 2; it must be a number",
        ),
        ({"guidance_interval": (0.8, 0.2)}, e.GuidanceError, "it must not end before it starts"),
        (
            {"guidance_interval": (0.41, 0.45), "num_inference_steps": 5},
            e.GuidanceError,
            "guidance_interval (0.41, 0.45) holds none of the 5 evaluations, which are 0.2 apart",
        ),
        ({"eta": -0.1}, e.GuidanceError, "eta is -0.1; it must be a number from 0 to 1"),
        ({"seed": -1}, e.SeedError, "seed -1 is not an integer from 0"),
        ({"seed": 1.5}, e.SeedError, "seed 1.5"),
        ({"seed": "7"}, e.SeedError, "seed '7'"),
        ({"seed": 2**64}, e.SeedError, "18446744073709551616"),
        ({"seed": [1, 2]}, e.SeedError, "2 seeds for 1 pictures"),
        ({"latents": np.zeros((1, 4, 8, 8), int)}, e.LatentsError, "an array of int64; pass a NumPy array of float32"),
        ({"latents": [[1.0]]}, e.LatentsError, "a list"),
        (
            {"latents": np.zeros((1, 4, 9, 8), np.float32)},
            e.LatentsError,
            r"shape (1, 4, 9, 8) instead of (1, 4, 8, 8)",
        ),
        ({"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, e.LatentsError, "256 values that are NaN or infinite"),
        ({"output_type": "pt"}, e.OutputTypeError, "'pt'; it must be one of 'pil', 'np', 'latent'"),
        ({"scheduler": "euler_b"}, e.UnknownSchedulerError, "'euler_b' is not known; the nearest: euler_a, euler"),
        ({"scheduler": "DPM++ 2N Karras"}, e.UnknownSchedulerError, "the nearest: DPM++ 2M Karras"),
        ({"schedule_type": "caras"}, e.ScheduleTypeError, "schedule_type 'caras' is not known; the nearest: karras"),
        ({"schedule_type": 7}, e.ScheduleTypeError, "schedule_type 7 is not known; known: leading, linspace"),
        (
            {"schedule_type": "karras", "scheduler": "pndm"},
            e.ScheduleTypeError,
            "pndm cannot use schedule_type 'karras'; it can use: leading, linspace, trailing",
        ),
        (
            {"schedule_type": "beta", "scheduler": "DPM++ 2M Karras"},
            e.ScheduleTypeError,
            "DPM++ 2M Karras cannot use schedule_type 'beta'; it can use: karras",
        ),
        (
            {"schedule_type": "Karras", "scheduler": "PLMS"},
            e.ScheduleTypeError,
            "it can use: none, its grid is its own",
        ),
        ({"timesteps": [1, 2]}, e.TimestepsError, "timesteps must fall: number 1 is 1 and the next is 2"),
        ({"timesteps": [1000]}, e.TimestepsError, "timestep 1000 is not one of the model's, which go from 999 to 0"),
        ({"timesteps": []}, e.TimestepsError, "timesteps are []; pass a list of 1 to 1001 finite numbers that fall"),
        ({"timesteps": 7}, e.TimestepsError, "timesteps are 7"),
        ({"timesteps": ["7"]}, e.TimestepsError, "timesteps are ['7']"),
        ({"timesteps": [float("nan")]}, e.TimestepsError, "timesteps are [nan]"),
        ({"timesteps": [10**400]}, e.TimestepsError, "timesteps are [1000"),
        ({"timesteps": [7], "scheduler": "pndm"}, e.TimestepsError, "pndm cannot use timesteps of a call: its steps"),
        (
            {"sigmas": [7, 0], "scheduler": "Euler Karras"},
            e.TimestepsError,
            "Euler Karras cannot use sigmas of a call: its name says the grid, karras; leave sigmas out, or take",
        ),
        ({"timesteps": [7], "schedule_type": "karras"}, e.TimestepsError, "schedule_type and timesteps all say which"),
        ({"timesteps": [7], "timestep_respacing": "5"}, e.TimestepsError, "timesteps and timestep_respacing both say"),
        ({"timestep_respacing": "ddim7,7"}, e.TimestepsError, "no whole stride leaves so many of 1000 timesteps"),
        ({"sigmas": [1.0]}, e.TimestepsError, "sigmas are [1.0]; pass a list of 2 to 1001 finite numbers that fall"),
        (
            {"sigmas": [1.0, 2.0]},
            e.TimestepsError,
            "sigmas must fall, to 0 at the lowest: number 1 is 1 and the next is 2",
        ),
        ({"sigmas": [1.0, -1.0]}, e.TimestepsError, "sigmas must fall, to 0 at the lowest"),
        ({"sigmas": [1.0, 0.0], "scheduler": "pndm"}, e.TimestepsError, "pndm cannot use sigmas of a call"),
        ({"sampler_options": {"churn": 1}}, e.SamplerOptionError, "ddim has no option 'churn'; it has: "),
        (
            {"sampler_options": {"steps_offset": 1.5}},
            e.SamplerOptionError,
            "steps_offset of ddim is 1.5; it must be an",
        ),
        ({"sampler_options": [("a", 1)]}, e.SamplerOptionError, "sampler_options are [('a', 1)]; pass a dictionary"),
        ({"sampler_options": {1: 2}}, e.SamplerOptionError, "sampler_options are {1: 2}; pass a dictionary"),
        ({"scheduler": 3}, e.UnknownSchedulerError, "3 is not known"),
        ({"callback_on_step_end": 5}, e.CallbackError, "callback_on_step_end is 5, which cannot be called"),
        (
            {"callback_on_step_end": lambda pipeline: None},
            e.CallbackError,
            "called with (pipeline, evaluation, timestep, tensors), which it does not take",
        ),
        ({"guidance_scale": 10**400}, e.GuidanceError, "guidance_scale is an integer of 1329 bits"),
        ({"guidance_scale": 1e30}, e.GuidanceError, "from -1000 to 1000"),
        ({"eta": 10**400}, e.GuidanceError, "eta is an integer of 1329 bits"),
        ({"eta": 1e200}, e.GuidanceError, "eta is 1e+200"),
        ({"seed": np.array(1)}, e.SeedError, "seed array(1)"),
        ({"seed": bytearray(b"a")}, e.SeedError, "seed bytearray(b'a')"),
        ({"seed": memoryview(b"a")}, e.SeedError, "seed <memory at"),
        ({"seed": 10**5000}, e.SeedError, "seed an integer of 16610 bits"),
        ({"height": 10**5000}, e.SizeError, "height is an integer of 16610 bits"),
        ({"width": -(10**5000)}, e.SizeError, "width is an integer of 16610 bits"),
        ({"num_inference_steps": 10**5000}, e.StepsError, "an integer of 16610 bits"),
        ({"num_images_per_prompt": 10**5000}, e.BatchError, "an integer of 16610 bits"),
        ({"output_type": np.array(["pil", "np"])}, e.OutputTypeError, "must be one of"),
        ({"latents": np.full((1, 4, 8, 8), 1e300)}, e.LatentsError, "values up to 1.0e+300; at most 1e+06"),
        ({"latents": np.ma.masked_array(np.zeros((1, 4, 8, 8), np.float32), True)}, e.LatentsError, "a MaskedArray"),
        ({"class_labels": 3}, e.ClassLabelError, "class_labels is 3, and this model has no classes; leave it out"),
        ({"scheduler": np.array(["a", "b"])}, e.UnknownSchedulerError, "is not known"),
        ({"prompt_syntax": "compel"}, e.PromptError, "prompt_syntax is 'compel'; it must be 'plain' or 'a1111'"),
        ({"prompt_syntax": None}, e.PromptError, "prompt_syntax is 'None'; it must be 'plain' or 'a1111'"),
        ({"emphasis": "most"}, e.PromptError, "emphasis is 'most'; it must be one of 'original', 'no norm', 'ignore'"),
        (
            {"prompt": "(a:1001)", "prompt_syntax": "a1111"},
            e.PromptWeightError,
            "the weight of 'a' is 1001, the product of the brackets around it; write weights from -1000 to 1000",
        ),
        (
            {"prompt": "a ring", "negative_prompt": "ugly <lora:ink:0.8>", "prompt_syntax": "a1111"},
            e.AdapterTagError,
            "the negative prompt has the tag '<lora:ink:0.8>', and both prompts' rows have the same weights",
        ),
        (
            {"prompt": ["a ring <lora:ink:0.8>", "a star"], "prompt_syntax": "a1111"},
            e.AdapterTagError,
            "prompt 1 has the tags '<lora:ink:0.8>' and prompt 2 none; one call has one set of adapters",
        ),
        (
            {"prompt": "a ring <lora:ink:0.8><lora:ink:0.5>", "prompt_syntax": "a1111"},
            e.AdapterTagError,
            "a prompt has two tags for the adapter 'ink'; write one",
        ),
        ({"prompt": "<lora:ink:1:1:0>", "prompt_syntax": "a1111"}, e.AdapterTagError, "can't be read"),
        ({"prompt": "<lora:ink:x>", "prompt_syntax": "a1111"}, e.AdapterTagError, "write <lora:name>, <lora:name:0.8>"),
        (
            {"prompt": "[red:blue:5] ring", "prompt_syntax": "a1111", "num_inference_steps": 4},
            e.PromptScheduleError,
            "the prompt changes at step 5, and the loop has 4 steps; write a step up to 4, or a part of the steps",
        ),
        (
            {"prompt": "[red:blue:1.5] ring", "prompt_syntax": "a1111"},
            e.PromptScheduleError,
            "the prompt changes at 1.5 of the steps",
        ),
        ({"clip_skip": 2}, e.ClipSkipError, "clip_skip is 2; it must be an integer from 0 to 1: this model's text "),
        ({"clip_skip": True}, e.ClipSkipError, "clip_skip is True; it must be an integer"),
        ({"clip_skip": 10**5000}, e.ClipSkipError, "clip_skip is an integer of 16610 bits"),
        ({"prompt_embeds": EMBEDDING}, e.EmbeddingsError, "prompt and prompt_embeds both say what the prompt is"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": EMBEDDING},
            e.EmbeddingsError,
            "negative_prompt and negative_prompt_embeds both say what the negative_prompt is; pass one of them",
        ),
        (
            {"prompt": None, "prompt_embeds": [1.0]},
            e.EmbeddingsError,
            "prompt_embeds is [1.0]; pass a NumPy array of float32 [prompts, tokens, 128]",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDDING[0]},
            e.EmbeddingsError,
            "prompt_embeds is an array of float32 of shape (77, 128); pass a NumPy array of float32 [prompts, tokens,",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDDING[:, :, :64]},
            e.EmbeddingsWidthError,
            "prompt_embeds has the shape (1, 77, 64), and this model takes embeddings of width 128; make them with its",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDDING * np.nan},
            e.EmbeddingsError,
            "prompt_embeds has 77 tokens and must hold finite values only, of at most 4928 tokens",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDDING, "negative_prompt_embeds": EMBEDDING[:, :70]},
            e.EmbeddingsError,
            "prompt_embeds has the shape (1, 77, 128) and negative_prompt_embeds (1, 70, 128); they must be the same",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDDING[:, :70]},
            e.EmbeddingsError,
            "embeddings of 70 tokens are given beside texts, which have a multiple of 77; pass both",
        ),
        (
            {"pooled_prompt_embeds": EMBEDDING[:, 0]},
            e.EmbeddingsError,
            "pooled_prompt_embeds is given, and this model's U-Net takes no pooled embeddings; leave it out",
        ),
    ],
)
def test_bad_input_gets_a_named_error(demo, arguments, error, words):
    assert words in message(demo, error, **arguments)


def test_one_negative_prompt_serves_all_prompts(demo):
    assert len(demo(["a ring", "a star"], num_inference_steps=1, negative_prompt="a square", seed=0).images) == 2


@pytest.mark.parametrize("value", [np.int64(8), 8])
def test_numpy_integers_are_integers(demo, value):
    assert demo("a ring", height=np.int32(64), num_inference_steps=np.int64(1), seed=value).seeds == [8]


def test_every_input_error_was_produced_here():
    produced = {
        mark.args[1][i][1] for mark in test_bad_input_gets_a_named_error.pytestmark for i in range(len(mark.args[1]))
    }
    elsewhere = {e.ThreadsError, e.UnknownBackendError, e.DeviceError, e.OutputPathError, e.PromptsFileError}
    elsewhere |= {e.ImageError, e.StrengthError}  # tests/test_image_to_image.py
    elsewhere |= {e.MaskError}  # tests/test_inpainting.py
    elsewhere |= {e.HiresError, e.TilingError, e.PreviewError}  # tests/test_hires.py, test_tiling.py, test_preview.py
    elsewhere |= {e.VariationError}  # tests/engine/test_variation.py
    elsewhere |= {e.ChannelsError, e.DepthMapError, e.NoiseLevelError}  # tests/test_channels.py
    assert (produced | elsewhere) >= set(InputError.__subclasses__())


def test_a_calls_own_timesteps_say_how_many_steps_there_are(demo):
    for grid in ({"timesteps": [900, 500, 100]}, {"sigmas": [10.0, 1.0, 0.1, 0.0]}, {"timestep_respacing": "3"}):
        assert demo("a ring", num_inference_steps=20, seed=0, scheduler="euler", **grid).evaluations == 3


def test_an_option_may_be_a_list(demo):
    options = {"disable_corrector": [0, 1], "solver_type": "bh1"}
    assert demo("a ring", num_inference_steps=2, seed=0, scheduler="unipc", sampler_options=options).evaluations == 2


def test_a_picture_says_which_sampler_and_schedule_type_made_it(demo):
    picture = demo("a ring", num_inference_steps=1, seed=0, scheduler="dpm++ 2m", schedule_type="SGM Uniform").images[0]
    assert "Sampler: DPM++ 2M, " in picture.info["parameters"]
    assert "Schedule type: SGM Uniform, " in picture.info["parameters"]


def test_automatic_is_the_samplers_own_schedule_type(demo):
    """A1111's word for it."""
    calls = [demo("a ring", num_inference_steps=2, seed=0, output_type="latent", schedule_type=kind).images
             for kind in (None, "Automatic")]  # fmt: skip
    np.testing.assert_array_equal(*calls)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 2**31, pytest.param(10**5000, id="huge")])
def test_threads_are_counted_from_1(demo_bundle, threads):
    with pytest.raises(e.ThreadsError, match="an integer from 1 to 1024, or None for every core"):
        Pipeline.load(demo_bundle, threads=threads)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"backend": "pytorch"},
            e.UnknownBackendError,
            "backend is 'pytorch'; it must be one of 'tensorrt', 'openvino', 'onnxruntime'",
        ),
        ({"device": "gpu"}, e.DeviceError, "device is 'gpu'; it must be 'cpu', 'cuda', 'cuda:N'"),
        ({"device": 0}, e.DeviceError, "device is 0"),
        ({"backend": np.array(["onnxruntime", "openvino"])}, e.UnknownBackendError, "it must be one of"),
        ({"device": np.array(["cpu", "cuda"])}, e.DeviceError, "it must be 'cpu'"),
        ({"device": "cuda:99999999999999999999"}, e.DeviceError, "with the number of a GPU"),
        ({"backend": "tensorrt", "device": "cpu"}, e.DeviceError, "TensorRT runs on NVIDIA GPUs only"),
    ],
)
def test_backend_and_device_are_checked(demo_bundle, arguments, error, words):
    with pytest.raises(error) as raised:
        Pipeline.load(demo_bundle, **arguments)
    assert words in str(raised.value)


def test_cuda_asked_for_and_not_there_is_an_error(demo_bundle):
    with pytest.raises(e.BackendError, match=r"has no CUDA provider, only .*CPUExecutionProvider"):
        Pipeline.load(demo_bundle, backend="onnxruntime", device="cuda:0")


SEVERAL = (
    Shapes(Range(512, 512, 512), Range(512, 512, 512), Range(1, 1, 1), Range(2, 2, 2)),
    Shapes(Range(768, 768, 768), Range(512, 768, 1024), Range(1, 1, 2), Range(1, 2, 4)),
)


def build(**sizes: Range) -> str:
    return " ".join(["build", *(f"--{side} {size}" for side, size in sizes.items())])


def test_defaults_come_from_the_first_profile_for_so_many_pictures():
    assert check_shapes(None, None, 1, 2, SEVERAL, build, 8) == (512, 512)
    assert check_shapes(None, None, 2, 4, SEVERAL, build, 8) == (768, 768)
    assert check_shapes(768, 1024, 1, 1, SEVERAL, build, 8) == (768, 1024)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (512, 1024, 1, 2),
            e.SizeError,
            "height 512 and width 1024 are not allowed together; this bundle was built for height x width 512 x 512, "
            "batch 1, "
            "2 U-Net rows; 768 x 512:768:1024, batch 1:1:2, 1:2:4 U-Net rows. Build for them: build --height 512 "
            "--width 1024",
        ),
        (
            (640, None, 1, 2),
            e.SizeError,
            "height 640 is not a size that this bundle was built for; the nearest sizes that this bundle allows are "
            "512 and 768 "
            "(512 only or 768 only). Build for 640: build --height 640",
        ),
        (
            (None, None, 3, 6),
            e.BatchError,
            "are 3 pictures in one call; this bundle was built for 1 or 1 to 2. Split the call, or build for that: "
            "build --batch 1:1:3",
        ),
        (
            (None, None, 2, 6),
            e.BatchError,
            "2 pictures with guidance and prompts of several parts are 6 rows of the U-Net; this bundle was built for "
            "2 or 1 to 4. Build for that: build --rows 6",
        ),
    ],
)
def test_sizes_outside_all_profiles(arguments, error, words):
    with pytest.raises(error) as raised:
        check_shapes(*arguments, SEVERAL, build, 8)
    assert words in str(raised.value)
