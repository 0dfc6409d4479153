"""Which class a saved transformers model is loaded as."""

from __future__ import annotations

import pytest

from sigswap.saving.sources import transformers_class

transformers = pytest.importorskip("transformers")


def test_a_part_of_a_model_that_transformers_does_not_export() -> None:
    from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2TextConfig
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextForCausalLM

    assert not hasattr(transformers, "Kosmos2TextForCausalLM")
    assert transformers_class(Kosmos2TextConfig(architectures=["Kosmos2TextForCausalLM"])) is Kosmos2TextForCausalLM
    assert (
        transformers_class(transformers.BertConfig(architectures=["BertForMaskedLM"])) is transformers.BertForMaskedLM
    )
    assert transformers_class(transformers.BertConfig(architectures=["None"])) is transformers.BertModel
