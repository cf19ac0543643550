"""Who sees whom. Masks are never data: positions and segments define them.

B batch, T query time, S key time
"""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class Visibility:
    """Where queries and keys stand. A query sees the keys at or before its position, inside its window and segment.

    Positions are int32 [B or 1, T] and [B or 1, S]. Segments number the documents packed into a row (0 = padding, which
    sees only padding); None where each row is one document.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None

    def distance(self) -> jax.Array:
        """How far behind each query each key stands, int32 [B or 1, T, S]."""
        return self.q_positions[:, :, None] - self.k_positions[:, None, :]

    def mask(self, window: int | None) -> jax.Array:
        """bool [B or 1, T, S], True where a query may look at a key. Every query sees at least itself."""
        distance = self.distance()
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        if self.q_segments is not None and self.k_segments is not None:
            visible &= self.q_segments[:, :, None] == self.k_segments[:, None, :]
        return visible
