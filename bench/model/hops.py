"""What an exchange sends between nodes and within them: each row straight to its expert, or once to each node first.

    ids = uniform_ids(num_tokens=8192, num_experts=256, top_k=8, seed=0)      # or those of a router, [T, K]
    nodes = Nodes(count=4, chips=8, num_experts=256)
    direct(ids, nodes).across.rows_sent                 # [32]: rows that each chip sends to other nodes
    in_two_hops(ids, nodes).elapsed(out=7392, back=14336, across=50e9, within=450e9)

Tokens lie on the chips in order, as many on each, and experts as well; node n has the chips n · chips and on. Rows that
stay on their chip are not counted. Counted is what an exact exchange sends: slabs are larger.
"""

import dataclasses

import numpy as np

SIDE_BYTES = 8
"""Beside a row that goes to a node, for each choice: an expert's number and its weight."""


@dataclasses.dataclass(frozen=True)
class Nodes:
    """So many nodes of so many chips, which share so many experts."""

    count: int
    chips: int
    num_experts: int

    def ends(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each choice of ids [T, K], the chip of the token and the chip of the expert, [T, K] each."""
        chips = self.count * self.chips
        if len(ids) % chips or self.num_experts % chips:
            raise ValueError(f"{chips} chips must divide {len(ids)} tokens and num_experts={self.num_experts}")
        senders = np.arange(len(ids))[:, None] // max(1, len(ids) // chips)
        senders, receivers = np.broadcast_arrays(senders, ids // (self.num_experts // chips))
        return senders, receivers

    def count_pairs(self, senders: np.ndarray, receivers: np.ndarray) -> np.ndarray:
        """[chips, chips], how often each pair of different chips comes."""
        chips = self.count * self.chips
        pairs = np.bincount(senders * chips + receivers, minlength=chips * chips).reshape(chips, chips)
        return pairs * ~np.eye(chips, dtype=bool)


@dataclasses.dataclass(frozen=True)
class Hop:
    """Rows on their way out over one kind of link; their results come back the other way.

    Attributes:
      rows: [chips, chips], how many each sends each.
    """

    rows: np.ndarray

    @property
    def rows_sent(self) -> np.ndarray:
        """[chips]."""
        return self.rows.sum(1)

    @property
    def messages(self) -> np.ndarray:
        """[chips], to how many others each sends rows."""
        return (self.rows > 0).sum(1)

    @property
    def busiest(self) -> int:
        """Rows of the chip that sends, or gets, the most."""
        return int(max(self.rows.sum(1).max(), self.rows.sum(0).max()))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """An exchange of tokens with `top_k` choices: what it sends between nodes and within them, at once or in turn."""

    across: Hop
    within: Hop
    top_k: int
    in_turn: bool

    def elapsed(self, *, out: int, back: int, across: float, within: float) -> float:
        """The least µs there and back: the busiest chip's links at their peak, those of a hop after the other's.

        Args:
          out: bytes of a row on its way to the experts.
          back: bytes of a row on its way back.
          across: bytes/s that a chip can send to other nodes, and get from them.
          within: the same for chips of its node.
        """
        side = SIDE_BYTES * self.top_k if self.in_turn else 0
        times = self.across.busiest * (out + side + back) / across, self.within.busiest * (out + back) / within
        return (sum(times) if self.in_turn else max(times)) * 1e6


def direct(ids: np.ndarray, nodes: Nodes) -> Traffic:
    """Every choice of ids [T, K] as a row of its own, straight to its expert; −1 for a choice that is not made."""
    senders, receivers = nodes.ends(ids)
    rows = nodes.count_pairs(senders[ids >= 0], receivers[ids >= 0])
    node = np.arange(len(rows)) // nodes.chips
    crosses = node[:, None] != node
    return Traffic(Hop(rows * crosses), Hop(rows * ~crosses), ids.shape[1], in_turn=False)


def in_two_hops(ids: np.ndarray, nodes: Nodes) -> Traffic:
    """A row for each node that a token of ids [T, K] chooses, to its own chip's place there, and on to the experts."""
    senders, receivers = nodes.ends(ids)
    places = receivers // nodes.chips * nodes.chips + senders % nodes.chips
    token, place = np.unique(np.stack([np.nonzero(ids >= 0)[0], places[ids >= 0]]), axis=1)
    across = nodes.count_pairs(senders[token, 0], place)
    within = nodes.count_pairs(places[ids >= 0], receivers[ids >= 0])
    return Traffic(Hop(across), Hop(within), ids.shape[1], in_turn=True)


def uniform_ids(
    num_tokens: int, num_experts: int, top_k: int, seed: int, *, groups: int = 1, kept: int = 1
) -> np.ndarray:
    """`top_k` experts for each token at random, all in `kept` of `groups` equal groups, which are chosen at random."""
    rng = np.random.default_rng(seed)
    order = rng.random((num_tokens, groups)).argsort(1)[:, :kept]
    allowed = np.zeros((num_tokens, groups), bool)
    np.put_along_axis(allowed, order, True, axis=1)
    score = np.where(np.repeat(allowed, num_experts // groups, axis=1), rng.random((num_tokens, num_experts)), -1)
    return np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
