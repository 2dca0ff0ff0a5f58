"""Matches the names in LoRA's options with the modules of a model, by PEFT's own rules; a name without an effect is a
problem."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hasten.suggest import did_you_mean

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Matching:
    """model: without an adapter. config: PEFT's LoraConfig, of which `targeted` reads the fields about modules.
    converted: names that PEFT replaces by parameters, for models whose layers transformers has fused. asked: the config
    before that."""

    model: Any
    config: Any
    modules: Mapping[str, nn.Module]
    converted: frozenset[str]
    asked: Any

    @classmethod
    def of(cls, model: Any, config: Any) -> "Matching":
        """Returns the matching, with "all-linear" replaced by the names that it stands for. Raises ValueError for names
        that PEFT cannot convert."""
        modules = {name: module for name, module in model.named_modules() if name}
        asked, config = config, copy.deepcopy(config)
        before = frozenset() if isinstance(config.target_modules, str) else frozenset(config.target_modules or ())
        convert_peft_config_for_transformers(config, model=model, conversions=None)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            head = model.get_output_embeddings()
            linear = (name for name, one in modules.items() if isinstance(one, nn.Linear | Conv1D) and one is not head)
            config.target_modules = set(linear)
        left = frozenset() if isinstance(config.target_modules, str) else frozenset(config.target_modules or ())
        return cls(model, config, modules, before - left, asked)

    def targeted(self, **changes: Any) -> list[str]:
        """Returns the modules that get a LoRA if the config's fields have the values in `changes`."""
        config = copy.copy(self.config)
        for name, value in changes.items():
            setattr(config, name, value)
        if not config.target_modules:
            return []
        return [name for name in self.modules if check_target_module_exists(config, name)]

    def named(self, name: str) -> list[str]:
        """Returns the modules with this full name or, at a dot, this ending."""
        return [path for path in self.modules if path == name or path.endswith(f".{name}")]

    def orientations(self) -> set[bool]:
        """Returns the values of `fan_in_fan_out` that fit the targeted layers: True for Conv1D, False for others."""
        return {isinstance(self.modules[name], Conv1D) for name in self.targeted()}

    def endings(self, paths: Iterable[str]) -> list[str]:
        return sorted({path.rsplit(".", 1)[-1] for path in paths})


def problems(matching: Matching, targets: tuple[str, ...] | str, saved: Iterable[str]) -> list[str]:
    """Returns a problem, with similar names, for each name of the options that matches nothing or has no effect.

    targets: `target_modules` as PEFT will get it. saved: `modules_to_save` likewise.
    """
    found = _of_targets(matching, targets)
    for check in (_of_exclusions, _of_layers, _of_patterns, _of_parameters, _of_bias, _of_orientation, _of_needs):
        found += check(matching)
    saved = list(saved)
    return found + _of_tokens(matching, saved) + _of_saved(matching, saved)


def broken_patterns(config: Any) -> list[str]:
    """Returns a problem for each regular expression of PEFT's config that cannot be compiled."""
    layers = config.layers_pattern
    single = [config.target_modules, config.exclude_modules, layers]
    patterns = [one for one in single if isinstance(one, str)] + [*config.rank_pattern, *config.alpha_pattern]
    found = []
    for pattern in patterns + ([] if layers is None or isinstance(layers, str) else list(layers)):
        try:
            re.compile(pattern)
        except re.error as error:
            found.append(f"{pattern!r} is not a regular expression: {error}")
    return found


def _of_targets(matching: Matching, targets: tuple[str, ...] | str) -> list[str]:
    free = {"exclude_modules": None, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None}
    found = []
    for name in [targets] if isinstance(targets, str) else targets:
        if name in matching.converted:
            continue
        entry = matching.config.target_modules if isinstance(targets, str) else {name}
        alone = matching.targeted(target_modules=entry, **free)
        asked = f"target_modules {name!r}" if entry == {name} else f"target_modules={name!r}"
        if not alone and isinstance(entry, str):
            found.append(f"{asked} matches no module as a regular expression")
        elif not alone:
            adaptable = [path for path, module in matching.modules.items() if is_adaptable(module)]
            found.append(f"{asked} matches no module of this model{_similar(name, matching.endings(adaptable))}")
        elif not any(is_adaptable(matching.modules[path]) for path in alone):
            adaptable = [path for path, module in matching.modules.items() if is_adaptable(module)]
            kind = type(matching.modules[alone[0]]).__name__
            hint = _similar(name, matching.endings(adaptable))
            found.append(f"{asked} is not a Linear layer or embedding of this model, but {kind}{hint}")
        elif not matching.targeted(target_modules=entry):
            found.append(
                f"{asked} matches only modules that exclude_modules, modules_to_save or layers_to_transform leave out"
            )
    return found


