"""Checkpoints: where the bytes of every expert lie in safetensors and GGUF files, and the expert pack."""
