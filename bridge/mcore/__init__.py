"""The Megatron-Core model of GPT-OSS-Vision and its registration in Megatron-Bridge.

Importing this package imports Megatron-Bridge (10 to 20 s), with or without CUDA and Transformer Engine.
"""

from .cpu import import_megatron_bridge

import_megatron_bridge()


def register() -> None:
    """Register the bridge in Megatron-Bridge, allow our classes in ``run_config.yaml``, and apply the work-arounds.

    Called by `gpt_oss_vision.register`. Idempotent.
    """
    from . import bridge, upstream  # importing the bridge registers it

    del bridge
    upstream.apply()
