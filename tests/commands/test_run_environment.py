"""`dpo-jax grpo --environment`: the documented examples as runs of a tiny random model."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import tiny
from documented import programs

from dpo_jax import cli
from dpo_jax.align.advantages import learning_targets
from dpo_jax.config import GRPORun, PPOConfig, SampleConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.log import read_metrics
from dpo_jax.judge.rewards.environment import Step
from dpo_jax.train import session as training
from dpo_jax.train.answered import Policy
from dpo_jax.train.playing import Bounds, Episode, Player, check_beginnings, padded

pytestmark = pytest.mark.usefixtures("compile_roughly", "few_devices")

STOPS = [str(i) for i in range(3, 160)]
"""Half of the tokens end a turn: a random model has many."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", hidden=16, heads=2, kv_heads=1, layers=1, max_position=512)
    words = ["cat", "whale", "stone", "ship"]
    rows = [{"prompt": "good book" if i % 2 else "red", "word": words[i % 4], "answer": i} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, code in programs("environments.md").items():
        (folder / name).write_text(code)
    failing = "import twenty_questions as t\nclass Fails(t.TwentyQuestions):\n    def step(self, messages):\n"
    failing = failing.replace("import twenty_questions as t", (folder / "twenty_questions.py").read_text())
    failing = failing.replace("t.TwentyQuestions", "TwentyQuestions")
    (folder / "fails.py").write_text(failing + "        return super().step(messages) if len(messages) < 4 else boom\n")
    return folder


CHANCE = """
import os, random

begun = 0

class Chance:
    def reset(self, row):
        global begun
        begun += 1
        with open({calls!r}, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        return [{{"role": "user", "content": "red " * random.SystemRandom().randint(1, 12)}}]

    def step(self, messages):
        if begun > 2 + 8:  # two are tried out
            raise RuntimeError("broken")
        chance = random.SystemRandom()
        return [{{"role": "user", "content": "book " * chance.randint(1, 12)}}], chance.random(), chance.random() < 0.3
"""


LENGTHS = """
class Lengths:
    def reset(self, row):
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, messages):
        return [{"role": "user", "content": "on"}], len(messages[-1]["content"]) % 7 / 8, False
"""


REFUSED = """
class Refused:
    def reset(self, row):
        return [{"role": "user", "content": "red"}]

    def step(self, messages):
        return [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], 0.5, False
"""


def words(inputs: Path, out: Path, *more: str, environment: str = "twenty_questions.py:TwentyQuestions") -> list[str]:
    args = ["grpo", "--model", inputs / "model", "--data", inputs / "rows.jsonl", "--out", out]
    args += ["--environment", f"{inputs}/{environment}", "--environment_turns", "3", "--environment_tokens", "200"]
    args += ["--train.batch_size", "8", "--ppo.group_size", "4", "--train.steps", "3", "--sample.max_new_tokens", "6"]
    args += ["--data.max_length", "400", "--lora.rank", "4", "--optimizer.learning_rate", "2e-2"]
    args += ["--checkpoint.every", "1", "--checkpoint.keep", "5", "--mesh.fsdp", "1", "--sample.stop_tokens", *STOPS]
    return [*map(str, args), *more]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", runs.small_mesh)
        assert cli.main(words(inputs, out)) == 0
    return out


def test_the_whole_run(whole: Path) -> None:
    rows, samples = read_metrics(whole / "metrics.jsonl"), read_metrics(whole / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    several = 0
    for row in rows:
        own = [s for s in samples if s["step"] == row["step"]]
        assert row["environment/turns"] == np.mean([s["turns"] for s in own])
        assert row["environment/done"] == np.mean([s["done"] for s in own])
        assert row["objective/scores"] == pytest.approx(np.mean([s["score"] for s in own]), abs=1e-6)
        assert row["objective/kl"] == pytest.approx(np.mean([s["kl"] for s in own]), abs=1e-4)
        assert row["lengths/response"] == np.mean([s["tokens"] for s in own])
        assert (row["environment/errors"], row["environment/tokens"] > 0) == (0, row["environment/turns"] > 1)
        # What the trainer computes of a conversation is what the sampler drew turn by turn, each in its context.
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        for sample in own:
            roles = [message["role"] for message in sample["response"]]
            assert roles == (["assistant", "user"] * 3)[: 2 * sample["turns"] - 1]
            several += sample["turns"] > 1
    assert several > 5
    assert (whole / "report.html").exists()


def test_held_out_episodes(inputs: Path, tmp_path: Path) -> None:
    """They are played with the same draws each time, two from every row, and change nothing of what is learnt."""
    out, held = tmp_path / "run", inputs / "held_out.jsonl"
    held.write_text("".join((inputs / "rows.jsonl").read_text().splitlines(keepends=True)[:3]))
    more = ["--eval_data", str(held), "--train.eval_every", "3", "--eval_samples", "2", "--eval_pass", "0.5"]
    (inputs / "lengths.py").write_text(LENGTHS)
    assert cli.main(words(inputs, out, *more, environment="lengths.py:Lengths")) == 0
    assert cli.main(words(inputs, tmp_path / "without", environment="lengths.py:Lengths")) == 0
    rows = read_metrics(out / "metrics.jsonl")
    evaluated = {row["step"]: row for row in rows if "eval_reward" in row}
    assert sorted(evaluated) == [0, 3]
    for step, row in evaluated.items():
        samples = [json.loads(line) for line in (out / "eval_samples" / f"{step}.jsonl").read_text().splitlines()]
        assert [(s["row"], s["sample"]) for s in samples] == [(r, k) for r in (1, 2, 3) for k in (0, 1)]
        for name, key in (("reward", "score"), ("kl", "kl"), ("length", "tokens"), ("environment/turns", "turns")):
            assert row[f"eval_{name}"] == pytest.approx(np.mean([s[key] for s in samples]), abs=1e-6)
        right = np.asarray([s["score"] >= 0.5 for s in samples]).reshape(3, 2)
        assert (row["eval_pass@1"], row["eval_pass@2"]) == pytest.approx((right.mean(), right.any(axis=1).mean()))
        assert row["eval_reward_low"] <= row["eval_reward"] <= row["eval_reward_high"]
    assert abs(evaluated[0]["eval_kl"]) < 1e-4
    assert evaluated[3]["eval_kl"] != evaluated[0]["eval_kl"]
    learned, without = (
        [r for r in read_metrics(x / "metrics.jsonl") if "loss" in r] for x in (out, tmp_path / "without")
    )
    assert [row["loss"] for row in learned] == [row["loss"] for row in without]


@pytest.mark.slow
def test_stopped_and_gone_on(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out, args = tmp_path / "run", words(inputs, tmp_path / "run")
    runs.stopped_and_gone_on(args, out, whole, step=2)


@pytest.mark.slow
def test_pieces_and_the_calculator(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Four at once: episodes at different turns are sampled together, and become what they became."""
    assert cli.main(words(inputs, tmp_path / "four", "--rollout_batch_size", "4", "--train.steps", "1")) == 0
    conversations = [
        [s["response"] for s in read_metrics(out / "samples.jsonl") if s["step"] == 1]
        for out in (tmp_path / "four", whole)
    ]
    assert conversations[0] == conversations[1]
    args = words(inputs, tmp_path / "tool", "--train.steps", "1", environment="calculator.py:Calculator")
    assert cli.main(args) == 0
    assert read_metrics(tmp_path / "tool" / "metrics.jsonl")[0]["environment/turns"] > 1


@pytest.mark.slow
def test_errors_of_the_environment(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = words(inputs, tmp_path / "run", "--train.steps", "1", environment="fails.py:Fails")
    assert cli.main(args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--environment: row " in error
    assert "NameError: name 'boom' is not defined" in error
    (inputs / "refused.py").write_text(REFUSED)
    answers = ["--environment", f"{inputs}/refused.py:Refused", "--data.template", "llama2"]
    assert cli.main([*args, *answers]) == 2
    assert "step: " in capsys.readouterr().err.strip().splitlines()[-1]
    assert cli.main([*args, *answers, "--environment_errors", "end", "--out", str(tmp_path / "refused")]) == 0
    (row,) = read_metrics(tmp_path / "refused" / "metrics.jsonl")
    assert row["environment/errors"] > 0
    assert cli.main([*args, "--environment_errors", "end"]) == 0
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0 < row["environment/errors"] <= 1
    assert row["environment/turns"] <= 2


@pytest.mark.multiprocess
def test_one_of_two_processes_plays(inputs: Path, tmp_path: Path) -> None:
    """Of an environment that answers by chance both read the same; its error, in the second step, ends both."""
    (inputs / "chance.py").write_text(CHANCE.format(calls=str(tmp_path / "calls")))
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        together = runs.start_together(
            # Episodes of a group begin by chance too: no prompt is the same for all of it.
            words(
                inputs,
                out,
                *("--mesh.fsdp", "2", "--train.layout", "separate"),
                *("--environment", f"{inputs}/chance.py:Chance"),
            ),
            2,
        )
    said = [process.communicate(timeout=600)[1] for process in together]
    assert [process.returncode for process in together] == [2, 2], said
    assert "RuntimeError: broken" in said[0].splitlines()[-1], said
    assert len(set((tmp_path / "calls").read_text().split())) == 1, "one process plays"
    samples = read_metrics(out / "samples.jsonl")
    assert len({message["content"] for s in samples for message in s["prompt"]}) > 1, "it answers by chance"
    (row,) = read_metrics(out / "metrics.jsonl")
    assert row["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", "vader"], "--reward has no effect with --environment"),
        (["--ppo.preset", "dapo"], "does not go with --ppo.zero_variance resample"),
        (["--data.template", "raw"], "--environment needs turns"),
        (["--environment_tokens", "0"], "--environment_tokens 0 must be at least 1"),
        (["--data.max_length", "600"], "--data.max_length 600 exceeds the model's context of 512; lower it"),
        (["--environment_tokens", "4"], "--environment_tokens 4 hold no turn of --sample.max_new_tokens 6"),
        (["--data.max_length", "150"], "an episode of 200 tokens (--environment_tokens) leaves no room"),
        (["--data.max_length", "210"], "reset gave 68 tokens, and --data.max_length leaves 10"),
    ],
)
def test_one_line_errors(more, message, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words(inputs, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_ends_an_episode_without_ending_the_run() -> None:
    """Messages that the template refuses, and rewards whose sum float32 does not hold; unless errors stop it."""
    two = Step((Message("user", "a"), Message("user", "b")), 0.5, False)
    much = Step((Message("user", "a"),), 3e38, False)
    for answers, why in (((two,), "step: "), ((much, much), "rewards add up to 6e\\+38")):
        for on_error in ("end", "stop"):
            encoder: Any = ConversationEncoder(tiny.tokenizer(), "llama2")
            policy: Any = SimpleNamespace(sample=SampleConfig(max_new_tokens=4))
            unused: Any = None
            player = Player(policy, unused, encoder, Bounds(9, 999, 99, on_error))
            episode = Episode(7, [1], [], 1, ids=[5, encoder.terminators[0]], turns=1)
            for answer in answers[:-1]:
                episode.ended = True
                assert player._goes_on(episode, answer)
            episode.ended = True
            if on_error == "end":
                assert not player._goes_on(episode, answers[-1])
                assert episode.failed
            else:
                with pytest.raises(InputError, match=f"row 7 of the prompts: {why}"):
                    player._goes_on(episode, answers[-1])


def test_what_a_turn_is_rewarded_with_stands_on_its_last_token() -> None:
    unused: Any = None
    policy = Policy(unused, unused, SampleConfig(stop_tokens=(2,)), unused, piece=1, raw=False, seed=0, vocabulary=None)
    player = Player(policy, unused, unused, Bounds(9, 12, 8, "stop"))
    own = [True, True, False, True, True, True]
    episode = Episode(
        3, [1, 2], [], 1, ids=[5, 2, 7, 8, 9, 2], own=own, logps=[-1.0] * 6, turns=2, score=0.75, ended=True
    )
    episode.step_scores = [(1, -0.25), (5, 1.0)]
    rollout = player.rollout([episode], kl_coefficient=np.zeros(1, np.float32))
    targets = learning_targets(rollout, PPOConfig(advantage="none", returns="to_go", whiten_advantages=False))
    assert targets.rewards[0].tolist() == [0, -0.25, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert targets.advantages[0, :6].tolist() == [0.75, 0.75, 0, 1, 1, 1]


def test_one_prompt_stands_for_a_group_only_where_all_begin_alike() -> None:
    episodes = [
        Episode(3, [1, 2], [], 1),
        Episode(3, [1, 2], [], 1),
        Episode(4, [1], [], 1),
        Episode(4, [2], [], 1),
    ]
    check_beginnings(episodes[:2], 2)
    with pytest.raises(InputError, match=r"row 4 .*another episode of the same row; add --train\.layout separate"):
        check_beginnings(episodes, 2)


def test_lengths_of_episodes() -> None:
    run = GRPORun(model="m", out="o", environment="e.py:E")
    assert (run.response_room, run.longest_prompt) == (512, 512), "half of --data.max_length is left for the beginning"
    few = dataclasses.replace(run, environment_turns=2)
    assert few.response_room == 2 * run.sample.max_new_tokens == 256
    assert [padded(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 104, 104]


@pytest.mark.parametrize("template", [None, "chatml", "zephyr"])
def test_turns_between_are_those_of_the_whole_conversation(template: str | None) -> None:
    """Token for token, whatever is spelled in them; the ids of the answer stay as they are."""
    encoder = ConversationEncoder(tiny.tokenizer(), template)
    opening, answer = (Message("system", "be good"), Message("user", "hi")), Message("assistant", "a red book")
    for said in ("no <|im_end|> text", " two\nlines ", "x"):
        whole = encoder.prompt_ids((*opening, answer, Message("user", said)))
        first = encoder.prompt_ids(opening)
        between = encoder.following_ids((Message("user", said),))
        assert whole[: len(first)] == first
        assert whole[len(whole) - len(between) :] == between
        middle = whole[len(first) : len(whole) - len(between)]
        assert middle == [*encoder.text_ids("a red book"), encoder.terminators[0]]
