"""Importing this module registers the model in transformers and Megatron-Bridge, and our attention in transformers.

For frameworks that load plug-ins by name: ``bridge_plugins: [gpt_oss_vision.bridge.plugin]``. Elsewhere call
`gpt_oss_vision.register`, which does the same.
"""

import importlib

from . import hf, hf_attention, mcore

hf.register_auto_classes()
hf_attention.register_attention()
mcore.register()
# By name: `recipes` is built on this package, and its catalogue on the standard library alone.
catalog = importlib.import_module("gpt_oss_vision.recipes.catalog")
catalog.publish(importlib.import_module("megatron.bridge.recipes"))
