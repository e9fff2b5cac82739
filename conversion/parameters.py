"""The parameters of the Megatron model, and their conversion between transformers' layout and Megatron's.

`parameters` lists them by the weight map, `bridge/weight_map.py`; `to_megatron` and `to_hf` copy one into given memory
as its row's `Layout` says. Shapes: E experts, f their FFN width, h hidden size; g key/value groups of q query heads of
size d.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..bridge.ops.mxfp4 import MXFP4_PARTS, VALUES_PER_SCALE, Dequantizer, Quantizer
from ..bridge.weight_map import ROWS, Layout, Row
from ..errors import UserError

MADE_OF_EXPERTS = (Layout.EXPERT_GATE_UP, Layout.EXPERT_DOWN)
KEPT_WHOLE = (Layout.REPLICATED, Layout.COLUMN, Layout.ROW)
"""Layouts whose elements are the same, in the same order, on both sides."""

type Take = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Makes an uninitialised tensor of a shape and type."""


@dataclass(frozen=True, slots=True)
class MegatronParameter:
    """One parameter of the Megatron model, as a checkpoint stores it.

    Attributes:
        name: Megatron's, with layers and experts numbered globally.
        key: of the checkpoint's tensor that contains it.
        index: its position on that tensor's leading axes: ``()``, ``(layer,)`` or ``(layer, expert)``.
        axes: sizes of those axes.
        shape: its own.
        hf: the tensors of transformers' checkpoint that it is made of: one, or q, k and v.
        layout: how it is made of them.
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
        """The index of this parameter in the transformers tensor; None where it is all of that tensor."""
        return self.index[-1] if self.layout in MADE_OF_EXPERTS else None

    @property
    def chunks(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and size of the chunks that Megatron stores: gate and up apart, for tensor parallelism."""
        chunks = 2 if self.layout is Layout.EXPERT_GATE_UP else 1
        rows = self.shape[0] // chunks if self.shape else 0
        ones, rest = (1,) * len(self.axes), self.shape[1:]
        if not self.shape:
            return [(self.index, ones)]
        return [((*self.index, i * rows, *(0 for _ in rest)), (*ones, rows, *rest)) for i in range(chunks)]


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


def needs_scratch(parameter: MegatronParameter) -> bool:
    """Whether `to_megatron` and `to_hf` take memory for the transposed parameter."""
    return parameter.layout is Layout.EXPERT_GATE_UP and len(parameter.shape) == 2


def to_megatron(
    parameter: MegatronParameter, parts: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], take: Take
) -> None:
    """Copy transformers' tensors into Megatron's layout.

    Args:
        parameter: whose.
        parts: the tensors of ``parameter.hf``; of one expert, where they hold all. Any floating type: elements are
            rounded to that of `outputs`.
        outputs: memory for ``parameter.chunks``, each contiguous: two for gate and up, else one.
        take: makes scratch memory.
    """
    if parameter.layout is Layout.QKV:
        for slot, part in zip(_slots(parameter, outputs[0], parts), parts, strict=True):
            slot.copy_(part.view(slot.shape))
    elif parameter.layout is Layout.EXPERT_GATE_UP:
        transposed = parts[0]
        if needs_scratch(parameter):  # torch transposes a whole matrix fast, every second row of one slowly
            transposed = take(parameter.shape, outputs[0].dtype).copy_(parts[0].mT)
        for half, start in zip(outputs, (0, 1), strict=True):
            half.copy_(transposed[start::2])
    else:
        outputs[0].copy_(parts[0].mT if _is_transposed(parameter) else parts[0].view(outputs[0].shape))


def to_hf(parameter: MegatronParameter, megatron: torch.Tensor, parts: Sequence[torch.Tensor], take: Take) -> None:
    """Copy a Megatron tensor into transformers' layout: the inverse of `to_megatron`, never packed.

    Args:
        parameter: whose.
        megatron: ``parameter.shape``. Any floating type: its elements are rounded to that of `parts`.
        parts: one tensor per name of ``parameter.hf``, contiguous; of one expert, where the name holds all.
        take: makes scratch memory.
    """
    if parameter.layout is Layout.QKV:
        for slot, part in zip(_slots(parameter, megatron, parts), parts, strict=True):
            part.view(slot.shape).copy_(slot)
    elif parameter.layout is Layout.EXPERT_GATE_UP:
        transposed = take(parameter.shape, parts[0].dtype) if needs_scratch(parameter) else parts[0]
        for half, start in zip(megatron.chunk(2), (0, 1), strict=True):
            transposed[start::2].copy_(half)
        if needs_scratch(parameter):
            parts[0].copy_(transposed.mT)
    else:
        parts[0].copy_(megatron.mT if _is_transposed(parameter) else megatron.view(parts[0].shape))


def packed_shapes(name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of blocks and scales, by their names, for a packed tensor ``[E, in, out]``: output rows first.

    Raises:
        ValueError: rows of `in` values are no multiple of MXFP4's blocks.
    """
    experts, inside, outside = shape
    if inside % VALUES_PER_SCALE:
        raise UserError(f"MXFP4 packs rows in blocks of {VALUES_PER_SCALE}; those of {name} have {inside} numbers")
    scales = experts, outside, inside // VALUES_PER_SCALE
    return dict(zip((name + part for part in MXFP4_PARTS), ((*scales, VALUES_PER_SCALE // 2), scales), strict=True))


def unpack(
    parameter: MegatronParameter,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    dequantizer: Dequantizer,
) -> None:
    """Dequantise an expert's MXFP4 weight into Megatron's layout.

    Both are output rows first; only gate and up have to be separated.

    Args:
        parameter: whose.
        blocks: ``[2f, h / 32, 16]`` or ``[h, f / 32, 16]``.
        scales: ``[2f, h / 32]`` or ``[h, f / 32]``.
        outputs: memory for ``parameter.chunks``, of the dequantizer's type.
        dequantizer: this thread's.
    """
    if parameter.layout is Layout.EXPERT_DOWN:
        dequantizer.into(outputs[0], blocks, scales)
        return
    for half, start in zip(outputs, (0, 1), strict=True):
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
        ValueError: an element is not finite.
    """
    if parameter.layout is Layout.EXPERT_DOWN:
        quantizer.into(blocks, scales, megatron)
        return
    for half, start in zip(megatron.chunk(2), (0, 1), strict=True):
        quantizer.into(blocks[start::2], scales[start::2], half)


def _is_transposed(parameter: MegatronParameter) -> bool:
    return parameter.layout is Layout.EXPERT_DOWN and len(parameter.shape) == 2


def _slots(parameter: MegatronParameter, fused: torch.Tensor, parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Views of q, k and v in ``[g (q + 2) d, …]``: ``[g, q d, …]``, ``[g, d, …]`` and ``[g, d, …]``."""
    rows = [len(part) // parameter.groups for part in parts]
    return fused.view(parameter.groups, sum(rows), *fused.shape[1:]).split(rows, dim=1)
