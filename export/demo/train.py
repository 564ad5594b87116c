"""Train the built-in model from nothing and write it as a diffusers folder.

    python -m export.demo.train                    # about 1 h 40 min on two busy CPU cores; resumes where it was
                                                   stopped

Stages, each kept in the work folder: the tokenizer, the VAE, the latents of a pool of pictures, and the denoiser
together with its text encoder. Same seed, same torch, same number of threads: same model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .pictures import COLOURS, POSITIONS, SHAPES, SIZE, SIZES, Scene, caption, coverage, held_out, triples
from .training import Training, step_rng

CAPTION_LENGTH = 77
EMPTY_CAPTIONS = 0.1
VARIANTS = 24
"""How many placements of each (shape, size, position) are drawn: the centre moves up to 1.5 pixels, the size up to 5
%."""


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    vae_steps: int = 5000
    vae_batch: int = 16
    vae_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    pool: int = 32768
    steps: int = 6000
    batch: int = 48
    rate: float = 1e-3


# ---------------------------------------------------------------------------------------------------- pictures


class Pictures:
    """Every shape's coverage masks, to be coloured batch by batch."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.allowed = sorted(set(triples()) - held_out())
        self.placed = [(shape, size, position) for shape in SHAPES for size in SIZES for position in POSITIONS]
        masks = []
        for shape, size, position in tqdm(self.placed, desc="draw shapes"):
            for _ in range(VARIANTS):
                shift = tuple(rng.uniform(-1.5, 1.5, 2))
                masks.append(coverage(Scene(shape, "", "", size, position, shift, rng.uniform(0.95, 1.05))))
        self.masks = torch.from_numpy(np.stack(masks)).reshape(len(self.placed), VARIANTS, 1, SIZE, SIZE)
        self.colours = {
            name: torch.tensor(rgb, dtype=torch.float32).reshape(3, 1, 1) / 127.5 - 1 for name, rgb in COLOURS.items()
        }

    def draw(self, rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
        """Pictures [count, 3, 64, 64] in -1..1, their masks, and what they show."""
        scenes, masks, ink, ground = [], [], [], []
        for _ in range(count):
            shape, colour, background = self.allowed[rng.integers(len(self.allowed))]
            size, position = str(rng.choice(list(SIZES))), str(rng.choice(list(POSITIONS)))
            scenes.append(Scene(shape, colour, background, size, position))
            masks.append(self.masks[self.placed.index((shape, size, position)), rng.integers(VARIANTS)])
            ink.append(self.colours[colour])
            ground.append(self.colours[background])
        mask = torch.stack(masks)
        return mask * torch.stack(ink) + (1 - mask) * torch.stack(ground), mask, scenes


# ---------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(folder: Path, seed: int) -> None:
    """A byte-level BPE in CLIP's form (vocab.json, merges.txt), learned from the captions."""
    rng = np.random.default_rng(seed)
    texts = [
        caption(Scene(*triple, size, position), rng) for triple in triples() for size in SIZES for position in POSITIONS
    ]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    words = list(dict.fromkeys(words)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CAPTION_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(
        texts, padding="max_length", max_length=CAPTION_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


# ---------------------------------------------------------------------------------------------------- modules


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_LENGTH,
            projection_dim=128,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 2.1's, with skip_prk_steps for PNDM among its options as there."""
    return DDIMScheduler.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": "v_prediction",
            "skip_prk_steps": True,
        }
    )


# ---------------------------------------------------------------------------------------------------- stages


def train_vae(recipe: Recipe, pictures: Pictures, work: Path) -> AutoencoderKL:
    torch.manual_seed(recipe.seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    training = Training(vae, recipe.vae_rate, recipe.vae_steps, work / "vae.pt")
    for step in training.remaining("VAE"):
        images, masks, _ = pictures.draw(step_rng(recipe.seed, 1, step), recipe.vae_batch)
        # Edges are few pixels and carry all the detail: each weighs as much as six flat ones.
        edges = 1 + 5 * (F.max_pool2d(masks, 3, 1, 1) + F.max_pool2d(-masks, 3, 1, 1)).clamp(0, 1)
        restored, kl = _vae_terms(vae, images.contiguous(memory_format=torch.channels_last))
        error = restored - images
        loss = ((error.abs() + error.square()) * edges).mean() + recipe.kl_weight * kl
        training.update(loss)
    return vae.eval()


def _vae_terms(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample()).sample
    return restored.float(), posterior.kl().float().mean() / posterior.mean[0].numel()


@torch.no_grad()
def peak_signal_to_noise(vae: AutoencoderKL, seed: int, count: int = 96) -> float:
    """PSNR in dB of reconstructions of held-out pictures, at placements that training never saw."""
    rng = np.random.default_rng(seed + 1)
    chosen = sorted(held_out())
    colours = {name: np.array(rgb, np.float32) / 127.5 - 1 for name, rgb in COLOURS.items()}
    images = []
    for i in range(count):
        shape, colour, background = chosen[i % len(chosen)]
        scene = Scene(
            shape,
            colour,
            background,
            str(rng.choice(list(SIZES))),
            str(rng.choice(list(POSITIONS))),
            tuple(rng.uniform(-1.5, 1.5, 2)),
            rng.uniform(0.95, 1.05),
        )
        mask = coverage(scene)[..., None]
        images.append(mask * colours[colour] + (1 - mask) * colours[background])
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    restored = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
    return -10 * torch.log10((restored - batch).square().mean() / 4).item()


@torch.no_grad()
def encode_pool(recipe: Recipe, pictures: Pictures, vae: AutoencoderKL, work: Path) -> tuple[torch.Tensor, list[Scene]]:
    """Latents of many pictures (mean and standard deviation, [pool, 8, 8, 8]) and what each shows."""
    rng = step_rng(recipe.seed, 2, 0)
    file = work / "latents.pt"
    kept = torch.load(file, weights_only=True) if file.exists() else None
    scenes, latents = [], []
    for _ in tqdm(range(recipe.pool // 64), desc="encode", disable=kept is not None):
        images, _, shown = pictures.draw(rng, 64)
        scenes += shown
        if kept is None:
            posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
            latents.append(torch.cat([posterior.mean, posterior.std], dim=1).contiguous())
    if kept is None:
        kept = torch.cat(latents)
        torch.save(kept, file)
    return kept, scenes


def train_denoiser(
    recipe: Recipe, vae: AutoencoderKL, tokenizer: CLIPTokenizer, latents: torch.Tensor, scenes: list[Scene], work: Path
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    torch.manual_seed(recipe.seed)
    both = torch.nn.ModuleDict({"text_encoder": new_text_encoder(len(tokenizer)), "unet": new_unet()})
    training = Training(both, recipe.rate, recipe.steps, work / "denoiser.pt")
    alphas = new_scheduler().alphas_cumprod
    mean, std = latents.chunk(2, dim=1)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        context = both["text_encoder"](ids).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            return both["unet"](noisy, timesteps, context).sample

    for step in training.remaining("denoiser"):
        rng = step_rng(recipe.seed, 3, step)
        chosen = torch.from_numpy(rng.integers(len(scenes), size=recipe.batch))
        texts = ["" if rng.random() < EMPTY_CAPTIONS else caption(scenes[i], rng) for i in chosen.tolist()]
        clean = (mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])) * vae.config.scaling_factor
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, len(alphas), (recipe.batch,))
        signal = alphas[timesteps].sqrt().reshape(-1, 1, 1, 1)
        sigma = (1 - alphas[timesteps]).sqrt().reshape(-1, 1, 1, 1)
        velocity = signal * noise - sigma * clean
        output = predict(signal * clean + sigma * noise, timesteps, tokenize(tokenizer, texts))
        training.update(F.mse_loss(output.float(), velocity))
    return both["text_encoder"].eval(), both["unet"].eval()


def write_model(
    folder: Path, tokenizer_files: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> None:
    """The diffusers folder, safetensors in fp16, in place of what was there."""
    tokenizer = load_tokenizer(tokenizer_files)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(unfinished, safe_serialization=True)
    config = (
        unfinished / "text_encoder" / "config.json"
    )  # transformers would load what it names, diffusers loads float32
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_files / name, unfinished / "tokenizer" / name)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in model from nothing.")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "model", help="the diffusers folder to write"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo-training"), help="where stages and checkpoints are kept"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--vae-steps", type=int, default=Recipe.vae_steps)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args()
    recipe = Recipe(seed=options.seed, vae_steps=options.vae_steps, steps=options.steps)
    options.work.mkdir(parents=True, exist_ok=True)

    train_tokenizer(options.work / "tokenizer", recipe.seed)
    tokenizer = load_tokenizer(options.work / "tokenizer")
    pictures = Pictures(recipe.seed)
    vae = train_vae(recipe, pictures, options.work)
    print(f"VAE: {peak_signal_to_noise(vae, recipe.seed):.1f} dB on held-out pictures")
    latents, scenes = encode_pool(recipe, pictures, vae, options.work)
    mean, std = latents.chunk(2, dim=1)
    vae.register_to_config(scaling_factor=round(1 / (mean.var() + std.square().mean()).sqrt().item(), 5))
    text_encoder, unet = train_denoiser(recipe, vae, tokenizer, latents, scenes, options.work)
    write_model(options.output, options.work / "tokenizer", vae, text_encoder, unet)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
