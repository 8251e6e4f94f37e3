"""Batches: what flows between the data pipeline and the training steps.

Glossary of axes, the same everywhere in this code base:
B batch (prompts), K responses a prompt, P prompt tokens, R response tokens, T sequence tokens, D width,
H heads, G key/value heads, C channels of a head, F feed-forward width, V vocabulary, L layers, W windows.
"""

import jax
import jax.numpy as jnp
from flax import struct

CHOSEN, REJECTED, MISMATCHED = 0, 1, 2
"""Positions on the K axis of a preference group. MISMATCHED and on are there only for KTO (see `align/dpo.py`)."""


@struct.dataclass
class Views:
    """What attention sees of windows of T places: sequences of their own, each a plain causal one, right-padded.

    A place may stand in several sequences (a prompt stands in those of all its responses), and is a query in one alone:
    what attention gives there would be the same in all. Of the sequences of the last classes only the ends are queries.
    Sequences of like length share a class.

    Attributes:
      places:  a class each: int32 [W, n, L], the place in the window of each token of n sequences; any at padding.
      lengths: a class each: int32 [W, n], tokens of each sequence; 0 for one that is not there.
      homes:   int32 [W, T, J], where each place stands in the sequences of its window, all classes one behind the
               other; the sum of all n L where there are fewer than J.
      tails:   each of the last classes: int32 [W, n, Q], the places that are queries; any at padding.
      starts:  each of the last classes: int32 [W, n], which token of its sequence the first of them is.
      answers: int32 [W, T], where each place stands among the queries of all classes (L or Q of each sequence), one
               behind the other; the sum of all where there is none.
    """

    places: tuple[jax.Array, ...]
    lengths: tuple[jax.Array, ...]
    homes: jax.Array
    tails: tuple[jax.Array, ...]
    starts: tuple[jax.Array, ...]
    answers: jax.Array

    @property
    def queries(self) -> tuple[jax.Array, ...]:
        """A class each: int32 [W, n, L or Q], the places that are queries."""
        return (*self.places[: len(self.places) - len(self.tails)], *self.tails)

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return max(places.shape[2] for places in self.places)


@struct.dataclass
class Windows:
    """The real tokens of preference groups, packed: each window holds B / W rows of a batch, one behind the other.

    Window w holds rows w B / W and on: the prompt of a row once, then its responses `first` to `last` - 1. Rows are
    read as one list of places each, P prompt tokens and then R of each of these responses; `source` and `spread` count
    through the rows of a window, `spread` through responses alone.

    Attributes:
      source:    int32 [W, T]  the place in the rows that a place of the window holds; any at padding.
      positions: int32 [W, T]  in its sequence.
      real:      bool [W, T]   False at padding.
      views:     the sequences that attention sees: a prompt and one response each.
      reads:     int32 [W, M]  the places whose states predict response tokens, of all of them.
      targets:   int32 [W, M]  the place in the rows of each of these tokens; any at padding.
      spread:    int32 [W, B / W (last - first) R]  of each response token, where in `reads` it is; any at padding.
      ends:      int32 [W, B / W (last - first)]  the place of the last token of each response; any where absent.
      first, last: static; which responses.
    """

    source: jax.Array
    positions: jax.Array
    real: jax.Array
    views: Views
    reads: jax.Array
    targets: jax.Array
    spread: jax.Array
    ends: jax.Array
    first: int = struct.field(pytree_node=False)
    last: int = struct.field(pytree_node=False)


@struct.dataclass
class PreferenceBatch:
    """A batch of preference groups: one prompt and K responses to it.

    Arrays are right-padded, and lengths alone say what is real: the values at padded positions are never read
    (so a tokenizer whose pad token is its EOS, or that has no pad token at all, needs no special care).

    Attributes:
      prompts:          int32 [B, P]     prompt ids, the BOS included where the tokenizer has one.
      prompt_lengths:   int32 [B]        real prompt tokens, at least 1.
      responses:        int32 [B, K, R]  response ids, the terminator included; K index 0 is chosen, 1 is rejected.
      response_lengths: int32 [B, K]     real response tokens; 0 = this response is absent (unpaired KTO rows).
      weights:          float32 [B]      1 for a real row, 0 for a filler row that completes the last batch of an epoch.
      rows:             int32 [B]        number of the row in its data set (for error messages); -1 for a filler row.
      format_masks:     bool [B, K, R]   True at header and turn-end tokens, or None where nobody asked for it.
      reference_logps:  float32 [B, K]   cached summed log-probabilities under the reference policy, or None.
      margins:          float32 [B]      difference of the scores of a pair (reward models, odpo), or None; or
                        float32 [B, K]   marks of the responses: the margin of a pair is the difference of its marks.
      ranks:            int32 [B, K]     place of each response, 0 the best, equal for ties; None: in the order given.
      labels:           name -> labels of the responses for an auxiliary head (reward models), or None:
                        int32 [B, K]     exclusive classes: the class, -1 = not labelled;
                        int8 [B, K, C]   overlapping classes: 1 holds, 0 does not, -1 not labelled.
      logp_weights:     float32 [B, K]   what the summed log-probability of each response adds to the loss of its row,
                        times this (XPO's exploration, see `align/online.py`), or None.
      windows:          how its tokens are packed for the forward pass, all responses or some at a time; or None.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    responses: jax.Array
    response_lengths: jax.Array
    weights: jax.Array
    rows: jax.Array
    format_masks: jax.Array | None = None
    reference_logps: jax.Array | None = None
    margins: jax.Array | None = None
    ranks: jax.Array | None = None
    labels: dict[str, jax.Array] | None = None
    logp_weights: jax.Array | None = None
    windows: tuple[Windows, ...] | None = None

    @property
    def present(self) -> jax.Array:
        """bool [B, K]: responses that are there, in rows that count."""
        return (self.response_lengths > 0) & (self.weights > 0)[:, None]

    @property
    def response_mask(self) -> jax.Array:
        """bool [B, K, R]: which response tokens are real."""
        return jnp.arange(self.responses.shape[2]) < self.response_lengths[..., None]


@struct.dataclass
class TokenBatch:
    """A batch of windows of T tokens for next-token prediction; a window holds one sequence or several, packed.

    Token t of a sequence is predicted from the tokens of the same sequence before it; the first token of a sequence is
    predicted by nothing and is never a target. Nothing is read at padded places.

    Attributes:
      tokens:    int32 [B, T]    ids.
      segments:  int32 [B, T]    which sequence of its window a token belongs to, from 1; 0 = padding.
      positions: int32 [B, T]    position in its sequence, from 0.
      targets:   bool [B, T]     True at tokens that are to be predicted (an answer, say); never at padding or at
                                 position 0.
      rows:      int32 [B, S]    rows of the data set that the window holds (for error messages); -1 where there are
                                 fewer than S. A filler window holds none, and no targets.
      views:     the sequences as attention sees them, of U pieces of the batch of B / U windows each, one behind the
                 other: its arrays are [U, ...], and count through B / U x T places. None: it goes by segments.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    targets: jax.Array
    rows: jax.Array
    views: Views | None = None


