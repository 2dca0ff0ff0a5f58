"""Reports what runs in each module of a model, and why: which overlay, which attention, which fused op, or stock."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from hasten.errors import PatchError
from hasten.ops.attention import CUDNN_LENGTH_MULTIPLE
from hasten.ops.backend import backend_for
from hasten.overlays import AttentionOverlay, BackboneOverlay, HeadOverlay, MLPOverlay, Overlay, StockHeadOverlay
from hasten.state import ModelState, causal_lm_of, find_state
from hasten.weights import is_packed, label_of, read_head, read_linear, read_lora

STOCK, UNFUSED = "stock", "PEFT's LoRA, unfused"
OWN_MODULE, OWN_HEAD = "its own module", "chunked loss through the head's own forward"
SLOW = (STOCK, UNFUSED, OWN_MODULE, OWN_HEAD)
"""What runs where hasten has a faster way that this module does not take."""


@dataclass(frozen=True)
class Row:
    """One line of the report: `count` modules of one class in which the same thing runs for the same reason."""

    module: str
    count: int
    runs: str
    why: str

    @property
    def is_slow(self) -> bool:
        """Whether hasten has a faster way for such a module, which `why` says that it does not take."""
        return self.runs in SLOW


@dataclass(frozen=True)
class Report:
    """rows: what runs where. notes: lines about the whole model. `str(report)` is a plain-text table."""

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [("module", "count", "runs", "why"), *((r.module, str(r.count), r.runs, r.why) for r in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, "", *lines, *(f"* {note}" for note in self.notes)])


def report(model: nn.Module, strict: bool = False) -> Report:
    """Describes the model in its present state: adapters added and overlays taken off since loading are seen.

    The notes of loading and `get_peft_model` (in the model's state) follow the table. strict: raises PatchError, naming modules and
    reasons, where a row is slow (`Row.is_slow`).
    """
    base = causal_lm_of(model)
    counted: Counter[tuple[str, str, str]] = Counter()
    state = find_state(base) or ModelState()
    planned = state.plan
    why = {a.name: a.why for a in planned.actions} if planned else {}
    skipped = {s.name: s.reason for s in planned.skips} if planned else {}
    fused = _fused_projections(base)
    wrapped: set[str] = set()
    for name, module in base.named_modules():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        row = fused.get(name) or _describe(name, module, base, why, skipped)
        if row is not None:
            counted[row] += 1
            if not isinstance(module, Overlay) and name not in skipped:
                wrapped.add(name)
    rows = tuple(Row(module, count, runs, reason) for (module, runs, reason), count in counted.items())
    slow = [f"{row.count} {row.module}: {row.runs}, since: {row.why}" for row in rows if row.is_slow]
    if strict and slow:
        lines = "".join(f"\n  - {line}" for line in slow)
        raise PatchError(f"not every module runs fused ({len(slow)} kinds):{lines}")
    overlaid = any(isinstance(m, Overlay) and not isinstance(m, StockHeadOverlay) for m in base.modules())
    kind = "hasten" if overlaid else "stock transformers"
    backend = backend_for(base.get_output_embeddings().weight)
    attention, _ = _attention(base)
    title = f"{type(base).__name__} ({base.config.model_type}): {kind}, {attention} attention, backend {backend}"
    notes = [note for topic in state.notes.values() for note in topic]
    if state.memory is not None:
        notes.append(f"memory: {state.memory}")
    return Report(title, rows, tuple(notes))


def _attention(base: Any) -> tuple[str, str]:
    """Returns (attention backend, why): hasten's own attention, or transformers' attention interface by the config's
    name."""
    name = getattr(base.config, "_attn_implementation", None)
    backbone = getattr(base, "model", None)
    if not isinstance(backbone, BackboneOverlay):
        return str(name), "the backbone has no overlay"
    if not backbone.uses_own_attention(base.get_output_embeddings().weight, {}):
        reason = (
            backbone.overlay_config.reason or "hasten's own attention runs only on a GPU, without attention dropout"
        )
        return str(name), f"through transformers: {reason}"
    layers = [m.overlay_config for m in base.modules() if isinstance(m, AttentionOverlay)]
    capped = [layer for layer in layers if layer.softcap is not None]
    windows = [layer for layer in layers if layer.window is not None]
    needs = ["packed and padded sequences, other lengths"]
    if windows:
        needs.insert(0, f"windows of {windows[0].window} in {len(windows)} of {len(layers)} layers")
    if len(capped) == len(layers):
        return "Triton", "softcap on scores, which torch's sdpa drops"
    plain = f"sdpa for plain causal sequences of a multiple of {CUDNN_LENGTH_MULTIPLE} tokens"
    return "torch sdpa and Triton", f"{plain}, Triton for {', '.join(needs)}; no dense mask"


GROUPS = {
    AttentionOverlay: (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    MLPOverlay: (("gate_proj", "up_proj", "down_proj"),),
}
"""Projections that one fused op computes together on a GPU (see `overlays.fused_linears`)."""


def _fused_projections(base: nn.Module) -> dict[str, tuple[str, str, str]]:
    """Returns {path: line} of each projection that a fused op computes, or would compute but for a sibling."""
    rows: dict[str, tuple[str, str, str]] = {}
    if backend_for(base.get_output_embeddings().weight) != "triton":  # pyright: ignore[reportCallIssue]
        return rows
    for path, module in base.named_modules():
        groups = next((names for overlay, names in GROUPS.items() if isinstance(module, overlay)), ())
        for group in groups:
            members = {name: getattr(module, name) for name in group}
            read = {name: read_linear(member, training=True) for name, member in members.items()}
            reasons = {name: one if isinstance(one, str) else None for name, one in read.items()}
            blocked = next(((name, reason) for name, reason in reasons.items() if reason is not None), None)
            packed_projections: tuple[str, ...] = module.packed_projections  # pyright: ignore[reportAssignmentType]
            unpacked = () if is_packed([getattr(module, name) for name in packed_projections]) else packed_projections
            for name, member in members.items():
                label = f"{name} ({label_of(member)})"
                if blocked is None:
                    pair, _ = read_lora(member, training=True)
                    why = "plain LoRA" if pair else "no adapter"
                    if name in unpacked:
                        why += "; weights are not packed, so copied for each matmul (patch on the final device)"
                    rows[f"{path}.{name}"] = (label, "fused LoRA op", why)
                elif reasons[name] is None:
                    rows[f"{path}.{name}"] = (label, OWN_MODULE, f"its sibling {blocked[0]}: {blocked[1]}")
    return rows


def _describe(
    name: str, module: nn.Module, base: nn.Module, why: dict[str, str], skipped: dict[str, str]
) -> tuple[str, str, str] | None:
    kind = type(module).__name__
    if isinstance(module, HeadOverlay):
        head = read_head(base.lm_head, training=True)
        reason, has_lora = (head, False) if isinstance(head, str) else (None, head.a is not None)
        runs = "fused chunked loss" if reason is None else OWN_HEAD
        return kind, runs, reason or (why.get(name, "") + (", LoRA on the head fused" if has_lora else ""))
    if isinstance(module, BackboneOverlay):
        attention, reason = _attention(base)
        return kind, f"attention by {attention}", reason
    if isinstance(module, StockHeadOverlay):
        return kind, STOCK, f"{skipped.get(name) or why.get(name, '')}; the loss materialises all logits"
    if isinstance(module, Overlay):
        return kind, f"{type(module).runs} overlay", why.get(name, "a copy of a patched module")
    if name in skipped:
        return kind, STOCK, skipped[name]
    is_linear = hasattr(module, "base_layer") or hasattr(module, "original_module") or isinstance(module, nn.Linear)
    if not is_linear:
        return None
    label = f"{name.rsplit('.', 1)[-1]} ({label_of(module)})"
    if hasattr(module, "original_module"):
        return label, "trained copy", "modules_to_save"
    pair, reason = read_lora(module, training=True)
    if reason is not None:
        return label, UNFUSED, reason
    return (label, "LoRA through PEFT's module", "plain LoRA") if pair else (label, "its own matmul", "no adapter")
