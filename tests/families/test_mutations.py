"""One wrong fact at a time: each must be caught, by the contract (structure) or by the comparison (numbers)."""

from dataclasses import fields, replace
from typing import Any

import pytest

from hasten.errors import AccuracyError, ContractError
from hasten.families import FAMILIES
from hasten.families.schema import Attention, Classes, Family, Norm
from hasten.testing import check_family, tiny_model

FLIPS: dict[tuple[str, str], Any] = {
    ("norm", "kind"): lambda n: "layer" if n == "rms" else "rms",
    ("norm", "unit_offset"): lambda n: not n,
    ("norm", "fp32_weight"): lambda n: not n,
    ("norm", "eps"): lambda n: "layer_norm_eps" if n == "rms_norm_eps" else "rms_norm_eps",
    ("attention", "rotation"): lambda n: "interleaved" if n == "half" else "half",
    ("attention", "rope_fp32"): lambda n: not n,
    ("attention", "rope_layers"): lambda n: "sliding" if n == "all" else "all",
    ("attention", "qk_norm"): lambda n: None if n else Norm(),
    ("attention", "window"): lambda n: {"never": "always", "always": "never", "by_layer": "never"}[n],
    ("attention", "scale"): lambda n: None if n else "hidden_size",
    ("attention", "scale_power"): lambda n: 1.0 if n != 1.0 else -0.5,
    ("attention", "softcap"): lambda n: None if n else "rms_norm_eps",
    ("mlp", "activation"): lambda n: "hidden_activation" if n == "hidden_act" else "hidden_act",
    ("block", "residual"): lambda n: {"serial": "parallel", "parallel": "serial", "sandwich": "serial"}[n],
    ("block", "multiplier"): lambda n: None if n else "initializer_range",
    ("head", "multiplier"): lambda n: None if n else "initializer_range",
    ("head", "divisor"): lambda n: None if n else "initializer_range",
    ("head", "softcap"): lambda n: None if n else "initializer_range",
}
# A flip that cannot matter: there is no scale field to raise to a power.
NEUTRAL = {(name, "attention", "scale_power") for name, family in FAMILIES.items() if family.attention.scale is None}
# Mistral's layers all have the window, so "sliding" and "all" name the same ones.
NEUTRAL |= {("mistral", "attention", "rope_layers")}
# Without a window no layer is a sliding one, and a config without the field has nothing to put one in.
NEUTRAL |= {(name, "attention", "window") for name in ("llama", "gemma", "cohere", "granite")}
CASES = [(name, part, fact) for name in FAMILIES for part, fact in FLIPS if (name, part, fact) not in NEUTRAL]


def _mutated(family: Family, part: str, fact: str) -> Family:
    holder = getattr(family, part)
    return replace(family, **{part: replace(holder, **{fact: FLIPS[part, fact](getattr(holder, fact))})})


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name) for name in FAMILIES}


@pytest.mark.parametrize(("name", "part", "fact"), CASES)
def test_a_wrong_fact_is_caught(models: dict[str, Any], name: str, part: str, fact: str) -> None:
    wrong = _mutated(FAMILIES[name], part, fact)
    assert wrong != FAMILIES[name]
    with pytest.raises((ContractError, AccuracyError)):
        check_family(wrong, models[name])


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.attention.qk_norm])
@pytest.mark.parametrize("fact", ["kind", "unit_offset", "fp32_weight"])
def test_a_wrong_qk_norm_is_caught(models: dict[str, Any], name: str, fact: str) -> None:
    family = FAMILIES[name]
    norm = family.attention.qk_norm
    assert norm is not None
    wrong = replace(norm, **{fact: FLIPS["norm", fact](getattr(norm, fact))})
    with pytest.raises((ContractError, AccuracyError)):
        check_family(replace(family, attention=replace(family.attention, qk_norm=wrong)), models[name])


def test_a_wrong_qk_norm_switch_is_caught() -> None:
    family = FAMILIES["cohere"]
    wrong = replace(family, attention=replace(family.attention, qk_norm_if=None))
    with pytest.raises(ContractError, match="norm on q and k"):
        check_family(wrong, tiny_model("cohere", use_qk_norm=False))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", [field.name for field in fields(Classes)])
def test_a_class_that_is_gone_is_caught(models: dict[str, Any], name: str, role: str) -> None:
    family = FAMILIES[name]
    wrong = replace(family, classes=replace(family.classes, **{role: "Renamed"}))
    with pytest.raises(ContractError, match="Renamed"):
        check_family(wrong, models[name])


def test_every_fact_has_a_flip() -> None:
    """A new fact in spec.py needs its flip here, or nothing shows that it matters."""
    holders = {"norm": Norm, "attention": Attention}
    for part in ("norm", "attention", "mlp", "block", "head"):
        overlay_config = {field.name for field in fields(holders.get(part, type(getattr(FAMILIES["llama"], part))))}
        # qk_norm_if has a test of its own above; qk_norm_heads_first shows to hooks alone (tests/overlays).
        assert overlay_config - {"qk_norm_if", "qk_norm_heads_first"} == {
            fact for flipped, fact in FLIPS if flipped == part
        }
