"""How the numbers of one parameter move between transformers' layout and Megatron's, straight into given memory.

`parameters` fills the numbers into the name table of `bridge/weight_map.py`; `to_megatron` and `to_hf` do what a row's
`Layout` says. Shapes: E experts, f their FFN width, h hidden size; g key/value groups of q query heads of size d.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..bridge.ops.mxfp4 import Dequantizer, Quantizer
from ..bridge.weight_map import ROWS, Layout, Row

MXFP4_PARTS = ("_blocks", "_scales")
"""What is added to the name of a tensor that is stored as MXFP4."""

MADE_OF_EXPERTS = (Layout.EXPERT_GATE_UP, Layout.EXPERT_DOWN)
KEPT_WHOLE = (Layout.REPLICATED, Layout.COLUMN, Layout.ROW)
"""Layouts whose numbers are the same, in the same order, on both sides."""


@dataclass(frozen=True, slots=True)
class MegatronParameter:
    """One parameter of the Megatron model, as a checkpoint has it.

    Attributes:
        name: Megatron's, with layers and experts numbered globally.
        key: of the checkpoint's tensor that it is a part of.
        index: where it lies on that tensor's leading axes: ``()``, ``(layer,)`` or ``(layer, expert)``.
        axes: how long those axes are.
        shape: its own.
        hf: the tensors of transformers' checkpoint that it is made of: one, or q, k and v.
        layout: how.
        groups: key/value groups of the attention.
        keep_fp32: whether it stays fp32 whatever the precision of the model.
    """

    name: str
    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    layout: Layout
    groups: int
    keep_fp32: bool

    @property
    def expert(self) -> int | None:
        """Which entry of the transformers tensor this parameter is; None where it is the whole of it."""
        return self.index[-1] if self.layout in MADE_OF_EXPERTS else None

    @property
    def chunks(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and size of the pieces that Megatron stores: gate and up apart, for tensor parallelism."""
        pieces = 2 if self.layout is Layout.EXPERT_GATE_UP else 1
        rows = self.shape[0] // pieces if self.shape else 0
        ones, rest = (1,) * len(self.axes), self.shape[1:]
        if not self.shape:
            return [(self.index, ones)]
        return [((*self.index, i * rows, *(0 for _ in rest)), (*ones, rows, *rest)) for i in range(pieces)]


def parameters(shapes: Mapping[str, Sequence[int]], groups: int) -> list[MegatronParameter]:
    """Every parameter of the Megatron model, in the order of the table, then of layers and experts.

    Args:
        shapes: of every tensor of the transformers model, by name, unquantised.
        groups: key/value groups of the attention.

    Raises:
        ValueError: listing the tensors that no row of the table names.
    """
    found: list[MegatronParameter] = []
    taken: set[str] = set()
    for row in ROWS:
        names = list(row.hf.values()) if isinstance(row.hf, dict) else [row.hf]
        pattern = re.compile(re.escape(names[0]).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)") + "$")
        matches = [match for name in shapes if name not in taken and (match := pattern.match(name))]
        for match in matches:  # two rows name the input norm; the first has the checkpoint's key
            hf = tuple(_fill(name, match.groups()) for name in names)
            taken.update(hf)
            found += _at(row, match.groups(), len(matches), hf, [tuple(shapes[name]) for name in hf], groups)
    unknown = sorted(shapes.keys() - taken)
    if unknown:
        raise ValueError(f"The name table has no row for {', '.join(unknown)}.")
    return found


def _at(
    row: Row, numbers: tuple[str, ...], count: int, hf: tuple[str, ...], shapes: list[tuple[int, ...]], groups: int
) -> list[MegatronParameter]:
    """The parameters of a row with its numbers filled in: one, or one per expert."""
    of_layer = row.megatron.startswith("decoder.layers.")
    index, axes = ((int(numbers[0]),), (count,)) if of_layer else ((), ())
    shape = _megatron_shape(row.layout, shapes)
    rest = (shape, hf, row.layout, groups, row.keep_fp32)
    if row.layout not in MADE_OF_EXPERTS:
        name = _fill(row.megatron, numbers)
        return [MegatronParameter(name, checkpoint_key(name), index, axes, *rest)]
    experts = shapes[0][0]
    names = [_fill(row.megatron, (*numbers, str(expert))) for expert in range(experts)]
    return [
        MegatronParameter(name, checkpoint_key(name), (*index, expert), (*axes, experts), *rest)
        for expert, name in enumerate(names)
    ]


def checkpoint_key(name: str) -> str:
    """The key under which Megatron-Core stores a parameter: layers and experts are axes there, not numbers.

    >>> checkpoint_key("decoder.layers.7.mlp.experts.linear_fc1.weight31")
    'decoder.layers.mlp.experts.experts.linear_fc1.weight'
    """
    key = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", name)
    return re.sub(r"(?<=\.mlp\.)experts\.(\w+\.\w+?)\d+$", r"experts.experts.\1", key)


