"""Files in and out: where a model reference points, and how weights are laid out on disk.

This package reads and writes other people's formats (Hugging Face directories, safetensors files) and turns a reference
that a user typed into a path. It knows nothing about meshes, optimizers, training runs or generation, and it never
loads pickled weights.
"""
