"""Tokenized corpora in other programs' formats, each written from a token cache.

What is written depends on the cache alone, so neither the number of processes nor an interruption shows in it. Knows no
text: ids go in, ids come out.
"""
