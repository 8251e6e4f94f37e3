"""Who sees whom, in every layout of sequences.

B rows, T query tokens, S key tokens, G key/value heads, C channels of a head.
"""

import jax
from flax import struct

from dpo_jax.types import Views

Prefix = tuple[int, int, int]


@struct.dataclass
class AttentionMask:
    """Who sees whom. Without anything: token t sees tokens 0..t.

    Attributes:
      segments:  int32 [B, T]  a token sees only tokens of its own segment, and only those at or before its own index.
                               Padding is segment 0: real tokens never see it, it sees only itself, and what it gives is
                               finite and nobody's business.
      positions: int32 [B, T]  the cached form: keys and values are [B, G, S, C], the slots of a cache, and a query at
                               position p sees slots 0..p.
      packed:    static; False promises that the segments of a row (with a prefix: of each block) are 1 ... 1 0 ... 0.
      window:    static; a token sees itself and the window - 1 positions before it. None: all before it.
      at:        int32 [B, T]  where each token stands in its sequence; given with a window.
      prefix:    (P, K, R)     static; the shared-prefix layout of T = P + K R tokens: a prompt block of P tokens, then
                               K response blocks of R. A response sees the prompt and itself, never another response.
      views:                   rows are windows of several sequences, which these say; nothing else is said then but
                               a window.
    """

    segments: jax.Array | None = None
    positions: jax.Array | None = None
    prefix: Prefix | None = struct.field(pytree_node=False, default=None)
    packed: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    at: jax.Array | None = None
    views: Views | None = None
