"""What one layer of an adapter does to a weight, in float32 or float64.

Sources: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), LyCORIS (arXiv:2309.14859) with
LoCon, LoHa and LoKr, (IA)^3 (arXiv:2205.05638), OFT (arXiv:2306.07280).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import AdapterError, AdapterShapeError
from ..text.tensors import StoredTensor

KINDS = {
    "lora": {"down", "up"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "ia3": {"weight", "on_input"},
    "ia3_on_input": {"ia3_in"},
    "ia3_on_output": {"ia3_out"},
    "full": {"diff"},
    "oft": {"oft_blocks"},
}
"""Each kind's tensors that a layer can't lack. LoKr has several forms of each factor."""


@dataclass(frozen=True, eq=False)
class Change:
    """One layer of an adapter. layer: its name in the file, for messages. The tensors are read when they are needed.
    rank: by which alpha is divided, where the tensors don't say it."""

    layer: str
    tensors: Mapping[str, StoredTensor]
    alpha: float | None = None
    rank: int | None = None
    rank_stabilized: bool = False

    @property
    def kind(self) -> str:
        """ "lora", "loha", "lokr", "ia3", "ia3_on_input", "ia3_on_output" (both
        peft's), "full" or "oft". AdapterError if tensors are missing."""
        if {"lokr_w1", "lokr_w1_a"} & set(self.tensors) and {"lokr_w2", "lokr_w2_a"} & set(self.tensors):
            return "lokr"
        for kind, needed in KINDS.items():
            if needed <= set(self.tensors):
                return kind
        raise AdapterError(
            f"the layer {self.layer} has only {sorted(self.tensors)}: the file is incomplete; get it again"
        )

    def delta(self, base: np.ndarray, weight: float = 1.0, dyn: int | None = None) -> np.ndarray:
        """The change of `base`, in its type and shape. dyn: of a LoRA, only the first so many ranks count.

        AdapterShapeError if the layer is made for a weight of another shape, or its own shapes don't go together."""
        try:
            return self._delta(base, weight, dyn)
        except (ArithmeticError, LookupError, ValueError) as error:
            shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in self.tensors.items())
            raise AdapterShapeError(
                f"the layer {self.layer} has tensors that don't go together ({shapes}): the file is damaged; get it "
                "again"
            ) from error

    def _delta(self, base: np.ndarray, weight: float, dyn: int | None) -> np.ndarray:
        kind = self.kind
        if kind == "oft":
            return self._rotated(base, weight) - base
        if kind == "ia3":
            return weight * self._scaled(base)
        if kind in ("ia3_on_input", "ia3_on_output"):
            return weight * (self._multiplied(base, kind == "ia3_on_input") - base)
        change = self._fitted(self._product(kind, base.dtype, dyn), base.shape)
        if not {"dora_scale", "magnitude"} & set(self.tensors):
            return weight * change
        return weight * (self._decomposed(base + change) - base)

    def _values(self, name: str, dtype: np.dtype) -> np.ndarray:
        return self.tensors[name].values().astype(dtype)

    def _scale(self, rank: int) -> float:
        scalar = self.tensors["scalar"].number() if "scalar" in self.tensors else 1.0
        if "scale" in self.tensors:
            return scalar * self.tensors["scale"].number()
        rank = self.rank or rank
        alpha = self.alpha or rank
        return scalar * (alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank)

    def _product(self, kind: str, dtype: np.dtype, dyn: int | None) -> np.ndarray:
        if kind == "lora":
            return self._lora(dtype, dyn)
        if kind == "loha":
            rank = self.tensors["hada_w1_b"].shape[0]
            return self._scale(rank) * self._pair("hada_w1", "hada_t1", dtype) * self._pair("hada_w2", "hada_t2", dtype)
        if kind == "lokr":
            return self._lokr(dtype)
        return self._values("diff", dtype)

    def _lora(self, dtype: np.dtype, dyn: int | None) -> np.ndarray:
        down, up = self._values("down", dtype), self._values("up", dtype)
        scale = self._scale(down.shape[0])
        up = up.reshape(len(up), -1)
        if "mid" in self.tensors:
            mid = self._values("mid", dtype)[:dyn]
            down = down.reshape(len(down), -1)
            return scale * np.einsum("nm...,in,mj->ij...", mid, up[:, :dyn], down, optimize=True)
        if up.shape[1] != down.shape[0]:
            raise AdapterShapeError(
                f"the layer {self.layer} has factors of the shapes {up.shape} and {down.shape}, whose ranks differ: "
                "the file is damaged; get it again"
            )
        return scale * np.tensordot(up[:, :dyn], down[:dyn], 1)

    def _pair(self, name: str, core: str, dtype: np.dtype) -> np.ndarray:
        """The product of two factors, around a core if there is one."""
        a, b = self._values(f"{name}_a", dtype), self._values(f"{name}_b", dtype)
        if core in self.tensors:
            return np.einsum("ij...,ip,jr->pr...", self._values(core, dtype), a, b, optimize=True)
        return np.tensordot(a, b, 1)

    def _lokr(self, dtype: np.dtype) -> np.ndarray:
        ranks = [self.tensors[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in self.tensors]
        scale = self._scale(ranks[0] if ranks else 1) if ranks or self.rank else 1.0
        first = self._values("lokr_w1", dtype) if "lokr_w1" in self.tensors else self._pair("lokr_w1", "", dtype)
        whole = "lokr_w2" in self.tensors
        second = self._values("lokr_w2", dtype) if whole else self._pair("lokr_w2", "lokr_t2", dtype)
        return scale * np.kron(first.reshape(first.shape + (1,) * (second.ndim - first.ndim)), second)

    def _fitted(self, change: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A convolution's change may be stored flat, a linear layer's as a 1x1 convolution. An inpainting model's first
        convolution has 9 input channels, of which the first 4 are a plain model's."""
        if change.size == math.prod(shape) and change.shape[0] == shape[0]:
            return change.reshape(shape)
        if change.ndim == 4 and len(shape) == 4 and (change.shape[1], shape[1]) == (4, 9):
            padded = np.zeros((change.shape[0], 9, *change.shape[2:]), change.dtype)
            padded[:, :4] = change
            if padded.shape == shape:
                return padded
        raise AdapterShapeError(
            f"the layer {self.layer} changes a weight of the shape {change.shape}, and the model's has {shape}; load "
            "an adapter that was trained for this kind of model"
        )

    def _decomposed(self, weight: np.ndarray) -> np.ndarray:
        """DoRA. LyCORIS's magnitude of one row is a norm of each input column; any other is a norm of each output
        row."""
        magnitude = self._values("magnitude" if "magnitude" in self.tensors else "dora_scale", weight.dtype)
        lycoris = "magnitude" not in self.tensors
        columns = lycoris and magnitude.ndim > 1 and magnitude.shape[0] == 1 and weight.shape[0] != 1
        kept = 1 if columns else 0
        axes = tuple(axis for axis in range(weight.ndim) if axis != kept)
        if magnitude.size != weight.shape[kept]:
            raise self._misfit(f"magnitudes of the shape {magnitude.shape}", weight)
        norm = np.sqrt(np.sum(weight**2, axis=axes, keepdims=True))
        return magnitude.reshape(norm.shape) * weight / norm

    def _scaled(self, base: np.ndarray) -> np.ndarray:
        """(IA)^3 of LyCORIS: the change by a factor for each input column or each output row."""
        factors = self._values("weight", base.dtype).reshape(-1)
        axis = 1 if self.tensors["on_input"].number() else 0
        if factors.size != base.shape[axis]:
            raise self._misfit(f"{factors.size} factors", base)
        shape = [1] * base.ndim
        shape[axis] = factors.size
        return base * factors.reshape(shape)

    def _multiplied(self, base: np.ndarray, on_input: bool) -> np.ndarray:
        """(IA)^3 of peft: a factor for each input column or each output row, whose biases it multiplies too."""
        factors = self._values("ia3_in" if on_input else "ia3_out", base.dtype).reshape(-1)
        axis = 1 if on_input else 0
        if axis >= base.ndim or factors.size != base.shape[axis]:
            raise self._misfit(f"{factors.size} factors", base)
        return np.moveaxis(np.moveaxis(base, axis, -1) * factors, -1, axis)

    def _rotated(self, base: np.ndarray, weight: float) -> np.ndarray:
        """OFT and BOFT: blocks of output rows are turned by the Cayley transform of a skew matrix; with BOFT
        (arXiv:2311.06243) several times, of rows that lie further and further apart."""
        blocks = self._values("oft_blocks", base.dtype)
        if blocks.ndim not in (3, 4) or blocks.shape[-3] * blocks.shape[-1] != base.shape[0]:
            raise self._misfit(f"rotations of the shape {blocks.shape}", base)
        turns = self._turns(blocks, base.shape[0], weight)
        if blocks.ndim == 3:
            turned = _turned(base.reshape(base.shape[0], -1), turns.swapaxes(1, 2))
        else:
            turned = _butterfly(base.reshape(base.shape[0], -1), turns)
        turned = turned.reshape(base.shape)
        if "rescale" in self.tensors:
            turned = (self._values("rescale", base.dtype).reshape(-1) * turned.T).T
        return turned

    def _turns(self, blocks: np.ndarray, rows: int, weight: float) -> np.ndarray:
        """The rotations, mixed with none by `weight`. alpha bounds the skew matrices' norm."""
        identity = np.eye(blocks.shape[-1], dtype=blocks.dtype)
        skew = blocks - blocks.swapaxes(-1, -2)
        if self.alpha:
            norm = float(np.linalg.norm(skew)) + 1e-8
            skew = skew * min(norm, self.alpha * rows) / norm
        turn = (identity + skew) @ np.linalg.inv(identity - skew)
        return weight * turn + (1 - weight) * identity

    def _misfit(self, given: str, base: np.ndarray) -> AdapterShapeError:
        return AdapterShapeError(
            f"the layer {self.layer} has {given} for a weight of the shape {base.shape}; load an adapter that was "
            "trained for this kind of model"
        )


def _turned(rows: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Each block of rows [n b, in], turned by its matrix [n, b, b]."""
    return (turns @ rows.reshape(*turns.shape[:2], -1)).reshape(rows.shape)


def _butterfly(rows: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Rows [N, in], turned by all of [m, n, b, b]. Before turn i, pairs of rows 2^i b / 2 apart come together."""
    for i, turn in enumerate(turns):
        apart = 2**i * turn.shape[-1] // 2
        places = np.arange(len(rows)).reshape(-1, 2, apart).swapaxes(1, 2).reshape(-1)
        turned = np.empty_like(rows)
        turned[places] = _turned(rows[places], turn)
        rows = turned
    return rows


def changed(base: np.ndarray, changes: Sequence[tuple[Change, float, int | None]]) -> np.ndarray:
    """`base` with the changes of several adapters, each with its weight and the ranks that count. Each is computed from
    `base`, so that their order does not matter."""
    total = base.copy()
    for change, weight, dyn in changes:
        total += change.delta(base, weight, dyn)
    return total
