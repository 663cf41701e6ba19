"""Every router once more, in numpy and float64, token by token: from the papers, sharing no code with the layers.

`REFERENCES[name](p, x, s)` takes the parameters p of a layer by path, tokens x [T, H] and a `Setting`, and returns the
layer's output [T, H] and its losses, unweighted losses times the weights of the setting.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    top_k: int
    sequence_length: int
    weights: dict[str, float]
    noise: np.ndarray | None = None
    groups: tuple[int, int] = (1, 1)
    capacity: int = 0
    passes: int = 2
    token_ids: np.ndarray | None = None


def softmax_of(z, axis=-1):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid_of(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid_of(z)


def mlp(x, gate_up, down):
    return (silu(x @ gate_up[:, 0]) * (x @ gate_up[:, 1])) @ down


def shared(p, x):
    return sigmoid_of(x @ p["shared_gate"]) * mlp(x, p["shared_gate_up"], p["shared_down"])


def apply(p, x, weight):
    """Σ_e weight[t, e] · expert e (x[t]), and the shared expert."""
    y = shared(p, x)
    for expert in range(weight.shape[1]):
        y = y + weight[:, expert, None] * mlp(x, p["gate_up"][expert], p["down"][expert])
    return y


def best(scores, k):
    """The k largest of each row; the first of equals."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def chosen_by(ids, num_experts):
    chosen = np.zeros((len(ids), num_experts), bool)
    for token, experts in enumerate(ids):
        chosen[token, experts] = True
    return chosen


def normalised(weight):
    return weight / weight.sum(1, keepdims=True)


def switch_loss(chosen, p, k):
    return chosen.shape[1] * np.sum(chosen.mean(0) / k * p.mean(0))


def logits_of(p, x):
    return x @ p["router.kernel"] + p["router.bias"]


def sequence_loss(chosen, scores, s, k):
    """The Switch loss of each sequence by itself, with scores that sum to 1."""
    length, shares = s.sequence_length, normalised(scores)
    starts = range(0, len(chosen), length)
    return np.mean([switch_loss(chosen[i : i + length], shares[i : i + length], k) for i in starts])


def z_loss_of(logits):
    return np.mean(np.log(np.exp(logits).sum(1)) ** 2)


def cv_squared(v):
    return np.var(v) / np.mean(v) ** 2


def softmax(p, x, s):
    logits = logits_of(p, x)
    scores = softmax_of(logits)
    chosen = chosen_by(best(scores, s.top_k), scores.shape[1])
    return apply(p, x, normalised(scores * chosen)), losses_of_scores(chosen, scores, logits, s, s.top_k)


def losses_of_scores(chosen, scores, logits, s, k):
    return {
        "load_balance": s.weights["load_balance"] * switch_loss(chosen, normalised(scores), k),
        "sequence_balance": s.weights["sequence_balance"] * sequence_loss(chosen, scores, s, k),
        "z": s.weights["z"] * z_loss_of(logits),
    }


def noisy_top_k(p, x, s):
    clean = logits_of(p, x)
    deviation = np.log1p(np.exp(x @ p["router.noise_kernel"]))
    noisy = clean + s.noise * deviation
    chosen = chosen_by(best(noisy, s.top_k), noisy.shape[1])
    gates = np.where(chosen, softmax_of(np.where(chosen, noisy, -np.inf)), 0)
    probability = np.zeros_like(clean)
    for t, e in np.ndindex(*clean.shape):
        kth_excluding = np.sort(np.delete(noisy[t], e))[-s.top_k]
        probability[t, e] = 0.5 * (1 + math.erf((clean[t, e] - kth_excluding) / deviation[t, e] / math.sqrt(2)))
    losses = {
        "importance": s.weights["importance"] * cv_squared(gates.sum(0)),
        "load": s.weights["load"] * cv_squared(probability.sum(0)),
        "sequence_balance": s.weights["sequence_balance"] * sequence_loss(chosen, softmax_of(clean), s, s.top_k),
        "z": s.weights["z"] * z_loss_of(clean),
    }
    return apply(p, x, gates), losses


