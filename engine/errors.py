"""The errors that the runtime raises on purpose. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """The repr of a value for an error message, shortened if it is long. Never raises."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # repr is the caller's own code
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


class EngineError(Exception):
    """Base class of the runtime's errors. `exit_code` is what a command line exits with: 2 where the user's input is at
    fault, 1 where something failed."""

    exit_code = 1


class InputError(EngineError, ValueError):
    """An argument of a call is not acceptable. The base of the errors about single arguments."""

    exit_code = 2


class PromptError(InputError):
    """A prompt is not a string, not valid Unicode, too long, does not match the number of negative prompts, or is given
    to a model without texts."""


class ClassLabelError(InputError):
    """A class label is not one of the model's, is missing, or is given to a model without classes."""


class PromptWeightError(PromptError):
    """A prompt gives a text a weight above 1000."""


class AdapterTagError(PromptError):
    """A tag in a prompt, such as `<lora:name:0.8>`, can't be read."""


class PromptScheduleError(PromptError):
    """A text in a prompt changes after the last step."""


class PromptLengthError(PromptError):
    """A prompt takes more tokens than the plans were built for."""


class EmbeddingsError(InputError):
    """`prompt_embeds`, `negative_prompt_embeds` or `pooled_prompt_embeds` are no embeddings, do not go together, or the
    model takes none."""


class EmbeddingsWidthError(EmbeddingsError):
    """Embeddings have another width than the model's."""


class ClipSkipError(InputError):
    """`clip_skip` is not an integer from 0, or the text encoder has not so many layers."""


class SizeError(InputError):
    """Height or width is not a multiple of 8, or the bundle was not built for it."""


class BatchError(InputError):
    """The number of pictures in one call is not what the bundle was built for."""


class StepsError(InputError):
    """`num_inference_steps` is not an integer from 1 to 1000, or more than the model was trained with."""


class GuidanceError(InputError):
    """A number of guidance, or `eta`, is not in its range, or a schedule of guidance does not fit the steps."""


class SeedError(InputError):
    """A seed is not an integer from 0 to 2**64 - 1, or there is not one for each picture."""


class VariationError(InputError):
    """`subseed_strength` is not a number from 0 to 1, is missing, or there is not one for each picture."""


class LatentsError(InputError):
    """Latents have the wrong shape or dtype, or hold values that are not finite."""


class OutputTypeError(InputError):
    """`output_type` is none of "pil", "np" and "latent"."""


class ThreadsError(InputError):
    """The number of threads is not an integer from 1 to 1024."""


class UnknownBackendError(InputError):
    """`backend` is none of the backends' names."""


class DeviceError(InputError):
    """`device` is not a device's name, there is no such GPU, or the backend does not run on it."""


class UnknownSchedulerError(InputError):
    """There is no sampler of that name."""


class ScheduleTypeError(InputError):
    """There is no schedule type of that name, or the sampler cannot use it."""


class TimestepsError(InputError):
    """`timesteps`, `sigmas` or `timestep_respacing` are not numbers that fall, are not the model's, or the sampler
    cannot use them."""


class SamplerOptionError(InputError):
    """An option in `sampler_options` is not one of the sampler's, or its value is wrong."""


class ImageError(InputError):
    """A picture to start from is not a picture, is damaged or too large, or the model can't start from one."""


class StrengthError(InputError):
    """`strength` is not a number from 0 to 1, leaves no step, or there is no image that it is about."""


class HiresError(InputError):
    """`hires` is no `Hires`, its scale, size or upscaler is wrong, or the call starts from an image already."""


class TilingError(InputError):
    """`vae_tiling` is no side of a tile in pixels."""


class MaskError(InputError):
    """`mask_image` is no mask, or an argument that is about one does not go with the rest of the call."""


class MaskSizeError(MaskError):
    """`mask_image` has another size than `image`."""


class ChannelsError(InputError):
    """An argument is about channels that the model's U-Net does not have, or nothing is given for channels that it
    has."""


class DepthMapError(InputError):
    """`depth_map` is no map of depths: of another shape, without differences, or with values that are no numbers."""


class NoiseLevelError(InputError):
    """`noise_level` is not an integer, or no level of the upscaler."""


class OutputPathError(InputError):
    """The name of a picture's file is not allowed, or it is the name of something that is never replaced, such as a
    folder or a device."""


class PromptsFileError(InputError):
    """A file of prompts is not readable, not UTF-8, or empty."""


