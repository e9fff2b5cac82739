"""LoRA beside which some groups of parameters are trained as full weights, such as the projector of a vision model."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.bridge.peft.lora import LoRA

from ...bridge.mcore.upstream import as_config_value
from ...bridge.weight_map import LANGUAGE_MODEL, PARAM_GROUPS, group_of
from ...errors import UserError


@dataclass
class GPTOSSVisionLoRA(LoRA):
    """Megatron-Bridge's LoRA, with `full_weights`: groups of parameters (`PARAM_GROUPS`) that are trained themselves.

    Its checkpoints hold the adapters and these weights. A group that the provider freezes stays frozen.
    """

    full_weights: list[str] = field(default_factory=lambda: ["vision_projection", "vision_bias"])
    names_of_full_weights = frozenset()  # of the model that has been adapted; no field
    matched = frozenset()  # targets that some module has matched; no field

    def freeze_model(self, model: Any, training: bool = True) -> None:
        """Freeze all parameters, in training but those of `full_weights` that are not frozen already.

        Raises:
            UserError: `full_weights` names what is no group, or the language model, which has the adapters.
        """
        groups = [group for group in PARAM_GROUPS if group != LANGUAGE_MODEL]
        if unknown := sorted({*self.full_weights} - {*groups}):
            raise UserError(f"peft.full_weights has {', '.join(unknown)}; it takes {', '.join(groups)}.")
        chunks = model if isinstance(model, list) else [model]
        named = [pair for chunk in chunks for pair in chunk.named_parameters()]
        kept = {name: one for name, one in named if one.requires_grad and group_of(name) in self.full_weights}
        self.names_of_full_weights = self.names_of_full_weights | kept.keys()
        super().freeze_model(model, training)
        for parameter in kept.values() if training else ():
            parameter.requires_grad_(True)

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Adapt a model. Megatron-Bridge only logs a target without a module, and then trains without its adapters.

        Raises:
            UserError: a target matches no module of any rank.
        """
        self.matched = frozenset()
        adapted = super().__call__(model, training)
        unmatched = {*(self.target_modules or ())} - self.matched
        if torch.distributed.is_initialized():  # a pipeline stage has some of the layers
            of_ranks = [unmatched] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(of_ranks, unmatched)
            unmatched = set.intersection(*of_ranks)
        if unmatched:
            raise UserError(
                f"peft.target_modules has {', '.join(sorted(unmatched))}, which no module of the model is called; "
                "the linear layers are linear_qkv, linear_proj, linear_fc1 and linear_fc2"
            )
        return adapted

    def match(self, m: Any, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """The target that a module matches, and the module's name; the target is recorded."""
        found = super().match(m, name, prefix)
        if found is not None:
            self.matched = self.matched | {found[0]}
        return found

    def adapter_key_filter(self, key: Any) -> bool:
        """Whether a checkpoint has the parameter: an adapter's or a full weight, also where it is loaded to be used."""
        name = key[0] if isinstance(key, tuple) else key
        return name in self.names_of_full_weights or super().adapter_key_filter(key)

    def to_cfg_dict(self) -> dict[str, Any]:
        """The fields for a configuration file.

        Megatron-Bridge 0.6.2 would write what it records while it adapts a model too, in sets, which it cannot read.
        """
        recorded = {"canonical_mapping"} | {each.name for each in fields(self) if not each.init}
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in recorded}
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"_target_": target} | {name: as_config_value(value) for name, value in values.items()}
