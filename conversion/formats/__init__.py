"""What a checkpoint is on disk: Hugging Face files, safetensors, torch's distributed checkpoints, Megatron metadata."""
