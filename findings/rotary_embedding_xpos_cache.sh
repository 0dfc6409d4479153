#!/usr/bin/env bash
# rotary-embedding-torch with xPos: a token that is decoded with cached keys gets other scores than in a full pass.
#
# Versions:  rotary-embedding-torch 0.9.1, torch 2.14.1, numpy 2.4.6; CPU, float32.
# Guess:     rotate_queries_with_cached_keys, which is there "to make this easy" with a cache, and has code for
#            use_xpos, gives the scores of the last rows of rotate_queries_and_keys, with which the model was trained.
# Behaviour: xPos scales queries by s^(position / 512) and keys by the inverse, so that scores depend on the distance.
#            Here positions are counted from the middle of those in the call, for numbers near 1; and the middle of the
#            queries is another one than that of the keys, if there are fewer. Each channel's part of a score is then
#            too small by s^(half of the cached length / 512), with s from 0.29 to 0.96: the more, the longer the text,
#            and nothing is said. With as many queries as keys, and without xPos, it is right; so is the last of the
#            scales of all positions handed to rotate_queries_or_keys.
# Seen:      relative error of the last row's scores at 64 / 512 / 1024 tokens: full pass 0.00 / 0.00 / 0.00, one
#            query with cached keys 0.04 / 0.26 / 0.39, all queries 0.00 / 0.00 / 0.00, without xPos 0.00 / 0.00 / 0.00,
#            scale by hand 0.00 / 0.00 / 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6 rotary-embedding-torch==0.9.1
cat >"$folder/xpos.py" <<'PYTHON'
import torch
from rotary_embedding_torch import RotaryEmbedding

dim = 32


def scores(query, key):
    return query[0, 0, -1] @ key[0, 0].T


def by_definition(query, key):
    """The last query's scores in float64: rotated, and scaled by s^(distance / 512)."""
    length = key.shape[2]
    distance = (length - 1 - torch.arange(length)).double()[:, None]
    order = torch.arange(0, dim, 2).double()
    scale = ((order + 0.4 * dim) / (1.4 * dim)) ** (distance / 512)
    angle = distance * 10000.0 ** (-order / dim)
    pairs = (each.double().unflatten(-1, (-1, 2)) for each in (query[0, 0, -1], key[0, 0]))
    last, others = map(torch.view_as_complex, pairs)
    return (last * others.conj() * torch.polar(scale, angle)).real.sum(-1)


def errors(length):
    query, key = torch.randn(2, 1, 1, length, dim)
    last = query[:, :, -1:]

    def error(got, expected):
        return float((got - expected).norm() / expected.norm())

    expected = by_definition(query, key)
    xpos, plain = RotaryEmbedding(dim, use_xpos=True), RotaryEmbedding(dim)
    scale = xpos.get_scale(torch.arange(length))
    rotated = xpos.rotate_queries_or_keys(last, offset=length - 1, scale=scale[-1:])
    rotated_key = xpos.rotate_queries_or_keys(key, scale=1 / scale)
    whole = plain.rotate_queries_or_keys(query), plain.rotate_queries_or_keys(key)
    return {
        "full pass": error(scores(*xpos.rotate_queries_and_keys(query, key)), expected),
        "one query with cached keys": error(scores(*xpos.rotate_queries_with_cached_keys(last, key)), expected),
        "all queries": error(scores(*xpos.rotate_queries_with_cached_keys(query, key)), expected),
        "without xPos": error(scores(*plain.rotate_queries_with_cached_keys(last, key)), scores(*whole)),
        "scale by hand": error(scores(rotated, rotated_key), expected),
    }


torch.manual_seed(0)
found = [errors(length) for length in (64, 512, 1024)]
print("relative error of the last row's scores at 64 / 512 / 1024 tokens:", end=" ")
print(", ".join(f"{name} {' / '.join(f'{each[name]:.2f}' for each in found)}" for name in found[0]))
wrong = [each.pop("one query with cached keys") for each in found]
assert 0.01 < wrong[0] < 0.1 < wrong[1] < wrong[2], "changed: look at it again"
assert max(max(each.values()) for each in found) < 1e-3, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/xpos.py"
