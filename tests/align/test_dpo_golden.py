"""Five DPO steps against PyTorch: transformers' Llama, its own DPO loss, torch.optim.AdamW, clip_grad_norm_.

Nothing of the reference trajectory comes from this code base except the batches. If this test fails while the parity
tests of the model pass, the step has changed its numbers: look at the loss, the reference, the reduction, the clipping
and the optimizer, in this order.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import make_batch, quick_jit

from dpo_jax.align import dpo
from dpo_jax.config import LINEAR_LAYERS, DPOConfig, LoraConfig, OptimizerConfig
from dpo_jax.weights.pretrained import load_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS, RATE, CLIP, DECAY, BETA, NLL = 5, 2e-3, 1.0, 0.05, 0.3, 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random two-layer Llama with grouped queries, saved by transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def batches():
    return [make_batch(4, prompt=8, response=9, seed=10 + i, vocab=96) for i in range(STEPS)]


def torch_logps(model, batch, k):
    """Summed log-probabilities of response k: each row as one right-padded sequence, the plain way."""
    rows = []
    for i in range(len(batch.weights)):
        prompt = batch.prompts[i, : batch.prompt_lengths[i]].tolist()
        response = batch.responses[i, k, : batch.response_lengths[i, k]].tolist()
        rows.append((prompt, response))
    longest = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([p + r + [0] * (longest - len(p) - len(r)) for p, r in rows])
    real = torch.tensor([[1] * (len(p) + len(r)) + [0] * (longest - len(p) - len(r)) for p, r in rows])
    answer = torch.tensor([[0] * len(p) + [1] * len(r) + [0] * (longest - len(p) - len(r)) for p, r in rows])
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
    logps = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * answer[:, 1:]).sum(1)


def torch_trajectory(policy, reference):
    """(loss, gradient norm) of each step; `reference(batch, k)` gives the reference log-probabilities."""
    named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": DECAY},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    out = []
    for batch in batches():
        chosen, rejected = torch_logps(policy, batch, 0), torch_logps(policy, batch, 1)
        margin = (chosen - reference(batch, 0)) - (rejected - reference(batch, 1))
        nll = -chosen / torch.tensor(batch.response_lengths[:, 0])
        loss = (-torch.nn.functional.logsigmoid(BETA * margin) + NLL * nll).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
        optimizer.step()
        out.append((loss.item(), norm.item()))
    return np.asarray(out)


def our_trajectory(model, variables):
    optimizer = OptimizerConfig(learning_rate=RATE, weight_decay=DECAY, clip_norm=CLIP)
    config = DPOConfig(beta=BETA, nll_coefficient=NLL, reference="live", optimizer=optimizer, accumulate=2)
    state, out = dpo.init_state(model, variables, config), []
    step = quick_jit(dpo.train_step, config=config)
    for batch in batches():
        state, metrics = step(state, batch)
        out.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.asarray(out), state


def test_full_fine_tuning(folder):
    policy, start = (transformers.LlamaForCausalLM.from_pretrained(folder).train(mode) for mode in (True, False))

    def reference(batch, k):
        with torch.no_grad():
            return torch_logps(start, batch, k)

    expected = torch_trajectory(policy, reference)
    got, state = our_trajectory(*load_pretrained(folder))
    assert (expected[:, 1] > CLIP).any()
    assert np.ptp(expected[:, 0]) > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    head = state.trainable["params"]["lm_head"]["kernel"]
    np.testing.assert_allclose(head, policy.lm_head.weight.detach().numpy().T, atol=1e-4)


def test_lora(folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    adapters = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEAR_LAYERS), init_lora_weights=False)
    policy = peft.get_peft_model(base, adapters)

    def stacked(group, name, which):
        modules = [getattr(getattr(layer, group), name) for layer in base.model.layers]
        factors = [getattr(m, which)["default"].weight.detach().numpy().T for m in modules]
        return jnp.asarray(np.stack(factors))

    def ours(group, names):
        return {n: {"lora_a": stacked(group, n, "lora_A"), "lora_b": stacked(group, n, "lora_B")} for n in names}

    start = {"layers": {"self_attn": ours("self_attn", LINEAR_LAYERS[:4]), "mlp": ours("mlp", LINEAR_LAYERS[4:])}}

    def reference(batch, k):
        with torch.no_grad(), policy.disable_adapter():
            return torch_logps(policy, batch, k)

    expected = torch_trajectory(policy, reference)
    model, variables = load_pretrained(folder, lora=LoraConfig(rank=4, alpha=8.0))
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, variables["adapters"])
    got, _ = our_trajectory(model, {**variables, "adapters": start})
    assert np.ptp(expected[:, 0]) > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-4)
