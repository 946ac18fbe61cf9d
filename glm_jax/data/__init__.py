"""Data: sources, tokenizers, user files, splits and the pre-training corpus."""
