"""Calibration of the bias that knows the first key, and of row caps, against float64 by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from first_token import first_token_oracle
from torch import Tensor, nn
from zoo import hf, randomise, tokens

import sigswap
from sigswap.conversion.state import SiteState
from sigswap.errors import CalibrationError, ConfigError
from sigswap.training import fit as fitting
from sigswap.training import observe

HEADS, HEAD_DIM, LENGTH = 2, 8, 24
DIM = HEADS * HEAD_DIM


class Attention(nn.Module):
    """Causal, with a first token that gets much of the attention, as in pretrained decoders."""

    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.explicit = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), explicit
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.35)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [t.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.explicit:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            attended = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(hidden, -math.inf).softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, explicit: bool = False) -> None:
        super().__init__()
        self.attention = Attention(explicit)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def model_and_batches(explicit: bool = False, **config: object) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    model = Model(explicit)
    batches = [torch.randn(2, LENGTH, DIM, dtype=torch.float64) for _ in range(3)]
    for batch in batches:
        batch[:, 0] = 3.0 * batches[0][0, 0]  # one and the same first token, of a large norm
    example = batches[0]
    settings: dict[str, object] = {"query_bias": True, "first_token": True} | config
    sigswap.convert(model, sigswap.SigmoidConfig(**settings), example_inputs=(example,))
    return model, batches


def seen(model: Model, batches: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, scores (masked: -inf), value, in float64, of all rows."""
    with torch.no_grad():
        q, k, v = (torch.cat(x) for x in zip(*(model.attention.heads(batch) for batch in batches), strict=True))
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~visible, -math.inf)
    return q, scores, v, visible


def site(model: Model) -> dict[str, Tensor]:
    return {n.rpartition(".")[2]: p.detach() for n, p in model.named_parameters() if ".sigswap." in n}


def capped(p: Tensor, cap: float | None) -> Tensor:
    return p if cap is None else p / p.sum(-1, keepdim=True).clamp(min=cap)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("cap", [None, 0.01])
def test_regression_is_at_a_minimum(explicit: bool, cap: float | None) -> None:
    model, batches = model_and_batches(explicit)
    sigswap.calibrate(model, batches, refine=0, row_cap=cap, progress=False)
    q, scores, _, _ = seen(model, batches)
    found = site(model)
    n = torch.arange(1, LENGTH + 1, dtype=torch.float64)
    total, first = scores.logsumexp(-1), scores[..., 0]
    if cap is not None:
        assert (found["offset"] == 0.5 * math.log(cap)).all()

    def cost(w: Tensor, c: Tensor, a: Tensor) -> Tensor:
        """By head."""
        others = a[:, None] * n.log() - c[:, None] - torch.einsum("bhmd,hd->bhm", q, w)
        missing = (torch.log(first.exp() + others.exp()) - total)[:, :, 1:]
        counts = torch.where(missing < 0, fitting.UPWARD, 1.0) if cap is None else 1.0
        ridge = fitting.RIDGE * (q.square().mean((0, 2)) * w.square()).sum(-1)
        return (counts * missing.square()).sum((0, 2)) / (len(q) * LENGTH) + ridge

    def slope(*parameters: Tensor) -> Tensor:
        leaves = [p.clone().requires_grad_() for p in parameters]
        slopes = torch.autograd.grad(cost(*leaves).sum(), leaves)
        return torch.stack([g.abs().view(HEADS, -1).amax(-1) for g in slopes]).amax(0)

    parameters = [found[name] for name in ("query_weight", "bias", "length_share")]
    start = [torch.zeros_like(parameters[0]), torch.zeros(HEADS).double(), torch.ones(HEADS).double()]
    # Without a cap a head whose output's error got larger is as it was.
    moved = (parameters[0] != 0).all(-1)
    assert moved.any() and (cap is None or moved.all())
    assert (cost(*parameters) < 0.5 * cost(*start))[moved].all()
    assert (slope(*parameters) < 1e-3 * slope(*start))[moved].all()


@pytest.mark.slow
@pytest.mark.parametrize("explicit", [False, True, "tiled"])
@pytest.mark.parametrize("cap", [None, 0.01])
def test_report_against_an_oracle(explicit: bool | str, cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if explicit == "tiled":
        monkeypatch.setattr(observe, "MAX_TILE_SCORES", 5 * 2 * HEADS * LENGTH)  # 5 rows of both sequences
    model, batches = model_and_batches(explicit is True)
    report = sigswap.calibrate(model, batches, row_cap=cap, progress=False)
    q, scores, v, visible = seen(model, batches)
    found = site(model)
    rest = found["bias"][:, None] + torch.einsum("bhmd,hd->bhm", q, found["query_weight"])
    p = first_token_oracle(scores, visible, found["length_share"], rest, found["offset"])
    softmax = scores.softmax(-1) @ v
    missing = softmax - capped(p, cap) @ v
    errors = missing.square().sum((0, 2, 3)) / softmax.square().sum((0, 2, 3))
    for head in report.heads:
        assert head.after == pytest.approx(float(errors[head.head]), rel=1e-4)
        assert head.before is not None and head.after < 0.5 * head.before
    assert [(r.least, r.most) for r in report.lengths] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, LENGTH)]
    for record in report.lengths:
        rows = slice(record.least - 1, record.most)
        error = missing[:, :, rows].square().sum() / softmax[:, :, rows].square().sum()
        assert record.error == pytest.approx(float(error), rel=1e-4)
        assert record.row_sum == pytest.approx(float(p[:, :, rows].sum(-1).mean()), rel=1e-4)
        assert record.rows == len(q) * HEADS * (record.most - record.least + 1)
    assert "visible keys" in str(report)


