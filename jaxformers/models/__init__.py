"""What a decoder-only language model computes: pure functions over a pytree of arrays.

Knows no mesh, file, optimizer or tokenizer. Dims are named to an injected `shard`, so the same code runs on one device
and on any mesh.
"""