def _of_exclusions(matching: Matching) -> list[str]:
    excluded = matching.config.exclude_modules
    if not excluded:
        return []
    without = matching.targeted(exclude_modules=None)
    found = []
    for name in [excluded] if isinstance(excluded, str) else sorted(excluded):
        entry = name if isinstance(excluded, str) else {name}
        if len(matching.targeted(exclude_modules=entry)) == len(without):
            hint = did_you_mean(name, matching.endings(without))
            found.append(f"exclude_modules {name!r} excludes none of the modules that target_modules matches{hint}")
    return found


def _of_layers(matching: Matching) -> list[str]:
    config = matching.config
    if config.layers_to_transform is None or isinstance(config.target_modules, str):
        return []
    exact = set(matching.modules) & set(config.target_modules)  # PEFT adapts a full name in whatever layer
    numbers = config.layers_to_transform
    found = []
    for number in [numbers] if isinstance(numbers, int) else numbers:
        if not set(matching.targeted(layers_to_transform=[number])) - exact:
            last = getattr(matching.model.config.get_text_config(), "num_hidden_layers", None)
            has = "" if last is None else f"; the model has layers 0 to {last - 1}"
            found.append(f"layers_to_transform {number}: no module that target_modules matches is in that layer{has}")
    patterns = config.layers_pattern or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not set(matching.targeted(layers_pattern=[pattern])) - exact:
            lists = matching.endings(p for p, m in matching.modules.items() if isinstance(m, nn.ModuleList))
            found.append(f"layers_pattern {pattern!r} matches no list of layers{_similar(pattern, lists)}")
    return found


def _of_patterns(matching: Matching) -> list[str]:
    """PEFT takes the first key of a pattern that matches, so that a later one may have no effect."""
    config = matching.config
    paths = [*matching.targeted(), *_parameters(matching)]
    found = []
    for field in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, field))
        given = getattr(matching.asked, field)
        first = {next((key for key in keys if _pattern_matches(key, path)), None) for path in paths}
        for key in keys:
            if key in first or key not in given:
                continue
            covered = any(_pattern_matches(key, path) for path in paths)
            hint = did_you_mean(key, matching.endings(paths))
            why = "matches only what an earlier key matches" if covered else f"matches no module with a LoRA{hint}"
            found.append(f"{field} {key!r} {why}")
    return found


