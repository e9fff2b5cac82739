"""The Megatron-Bridge bridge of GPT-OSS-Vision, used by `AutoBridge`."""

from collections.abc import Iterable, Mapping

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.bridge.utils.common_utils import extract_expert_number_from_param

from ...errors import UserError
from ..ops.mxfp4 import MXFP4_PARTS, dequantize
from ..weight_map import ROWS, Layout, Row
from . import upstream
from .model import MCoreGPTOSSVisionModel
from .provider import GPTOSSVisionProvider, provider_from_config


class ExpertMapping(MegatronParamMapping[torch.Tensor]):
    """One expert of a transformers tensor ``[E, …]`` with all experts.

    Megatron has a parameter per expert: on import several parameters read the same tensor, on export they are stacked.
    """

    is_grouped_export = True

    def __init__(self, megatron_param: str, hf_param: str):
        super().__init__(megatron_param, hf_param)
        # As MXFP4 the tensor is stored under two other names.
        self.allow_hf_name_mismatch = True

    @property
    def group_key(self) -> str:
        """Name of the tensor with all experts."""
        return str(self.hf_param)

    @property
    def expert(self) -> int:
        """Global index of the expert."""
        return extract_expert_number_from_param(self.megatron_param)

    def _parallel[M: MegatronParamMapping](self, mapping: M) -> M:
        """Let `mapping` shard on this mapping's process groups."""
        if self._pg_collection is not None:
            mapping.set_process_groups_from_pg_collection(self._pg_collection)
        return mapping


