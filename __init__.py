"""GPT-OSS-Vision for NVIDIA Megatron-Bridge."""
