"""Importing this module makes transformers and Megatron-Bridge know the model, and transformers our attention.

For frameworks that load plug-ins by name: ``bridge_plugins: [gpt_oss_vision.bridge.plugin]``. Others call
`gpt_oss_vision.register`, which is the same.
"""

from . import hf, hf_attention, mcore

hf.register_auto_classes()
hf_attention.register_attention()
mcore.register()
