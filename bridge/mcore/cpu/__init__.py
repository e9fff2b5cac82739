"""Megatron without a CUDA device, and without Transformer Engine: imports, calls of torch.cuda, and ranks.

Versions: megatron-bridge 0.6.2, megatron-core 0.19.2, torch 2.11.0. A test checks every name in the tables.
"""

# ruff: noqa: F401
from .ranks import die_with_parent, run_ranks
from .runtime import CPU, adapt_config_for_cpu, cuda_is_real, redirections, runtime
from .stand_ins import import_megatron_bridge
