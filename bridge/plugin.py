"""Importing this module makes transformers' Auto classes and Megatron-Bridge know the model.

For frameworks that load plug-ins by name: ``bridge_plugins: [gpt_oss_vision.bridge.plugin]``. Others call
`gpt_oss_vision.register`, which is the same.
"""

from . import hf, megatron

hf.register_auto_classes()
megatron.register()
