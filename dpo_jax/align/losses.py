"""Preference losses: one number for each pair, from summed log-probabilities.

Of a pair: Lc, Lr the summed log-probabilities of the chosen and rejected response under the policy, Rc, Rr under the
reference, nc, nr the numbers of tokens summed, and

    u = Lc − Rc    v = Lr − Rr    D = u − v    σ the logistic function

    sigmoid       −(1−ε) log σ(βD) − ε log σ(−βD)                  Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7;
                                                                   ε > 0: cDPO, Mitchell 2023, "A note on DPO with noisy
                                                                   preferences"
    robust        [−(1−ε) log σ(βD) + ε log σ(−βD)] / (1−2ε)       Chowdhury et al. 2024 (2403.00409)
    hinge         max(0, 1 − βD)                                   Zhao et al. 2023 (SLiC-HF, 2305.10425)
    ipo           (u/nc − v/nr − 1/(2β))²                          Azar et al. 2023 (2310.12036), Eq. 17, token means
    ipo_sum       (D − 1/(2β))²                                    the same, sums
    sigmoid_norm  −log σ(β (u/nc − v/nr))                          Lambert et al. 2024 (Tülu 3, 2411.15124), section 5
    simpo         −log σ(β (Lc/nc − Lr/nr) − γ)                    Meng et al. 2024 (2405.14734), Eq. 6
    orpo          −Lc/nc − λ log σ(ω(Lc/nc) − ω(Lr/nr)),           Hong et al. 2024 (2403.07691), Eqs. 4-7
                  ω(l) = l − log(1 − eˡ)   (log-odds)
    kto           λ_D (1 − σ(β (u − z₀)))  of the chosen,          Ethayarajh et al. 2024 (2402.01306), Eq. 8
                  λ_U (1 − σ(β (z₀ − v)))  of the rejected,
                  z₀ = max(0, mean of policy − reference on mismatched pairs), no gradient; a pair's answer is
                  another row's, each row's answers being used once (`data/sets/dataset.py`)
    dpop          −log σ(β (D − λ max(0, Rc − Lc)))                Pal et al. 2024 (Smaug, 2402.13228v2)
    exo_pair      p log(p/(1−ε)) + (1−p) log((1−p)/ε), p = σ(βD)   Ji et al. 2024 (EXO, 2402.00856), Eq. 16
    nca_pair      −log σ(βu) − ½ log σ(−βu) − ½ log σ(−βv)         Chen et al. 2024 (NCA, 2402.05369), section 4.1
    sppo_hard     (u − 1/(2β))² + (v + 1/(2β))²                    Wu et al. 2024 (SPPO, 2405.00675), Eq. 4.7: the
                                                                   chosen one wins with probability 1; η = 1/β
    apo_zero      1 − σ(βu) + σ(βv)                                D'Oosterlinck et al. 2024 (2408.06266), Eq. 7
    apo_down      σ(βu) + 1 − σ(βD)                                the same, Eq. 8
    discopop      (1−m) (−log σ(βD)) + m exp(−βD),  m = σ(βD/τ)    Lu et al. 2024 (2406.08414), Eq. 5
    apo_zero_unpaired  λ_D (1 − σ(βu))  of the chosen, λ_U σ(βv)  of the rejected: apo_zero for rows like kto's
    bco_pair      −log σ(βu − δ) − log σ(−(βv − δ))                Jung et al. 2024 (BCO, 2404.04656); δ the mean of all
                                                                   rewards so far, this batch's too, no gradient
    aot           −(1−ε) log σ(βD') − ε log σ(−βD'), D' = Lc − Lr of a pair less Rc − Rr of the pair of the same rank
    aot_unpaired  the same with D' = u less v of the same rank     Melnyk et al. 2024 (AOT, 2406.05882); ranks over
                                                                   the whole batch
    odpo          −log σ(βD − α f(s_c − s_r))                      Amini et al. 2024 (ODPO, 2402.10571); s the scores of
                                                                   the row's responses, f the logarithm or the identity
    sft           NLL of the chosen (below): one of several
    divergence    in sigmoid, robust, hinge, exo_pair, discopop: D = f'(eᵘ) − f'(eᵛ), Wang et al. 2023 (f-DPO,
                  2309.16240), Eq. 9 and Table 1; see `divergence_slope`
    several       Σ_i w_i ℓ_i                                       e.g. MPO, Wang et al. 2024 (2411.10442): .8 sigmoid,
                                                                   .2 bco_pair, 1 sft
    + a NLL       NLL = −Lc/nc of each pair (Pang et al. 2024, Iterative RPO, 2404.19733), or over the mean
                  length of all chosen responses of the batch, which makes its batch mean a mean over tokens
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jax.typing import ArrayLike

from dpo_jax.align.across import of_batch
from dpo_jax.config import DPOLossConfig, Loss, Objective
from dpo_jax.config.training.dpo import MARGIN
from dpo_jax.errors import InputError

Numbers = ArrayLike | list[float] | list[int] | tuple[float, ...]
"""What a caller may pass for a float array [B]."""


def per_token(total: jax.Array, tokens: jax.Array) -> jax.Array:
    """total / tokens; 0 tokens (an absent response) count as 1, so that 0 / 0 is 0."""
    return total / jnp.maximum(tokens, 1)


def log_odds(l: jax.Array) -> jax.Array:
    """ω(l) = l − log(1 − eˡ) of a mean log-probability l ≤ 0.

    A float32 log-probability is not known to better than about 1e-7, so a probability nearer to 1 than that is taken
    as 1 − 1e-7 (with no gradient), and the log-odds stay finite.
    """
    l = jnp.minimum(l, -jnp.finfo(l.dtype).eps)
    return l - jax.nn.log1mexp(-l)


_STEEPEST = 20.0


def _expm1(x: jax.Array) -> jax.Array:
    """eˣ − 1; above x = 20 its tangent there, so that neither value nor slope overflows."""
    return jnp.expm1(jnp.minimum(x, _STEEPEST)) + jnp.exp(_STEEPEST) * jax.nn.relu(x - _STEEPEST)


def divergence_slope(log_ratio: jax.Array, objective: Objective) -> jax.Array:
    """f'(eˣ) − f'(1) of `objective.divergence` at log ratios x, in nats; a margin is a difference of two.

    Wang et al. 2023 (f-DPO, arXiv 2309.16240), Table 1, where D_f = E_ref[f(policy / reference)]:

        reverse_kl  f' = log t + 1          x
        forward_kl  f' = −1/t               1 − e⁻ˣ
        js          f' = log(2t/(1+t))      log 2 + log σ(x)
        alpha       f' = (1 − t^−α)/α       (1 − e^(−αx))/α,   0 < α < 1

    All are x to first order at 0. A response less likely than the reference by 20 nats (20/α) has the slope of 20.
    """
    match objective.divergence:
        case "forward_kl":
            return -_expm1(-log_ratio)
        case "js":
            return jnp.log(2.0) + log_sigmoid(log_ratio)
        case "alpha":
            α = objective.divergence_alpha
            return -_expm1(-α * log_ratio) / α
        case _:
            return log_ratio


def nll_loss(
    chosen_nll: Numbers,
    lengths: Numbers,
    *,
    normalization: Literal["sequence", "token"] = "sequence",
    mean_length: ArrayLike | None = None,
    mean_present: ArrayLike | None = None,
) -> jax.Array:
    """Negative log-likelihood of the chosen responses, [B], in nats a token.

    Args:
      chosen_nll: [B], minus the summed log-probability of each chosen response.
      lengths: [B], its tokens. A row with none contributes 0.
      normalization: "sequence" divides each row by its own length, and by the share of rows that have a response, so
        that the mean of the result over the batch is the mean over its responses; "token" by the mean length over the
        batch, so that it is the mean over its tokens.
      mean_length: for "token", that mean length where these rows are only a part of the batch. Default: over `lengths`.
      mean_present: for "sequence", that share where these rows are only a part of the batch. Default: of `lengths`.
    """
    chosen_nll, lengths = jnp.asarray(chosen_nll, jnp.float32), jnp.asarray(lengths, jnp.float32)
    if normalization == "sequence":
        share = jnp.mean((lengths > 0).astype(jnp.float32)) if mean_present is None else jnp.asarray(mean_present)
        values = per_token(chosen_nll, lengths)
    else:
        share = jnp.mean(lengths) if mean_length is None else jnp.asarray(mean_length)
        values = chosen_nll
    # Where no row has a response all values are 0, and their mean over nothing adds nothing to the loss.
    return jnp.where(lengths > 0, values / jnp.where(share > 0, share, 1.0), 0.0)


def preference_loss(*arguments: Any, config: DPOLossConfig, **others: Any) -> jax.Array:
    """The loss of each pair, float32 [B], by `config`: the weighted sum of its losses; the formulas stand above.

    The NLL term is part of it where `config.nll_coefficient` is positive. The loss of a batch is the plain mean of the
    result (weighted, where there are filler rows). Arguments and errors as for `preference_terms`.
    """
    objective = config.objective
    return total(preference_terms(*arguments, objective=objective, **others), objective)


def total(terms: Mapping[str, jax.Array], objective: Objective, pair_weights: jax.Array | None = None) -> jax.Array:
    """What `preference_terms` gave as one loss, [B]. `pair_weights`: [B], of all losses but the NLL term (WPO)."""
    loss = sum((w * terms[name] for name, w in zip(objective.losses, objective.weights, strict=True)), jnp.zeros(()))
    loss = loss if pair_weights is None else pair_weights * loss
    return loss + objective.nll_coefficient * terms["nll"] if objective.nll_coefficient > 0 else loss


def preference_terms(
    policy_chosen: Numbers,
    policy_rejected: Numbers,
    reference_chosen: Numbers | None = None,
    reference_rejected: Numbers | None = None,
    *,
    chosen_lengths: Numbers,
    rejected_lengths: Numbers,
    objective: Objective,
    chosen_nll: Numbers | None = None,
    nll_lengths: Numbers | None = None,
    mean_nll_length: ArrayLike | None = None,
    mean_chosen: ArrayLike | None = None,
    mean_responses: ArrayLike | None = None,
    kl: ArrayLike = 0.0,
    score_gaps: Numbers | None = None,
    across: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """name -> [B], float32: each loss of `objective`, and "nll" where its `nll_coefficient` is positive.

    Args:
      policy_chosen, policy_rejected: [B], Lc and Lr, in nats.
      reference_chosen, reference_rejected: [B], Rc and Rr; not read, and may be None, where no loss has a reference.
      chosen_lengths, rejected_lengths: [B], nc and nr: the tokens in those sums. For kto and apo_zero_unpaired, 0 marks
        an absent response, whose log-probabilities are not read.
      objective: which losses, and their coefficients.
      chosen_nll: [B], the negative log-likelihood of the whole chosen response. Default: -policy_chosen. It differs
        where format tokens are left out of the preference sums.
      nll_lengths: [B], the tokens in `chosen_nll`. Default: chosen_lengths.
      mean_nll_length: scalar, mean of `nll_lengths` over the whole batch, for `nll_normalization="token"` where these
        rows are only a part of it. Default: over these rows.
      mean_chosen: scalar, for `nll_normalization="sequence"` in the same way: the share of the batch's rows that have a
        chosen response. Default: of these rows.
      mean_responses: scalar, for kto and apo_zero_unpaired: the mean number of responses present a row, over the whole
        batch. Rows are divided by it, so that the batch mean is a mean over responses. Default: over these rows.
      kl: scalar z₀ of kto, at least 0; no gradient flows into it.
      score_gaps: [B], s_c − s_r of odpo, positive.
      across: what bco_pair, aot and aot_unpaired take from the whole batch where these rows are only a part of it, or
        from batches before: see `across.of_batch`. Default: from these rows alone.

    Raises:
      InputError: a loss needs a reference, or scores, and there are none.
    """
    array = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    Lc, Lr = array(policy_chosen), array(policy_rejected)
    nc, nr = array(chosen_lengths), array(rejected_lengths)
    nll = -Lc if chosen_nll is None else array(chosen_nll)
    nll_n = nc if nll_lengths is None else array(nll_lengths)
    if objective.reference_free:
        Rc, Rr = jnp.zeros_like(Lc), jnp.zeros_like(Lr)
    elif reference_chosen is None or reference_rejected is None:
        raise InputError(f"loss {objective.loss} compares with a reference policy: give its log-probabilities")
    else:
        Rc, Rr = array(reference_chosen), array(reference_rejected)

    β, ε = objective.beta, objective.label_smoothing
    u, v = Lc - Rc, Lr - Rr
    has_c, has_r = nc > 0, nr > 0
    if objective.unpaired:
        u, v = jnp.where(has_c, u, 0.0), jnp.where(has_r, v, 0.0)
        nll = jnp.where(has_c, nll, 0.0)
        if mean_responses is None:
            mean_responses = jnp.mean(has_c.astype(jnp.float32) + has_r)
    if across is None and objective.takes_across:
        policy, reference = jnp.stack([Lc, Lr], 1), jnp.stack([Rc, Rr], 1)
        across = of_batch(policy, reference, jnp.ones_like(policy, bool), objective)

    def logistic(x: jax.Array) -> jax.Array:
        return -(1 - ε) * log_sigmoid(x) - ε * log_sigmoid(-x)

    def halves(desirable: jax.Array, undesirable: jax.Array) -> jax.Array:
        """The two responses of a row apart, absent ones nothing, so that the batch mean is one over responses."""
        assert mean_responses is not None
        λ_D, λ_U = objective.desirable_weight, objective.undesirable_weight
        return (jnp.where(has_c, λ_D * desirable, 0.0) + jnp.where(has_r, λ_U * undesirable, 0.0)) / mean_responses

    def nll_term() -> jax.Array:
        how = objective.nll_normalization
        return nll_loss(nll, nll_n, normalization=how, mean_length=mean_nll_length, mean_present=mean_chosen)

    def term(name: Loss) -> jax.Array:
        # f-DPO is about losses of nothing but the margin; others beside them keep theirs.
        D = divergence_slope(u, objective) - divergence_slope(v, objective) if name in MARGIN else u - v
        match name:
            case "sigmoid":
                return logistic(β * D)
            case "robust":
                return (-(1 - ε) * log_sigmoid(β * D) + ε * log_sigmoid(-β * D)) / (1 - 2 * ε)
            case "hinge":
                return jax.nn.relu(1 - β * D)
            case "ipo":
                return jnp.square(per_token(u, nc) - per_token(v, nr) - 1 / (2 * β))
            case "ipo_sum":
                return jnp.square(D - 1 / (2 * β))
            case "sigmoid_norm":
                return -log_sigmoid(β * (per_token(u, nc) - per_token(v, nr)))
            case "simpo":
                γ = objective.simpo_gamma
                return -log_sigmoid(β * (per_token(Lc, nc) - per_token(Lr, nr)) - γ)
            case "orpo":
                λ = objective.orpo_lambda
                ratio = log_odds(per_token(Lc, nc)) - log_odds(per_token(Lr, nr))
                return nll_loss(nll, nll_n, mean_present=mean_chosen) - λ * log_sigmoid(ratio)
            case "kto":
                z0 = jax.lax.stop_gradient(array(kl))
                # 1 − σ(x) is written σ(−x), which keeps its digits where σ(x) is near 1.
                return halves(sigmoid(-β * (u - z0)), sigmoid(-β * (z0 - v)))
            case "dpop":
                λ = objective.dpop_lambda
                return -log_sigmoid(β * (D - λ * jax.nn.relu(Rc - Lc)))
            case "exo_pair":
                right, wrong = log_sigmoid(β * D), log_sigmoid(-β * D)
                return sigmoid(β * D) * (right - jnp.log1p(-ε)) + sigmoid(-β * D) * (wrong - jnp.log(ε))
            case "nca_pair":
                return -log_sigmoid(β * u) - 0.5 * log_sigmoid(-β * u) - 0.5 * log_sigmoid(-β * v)
            case "sppo_hard":
                return jnp.square(u - 1 / (2 * β)) + jnp.square(v + 1 / (2 * β))
            case "apo_zero":
                return sigmoid(-β * u) + sigmoid(β * v)
            case "apo_down":
                return sigmoid(β * u) + sigmoid(-β * D)
            case "discopop":
                x = β * D / objective.discopop_tau
                # m e^(−βD) in one exponent: by itself e^(−βD) overflows where m is 0.
                return -sigmoid(-x) * log_sigmoid(β * D) + jnp.exp(log_sigmoid(x) - β * D)
            case "apo_zero_unpaired":
                return halves(sigmoid(-β * u), sigmoid(β * v))
            case "bco_pair":
                assert across is not None
                δ = across["reward_mean"]
                return -log_sigmoid(β * u - δ) - log_sigmoid(-(β * v - δ))
            case "aot":
                assert across is not None
                return logistic(β * (Lc - Lr - across["reference_partner"]))
            case "aot_unpaired":
                assert across is not None
                mine = logistic(β * (u - across["rejected_partner"]))
                theirs = logistic(β * (across["chosen_partner"] - v))
                # Each pair of one rank is met twice, from either row, which sees the other as fixed: the gradients add
                # up to that of the pair, and the values to twice its own.
                return mine + theirs - jax.lax.stop_gradient((mine + theirs) / 2)
            case "odpo":
                if score_gaps is None:
                    raise InputError("loss odpo takes its offset from the scores of the responses: give score_gaps")
                gap = array(score_gaps)
                f = jnp.log(gap) if objective.odpo_scale == "log" else gap
                return -log_sigmoid(β * D - objective.odpo_alpha * f)
            case "sft":
                return nll_term()

    terms = {str(name): term(name) for name in objective.losses}
    return {**terms, "nll": nll_term()} if objective.nll_coefficient > 0 else terms


def implicit_rewards(
    policy: jax.Array, reference: jax.Array | None, lengths: jax.Array, *, objective: Objective
) -> jax.Array:
    """What the policy's log-probabilities say of each response, in units of reward; shaped like `policy`.

    β (L − R), never smoothed, whatever the divergence (f' is increasing, so it prefers the same response).
    Without a reference, β L / n: what SimPO and ORPO compare (SimPO, Eq. 4).
    """
    β = objective.beta
    return β * (per_token(policy, lengths) if reference is None else policy - reference)
