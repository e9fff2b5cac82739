"""INT8 weights through torchao, experts included, and a summary of what is quantised.

model = GPTOSSVisionForCausalLM.from_pretrained(folder, dtype="bfloat16", quantization_config=int8_config())
print(describe_weights(model))
"""

import re
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TorchAoConfig

from ..errors import UserError
from .hf.configuration_gpt_oss_vision import TOWERS

try:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
except ModuleNotFoundError as error:
    raise UserError("INT8 weights need torchao; install it with `pip install 'gpt-oss-vision[int8]'`") from error

# Weights of the linear layers of decoder, towers, projection and head, and the experts. Routers stay: they are small,
# and rounding would change which experts are chosen. So do embeddings, which torchao would unpack for every token.
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "proj", "lm_head"}.union(
    *(tower.linears for tower in TOWERS.values())
)
LINEAR_WEIGHTS = rf"(?:.*\.)?(?:{'|'.join(sorted(LINEARS))})\.weight"
EXPERT_WEIGHTS = r".*\.experts\.(?:gate_up|down)_proj"


def int8_config() -> TorchAoConfig:
    """The `quantization_config` of `from_pretrained` for INT8 weights with a scale per row.

    Weights are quantised one by one while they are loaded, on any device. A quantised model can be saved and loaded.
    """
    int8 = Int8WeightOnlyConfig(version=2)
    return TorchAoConfig(
        FqnToConfig(OrderedDict.fromkeys((f"re:{LINEAR_WEIGHTS}", f"re:{EXPERT_WEIGHTS}"), int8)),
        modules_to_not_convert=[],  # transformers would exclude the head
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightUsage:
    """Number, memory and quantisation of the parameters with one name, over all layers."""

    name: str  # with "N" for the number of a layer
    weights: int
    bytes: int
    is_quantized: bool


def weight_usage(model: nn.Module) -> list[WeightUsage]:
    """Usage per parameter name, the largest first."""
    kinds = defaultdict(list)
    for name, parameter in model.named_parameters():
        kinds[re.sub(r"\.\d+\.", ".N.", name)].append(parameter)
    rows = [
        WeightUsage(
            name=name,
            weights=sum(parameter.numel() for parameter in parameters),
            bytes=sum(_bytes_of(parameter) for parameter in parameters),
            is_quantized=any(_parts_of(parameter) for parameter in parameters),
        )
        for name, parameters in kinds.items()
    ]
    return sorted(rows, key=lambda row: -row.weights)


def describe_weights(model: nn.Module, *, named_at_most: int = 3) -> str:
    """A sentence with the number of weights, their memory, and the names and shares of those that are not quantised."""
    rows = weight_usage(model)
    total = sum(row.weights for row in rows)
    left = [row for row in rows if not row.is_quantized]
    shares = [f"{row.name} {row.weights / total:.2%}" for row in left[:named_at_most]]
    if others := left[named_at_most:]:
        shares.append(f"{len(others)} smaller kinds {sum(row.weights for row in others) / total:.2%}")
    size = sum(row.bytes for row in rows) / 1e9
    share = sum(row.weights for row in left) / total
    return f"{total:,} weights in {size:.3g} GB; {share:.2%} of them not quantised: {', '.join(shares)}."


def _parts_of(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of a quantised parameter (values and scales); empty for a plain tensor."""
    if not is_traceable_wrapper_subclass(parameter):
        return []
    names, _ = parameter.__tensor_flatten__()
    return [getattr(parameter, name) for name in names]


def _bytes_of(parameter: torch.Tensor) -> int:
    return sum(part.nbytes for part in _parts_of(parameter) or [parameter])