class GateUpMapping(ExpertMapping):
    """``[E, h, 2f]`` or ``[E, 2f]``, gate and up interleaved; per expert ``[2f, h]`` or ``[2f]``, gate before up."""

    def _gated(self) -> GatedMLPMapping:
        gate, up = self._part_names
        return self._parallel(GatedMLPMapping(self.megatron_param, gate=gate, up=up))

    @property
    def _part_names(self) -> tuple[str, str]:
        return f"{self.hf_param}[gate]", f"{self.hf_param}[up]"

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module) -> torch.Tensor:
        """Select the expert, transpose it, separate gate and up, and shard both over the expert-TP ranks."""
        mine = hf_weights[self.expert]
        mine = mine.mT if mine.ndim == 2 else mine
        parts = {"gate": mine[0::2].contiguous(), "up": mine[1::2].contiguous()}
        return self._gated().hf_to_megatron(parts, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """Gather both halves and interleave them; with expert parallelism a leading axis of EP ranks remains."""
        parts = self._gated().megatron_to_hf(megatron_weights, megatron_module)
        if not parts:
            return {}
        is_weight = not str(self.hf_param).endswith("_bias")
        joined = torch.stack([parts[name] for name in self._part_names], dim=-2 if is_weight else -1)
        # [.., f, 2, h] to [.., 2f, h] for a weight, [.., f, 2] to [.., 2f] for a bias
        joined = joined.flatten(-3, -2).mT.contiguous() if is_weight else joined.flatten(-2)
        return {self.group_key: joined}


class DownMapping(ExpertMapping):
    """``[E, f, h]`` or ``[E, h]``, and per expert ``[h, f]`` or ``[h]``.

    The orientation is never inferred from the shape: gpt-oss has h = f.
    """

    def _row(self) -> RowParallelMapping:
        return self._parallel(RowParallelMapping(self.megatron_param, str(self.hf_param)))

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module) -> torch.Tensor:
        """Select the expert, transpose it, and shard it over the expert-TP ranks."""
        mine = hf_weights[self.expert]
        return self._row().hf_to_megatron(mine.mT.contiguous() if mine.ndim == 2 else mine, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """Gather and transpose; with expert parallelism a leading axis of EP ranks remains."""
        gathered = self._row().megatron_to_hf(megatron_weights, megatron_module)
        if str(self.hf_param).endswith("_bias"):
            return gathered
        return {name: weight.mT.contiguous() for name, weight in gathered.items()}


MAPPINGS = {
    Layout.REPLICATED: ReplicatedMapping,
    Layout.COLUMN: ColumnParallelMapping,
    Layout.ROW: RowParallelMapping,
    Layout.EXPERT_GATE_UP: GateUpMapping,
    Layout.EXPERT_DOWN: DownMapping,
}


def mapping_of(row: Row) -> MegatronParamMapping:
    """The Megatron-Bridge mapping of a row."""
    if row.layout is Layout.QKV:
        assert isinstance(row.hf, dict)
        return QKVMapping(row.megatron, **row.hf)
    return MAPPINGS[row.layout](row.megatron, row.hf)


@MegatronModelBridge.register_bridge(
    source="GPTOSSVisionForCausalLM",
    target=MCoreGPTOSSVisionModel,
    provider=GPTOSSVisionProvider,
    model_type="gpt_oss_vision",
)
class GPTOSSVisionBridge(MegatronModelBridge):
    """GPT-OSS-Vision between transformers and Megatron-Core.

    Used through ``AutoBridge.from_hf_pretrained(path)`` after ``gpt_oss_vision.register()``. Other bridges only warn of
    a parameter without a mapping; this one raises an error with its name.
    """

    def provider_bridge(self, hf_pretrained) -> GPTOSSVisionProvider:
        """The provider of a checkpoint's config, not finalized."""
        return provider_from_config(hf_pretrained.config)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The weight map as Megatron-Bridge's mappings."""
        return MegatronMappingRegistry(*(mapping_of(row) for row in ROWS))

    def build_conversion_tasks(self, hf_pretrained, megatron_model, weight_dtype: torch.dtype | None = None):
        """As in the base class, after `check_coverage`.

        Raises:
            UserError: listing every Megatron parameter without a source and every source tensor without a use.
        """
        source = getattr(getattr(hf_pretrained, "state", None), "source", None)
        names = upstream.global_parameter_names(self, megatron_model)
        check_coverage(names, source.get_all_keys() if source is not None else None, self.mapping_registry())
        return super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype)

    def maybe_modify_loaded_hf_weight(
        self, hf_param: str | dict[str, str], hf_state_dict: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Read a tensor; MXFP4 is dequantised and transposed to the orientation of unquantised checkpoints."""
        if isinstance(hf_param, str) and hf_param not in hf_state_dict:
            blocks, scales = (hf_state_dict[hf_param + part] for part in MXFP4_PARTS)
            return dequantize(blocks, scales).mT
        return super().maybe_modify_loaded_hf_weight(hf_param, hf_state_dict)


def check_coverage(
    megatron_names: Iterable[str], hf_names: Iterable[str] | None, registry: MegatronMappingRegistry
) -> None:
    """Compare the parameters of a model with the tensors of a checkpoint.

    Args:
        megatron_names: global parameter names.
        hf_names: names in the checkpoint, or None when there is none to compare with.
        registry: the mappings between them.

    Raises:
        UserError: listing unmapped, missing and unused names.
    """
    wanted, unmapped = set(), []
    for name in megatron_names:
        mapping = registry.megatron_to_hf_lookup(name)
        if mapping is None:
            unmapped.append(name)
        else:
            wanted |= {mapping.hf_param} if isinstance(mapping.hf_param, str) else set(mapping.hf_param.values())
    problems = {"Megatron parameters without a mapping": unmapped}
    if hf_names is not None:
        found = {_without_mxfp4_part(name) for name in hf_names}
        problems["tensors missing in the checkpoint"] = sorted(wanted - found)
        problems["tensors of the checkpoint that nothing reads"] = sorted(found - wanted)
    listed = [f"{title}: {', '.join(names)}" for title, names in problems.items() if names]
    if listed:
        raise UserError("The checkpoint and the model do not match. " + "; ".join(listed) + ".")


def _without_mxfp4_part(name: str) -> str:
    for part in MXFP4_PARTS:
        name = name.removesuffix(part)
    return name
