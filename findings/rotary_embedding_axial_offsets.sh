#!/usr/bin/env bash
# rotary-embedding-torch puts each chunk of a video at frame 0: get_axial_freqs takes offsets and then loses them.
#
# Versions:  rotary-embedding-torch 0.9.1, torch 2.14.1, numpy 2.4.6; CPU, float32.
# Guess:     get_axial_freqs(2, 4, 4, offsets=(6, 0, 0)) gives frames 6 and 7 their frequencies: those of rows 6 and 7
#            of get_axial_freqs(8, 4, 4).
# Behaviour: what is worked out for an axis is kept for the next call, by its length alone: the offset is neither in
#            what is stored nor in what is looked up. An axis no longer than one before gets that one's positions. So
#            chunks of a video, or tiles of an image, all get those of the first; and after an offset on the longest
#            axis a plain rotate_queries_or_keys of as many tokens begins at that offset. Nothing is said. It is so with
#            freqs_for="lang", the default; "pixel" keeps nothing, and cache_if_possible=False is right.
# Seen:      positions of the frames, in chunks of two at 0, 2, 4, 6: default [0, 1], [0, 1], [0, 1], [0, 1];
#            cache_if_possible=False [0, 1], [2, 3], [4, 5], [6, 7]
#            a tile of 4 x 4 at row 0, column 100: default columns [0, 1, 2, 3], without [100, 101, 102, 103]
#            four tokens rotated after an offset of 10: default at [10, 11, 12, 13], without at [0, 1, 2, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6 rotary-embedding-torch==0.9.1
cat >"$folder/offsets.py" <<'PYTHON'
import torch
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb

dim = 16


def positions(freqs):
    """The position of each row: the first frequency is 1, so that its angle is the position."""
    return freqs[..., 0].round().int().tolist()


def chunks(rotary):
    return [positions(rotary.get_axial_freqs(2, 4, 4, offsets=(first, 0, 0))[:, 0, 0]) for first in (0, 2, 4, 6)]


def columns(rotary):
    return positions(rotary.get_axial_freqs(4, 4, offsets=(0, 100))[0, :, dim:])


def tokens(rotary):
    """Where rotate_queries_or_keys puts four tokens, after frequencies of four rows and columns from 10 on."""
    rotary.get_axial_freqs(4, 4, offsets=(10, 10))
    query = torch.randn(4, dim)
    rotated = rotary.rotate_queries_or_keys(query)
    angles = torch.arange(50.0)[:, None] * rotary.freqs.repeat_interleave(2)
    starts = {start: apply_rotary_emb(angles[start : start + 4], query) for start in range(46)}
    [first] = [start for start, expected in starts.items() if torch.allclose(expected, rotated, atol=1e-4)]
    return list(range(first, first + 4))


torch.manual_seed(0)
seen = [
    [find(RotaryEmbedding(dim, cache_if_possible=kept)) for kept in (True, False)] for find in (chunks, columns, tokens)
]
by_chunk = [", ".join(map(str, each)) for each in seen[0]]
print(f"positions of the frames, in chunks of two at 0, 2, 4, 6: default {by_chunk[0]};", end=" ")
print(f"cache_if_possible=False {by_chunk[1]}")
print(f"a tile of 4 x 4 at row 0, column 100: default columns {seen[1][0]}, without {seen[1][1]}")
print(f"four tokens rotated after an offset of 10: default at {seen[2][0]}, without at {seen[2][1]}")
assert seen[0] == [[[0, 1]] * 4, [[0, 1], [2, 3], [4, 5], [6, 7]]], "changed: look at it again"
assert seen[1] == [[0, 1, 2, 3], [100, 101, 102, 103]], "changed: look at it again"
assert seen[2] == [[10, 11, 12, 13], [0, 1, 2, 3]], "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/offsets.py"
