"""transformers' common model tests for the ten families, with a tiny config of each. `tests` is transformers' folder.

transformers' own testers of each model and its generation tests are not part of its source package: `Tester` and
`GenerationTests` stand in for them.
"""

import copy
import importlib
import unittest
from typing import Any, ClassVar

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers import AutoConfig, AutoModel, set_seed
from transformers.generation import GenerationMixin

from hasten.families import FAMILIES
from hasten.families.schema import Family
from hasten.overlays.cache_name import CACHE

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


class Tester:
    """What the common tests ask of a model's tester: sizes, a config and inputs."""

    batch_size, seq_length, is_training = 13, 7, True

    def __init__(self, family: Family) -> None:
        module: Any = importlib.import_module(family.classes.module)
        self.model_type = family.model_type
        self.causal_lm_class = getattr(module, family.classes.causal_lm)
        self.__dict__.update(SIZES)
        self.base_model_class = type(AutoModel.from_config(self.get_config()))

    def get_config(self) -> Any:
        """A config with one full and one sliding layer where the family has both."""
        config = AutoConfig.for_model(self.model_type, **SIZES)
        if getattr(config, "layer_types", None) and "sliding_attention" in config.layer_types:
            config.layer_types = ["full_attention", "sliding_attention"]
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Config, ids (13, 7) and a mask with padding on the right."""
        ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"])
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class GenerationTests(GenerationTesterMixin):
    """Generation agrees with itself: by cache, beams, drafts, padding and continuation."""

    model_tester: Tester

    def _model(self, **changes: Any) -> tuple[Any, torch.Tensor]:
        set_seed(0)
        config = self.model_tester.get_config()
        config.initializer_range = 0.3  # with the default of 0.02 tokens do not depend on attention
        for name, value in changes.items():
            setattr(config, name, value)
        return self.model_tester.causal_lm_class(config).eval(), torch.randint(5, 95, (2, 9))

    def test_generate_without_cache(self) -> None:
        model, ids = self._model()
        assert torch.equal(model.generate(ids, **NEW), model.generate(ids, use_cache=False, **NEW))

    def test_generate_is_the_forward(self) -> None:
        model, ids = self._model()
        for _ in range(5):
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
            logits[:, 2] = -torch.inf
            ids = torch.cat((ids, logits.argmax(-1)[:, None]), dim=1)
        assert torch.equal(model.generate(ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]), **NEW), ids)

    def test_generate_records(self) -> None:
        model, ids = self._model(_attn_implementation="eager")
        wanted = ("scores", "logits", "attentions", "hidden_states")
        found = model.generate(ids, return_dict_in_generate=True, **{f"output_{name}": True for name in wanted}, **NEW)
        assert all(len(found[name]) == 5 for name in wanted)
        assert found.hidden_states[0][0].shape == (2, 9, 32) and found.attentions[0][0].shape == (2, 4, 9, 9)
        assert found[CACHE].get_seq_length() == 13

    def test_generate_continues(self) -> None:
        model, ids = self._model()
        whole = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        first = model.generate(ids, return_dict_in_generate=True, **{**NEW, "max_new_tokens": 4, "min_new_tokens": 4})
        second = model.generate(
            first.sequences,
            attention_mask=torch.ones_like(first.sequences),  # a new token may be the pad token
            **{CACHE: first[CACHE]},
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(second, whole)

    def test_generate_left_padded(self) -> None:
        model, ids = self._model()
        padded = torch.nn.functional.pad(ids, (4, 0))
        mask = (padded != 0).long()
        found = model.generate(padded, attention_mask=mask, **NEW)
        assert torch.equal(found[:, 4:], model.generate(ids, attention_mask=torch.ones_like(ids), **NEW))

    def test_generate_from_embeddings(self) -> None:
        model, ids = self._model()
        found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **NEW)
        assert torch.equal(found, model.generate(ids, **NEW)[:, 9:])

    def test_generate_beams_and_samples(self) -> None:
        model, ids = self._model()
        beams = model.generate(ids, num_beams=3, num_return_sequences=2, **NEW)
        assert beams.shape == (4, 14)
        for options in ({"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7}, {"num_beams": 2}):
            drawn = [(set_seed(3), model.generate(ids, **{**NEW, "do_sample": True}, **options))[1] for _ in range(2)]
            assert torch.equal(*drawn)

    def test_generate_with_drafts(self) -> None:
        model, ids = self._model()
        expected = model.generate(ids[:1], **NEW)
        assert torch.equal(model.generate(ids[:1], assistant_model=copy.deepcopy(model), **NEW), expected)
        assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=3, **NEW), expected)

    def test_generate_with_other_caches(self) -> None:
        model, ids = self._model()
        expected = model.generate(ids, **NEW)
        for kind in ("static", "offloaded") if torch.cuda.is_available() else ("static",):
            found = model.generate(ids, cache_implementation=kind, disable_compile=True, **NEW)
            assert torch.equal(found, expected)

    def test_generate_prefills_in_chunks(self) -> None:
        model, ids = self._model()
        assert torch.equal(model.generate(ids, prefill_chunk_size=4, **NEW), model.generate(ids, **NEW))


def _case(family: Family) -> type[unittest.TestCase]:
    tester = Tester(family)

    class FamilyTest(GenerationTests, ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
        model_tester: ClassVar[Any] = tester
        all_model_classes = (tester.base_model_class, tester.causal_lm_class)

    FamilyTest.__name__ = FamilyTest.__qualname__ = f"{tester.causal_lm_class.__name__}Test"
    assert issubclass(tester.causal_lm_class, GenerationMixin)
    return FamilyTest


for _family in FAMILIES.values():
    _made = _case(_family)
    vars()[f"Test_{_family.model_type}"] = _made
del _made, _family
