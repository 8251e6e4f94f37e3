"""Options of `dpo-jax ppo` and `dpo-jax grpo`: of the run around the step."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.options import Count, Finite, not_given, part, require
from dpo_jax.config.sections import SampleConfig
from dpo_jax.config.training.ppo import PPOConfig, PPOLossConfig
from dpo_jax.config.training.run import JudgedRun, SampledRun

_NARROWING = ("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram", "logit_bias", "min_new_tokens")
"""Options of sampling under which the tokens drawn have other probabilities than the model gives them."""


@dataclass(frozen=True, kw_only=True)
class PPORun(SampledRun, JudgedRun):
    """Let a model learn from rewards of what it writes: `dpo-jax ppo`.

    --data holds prompts: rows with `prompt` (a text) or `messages`. One step is one iteration: sample responses to a
    batch of prompts, score them, and make --ppo.epochs x --ppo.minibatches updates. --train.batch_size counts the
    responses of an iteration.
    """

    reward: str | tuple[str, ...] = ()
    """What judges a response, one or several, whose scores are summed: vader (sentiment, -1 to 1), length (hundreds of
    characters), regex:PATTERN (1 where it is found, else 0), language:CODE, exact:COLUMN, numeric:COLUMN and
    math:COLUMN (the row's right answer), json, json:SCHEMA, format:PATTERN, ramp:A:B, repetition:N, run:COMMAND,
    FILE.py:FUNCTION (your own code), a URL, judge:FILE.yaml (options of `dpo-jax judge`: a score asked of an endpoint
    or a model), or a reward model: a folder, a hub id, or a run. docs/rewards.md says what each gives. Not given: only
    with --environment."""
    environment: str | None = None
    """In place of --reward, FILE.py:NAME, a class of your own that answers the model turn by turn and rewards it
    (docs/environments.md). --reward_timeout holds for one call of it."""
    environment_turns: Count | None = not_given(8, needs="environment")
    """The most turns of the model in an episode."""
    environment_tokens: Count | None = not_given(needs="environment")
    """The most tokens of an episode behind its first messages, the environment's among them; a turn is begun where
    --sample.max_new_tokens of them are left. Not given: --sample.max_new_tokens x --environment_turns, but at most half
    of --data.max_length."""
    environment_errors: Literal["stop", "end"] | None = not_given("stop", needs="environment")
    """Where the environment raises an exception or gives what is no answer: stop the run, or end that episode with the
    rewards that it had, counted in environment/errors (a first message always stops the run)."""
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = not_given("sum_then_normalize")
    """Of several --reward: the weighted sum is compared within a prompt's responses, or each is standardised over them
    and the results are summed (GDPO, arXiv 2601.05242)."""
    eval_samples: Count | None = not_given(1)
    """Responses to each held-out prompt."""
    eval_pass: Finite | None = None
    """A held-out response that scores at least this is right: eval_pass@1, and eval_pass@k unbiased, k = 2, 4, ... up
    to --eval_samples (Chen et al. 2021). Not given: not reported."""
    value_model: str | None = None
    """Reward model that the value model starts from. Not given: the policy with a fresh head."""
    ppo: PPOLossConfig = part(PPOLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.lora.settled.dropout,
            "--lora.dropout does not go with PPO: updates compare the policy with what sampled, which drops nothing",
        )
        size, group, m = self.train.batch_size, self.ppo.group, self.ppo.minibatches
        free = SampleConfig()
        narrowing = [name for name in _NARROWING if getattr(self.sample, name) != getattr(free, name)]
        require(
            not narrowing,
            f"--sample.{narrowing[0] if narrowing else ''} does not go with PPO: it changes what is drawn, and the"
            " update compares log-probabilities of the model as it is; leave it out (rejection takes it)",
        )
        require(
            size % group == 0,
            f"--train.batch_size {size} responses are not made of groups of {group} (--ppo.group_size)",
        )
        self._check_environment()
        require(size % m == 0, f"--train.batch_size {size} does not split into --ppo.minibatches {m}")
        self.check_sampling("PPO", size, group, "--ppo.group_size")
        apart = self.ppo.settled.zero_variance == "resample" or self.ppo.estimator == "greedy"
        require(
            self.safety_reward is None or not apart,
            "--safety_reward standardises the scores of a whole rollout: it does not go with --ppo.zero_variance"
            " resample or --ppo.advantage greedy, which score some responses by themselves",
        )
        for name in ("eval_samples", "eval_pass"):
            given = getattr(self, name) is not None
            require(not given or self.eval_data is not None, f"--{name} has no effect without --eval_data")
        require(
            self.reward_aggregation is None or len(self.rewards) > 1,
            "--reward_aggregation has no effect with one --reward",
        )
        require(
            self.standardised_over is None or (group > 1 and self.ppo.estimator != "greedy"),
            "--reward_aggregation normalize_then_sum standardises over the responses to a prompt: it needs"
            " --ppo.group_size and does not go with --ppo.advantage greedy, which scores one by itself",
        )
        buffer, most = self.ppo.overlong_buffer or 0, self.response_room
        named = "--sample.max_new_tokens" if self.environment is None else "--environment_tokens"
        require(buffer <= most, f"--ppo.overlong_buffer {buffer} is longer than {named} {most}")
        if self.value_model is not None:
            require(
                self.ppo.critic == "separate",
                "--value_model has no effect without --ppo.advantage gae and --ppo.value separate",
            )
            require(
                not self.lora.rank,
                "--value_model does not go with --lora.rank: there the values' adapters stand on the policy's weights",
            )

    def _check_environment(self) -> None:
        if self.environment is None:
            return
        require(not self.rewards, "--reward has no effect with --environment, which rewards its episodes itself")
        require(self.safety_reward is None, "--safety_reward does not go with --environment")
        require(
            self.ppo.settled.zero_variance != "resample" and self.ppo.estimator != "greedy",
            "--environment does not go with --ppo.zero_variance resample or --ppo.advantage greedy, which answer"
            " prompts by themselves",
        )
        require(self.data.template != "raw", "--environment needs turns: not --data.template raw")
        require(
            self.response_room >= self.sample.max_new_tokens,
            f"--environment_tokens {self.response_room} hold no turn of --sample.max_new_tokens"
            f" {self.sample.max_new_tokens}",
        )

    @property
    def response_room(self) -> int:
        """The most tokens of a response; of an episode all behind its first messages."""
        if self.environment is None:
            return self.sample.max_new_tokens
        if self.environment_tokens is not None:
            return self.environment_tokens
        turn = self.sample.max_new_tokens
        return max(turn, min(turn * self.settled.environment_turns, self.data.max_length // 2))

    @property
    def limited(self) -> tuple[str | None, ...]:
        """The judges that --reward_timeout and --reward_memory hold for; an environment is code of the user's."""
        return (*super().limited, self.environment)

    @property
    def judges_are_given(self) -> bool:
        """Whether something rewards: `--reward`, or `--environment`."""
        return bool(self.rewards) or self.environment is not None

    @property
    def told_reward(self) -> str:
        """For one line: what rewards."""
        return super().told_reward if self.environment is None else self.environment

    @property
    def standardised_over(self) -> int | None:
        """Neighbouring responses that each of several rewards is standardised over before the sum, if it is."""
        return self.ppo.group if self.settled.reward_aggregation == "normalize_then_sum" else None

    def check_sizes(self, devices: int) -> None:
        """Refuse sizes that do not divide over mini-batches, micro-batches and devices. Raises `InputError`."""
        parts = self.ppo.minibatches * self.train.accumulate * devices
        require(
            self.train.batch_size % parts == 0,
            f"--train.batch_size {self.train.batch_size} does not divide by {parts} (--ppo.minibatches x"
            f" --train.accumulate x devices that split the batch); choose a multiple of {parts}",
        )
        self.check_pieces(devices)

    def step_config(self) -> PPOConfig:
        """What the step needs to know of these options."""
        return self.step(
            PPOConfig,
            self.ppo,
            temperature=self.sample.temperature,
            max_response=self.response_room,
            layout=self.train.settled.layout,
            seed=self.train.seed,
        )


@dataclass(frozen=True, kw_only=True)
class GRPORun(PPORun):
    """Let a model learn from rewards, without a value model: `dpo-jax grpo`.

    As `dpo-jax ppo`, with --ppo.preset grpo where none is given: one pass over a rollout, groups of responses to a
    prompt that are compared with each other.
    """

    ppo: PPOLossConfig = part(PPOLossConfig, preset="grpo")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.ppo.critic is None,
            f"grpo has no value model, which --ppo.advantage gae needs ({self.ppo.algorithm()}); run dpo-jax ppo",
        )
