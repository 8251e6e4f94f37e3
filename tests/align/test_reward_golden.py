"""Five steps of a reward model against PyTorch: transformers' LlamaForSequenceClassification, torch.optim.AdamW.

Nothing of the reference trajectory comes from this code base except the batches. If this test fails while the parity
tests of the model pass, the step has changed its numbers: look at the loss, the margin, where the state is taken from,
the reduction, the clipping and the optimizer, in this order.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import make_batch, quick_jit

from dpo_jax.align import reward
from dpo_jax.config import OptimizerConfig, RewardConfig
from dpo_jax.weights.pretrained import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS, RATE, CLIP, DECAY, CENTERING, SAFETY = 5, 2e-3, 1.0, 0.05, 0.02, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer reward model with grouped queries, saved by transformers. Its pad token is no other token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        num_labels=1,
        pad_token_id=96,
    )
    path = tmp_path_factory.mktemp("reward")
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def batches():
    """Pairs with margins, and whether each response is unsafe (1), safe (0), or not labelled (-1)."""
    for i in range(STEPS):
        rng = np.random.default_rng(100 + i)
        batch = make_batch(4, prompt=8, response=9, seed=10 + i, vocab=96)
        margins = rng.choice([1, 2 / 3, 1 / 3, 0], 4).astype(np.float32)
        yield dataclasses.replace(
            batch, margins=margins, labels={"safety": rng.integers(-1, 2, (4, 2)).astype(np.int32)}
        )


def torch_scores(model, head, batch):
    """Scores [B, K] by the model's own head, and the auxiliary logits [B, K, 2] of the state that it reads."""
    rows = []
    for i in range(len(batch.weights)):
        prompt = batch.prompts[i, : batch.prompt_lengths[i]].tolist()
        rows += [prompt + batch.responses[i, k, : batch.response_lengths[i, k]].tolist() for k in range(2)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [96] * (longest - len(row)) for row in rows])
    real = (ids != 96).long()
    out = model(input_ids=ids, attention_mask=real, output_hidden_states=True)
    last = torch.tensor([len(row) - 1 for row in rows])
    state = out.hidden_states[-1][torch.arange(len(rows)), last]
    return out.logits.view(-1, 2), (state @ head).view(-1, 2, 2)


def torch_trajectory(model, head):
    """(loss, gradient norm) of each step."""
    named = [*model.named_parameters(), ("safety", head)]
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": DECAY},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    out = []
    for batch in batches():
        scores, logits = torch_scores(model, head, batch)
        chosen, rejected = scores[:, 0], scores[:, 1]
        ranking = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(batch.margins))
        loss = (ranking + CENTERING * (chosen + rejected) ** 2).mean()
        labels = torch.tensor(batch.labels["safety"]).long().view(-1)
        safety = torch.nn.functional.cross_entropy(logits.view(-1, 2), labels, ignore_index=-1)
        optimizer.zero_grad()
        (loss + SAFETY * safety).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
        optimizer.step()
        out.append(((loss + SAFETY * safety).item(), norm.item()))
    return np.asarray(out)


def test_full_fine_tuning(folder):
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(folder).train()
    start = 0.2 * np.random.default_rng(5).standard_normal((32, 2)).astype(np.float32)
    head = torch.tensor(start, requires_grad=True)
    expected = torch_trajectory(theirs, head)
    assert (expected[:, 1] > CLIP).any()
    assert np.ptp(expected[:, 0]) > 0.1

    config = RewardConfig(
        margin="column",
        centering=CENTERING,
        multi_class=(f"safety:{SAFETY}=safe,unsafe",),
        optimizer=OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, clip_norm=CLIP),
        accumulate=2,
    )
    model, variables = load_pretrained(folder)
    variables = {**variables, "heads": {**variables["heads"], "safety": {"kernel": jnp.asarray(start)}}}
    state, got = reward.init_state(model, variables, config), []
    step = quick_jit(reward.train_step, config=config)
    for batch in batches():
        state, metrics = step(state, batch)
        got.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(got, expected, rtol=2e-4)
    score = state.trainable["heads"]["score"]["kernel"]
    np.testing.assert_allclose(score, theirs.score.weight.detach().numpy().T, atol=1e-4)
    np.testing.assert_allclose(state.trainable["heads"]["safety"]["kernel"], head.detach().numpy(), atol=1e-4)
