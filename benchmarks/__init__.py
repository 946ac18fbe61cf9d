"""Measurements that compare glm-jax with a peer or a baseline, each in one run."""