@struct.dataclass
class Updates:
    """The mini-batches of a rollout's U updates, and their windows.

    Attributes:
      rows:    int32 [n, U]  the rows of the rollout in each mini-batch, in the order of its windows.
      windows: of each; their arrays are [W, U, ...].

    The first axis is that of rows and windows, which devices split as they split those of every batch.
    """

    rows: jax.Array
    windows: Windows


@struct.dataclass
class Rollout:
    """Responses that a policy sampled, with all that was measured when they were. The update reads it and adds nothing.

    Arrays of responses are right-padded; lengths alone say what is real. Log-probabilities are in nats, at the sampling
    temperature. With K > 1 responses to a prompt, they stand in neighbouring rows, each of which repeats it.

    Attributes:
      prompts:          int32 [B, P]
      prompt_lengths:   int32 [B]
      responses:        int32 [B, R]    the terminator included, where it was reached.
      response_lengths: int32 [B]       at least 1.
      ended:            bool [B]        whether the response ends with a terminator; of an episode, whether no limit
                                        ended it.
      sampler_logps:    float32 [B, R]  of each token as it was drawn: by the sampler's weights, which may be narrow.
      reference_logps:  float32 [B, R]  under the reference policy.
      values:           float32 [B, R]  of the state before each token, or None where there is no value model.
      scores:           float32 [B]     the reward of each whole response.
      kl_coefficient:   float32 [B]     β, the same in every row (an array, so that a controller may move it).
      weights:          float32 [B]     1 for a real row, 0 for a filler.
      rows:             int32 [B]       row of the prompt in its file; -1 for a filler.
      old_logps:        float32 [B, R]  of each token under the policy before the first update, as the update computes
                                        them; or None where one update is all there is, so that they are its own.
      greedy_scores:    float32 [B]     the reward of the greedy response to the same prompt, or None.
      step_scores:      float32 [B, R]  what of `scores` stands at tokens before the last one (a score for each step, or
                                        for each turn); the rest stands on the last. None: all of it does.
      own:              bool [B, R]     tokens that the policy wrote, where others stand among them (what an environment
                                        says between its turns); the last real one is the policy's. None: all are.
      windows:          how its tokens are packed for one forward pass, as `PreferenceBatch` has it; or None.
      updates:          how they are packed for the updates of a step, or None. What is computed is the same.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    responses: jax.Array
    response_lengths: jax.Array
    ended: jax.Array
    sampler_logps: jax.Array
    reference_logps: jax.Array
    values: jax.Array | None
    scores: jax.Array
    kl_coefficient: jax.Array
    weights: jax.Array
    rows: jax.Array
    old_logps: jax.Array | None = None
    greedy_scores: jax.Array | None = None
    step_scores: jax.Array | None = None
    own: jax.Array | None = None
    windows: tuple[Windows, ...] | None = None
    updates: Updates | None = None

    @property
    def logps(self) -> jax.Array:
        """float32 [B, R]: the policy's log-probabilities before the updates; the sampler's where none were stored."""
        return self.sampler_logps if self.old_logps is None else self.old_logps

    @property
    def response_mask(self) -> jax.Array:
        """bool [B, R]: real tokens of real rows that the policy wrote."""
        real = jnp.arange(self.responses.shape[1]) < self.response_lengths[:, None]
        real = real if self.own is None else real & self.own
        return real & (self.weights > 0)[:, None]

    def groups(self, k: int = 1) -> PreferenceBatch:
        """The same prompts and responses as B / k groups, of k neighbouring rows that answer one prompt."""

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // k, k, *x.shape[1:])

        return PreferenceBatch(
            prompts=split(self.prompts)[:, 0],
            prompt_lengths=split(self.prompt_lengths)[:, 0],
            responses=split(self.responses),
            response_lengths=split(self.response_lengths),
            weights=split(self.weights).max(axis=1),
            rows=split(self.rows)[:, 0],
            windows=self.windows,
        )
