"""The peers of ``sigswap bench``: the implementations that it measures beside sigswap's own.

A new peer is a :class:`~sigswap.bench.peers.peer.Peer` in a file of this folder, and a place in ``PEERS``. The suites'
columns, their order and colours, JSON, the versions of packages and the help of ``--peers`` follow from it.
"""

from __future__ import annotations

from sigswap.bench.peers import flash_attention, flashinfer, flex, sdpa, triton_sigmoid
from sigswap.bench.peers.peer import Peer

PEERS: tuple[Peer, ...] = (
    sdpa.FA2,
    flash_attention.FA3,
    flash_attention.FA4,
    sdpa.CUDNN,
    sdpa.EFFICIENT,
    sdpa.SDPA,
    flex.FLEX,
    flashinfer.FLASHINFER,
    sdpa.PADDED,
    sdpa.NESTED,
    triton_sigmoid.TRITON_SIGMOID,
    sdpa.UNFUSED,
)


def peer_names() -> list[str]:
    return [peer.name for peer in PEERS]


def peers_of(suite: str) -> list[Peer]:
    """In the order of their columns."""
    return [peer for peer in PEERS if suite in peer.suites]


def find_peer(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def described() -> str:
    """All peers and what they are, for ``--help``."""
    return "; ".join(f"{peer.name}: {peer.about}" for peer in PEERS)
