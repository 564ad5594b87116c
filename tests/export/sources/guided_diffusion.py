"""A U-Net as arXiv 2102.09672 and 2105.05233 describe it, with OpenAI's names: what the reader is compared with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Residual(nn.Module):
    def __init__(self, channels: int, made: int, time: int, scale_shift: bool, resize: str = "") -> None:
        super().__init__()
        self.resize, self.scale_shift = resize, scale_shift
        self.in_layers = nn.Sequential(norm(channels), nn.SiLU(), nn.Conv2d(channels, made, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, made * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(norm(made), nn.SiLU(), nn.Dropout(0), nn.Conv2d(made, made, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == made else nn.Conv2d(channels, made, 1)

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0) if self.resize == "up" else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = self.in_layers[2](self._resized(self.in_layers[1](self.in_layers[0](x))))
        shift = self.emb_layers(time)[..., None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            inner = self.out_layers[1:](self.out_layers[0](inner) * (1 + scale) + shift)
        else:
            inner = self.out_layers(inner + shift)
        return self.skip_connection(self._resized(x)) + inner


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        size = channels // self.heads
        projected = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            q, k, v = projected.reshape(batch, 3, self.heads, size, -1).unbind(1)
        else:
            q, k, v = projected.reshape(batch, self.heads, 3, size, -1).unbind(2)
        weight = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(size), dim=-1)
        seen = torch.einsum("bhts,bhcs->bhct", weight, v).reshape(batch, channels, -1)
        return x + self.proj_out(seen).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Entry(nn.Conv2d):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x)


class UNet(nn.Module):
    """The options have OpenAI's names; `attention` says which levels have it."""

    def __init__(
        self,
        num_channels: int = 32,
        channel_mult: tuple[float, ...] = (1, 2),
        attention: tuple[bool, ...] = (False, True),
        num_res_blocks: int = 1,
        num_heads: int = 0,
        num_head_channels: int = 0,
        use_new_attention_order: bool = False,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        learn_sigma: bool = True,
        num_classes: int = 0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        time, self.width = 4 * num_channels, num_channels
        widths = [int(factor * num_channels) for factor in channel_mult]

        def attend(width: int) -> SelfAttention:
            return SelfAttention(width, num_heads or width // num_head_channels, use_new_attention_order)

        def residual(channels: int, made: int, resize: str = "") -> Residual:
            return Residual(channels, made, time, use_scale_shift_norm, resize)

        self.time_embed = nn.Sequential(nn.Linear(num_channels, time), nn.SiLU(), nn.Linear(time, time))
        self.label_emb = nn.Embedding(num_classes, time) if num_classes else None
        current = widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Entry(in_channels, current, 3, padding=1)])])
        skips = [current]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                block = [residual(current, width)] + ([attend(width)] if attention[level] else [])
                self.input_blocks.append(nn.ModuleList(block))
                current = width
                skips.append(current)
            if level < len(widths) - 1:
                down = residual(current, current, "down") if resblock_updown else Down(current)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(current)
        self.middle_block = nn.ModuleList([residual(current, current), attend(current), residual(current, current)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for number in range(num_res_blocks + 1):
                block = [residual(current + skips.pop(), width)] + ([attend(width)] if attention[level] else [])
                current = width
                if level and number == num_res_blocks:
                    block.append(residual(current, current, "up") if resblock_updown else Up(current))
                self.output_blocks.append(nn.ModuleList(block))
        made = in_channels * (2 if learn_sigma else 1)
        self.out = nn.Sequential(norm(current), nn.SiLU(), nn.Conv2d(current, made, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.width // 2
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.label_emb is not None:
            time = time + self.label_emb(labels)
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, time)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, time)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, time)
        return self.out(x)
