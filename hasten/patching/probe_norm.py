"""Finds the `NormConfig` that reproduces a norm of a model type without a data file, or says why none does."""

from itertools import product
from typing import Any

import torch
from torch import nn

from hasten.ops import NormConfig, norm
from hasten.patching.forward_names import read_forward
from hasten.patching.trial import Refused, random, stand_in

ATTRIBUTES = frozenset({"weight", "variance_epsilon", "eps", "bias", "normalized_shape"})
OPERATIONS = frozenset(
    {"torch", "nn", "functional", "F", "float32", "float", "dtype", "to", "type_as"}
    | {"pow", "square", "mean", "var", "sqrt", "rsqrt", "layer_norm", "rms_norm"}
)
SCALES = (1e-4, 1e-2, 1.0, 30.0, 1e4)
"""Of the input: from where epsilon dominates to near fp16's largest number."""

PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
)
"""(dtype of the input, of the weight)."""

LIMIT, GRADIENT_LIMIT = 8 * torch.finfo(torch.float32).eps, 1e-5


def prove_norm(module: nn.Module) -> NormConfig:
    """The config with which `ops.norm` computes what the module's class computes, in fp32 and 16-bit. Raises Refused."""
    eps = _check(module)
    width = next(module.parameters()).shape[0]
    weight = random(width, seed=1)
    fitting = [NormConfig(eps, *v) for v in product(("rms", "layer"), (False, True), (False, True))]
    for x_dtype, weight_dtype in PAIRS:
        weights = weight.to(weight_dtype)
        trials = [(x, _outputs(module, x, weights)) for x in _inputs(width, x_dtype)]
        fitting = [rule for rule in fitting if all(_fits(x, weights, rule, theirs) for x, theirs in trials)]
        if not fitting:
            raise Refused(
                f"its outputs match no norm that hasten has ({_short(x_dtype)}, weight {_short(weight_dtype)})"
            )
    x = random(4, width, seed=2) * 3 + 1
    theirs = _gradients(lambda x, w: stand_in(module, {"weight": w}, {})(x), x, weight)
    for one, other in zip(_gradients(lambda x, w: norm(x, w, fitting[0]), x, weight), theirs, strict=True):
        if not float((one - other).norm()) <= GRADIENT_LIMIT * float(other.norm()):
            raise Refused("its gradients match no norm that hasten has")
    return fitting[0]


def _check(module: nn.Module) -> float:
    """The epsilon of a module that may be a norm. Raises Refused."""
    tensors = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor is not None]
    if tensors != ["weight"] or next(module.parameters()).dim() != 1:
        raise Refused("not a norm over one axis with a weight alone")
    names = read_forward(module)
    if isinstance(names, str):
        raise Refused(names)
    if len(names.parameters) != 1:
        raise Refused(f"its forward takes {', '.join(names.parameters)}; a norm takes one tensor")
    if reason := names.unknown(ATTRIBUTES, OPERATIONS):
        raise Refused(reason)
    shape: Any = getattr(module, "normalized_shape", None)
    if shape is not None and tuple(shape) != tuple(next(module.parameters()).shape):
        raise Refused(f"it normalises over {tuple(shape)}, not over its weight's axis")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float | int):
        raise Refused(f"its epsilon is {eps!r}, not a number")
    return float(eps)


def _inputs(width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Zeros, and random tensors of every scale, centred and not, of the shapes that hidden states and heads have."""
    scaled = [(random(2, 2, width, seed=seed) + seed % 2) * scale for seed, scale in enumerate(SCALES)]
    return [torch.zeros(1, width).to(dtype), random(1, 2, 2, width).to(dtype), *(x.to(dtype) for x in scaled)]


def _outputs(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    made = stand_in(module, {"weight": weight}, {})
    with torch.no_grad():
        return [made.train(training)(x) for training in (True, False)]


def _fits(x: torch.Tensor, weight: torch.Tensor, rule: NormConfig, theirs: list[torch.Tensor]) -> bool:
    """Equal bits where the result is 16-bit, so that the order of casts shows; a few roundings of each row in fp32."""
    with torch.no_grad():
        ours = norm(x, weight, rule)
    for other in theirs:
        if not isinstance(other, torch.Tensor) or (ours.shape, ours.dtype) != (other.shape, other.dtype):
            return False
        largest = other.abs().amax(-1, keepdim=True)
        close = bool(((ours - other).abs() <= LIMIT * largest).all())
        if not (close if ours.dtype == torch.float32 else torch.equal(ours, other)):
            return False
    return True


def _gradients(forward: Any, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Of x and of the weight, for a random upstream gradient."""
    leaves = [x.clone().requires_grad_(), nn.Parameter(weight.clone())]
    with torch.enable_grad():
        out = forward(*leaves)
        return list(torch.autograd.grad(out, leaves, random(*out.shape, seed=3)))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
