"""From a prompt to more tokens: sampling, cached generation, and the engine that batches requests.

Everything here works on token ids and arrays. It knows nothing about text, tokenizers, files or HTTP: those stand in
front of it and behind it.
"""
