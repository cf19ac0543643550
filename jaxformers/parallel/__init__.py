"""Where arrays live: device meshes, and the rules that place named dims on their axes.

Knows specs and shapes, nothing of files, tokens or optimizers.
"""
