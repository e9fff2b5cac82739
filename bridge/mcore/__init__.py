"""The Megatron-Core model of GPT-OSS-Vision, and its place in Megatron-Bridge.

Importing this package imports Megatron-Bridge (10 to 20 s), also where there is no CUDA and no Transformer Engine.
"""

from .cpu import import_megatron_bridge

import_megatron_bridge()


def register() -> None:
    """Make Megatron-Bridge know this model: its bridge, and its classes in ``run_config.yaml``.

    A part of `gpt_oss_vision.register`. Calling it again changes nothing.
    """
    from . import bridge, upstream  # importing the bridge registers it

    del bridge
    upstream.apply()