def _pattern_matches(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _parameters(matching: Matching) -> list[str]:
    """Returns the full names of the parameters that `target_parameters` matches."""
    names = matching.config.target_parameters or []
    paths = [path for path, _ in matching.model.named_parameters()]
    return [path for path in paths if any(path == name or path.endswith(f".{name}") for name in names)]


def _of_parameters(matching: Matching) -> list[str]:
    matched = _parameters(matching)
    found = []
    for name in matching.asked.target_parameters or []:  # PEFT may add names that only some models have
        if not any(path == name or path.endswith(f".{name}") for path in matched):
            tails = sorted({".".join(p.split(".")[-2:]) for p, _ in matching.model.named_parameters()})
            found.append(f"target_parameters {name!r} matches no parameter of this model{_similar(name, tails)}")
    weights = dict(matching.model.named_parameters())
    for path in matched:
        if not weights[path].is_floating_point() or weights[path].dim() not in (2, 3):
            shape = f"{list(weights[path].shape)} {str(weights[path].dtype).removeprefix('torch.')}"
            found.append(f"target_parameters: {path} is {shape}, and LoRA needs a dense matrix or a stack of them")
    return found


def _of_tokens(matching: Matching, saved: list[str]) -> list[str]:
    asked, embedding = matching.config.trainable_token_indices, matching.model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    own = next(path for path, module in matching.modules.items() if module is embedding)
    by_module = asked if isinstance(asked, Mapping) else {} if asked is None else {own: asked}
    taken = {*matching.targeted(), *(path for name in saved for path in matching.named(name))}
    found = _outside("alora_invocation_tokens", matching.config.alora_invocation_tokens or [], rows)
    for name, ids in by_module.items():
        found += _outside("trainable_token_indices", ids, rows)
        paths = matching.named(name)
        if not paths:
            tails = [path for path, module in matching.modules.items() if isinstance(module, nn.Embedding)]
            found.append(f"trainable_token_indices {name!r} matches no module{_similar(name, matching.endings(tails))}")
        if both := sorted(taken.intersection(paths)):
            found.append(
                f"trainable_token_indices: {both[0]} gets a LoRA or is trained fully already; drop one of them"
            )
    return found


def _outside(field: str, ids: Iterable[int], rows: int) -> list[str]:
    outside = [one for one in ids if one >= rows]
    return [f"{field} {outside}: the model has token ids 0 to {rows - 1}"] if outside else []


def _of_bias(matching: Matching) -> list[str]:
    asked = matching.config.bias
    if asked == "none":
        return []
    among = matching.targeted() if asked == "lora_only" else list(matching.modules)
    if any(getattr(matching.modules[name], "bias", None) is not None for name in among):
        return []
    where = "no layer with a LoRA" if asked == "lora_only" else "no layer of this model"
    return [f"bias={asked!r} would train nothing: {where} has a bias; leave it out"]


def _of_orientation(matching: Matching) -> list[str]:
    """Returns a problem if `fan_in_fan_out` was given and contradicts every layer (PEFT would set it back)."""
    asked = bool(matching.config.fan_in_fan_out)
    if matching.orientations() != {not asked}:
        return []
    stored = "(out, in), as Linear" if asked else "(in, out), as Conv1D"
    return [f"fan_in_fan_out={asked}: the weights of the targeted layers are {stored} stores them; leave it out"]


def _of_needs(matching: Matching) -> list[str]:
    """Returns a problem for options that PEFT drops in silence where a targeted layer lacks what they need."""
    layers = [matching.modules[name] for name in matching.targeted()]
    found = []
    if matching.config.init_lora_weights == "lora_ga" and not all(hasattr(one, "_peft_loraga_grad") for one in layers):
        found.append("init_lora_weights='lora_ga' needs gradients; call PEFT's preprocess_loraga() on the model first")
    if matching.config.use_qalora and not all(hasattr(one, "qweight") for one in layers):
        found.append("use_qalora=True has an effect only on layers that GPTQ has quantised; leave it out")
    return found


def _of_saved(matching: Matching, saved: Iterable[str]) -> list[str]:
    found = []
    for name in saved:
        paths = matching.named(name)
        if not paths:
            hint = _similar(name, matching.endings(matching.modules))
            found.append(f"modules_to_save {name!r} matches no module of this model{hint}")
        elif not any(True for path in paths for _ in matching.modules[path].parameters()):
            found.append(f"modules_to_save {name!r} has no weights to train; leave it out")
    return found


def exact_names(matching: Matching, saved: Iterable[str]) -> list[str]:
    """Returns `modules_to_save` such that PEFT trains the named modules only.

    PEFT compares endings without the dot: "norm" would also be input_layernorm. Full names are used in that case.
    """
    names: list[str] = []
    for name in saved:
        named = matching.named(name)
        loose = [path for path in matching.modules if path.endswith(name)]
        names += [name] if len(loose) == len(named) else named
    return names


def is_adaptable(module: nn.Module) -> bool:
    """Returns whether PEFT makes a LoRA for this kind of layer, a quantised Linear of any library included."""
    return isinstance(module, ADAPTABLE) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def _similar(name: str, known: list[str]) -> str:
    return did_you_mean(name, known) or f"; it has {', '.join(known[:8])}"
