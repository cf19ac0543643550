"""From a batch to an update, and from updates to a run: losses, optimizer, the step, checkpoints and the loop.

SFT, preference learning and distillation are losses and parameter splits over the one step here, not other trainers.
Only `loop` reads clocks and handles signals.
"""
