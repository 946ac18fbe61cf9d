"""Released checkpoints to our parameter tree and back, driven by the weight tables."""
