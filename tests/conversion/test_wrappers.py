"""Public functions on a converted model with something around it: seen through, or refused before anything changes."""

from __future__ import annotations

import copy
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import sigswap
from sigswap.errors import (
    ArgumentError,
    CheckpointError,
    ConversionError,
    ExampleInputsError,
    NotConvertedError,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(1, 13).view(2, 6)
BATCHES = [{"input_ids": IDS}]


class Holder(nn.Module):
    """A LightningModule, say."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertModel(config).eval()


def lora(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def spread(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made: nn.Module = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return made


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "ddp": DistributedDataParallel,
    "dp": DataParallel,
    "lora": lora,
    "fsdp": sharded,
    "fsdp2": spread,
    "ddp of lora": lambda model: DistributedDataParallel(lora(model)),
    "compiled ddp": lambda model: compiled(DistributedDataParallel(model)),
    "holder": Holder,
    "sequential": nn.Sequential,
}

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "convert": lambda model: sigswap.convert(model, example_inputs={"input_ids": IDS}),
    "inspect": lambda model: sigswap.inspect(model, example_inputs={"input_ids": IDS}),
    "report": sigswap.report,
    "is_converted": sigswap.is_converted,
    "set_row_cap": lambda model: sigswap.set_row_cap(model, 0.5),
    "softmax": lambda model: sigswap.softmax(model).__enter__(),
    "calibrate": lambda model: sigswap.calibrate(model, BATCHES, refine=0, progress=False),
    "rank_sites": lambda model: sigswap.rank_sites(model, BATCHES, progress=False),
    "distill": lambda model: sigswap.distill(model, bert(), BATCHES, steps=1, progress=False),
    "compare": lambda model: sigswap.compare(model, bert(), BATCHES, progress=False),
    "param_groups": lambda model: sigswap.param_groups(model, 0.1),
    "save": lambda model: sigswap.save(model, tempfile.mkdtemp()),
    "revert": sigswap.revert,
}
DISTRIBUTED = dict.fromkeys(("convert", "calibrate", "revert"), ConversionError)
REFUSED: dict[str, dict[str, Any]] = {
    "compiled": {"convert": ConversionError, "inspect": ConversionError, "distill": ArgumentError},
    "ddp": DISTRIBUTED,
    "dp": {**DISTRIBUTED, "distill": ConversionError},
    "lora": {"save": CheckpointError},
    "fsdp": {
        **DISTRIBUTED,
        "distill": ConversionError,
        **dict.fromkeys(("rank_sites", "compare", "param_groups"), ArgumentError),
        "save": CheckpointError,
    },
    "fsdp2": {"revert": ConversionError},
    "ddp of lora": {**DISTRIBUTED, "save": CheckpointError},
    "compiled ddp": {**DISTRIBUTED, "inspect": ConversionError, "distill": ArgumentError},
    "holder": {
        "calibrate": NotConvertedError,
        "save": NotConvertedError,
        "distill": sigswap.errors.CalibrationError,
        "compare": ArgumentError,
    },
    "sequential": {
        "convert": ExampleInputsError,
        "inspect": ExampleInputsError,
        "calibrate": NotConvertedError,
        "save": NotConvertedError,
        "rank_sites": sigswap.errors.CalibrationError,  # its own forward takes no keywords
        "distill": sigswap.errors.CalibrationError,
        "compare": ArgumentError,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CONVERTED = sigswap.convert(bert())


def pairs() -> Iterator[Any]:
    """Of a wrapper and a function: all that are refused, a sample of those that run."""
    for wrapper, function in itertools.product(WRAPPERS, FUNCTIONS):
        marks = () if function in REFUSED[wrapper] else pytest.mark.slow
        yield pytest.param(wrapper, function, marks=marks)


@pytest.mark.parametrize(("wrapper", "function"), list(pairs()))
def test_a_function_on_a_wrapper(wrapper: str, function: str) -> None:
    inside = bert() if function in ("convert", "inspect") else copy.deepcopy(CONVERTED)
    model = WRAPPERS[wrapper](inside)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    caps = [module.row_cap for module in model.modules() if hasattr(module, "row_cap")]
    expected = REFUSED[wrapper].get(function)
    if expected is None:
        FUNCTIONS[function](model)
        return
    with pytest.raises(expected) as refused:
        FUNCTIONS[function](model)
    assert refused.value.hint is not None
    assert before.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        same = parameter == before[name]
        assert bool(getattr(same, "full_tensor", lambda same=same: same)().all()), name
    assert caps == [module.row_cap for module in model.modules() if hasattr(module, "row_cap")]


@pytest.mark.parametrize("frozen", [False, True])
def test_what_ddp_does_not_know_is_not_added(frozen: bool, thawed: None) -> None:
    inside = bert()
    wrapper = torch.nn.parallel.DistributedDataParallel(inside)
    if frozen:
        gc.freeze()
    for part in (wrapper.module, wrapper.module.encoder):
        with pytest.raises(ConversionError, match="inside DistributedDataParallel cannot be converted"):
            sigswap.convert(part)
    assert not sigswap.is_converted(inside)
    del wrapper
    assert sigswap.is_converted(sigswap.convert(inside))


def test_what_was_asked_for_happens_inside_the_wrapper() -> None:
    inside = copy.deepcopy(CONVERTED)
    for wrapper in ("compiled", "ddp", "lora", "ddp of lora", "holder"):
        model = WRAPPERS[wrapper](inside)
        assert sigswap.is_converted(model)
        assert sigswap.report(model).sites == sigswap.report(inside).sites
        sigswap.set_row_cap(model, 0.5)
        assert sigswap.report(inside).notes[-1].startswith("Row cap: 0.5")
        sigswap.set_row_cap(inside, None)
    model = compiled(inside)
    sigswap.calibrate(model, BATCHES, refine=0, progress=False)
    assert any("Calibrated" in note for note in sigswap.report(inside).notes)
    assert sigswap.revert(model) is model
    assert not sigswap.is_converted(inside)


def test_a_model_with_adapters_is_converted() -> None:
    """The model inside gets the conversion, as if it had been converted itself; what was given comes back."""
    expected = lora(copy.deepcopy(CONVERTED))
    model = lora(bert())
    assert sigswap.convert(model) is model
    assert model.get_base_model().__dict__.keys() >= {"_sigswap_conversion"}
    with torch.no_grad():
        assert torch.equal(model(**BATCHES[0])[0], expected(**BATCHES[0])[0])


def test_what_runs_in_a_wrapper_is_watched() -> None:
    model = lora(bert())
    with sigswap.watch(model):
        model(**BATCHES[0])
    sigswap.convert(model)
    assert sigswap.is_converted(model)


def test_two_converted_parts_are_named() -> None:
    both = nn.ModuleDict({"a": copy.deepcopy(CONVERTED), "b": copy.deepcopy(CONVERTED)})
    with pytest.raises(NotConvertedError, match=r"Pass model\.a or model\.b"):
        sigswap.report(both)


def test_prompts_are_run_with_the_model() -> None:
    """What peft does around the model is part of what a calibration runs."""
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    base = sigswap.convert(transformers.LlamaForCausalLM(config).eval())
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(base, prompts)
    sigswap.calibrate(model, BATCHES, refine=0, lookups=False, progress=False)
    assert base.__dict__["_sigswap_conversion"].fitted_length == IDS.shape[1] + 5