class TensorFileError(EngineError):
    """A file of tensors is missing, damaged or too large, or holds tensors of a type that is not read."""

    exit_code = 2


class UnsafePickleError(TensorFileError):
    """A .pt or .bin asks for something else than tensors. Nothing of it was run."""


class AdapterError(EngineError):
    """A file holds no adapter, or one that can't be read, such as a layer with half of its tensors."""

    exit_code = 2


class AdapterFamilyError(AdapterError):
    """An adapter was trained for another family of models."""


class AdapterShapeError(AdapterError):
    """A change of a layer does not have the shape of the layer's weight."""


class AdapterNameError(AdapterError):
    """No adapter of that name is loaded, or one is already."""


class AdapterWeightError(AdapterError):
    """The weight of an adapter is no number within its limits."""


class AdapterBusyError(AdapterError):
    """Adapters can't be switched while lanes hold jobs."""


class InversionError(EngineError):
    """A file holds no vectors of a textual inversion, or too many, or its word can't stand in a prompt."""

    exit_code = 2


class InversionWidthError(InversionError):
    """The vectors of a textual inversion are for other text encoders than the model's."""


class SchedulerConfigError(EngineError):
    """The model's scheduler_config.json asks for something that the samplers do not support."""

    exit_code = 2


class NumericalError(EngineError):
    """The model produced values that are not finite; there is no picture to show."""


class CallbackError(InputError):
    """`callback_on_step_end` cannot be called as it is, or returned something else than None or a dictionary with
    latents."""


class PreviewError(InputError):
    """The sampler leaves no room for the predicted clean latents at this evaluation."""


class PipelineStateError(EngineError):
    """The pipeline is closed or busy, or cannot be copied. The base of the errors below."""


class ClosedPipelineError(PipelineStateError):
    """The pipeline was closed."""


class BusyPipelineError(PipelineStateError):
    """A callback, or a signal handler during a call, used the pipeline that the call is running on."""


class PicklingError(PipelineStateError, TypeError):
    """A pipeline cannot be pickled: it belongs to its process."""


class BundleError(EngineError):
    """A bundle cannot be used. The base of the errors below."""

    exit_code = 2


class BundleNotFoundError(BundleError):
    """There is no bundle at that path."""


class ManifestError(BundleError):
    """manifest.json is not readable, or a field is missing or wrong."""


class ManifestVersionError(BundleError):
    """The bundle has another format than this version of LatentRT reads."""


class UnsafePathError(BundleError):
    """The manifest names a file outside the bundle, or a symbolic link."""


class MissingFileError(BundleError):
    """A file that the manifest names is missing or not readable."""


class HashMismatchError(BundleError):
    """A file is not the one that was built: its size or SHA-256 differs from the manifest's."""


class BundleChangedError(HashMismatchError):
    """A file of a loaded bundle was replaced, changed or deleted, and is needed again."""


class PlanError(BundleError):
    """A bundle has no TensorRT plans that this machine can use. The base of the errors below."""


class PlanNotFoundError(PlanError):
    """There are no plans for this GPU and this version of TensorRT."""


class PlanMismatchError(PlanError):
    """A plan was built for something else than this machine and this bundle; the message names what differs."""


class PlanDamagedError(PlanError, HashMismatchError):
    """A plan is not the file that was built; it was not executed."""


class BackendError(EngineError):
    """The inference library is missing, or failed to load a graph or to run it."""


class TensorRtError(BackendError):
    """A call of TensorRT failed; the message ends with its log."""


class CudaError(BackendError):
    """A call of CUDA failed; the message says what was running."""


class CudaMemoryError(CudaError):
    """The GPU has too little free memory."""


class DeviceLostError(CudaError):
    """An earlier error has made the GPU unusable for this process; a new process can use it."""


class OutputFileError(EngineError):
    """A picture could not be written."""


class MetadataError(EngineError):
    """A picture's settings can't be read, or are too long for its format."""

    exit_code = 2


class ReproductionError(EngineError):
    """A picture's file does not have all that made the picture, or an array is given that its call did not have."""

    exit_code = 2


class BatchFileError(EngineError):
    """A file of calls is not readable or not UTF-8, or a line is no call."""

    exit_code = 2


class CompareError(EngineError):
    """What `--compare` names can't be compared: an argument or a value that there isn't, or too many of them."""

    exit_code = 2
