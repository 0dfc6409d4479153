"""All models that the coverage is of, by name: ``timm/FAMILY``, ``transformers/TYPE``, ``torchvision/NAME``,
``PACKAGE/NAME``."""

from __future__ import annotations

from torch import nn

from tests.coverage.check import Built


def all_names() -> list[str]:
    from tests.coverage import third_party, transformers_models, vision_models

    return [
        *(f"timm/{name}" for name in vision_models.timm_names()),
        *(f"torchvision/{name}" for name in vision_models.torchvision_names()),
        *third_party.names(),
        *(f"transformers/{name}" for name in transformers_models.names()),
    ]


def build(name: str) -> Built:
    """The case of that name. Raises whatever the library raises."""
    kind, _, model = name.partition("/")
    if kind == "timm":
        from tests.coverage.vision_models import build_timm

        return build_timm(model)
    if kind == "torchvision":
        from tests.coverage.vision_models import build_torchvision

        return build_torchvision(model)
    if kind == "transformers":
        from tests.coverage.transformers_models import build as build_transformers

        return build_transformers(model)
    from tests.coverage.third_party import build as build_third_party

    return build_third_party(name)


def made(name: str) -> nn.Module:
    """The model of the case: the factory that a saved copy is built by."""
    return build(name).make()
