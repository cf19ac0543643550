"""An OpenAI-compatible HTTP API over an engine: bodies, routes, keys, streams, metrics.

It knows tokenizers and what an engine is asked (`infer.request`); it loads no model and compiles nothing itself.
"""
