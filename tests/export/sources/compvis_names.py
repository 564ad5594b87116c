"""diffusers' names -> CompVis names, for making test checkpoints. Written from the layout of the CompVis repository,
not from the conversion that it tests."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from export.sources.checkpoint import BUILT_IN

from ...models import SCHEDULER


def _unet(state: dict, layers: int) -> dict:
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    made = {}

    def put(block: str, rest: str, value: torch.Tensor) -> None:
        head, _, tail = rest.partition(".")
        made[f"{block}.{inner[head]}.{tail}" if head in inner else f"{block}.{rest}"] = value

    plain = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        parts = name.split(".")
        if module in plain:
            made[f"{plain[module]}.{kind}"] = value
        elif parts[0] == "down_blocks":
            i, what, j, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
            if what == "downsamplers":
                made[f"input_blocks.{(layers + 1) * (i + 1)}.0.op.{parts[-1]}"] = value
            else:
                put(f"input_blocks.{1 + (layers + 1) * i + j}.{0 if what == 'resnets' else 1}", rest, value)
        elif parts[0] == "mid_block":
            put(f"middle_block.{2 * int(parts[2]) if parts[1] == 'resnets' else 1}", ".".join(parts[3:]), value)
        else:
            i, what, j, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
            if what == "upsamplers":
                attention = f"up_blocks.{i}.attentions.0.norm.weight" in state
                made[f"output_blocks.{(layers + 1) * i + layers}.{2 if attention else 1}.conv.{parts[-1]}"] = value
            else:
                put(f"output_blocks.{(layers + 1) * i + j}.{0 if what == 'resnets' else 1}", rest, value)
    return {f"model.diffusion_model.{name}": value for name, value in made.items()}


def vae_names(state: dict, levels: int) -> dict:
    made = {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, value in state.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        parts = new.split(".")
        if parts[1] == "down_blocks":
            level, rest = int(parts[2]), parts[5:]
            new = (
                f"encoder.down.{level}."
                + (f"block.{parts[4]}." if parts[3] == "resnets" else "downsample.")
                + ".".join(rest)
            )
        elif parts[1] == "up_blocks":
            level, rest = levels - 1 - int(parts[2]), parts[5:]
            new = (
                f"decoder.up.{level}."
                + (f"block.{parts[4]}." if parts[3] == "resnets" else "upsample.")
                + ".".join(rest)
            )
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            new = f"{parts[0]}.mid.block_{int(parts[3]) + 1}." + ".".join(parts[4:])
        elif parts[1] == "mid_block":
            rest = ".".join(parts[4:])
            for diffusers_name, compvis_name in attention.items():
                rest = rest.replace(f"{diffusers_name}.", f"{compvis_name}.")
            new = f"{parts[0]}.mid.attn_1.{rest}"
            if new.endswith("weight") and value.ndim == 2:
                value = value[:, :, None, None]
        made[f"first_stage_model.{new}"] = value
    return made


def _open_clip(state: dict, layers: int) -> dict:
    made = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        made[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
        for i in range(layers):
            old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            made[f"{new}attn.in_proj_{kind}"] = torch.cat([state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            names = {
                "self_attn.out_proj": "attn.out_proj",
                "layer_norm1": "ln_1",
                "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc",
                "mlp.fc2": "mlp.c_proj",
            }
            made |= {
                f"{new}{compvis}.{kind}": state[f"{old}{diffusers}.{kind}"] for diffusers, compvis in names.items()
            }
    width = made["ln_final.weight"].shape[0]
    made["text_projection"] = torch.eye(width)
    made["logit_scale"] = torch.tensor(4.6)
    last = {
        name.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): torch.randn_like(value)
        for name, value in made.items()
        if f"resblocks.{layers - 1}." in name
    }  # the block that SD 2.x skips
    return {f"cond_stage_model.model.{name}": value for name, value in {**made, **last}.items()}


def compvis_state_dict(modules: dict) -> dict:
    """The single-file form of the components of tests/models.py."""
    unet, vae, text = modules["unet"], modules["vae"], modules["text_encoder"]
    made = _unet(unet.state_dict(), unet.config.layers_per_block)
    made |= vae_names(vae.state_dict(), len(vae.config.block_out_channels))
    if text.config.hidden_act == "gelu":
        made |= _open_clip(text.state_dict(), text.config.num_hidden_layers)
    else:
        made |= {f"cond_stage_model.transformer.text_model.{name}": value for name, value in text.state_dict().items()}
        made["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {name: value.contiguous().clone() for name, value in made.items()}


def compvis_modules(kind):
    """Small components with what a CompVis file cannot tell as Stable Diffusion has it: 32 norm groups, 64 channels a
    head."""
    torch.manual_seed(1)
    second = kind == "sd2"
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN / "tokenizer", pad_token="!" if second else "<|endoftext|>")
    unet = UNet2DConditionModel(
        sample_size=96 if second else 64,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **({"attention_head_dim": (1, 2, 2), "use_linear_projection": True} if second else {"attention_head_dim": 8}),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=1,
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = DDIMScheduler(**{k: v for k, v in SCHEDULER.items() if k != "skip_prk_steps"})
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
