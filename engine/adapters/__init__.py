"""Adapters: files of changes to a model's weights, such as LoRA."""
