"""The parts of a block in float64 numpy, written from their papers: head by head, query by query."""

import numpy as np
from flax import nnx

from tests.helpers import float64


def rms_norm(x, scale, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, positions, theta):
    """x [L, D] as D / 2 complex numbers, each turned by its angle."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
        1j * positions[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    )
    return np.concatenate([turned.real, turned.imag], -1)


def attention(params, x, config, mask=None):
    """x [B, L, H] with `params` as `values` gives them; zeros where the mask is false."""
    n, g, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    projected = x @ params["qkv.kernel"] + params.get("qkv.bias", 0)
    y = np.zeros((*x.shape[:2], n, d))
    for b, row in enumerate(projected):
        heads = row.reshape(len(row), n + 2 * g, d).swapaxes(0, 1)
        real = np.ones(len(row), bool) if mask is None else np.asarray(mask[b])
        for head in range(n):
            q, k, v = heads[head], heads[n + head // (n // g)], heads[n + g + head // (n // g)]
            if config.qk_norm:
                q, k = rms_norm(q, params["q_norm.scale"]), rms_norm(k, params["k_norm.scale"])
            q, k = (rotate(each, np.arange(len(row)), config.rope_theta) for each in (q, k))
            for i in np.flatnonzero(real):
                seen = np.flatnonzero(real[: i + 1])
                weights = np.exp(k[seen] @ q[i] / np.sqrt(d))
                y[b, i, head] = weights @ v[seen] / weights.sum()
    out = y.reshape(*x.shape[:2], n * d) @ params["out.kernel"] + params.get("out.bias", 0)
    return out if mask is None else np.where(np.asarray(mask)[..., None], out, 0)


def mlp(params, x):
    """With silu."""
    gate, up = (x @ params["gate_up"][:, half] for half in (0, 1))
    return gate / (1 + np.exp(-gate)) * up @ params["down"]


def dense_block(params, x, config):
    """A block whose feed-forward network is dense."""

    def part(name):
        return {key.removeprefix(f"{name}."): value for key, value in params.items() if key.startswith(f"{name}.")}

    x = x + attention(part("attention"), rms_norm(x, params["attention_norm.scale"]), config.attention)
    return x + mlp(part("feed_forward"), rms_norm(x, params["feed_forward_norm.scale"]))


def values(state) -> dict[str, np.ndarray]:
    """The parameters in a state of nnx, by their dotted names, in float64."""
    return {".".join(map(str, path)): float64(variable.get_value()) for path, variable in nnx.to_flat_state(state)}
