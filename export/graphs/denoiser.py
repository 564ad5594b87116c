"""The denoiser's graph."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from engine.contract import JOINS

from ..sources.checks import PLAIN, check_unet
from .precision import prepare

LEAST_SQUARES = 1e-20
"""Below this sum of squares an output counts as constant: it is that of an idle sample, and 0 / 0 would be NaN."""


class Denoiser(nn.Module):
    """One whole denoising step: U-Net, guidance and sampler. The timestep of a sample is embedded once, in float32,
    and spread to its rows."""

    joins: tuple[int, ...] = PLAIN
    """How many channels the U-Net may see beside the latents."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype, fused_attention: bool = False) -> None:
        super().__init__()
        check_unet(unet.config, self.joins)
        prepare(unet, dtype, fused_attention)
        unet.time_embedding.float()
        self.unet, self.dtype = unet, dtype

    def forward(
        self,
        state: Tensor,
        row_sample: Tensor,
        context: Tensor,
        timestep: Tensor,
        mixing: Tensor,
        rescale: Tensor,
        update: Tensor,
        blend: Tensor,
        noise: Tensor,
        mask: Tensor,
        original: Tensor,
        start_noise: Tensor,
    ) -> Tensor:
        output = self.predict(state[:, 0], row_sample, context, timestep)
        next_state = advance(state, guide(output, mixing, rescale), update, noise)
        return inpaint(next_state, mask, original, start_noise, blend)

    def predict(
        self,
        sample: Tensor,
        row_sample: Tensor,
        context: Tensor,
        timestep: Tensor,
        concat: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """What the U-Net makes of samples [batch, C, h, w], for each row, in float32."""
        rows = torch.index_select(sample, 0, row_sample)
        if concat is not None:
            rows = torch.cat([rows, concat], dim=1)
        embedding = self.unet.time_embedding(self.unet.time_proj(timestep))
        embedding = torch.index_select(embedding, 0, row_sample)
        if class_labels is not None:
            embedding = embedding + self.unet.class_embedding(class_labels).float()
        return self._evaluate(rows.to(self.dtype), embedding.to(self.dtype), context.to(self.dtype)).float()

    def _evaluate(self, sample: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """UNet2DConditionModel.forward for the models of Stable Diffusion 1.x and 2.x. Upsampling always asks for the
        size of the skip connection: the same as doubling, and right for the sizes that halving rounds."""
        unet = self.unet
        sample = unet.conv_in(sample)
        skips = [sample]
        for block in unet.down_blocks:
            crossed = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            sample, outputs = block(hidden_states=sample, temb=embedding, **crossed)
            skips += outputs
        sample = unet.mid_block(sample, embedding, encoder_hidden_states=context)
        for i, block in enumerate(unet.up_blocks):
            used, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
            crossed = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            size = skips[-1].shape[2:] if i < len(unet.up_blocks) - 1 else None
            sample = block(
                hidden_states=sample, temb=embedding, res_hidden_states_tuple=used, upsample_size=size, **crossed
            )
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))


class JoinedDenoiser(Denoiser):
    """The step of a U-Net that sees `concat` [rows, c, h, w] beside the sample. The upscaler's also takes the noise
    level of that as `class_labels` [rows]."""

    joins = tuple(JOINS)

    def forward(  # type: ignore[override]
        self,
        state: Tensor,
        row_sample: Tensor,
        context: Tensor,
        timestep: Tensor,
        mixing: Tensor,
        rescale: Tensor,
        update: Tensor,
        noise: Tensor,
        concat: Tensor,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        output = self.predict(state[:, 0], row_sample, context, timestep, concat, class_labels)
        return advance(state, guide(output, mixing, rescale), update, noise)


def guide(output: Tensor, mixing: Tensor, rescale: Tensor) -> Tensor:
    """The guided output of each sample [batch, 1, elements], from the rows' outputs [rows, C, h, w].

    mixing [batch, rows] has the rows' weights. rescale [batch, rows] is phi of arXiv 2305.08891, section 3.4, at the
    row whose standard deviation the guided output takes over, and 0 elsewhere. Standard deviations of equally many
    elements are to each other as the roots of the sums of squares. Without phi the factor is exactly 1, also for an
    output of zeros.
    """
    weights = torch.stack([mixing, rescale], dim=1)
    mixed = torch.matmul(weights, output.flatten(1))
    centered = mixed - mixed.sum(dim=2, keepdim=True) / mixed.shape[2]
    squares = (centered * centered).sum(dim=2, keepdim=True)
    guided, reference = squares[:, :1], squares[:, 1:]
    phi = rescale.sum(dim=1).reshape(-1, 1, 1)
    factor = torch.sqrt(reference / guided.clamp(min=LEAST_SQUARES)) + (1 - phi)
    return mixed[:, :1] * factor


def advance(state: Tensor, guided: Tensor, update: Tensor, noise: Tensor) -> Tensor:
    """The sampler's step: the next state from the guided output."""
    columns = torch.cat([state.flatten(2), guided, noise.flatten(1).unsqueeze(1)], dim=1)
    return torch.bmm(update, columns).reshape(state.shape)


def inpaint(state: Tensor, mask: Tensor, original: Tensor, start_noise: Tensor, blend: Tensor) -> Tensor:
    """The state whose slot 0 outside of the mask is the original with noise of the state's level: blend [batch, 2] has
    the factors of both. Where mask [batch, 1, h, w] is 1 the state stays bit for bit."""
    signal, noise = blend[:, :1, None, None], blend[:, 1:, None, None]
    kept = signal * original + noise * start_noise
    latents = mask * state[:, 0] + (1 - mask) * kept
    return torch.cat([latents.unsqueeze(1), state[:, 1:]], dim=1)
