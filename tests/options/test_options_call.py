"""From a call to options: defaults told from explicit values, names suggested for mistyped ones."""

from hasten.options import none_if_left_out
from hasten.suggest import did_you_mean


def test_a_left_out_4bit_flag_is_told_from_an_explicit_one() -> None:
    @none_if_left_out("load_in_4bit")
    def load(name: str, load_in_4bit: bool = True, **kwargs: object) -> tuple[object, dict]:
        return load_in_4bit, kwargs

    assert load("x") == (None, {})
    assert load("x", True) == (True, {})
    assert load("x", load_in_4bit=False, more=1) == (False, {"more": 1})


def test_near_names_are_suggested_most_similar_first() -> None:
    assert did_you_mean("lora_alhpa", ["lora_alpha", "lora_dropout", "r"]) == " (did you mean lora_alpha?)"
    assert did_you_mean("ofload", [False, True, "offload", "offloaded"]) == " (did you mean offload or offloaded?)"
    assert did_you_mean("ofload", ["offload", "offloaded"], count=1) == " (did you mean offload?)"
    assert did_you_mean("xyz", ["offload"]) == ""
    assert did_you_mean("xyz", []) == ""
