"""Generation: the key-value cache, sampling, and the compiled prefill and decode loop."""