def test_the_model_computes_what_was_fitted() -> None:
    model, batches = model_and_batches()
    sigswap.calibrate(model, batches, row_cap=0.01, progress=False)
    q, scores, v, visible = seen(model, batches)
    found = site(model)
    rest = found["bias"][:, None] + torch.einsum("bhmd,hd->bhm", q, found["query_weight"])
    p = capped(first_token_oracle(scores, visible, found["length_share"], rest, found["offset"]), 0.01)
    expected = model.attention.out((p @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(torch.cat([model(batch) for batch in batches]), expected)


def test_a_decoder_gets_a_low_row_cap_and_is_all_but_softmax() -> None:
    model, batches = model_and_batches()
    with sigswap.softmax(model):
        before = [model(batch) for batch in batches]
    report = sigswap.calibrate(model, batches, progress=False)
    conversion = sigswap.report(model)
    assert any("0.01" in note for note in report.notes) and any("0.01" in note for note in conversion.notes)
    for ours, theirs in zip((model(batch) for batch in batches), before, strict=True):
        assert (ours - theirs).square().sum() < 2e-3 * theirs.square().sum()


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = sigswap.convert(
        randomise(hf("LlamaForCausalLM", "sdpa")).eval(), sigswap.SigmoidConfig(query_bias=True, first_token=True)
    )
    ids = tokens(2, 12)
    sigswap.calibrate(model, [{"input_ids": ids}], progress=False)
    sigswap.save(model, tmp_path)
    loaded = sigswap.load(tmp_path)
    assert sigswap.report(loaded).notes == sigswap.report(model).notes
    assert {module.fitted_length for module in loaded.modules() if isinstance(module, SiteState)} == {12}
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    names = [name for name in loaded.state_dict() if ".sigswap." in name]
    assert {name.rpartition(".")[2] for name in names} == {"bias", "query_weight", "length_share", "offset"}


def test_a_row_cap_stays_off_unless_it_is_asked_for() -> None:
    model, batches = model_and_batches(first_token=False)
    report = sigswap.calibrate(model, batches, progress=False)
    assert not [note for note in sigswap.report(model).notes if "Row cap" in note]
    other, _ = model_and_batches(first_token=False)
    with_cap = sigswap.calibrate(other, batches, row_cap=0.01, progress=False)
    assert [note for note in sigswap.report(other).notes if "0.01" in note]
    after, without = with_cap.mean("after"), report.mean("after")
    assert after is not None and without is not None and after < 0.5 * without


def test_a_row_cap_that_does_not_pay_is_not_kept() -> None:
    """Every row's sum would have to reach 1,000: its output would all but vanish."""
    model, batches = model_and_batches()
    sigswap.calibrate(model, batches, row_cap=None, progress=False)
    fitted = {name: value.clone() for name, value in model.state_dict().items()}
    sigswap.calibrate(model, batches, refine=0, row_cap=1e3, progress=False)
    assert not [note for note in sigswap.report(model).notes if "Row cap" in note]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, fitted[name], rtol=0, atol=0)


def test_a_failed_calibration_leaves_the_cap() -> None:
    model, batches = model_and_batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError):
        sigswap.calibrate(model, [*batches, batches[0] * math.nan], row_cap=0.01, progress=False)
    with pytest.raises(ConfigError, match="row_cap"):
        sigswap.calibrate(model, batches, row_cap=-1.0, progress=False)
    assert model.attention.sigswap.site(0).row_cap is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("explicit", [False, True])
def test_a_run_far_beyond_the_fitted_length_warns(explicit: bool, recwarn: pytest.WarningsRecorder) -> None:
    model, batches = model_and_batches(explicit)
    model(torch.randn(1, 4 * LENGTH + 1, DIM, dtype=torch.float64))
    sigswap.calibrate(model, batches, progress=False)
    model(torch.randn(1, 4 * LENGTH, DIM, dtype=torch.float64))
    assert not [w for w in recwarn if "calibrated" in str(w.message)]
    with pytest.warns(UserWarning, match=f"at most {LENGTH} visible keys runs on {4 * LENGTH + 1} positions"):
        model(torch.randn(1, 4 * LENGTH + 1, DIM, dtype=torch.float64))


def test_rows_are_sampled_alike_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from sigswap.training import sums

    monkeypatch.setattr(sums, "SAMPLED_ROWS", 10)
    x = torch.arange(2 * 100, dtype=torch.float64).view(2, 100, 1)
    counted = torch.ones(2, 100, dtype=torch.bool)
    counted[1, 5] = False
    kept = []
    for size in (100, 7, 1):
        sample = sums.Sample()
        for part in range(0, 100, size):
            cut = slice(part, part + size)
            sample.add(x[:, cut], x[:, cut, 0], -x[:, cut, 0], counted[:, cut])
        kept.append(sample.get())
    assert 5 <= kept[0][0].shape[1] <= 10
    for other in kept[1:]:
        for one, two in zip(kept[0], other, strict=True):
            assert torch.equal(one, two)
