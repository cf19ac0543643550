"""From files to batches: tokenizers, text sources, the token cache, packing and the batch iterator.

The way of a batch, one module a stage: `sources` reads documents from files, `tokenizer` turns text into ids, `shards`
and `cache` keep those ids on disk, `packing` decides which piece of which document lies in which row, `rows` cuts the
rows out of the cache, `corpus` opens all of it from one config, `pipeline` makes batches and puts them on a mesh.

Nothing here knows a model, a loss or a step. Only `pipeline` imports jax, and nothing is imported from here on its own:
the processes that tokenize start in a fraction of a second.
"""
