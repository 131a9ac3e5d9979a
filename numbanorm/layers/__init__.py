"""Layers: parameters, running statistics and mode around the functions."""
