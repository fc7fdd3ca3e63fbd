"""Radix index over the token sequences in the KV cache. Pure: it says who holds a prefix, not whether it is computed.

A holder is a sequence id of the context. Every namespace (an account, or the root of the appliance's own prompts) is a
tree of its own, so that no timing tells one account what another has asked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many leading tokens `a` and `b` have in common."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


class _Node:
    __slots__ = ("children", "depth", "edge", "holders", "parent")

    def __init__(self, edge: Tokens, parent: _Node | None, depth: int) -> None:
        self.edge = edge  # the tokens between parent and here
        self.parent = parent
        self.depth = depth  # tokens from the root to the end of the edge
        self.children: dict[int, _Node] = {}
        self.holders: set[int] = set()  # who holds the whole path down to here


class PrefixIndex:
    """Finds the holders of the longest common prefix in O(length of the prefix)."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}
        self._leaves: dict[int, dict[str, _Node]] = {}  # where each holder's path ends, per namespace

    def insert(self, namespace: str, tokens: Tokens, holder: int) -> None:
        """`holder` holds (or will hold) `tokens`; inserting a longer sequence again extends its path."""
        node = self._roots.setdefault(namespace, _Node(np.empty(0, np.int32), None, 0))
        at = 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                child = _Node(tokens[at:], node, len(tokens))
                node.children[int(tokens[at])] = child
            elif (n := common_prefix(child.edge, tokens[at:])) < len(child.edge):
                child = self._split(child, n)
            child.holders.add(holder)
            at, node = child.depth, child
        self._leaves.setdefault(holder, {})[namespace] = node

    def remove(self, holder: int) -> None:
        """Forget `holder` in every namespace."""
        for namespace, leaf in self._leaves.pop(holder, {}).items():
            node: _Node | None = leaf
            while node is not None and node.parent is not None:
                node.holders.discard(holder)
                if not node.holders:
                    del node.parent.children[int(node.edge[0])]
                node = node.parent
            if node is not None and not node.children:
                self._roots.pop(namespace, None)

    def match(self, namespace: str, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """Yields (holder, matched tokens), longest match first, every holder once."""
        path = list(self._walk(namespace, tokens))
        seen: set[int] = set()
        for node, matched in reversed(path):
            for holder in node.holders - seen:
                yield holder, matched
            seen |= node.holders

    def ends_within(self, namespace: str, tokens: Tokens) -> Iterator[int]:
        """Holders whose whole sequence is a prefix of `tokens`."""
        for node, matched in self._walk(namespace, tokens):
            if matched == node.depth:
                yield from (h for h in node.holders if self._leaves[h].get(namespace) is node)

    def _walk(self, namespace: str, tokens: Tokens) -> Iterator[tuple[_Node, int]]:
        """The nodes along `tokens` with the tokens matched down to (and into) each."""
        node = self._roots.get(namespace)
        at = 0
        while node is not None and at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                return
            n = common_prefix(child.edge, tokens[at:])
            yield child, at + n
            if n < len(child.edge):
                return
            at, node = child.depth, child

    @staticmethod
    def _split(lower: _Node, n: int) -> _Node:
        """Cut the edge into `lower` after `n` tokens; the new node above it is returned."""
        assert lower.parent is not None
        upper = _Node(lower.edge[:n], lower.parent, lower.depth - len(lower.edge) + n)
        upper.holders = set(lower.holders)
        upper.children[int(lower.edge[n])] = lower
        lower.parent.children[int(lower.edge[0])] = upper
        lower.parent, lower.edge = upper, lower.edge[n:]
        return upper