def switch(p, x, s):
    logits = logits_of(p, x)
    scores = softmax_of(logits)
    chosen = chosen_by(best(scores, 1), scores.shape[1])
    has_room = chosen & (np.cumsum(chosen, axis=0) <= s.capacity)
    return apply(p, x, scores * has_room), losses_of_scores(chosen, scores, logits, s, 1)


def loss_free(p, x, s):
    logits = logits_of(p, x)
    scores = sigmoid_of(logits)
    ranking = scores + p["router.correction_bias"]
    num_groups, topk_groups = s.groups
    size = scores.shape[1] // num_groups
    for row in ranking:
        worth = [np.sort(row[g * size : (g + 1) * size])[-2:].sum() for g in range(num_groups)]
        for g in np.argsort(worth)[: num_groups - topk_groups]:
            row[g * size : (g + 1) * size] = -np.inf
    chosen = chosen_by(best(ranking, s.top_k), scores.shape[1])
    return apply(p, x, normalised(scores * chosen)), losses_of_scores(chosen, scores, logits, s, s.top_k)


def expert_choice(p, x, s):
    logits = logits_of(p, x)
    scores = softmax_of(logits)
    taken = chosen_by(best(scores.T, s.capacity), len(x)).T
    return apply(p, x, scores * taken), {"z": s.weights["z"] * z_loss_of(logits)}


def soft_moe(p, x, s):
    phi = p["router.phi"]
    num_slots = phi.shape[2]
    flat = phi.reshape(len(phi), -1)
    flat = p["router.scale"][0] * flat / np.linalg.norm(flat, axis=0)
    y = shared(p, x)
    for i in range(0, len(x), s.sequence_length):
        tokens = x[i : i + s.sequence_length]
        logits = tokens / np.linalg.norm(tokens, axis=1, keepdims=True) @ flat
        slots = softmax_of(logits, axis=0).T @ tokens
        outputs = [mlp(slots[j], p["gate_up"][j // num_slots], p["down"][j // num_slots]) for j in range(len(slots))]
        y[i : i + s.sequence_length] += softmax_of(logits, axis=1) @ np.stack(outputs)
    return y, {}


def chain_of_experts(p, x, s):
    of_passes = []
    for number in range(s.passes):
        own = {f"router.{part}": p[f"router.{part}"][number] for part in ("kernel", "bias")}
        y, losses = softmax(p | own, x, dataclasses.replace(s, top_k=s.top_k // s.passes))
        x = x + y
        of_passes.append(losses)
    return x, {name: np.mean([losses[name] for losses in of_passes]) for name in of_passes[0]}


def hash_routing(p, x, s):
    table = p["router.table"].astype(int)
    weight = np.zeros((len(x), p["gate_up"].shape[0]))
    for token, token_id in enumerate(s.token_ids):
        if token_id >= 0:
            weight[token, table[token_id % len(table)]] = 1 / s.top_k
    return apply(p, x, weight), {}


def specialized(p, x, s):
    common = x + silu(x @ p["router.common_in"]) @ p["router.common_out"]
    logits = logits_of(p, common)
    scores = softmax_of(logits)
    chosen = chosen_by(best(scores, s.top_k), scores.shape[1])

    def entropy(q):
        return -np.sum(q * np.log(q), axis=-1)

    information = entropy(scores.mean(0)) - entropy(scores).mean()
    losses = {
        "specialization": s.weights["specialization"] * (1 - information / np.log(scores.shape[1])),
        "sequence_balance": s.weights["sequence_balance"] * sequence_loss(chosen, scores, s, s.top_k),
        "z": s.weights["z"] * z_loss_of(logits),
    }
    return apply(p, x, normalised(scores * chosen)), losses


REFERENCES = {
    "softmax": softmax,
    "noisy_top_k": noisy_top_k,
    "switch": switch,
    "loss_free": loss_free,
    "group_limited": loss_free,
    "expert_choice": expert_choice,
    "soft_moe": soft_moe,
    "chain_of_experts": chain_of_experts,
    "hash": hash_routing,
    "specialized": specialized,
}
