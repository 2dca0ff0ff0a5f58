"""docs/families.md: each line is what a comparison with stock transformers and PEFT gives, and no comparison fails."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

import hasten
from hasten.ops import NormConfig, glu
from hasten.overlays import HeadConfig, HeadOverlay, MLPConfig, MLPOverlay, NormOverlay, Overlay
from hasten.patching import probe
from hasten.testing.model_types import row
from hasten.testing.tiny_types import MODEL_TYPES
from hasten.testing.type_checks import check_type

# Old model types, and PEFT on them, warn of their own deprecations; a warning of ours is an error as everywhere.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::hasten")]

PAGE = (Path(hasten.__file__).parent.parent / "docs/families.md").read_text(encoding="utf-8")
ROWS = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*\|$", PAGE, re.M)}
FAST = (
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss", "vaultgemma", "qwen3_next", "qwen3_5_text", "olmo2"),
    *("gpt2", "falcon", "mamba", "deepseek_v3", "gemma3n_text", "gemma4_text", "llama"),
)


def _check(model_type: str, folder: Path) -> None:
    result = check_type(model_type, folder)
    assert not result.failures
    if f"of transformers {transformers.__version__}," not in PAGE:
        return  # the table is that of another version
    expected = ROWS[model_type]
    if result.unbuildable is not None:
        assert "not built" in expected
    else:
        assert row(result) == expected, "write the table: python -m hasten.testing.model_types --write docs/families.md"


@pytest.mark.parametrize("model_type", FAST)
def test_hard_types_agree_with_stock_and_the_table(model_type: str, tmp_path: Path) -> None:
    _check(model_type, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in FAST])
def test_all_other_types_agree_with_stock_and_the_table(model_type: str, tmp_path: Path) -> None:
    _check(model_type, tmp_path)


def test_the_table_has_every_type_and_no_failure() -> None:
    if f"of transformers {transformers.__version__}," in PAGE:
        assert tuple(ROWS) == MODEL_TYPES
    for line in ROWS.values():
        checks = line.rsplit(" | ", 1)[1].removesuffix(" |")
        passed = checks == "all ok" or checks.startswith("not built: ")
        assert passed or all(re.match(r"\w+: (ok on|transformers:) ", part) for part in checks.split("; ")), line


ROUTER_LOGITS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="in older transformers a plain head gives the same logits here",
)


def _proof_is(overlay: type[Overlay], config: Any) -> tuple[type[Overlay], Callable[[Any], Any]]:
    return overlay, lambda module: config


@pytest.mark.parametrize(
    ("model_type", "kind", "proof", "failing"),
    [
        ("mixtral", "head", _proof_is(HeadOverlay, HeadConfig()), "logits"),
        ("vaultgemma", "head", _proof_is(HeadOverlay, HeadConfig()), "logits"),
        pytest.param("deepseek_v3", "head", _proof_is(HeadOverlay, HeadConfig()), "logits", marks=ROUTER_LOGITS),
        ("seed_oss", "mlp", _proof_is(MLPOverlay, MLPConfig("silu")), "loss"),
        ("olmo2", "norm", _proof_is(NormOverlay, NormConfig(1e-5, "rms", True, False)), "logits"),
    ],
)
def test_a_wrong_proof_fails_the_comparison(
    model_type: str, kind: str, proof: Any, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(probe.PROVERS, kind, proof)  # no argument lets anybody choose a wrong proof
    result = check_type(model_type, tmp_path)
    assert result.checks["load"] == "ok" and failing in result.failures, result.checks


def test_a_near_activation_fails_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An overlay with another activation in its config would run the stock forward, so the op itself must be wrong.
    monkeypatch.setattr("hasten.overlays.mlp.glu", lambda gate, up, activation: glu(gate, up, "gelu"))
    assert "logits" in check_type("vaultgemma", tmp_path).failures
