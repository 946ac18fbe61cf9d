"""Layers, the mask and the losses: functions on arrays. No model knows another."""
