"""Implements AdamW for full fine-tuning in bf16 without losing small updates: six bytes per weight, moments included;
fp32 takes twelve.

transformers' own optimizer names (`optim="paged_adamw_8bit"`, ...) work without this file.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from hasten.ops.adamw import AdamWConfig, adamw_, key_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

MOMENTS = ("exp_avg", "exp_avg_sq")
STOCHASTIC = "adamw_bf16_stochastic"
"""The value of a job file's `train.optim` that selects `stochastic_adamw`."""
REQUIRED_PACKAGES = {
    "adamw_8bit": "bitsandbytes",
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_adamw_32bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}
"""transformers' optimizer name -> the package it needs, which transformers itself only looks for when training
starts."""


def optimizer_problems(name: Any) -> list[str]:
    """Returns the problems of an `optim` for SFTConfig: a name that only job files know, or a package that is not
    installed."""
    name = getattr(name, "value", name)
    if name == STOCHASTIC:
        return [
            f"optim={STOCHASTIC!r} is only for job files; pass it to a trainer as "
            "SFTTrainer(..., args=args, optimizer_cls_and_kwargs=hasten.stochastic_adamw(args))"
        ]
    package = REQUIRED_PACKAGES.get(name)
    if package is None or importlib.util.find_spec(package) is not None:
        return []
    extra = "hasten[train]" if package == "bitsandbytes" else package
    return [f"optim={name!r} needs {package}, which is not installed: pip install '{extra}'"]


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) computed in fp32, with stochastic rounding of bf16 weights
    (`ops.adamw`).

    An update smaller than half a bf16 step would be rounded away; stochastic rounding applies it in expectation.

    params: fp32 or bf16 tensors, contiguous; fp32 ones are updated as by torch.optim.AdamW. lr, betas, eps,
    weight_decay: as AdamW's. moments: dtype of both Adam moments, torch.bfloat16 (rounded stochastically too) or
    torch.float32. seed: of the random bits; None draws one from torch's generator. The bits depend only on the seed,
    the step and the position of a weight, so a resumed run, and every rank of a data-parallel run, round equally.

    Raises ValueError for parameters or moments of another dtype, and for negative or out-of-range hyperparameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        moments: torch.dtype = torch.bfloat16,
        seed: int | None = None,
    ) -> None:
        if moments not in (torch.bfloat16, torch.float32):
            raise ValueError(f"moments must be torch.bfloat16 or torch.float32; got {moments}")
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr, eps and weight_decay must not be negative and betas must be in [0, 1); got lr={lr}, eps={eps}, "
                f"weight_decay={weight_decay}, betas={betas}"
            )
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        self.moments = moments
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch.optim.Optimizer does. Raises ValueError for parameters that are neither fp32 nor
        bf16."""
        super().add_param_group(param_group)
        other = {p.dtype for p in self.param_groups[-1]["params"]} - {torch.bfloat16, torch.float32}
        if other:
            self.param_groups.pop()
            raise ValueError(f"StochasticAdamW trains bf16 and fp32 weights; found {sorted(map(str, other))}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # another optimizer's state has no seed
            group.setdefault("seed", self.defaults["seed"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient. closure: recomputes the loss; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group, number)
        return loss

    def _step(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], number: int) -> None:
        """Updates one parameter. number: its index over all groups, which selects its random bits."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=self.moments, memory_format=torch.contiguous_format)
        state["step"] += 1
        step = int(state["step"])
        beta1, beta2 = group["betas"]
        config = AdamWConfig(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step)
        key = key_of(group["seed"], step, number)
        adamw_(parameter, grad, (state["exp_avg"], state["exp_avg_sq"]), config, key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of StochasticAdamW or torch.optim.AdamW. torch would cast it to the weights' dtype; here
        moments keep the dtype `self.moments`."""
        super().load_state_dict(state_dict)
        parameters: Iterable[torch.Tensor] = itertools.chain(*(group["params"] for group in self.param_groups))
        numbers = itertools.chain(*(group["params"] for group in state_dict["param_groups"]))
        for number, parameter in zip(numbers, parameters, strict=True):
            for name in MOMENTS:
                if name in (saved := state_dict["state"].get(number, {})):
                    self.state[parameter][name] = saved[name].to(parameter.device, self.moments, copy=True)


def stochastic_adamw(
    args: "TrainingArguments", moments: torch.dtype = torch.bfloat16
) -> tuple[type[StochasticAdamW], dict[str, Any]]:
    """Returns a trainer's `optimizer_cls_and_kwargs`: StochasticAdamW with the learning rate, betas, epsilon and seed
    of `args`.

    args: the trainer's arguments (their `weight_decay` applies through the trainer's parameter groups). moments: dtype
    of both moments, see StochasticAdamW.
    """
    return StochasticAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "moments": moments,
        "seed": args.seed,
    }