def _fill(pattern: str, numbers: Sequence[str]) -> str:
    left = iter(numbers)
    return re.sub(r"\*+", lambda _: next(left), pattern)


def _megatron_shape(layout: Layout, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if layout is Layout.QKV:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return shapes[0][:0:-1] if layout in MADE_OF_EXPERTS else shapes[0]


def to_megatron(
    parameter: MegatronParameter, parts: Sequence[torch.Tensor], pieces: Sequence[torch.Tensor], scratch: torch.Tensor
) -> None:
    """Lay transformers' numbers out as Megatron has them.

    Args:
        parameter: whose.
        parts: the tensors of ``parameter.hf``; of one expert, where they hold all. Any floating type: they are
            rounded to that of `pieces`.
        pieces: memory for ``parameter.chunks``, each contiguous: two for gate and up, else one.
        scratch: ``parameter.shape``, of the type of `pieces`.
    """
    if parameter.layout is Layout.QKV:
        for slot, part in zip(_slots(parameter, pieces[0], parts), parts, strict=True):
            slot.copy_(part.view(slot.shape))
    elif parameter.layout is Layout.EXPERT_GATE_UP:
        # By way of the transpose: torch turns a whole matrix fast, every second row of one slowly.
        turned = scratch.copy_(parts[0].mT) if scratch.ndim == 2 else parts[0]
        for half, start in zip(pieces, (0, 1), strict=True):
            half.copy_(turned[start::2])
    else:
        pieces[0].copy_(parts[0].mT if _is_turned(parameter) else parts[0].view(pieces[0].shape))


def to_hf(
    parameter: MegatronParameter, megatron: torch.Tensor, parts: Sequence[torch.Tensor], scratch: torch.Tensor
) -> None:
    """Lay Megatron's numbers out as transformers has them: the inverse of `to_megatron`, never packed.

    Args:
        parameter: whose.
        megatron: ``parameter.shape``. Any floating type: its numbers are rounded to that of `parts`.
        parts: one tensor per name of ``parameter.hf``, contiguous; of one expert, where the name holds all.
        scratch: as large as `megatron`, of the type of `parts`.
    """
    if parameter.layout is Layout.QKV:
        for slot, part in zip(_slots(parameter, megatron, parts), parts, strict=True):
            part.view(slot.shape).copy_(slot)
    elif parameter.layout is Layout.EXPERT_GATE_UP:
        turned = scratch if megatron.ndim == 2 else parts[0]
        for half, start in zip(megatron.chunk(2), (0, 1), strict=True):
            turned[start::2].copy_(half)
        if megatron.ndim == 2:
            parts[0].copy_(scratch.mT)
    else:
        parts[0].copy_(megatron.mT if _is_turned(parameter) else megatron.view(parts[0].shape))


def unpack(
    parameter: MegatronParameter,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    dequantizer: Dequantizer,
) -> None:
    """Lay an expert's MXFP4 numbers out as Megatron has them.

    They are packed output rows first, as Megatron's are; only gate and up have to be parted.

    Args:
        parameter: whose.
        blocks: ``[2f, h / 32, 16]`` or ``[h, f / 32, 16]``.
        scales: ``[2f, h / 32]`` or ``[h, f / 32]``.
        pieces: memory for ``parameter.chunks``, of the dequantizer's type.
        dequantizer: this thread's.
    """
    if parameter.layout is Layout.EXPERT_DOWN:
        dequantizer.into(pieces[0], blocks, scales)
        return
    for half, start in zip(pieces, (0, 1), strict=True):
        dequantizer.into(half, blocks[start::2], scales[start::2])


def pack(
    parameter: MegatronParameter,
    megatron: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    quantizer: Quantizer,
) -> None:
    """Pack an expert's weight as MXFP4: the inverse of `unpack`, up to rounding.

    Args:
        parameter: whose.
        megatron: ``parameter.shape``.
        blocks: ``[2f, h / 32, 16]`` or ``[h, f / 32, 16]``.
        scales: ``[2f, h / 32]`` or ``[h, f / 32]``.
        quantizer: this thread's.

    Raises:
        ValueError: a number is not finite.
    """
    if parameter.layout is Layout.EXPERT_DOWN:
        quantizer.into(blocks, scales, megatron)
        return
    for half, start in zip(megatron.chunk(2), (0, 1), strict=True):
        quantizer.into(blocks[start::2], scales[start::2], half)


def _is_turned(parameter: MegatronParameter) -> bool:
    return parameter.layout is Layout.EXPERT_DOWN and len(parameter.shape) == 2


def _slots(parameter: MegatronParameter, fused: torch.Tensor, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Where q, k and v lie in ``[g (q + 2) d, …]``: ``[g, q d, …]``, ``[g, d, …]`` and ``[g, d, …]``."""
    rows = [len(part) // parameter.groups for part in parts]
    return fused.view(parameter.groups, sum(rows), *fused.shape[1:]).split(rows, dim=1)
