"""Importing hasten: silent, light, offline, and without side effects on anything else in the process."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str, silent: bool = False) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    if silent:  # what other libraries log once they are used is not ours to silence
        assert done.stderr == ""
    return done.stdout.strip()


def test_import_is_silent_light_and_offline() -> None:
    out = run(
        """
        import os, socket, sys, time
        def refuse(*args): raise AssertionError("a socket was opened")
        socket.socket.connect = refuse
        import transformers
        environment, start = dict(os.environ), time.perf_counter()
        import hasten
        dir(hasten)
        assert time.perf_counter() - start < 0.5
        assert dict(os.environ) == environment
        heavy = {"triton", "bitsandbytes", "trl", "vllm", "peft", "matplotlib", "datasets", "torchao"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """,
        silent=True,
    )
    assert out == ""


@pytest.mark.full  # test_r27 blocks all of them at once
@pytest.mark.parametrize("blocked", ["triton", "bitsandbytes", "trl", "datasets", "matplotlib", "vllm", "torchao"])
def test_a_model_runs_without_each_optional_package(blocked: str) -> None:
    out = run(
        f"""
        import sys, warnings
        warnings.simplefilter("ignore")
        import transformers
        transformers.logging.set_verbosity_error()
        sys.modules["{blocked}"] = None
        from hasten.testing import check_family
        from hasten.families import FAMILIES
        from hasten import FastLanguageModel
        print(len(check_family(FAMILIES["llama"]).rows) > 50)
        """
    )
    assert out == "True"


def test_transformers_peft_torch_and_trl_are_the_same_objects_after_import() -> None:
    out = run(
        """
        import warnings
        warnings.simplefilter("ignore")
        import torch, transformers, peft, trl
        transformers.logging.set_verbosity_error()
        from transformers import LlamaForCausalLM, Trainer, GenerationMixin
        from trl import SFTTrainer
        from peft import PeftModel
        def members(*owners):
            return {(o.__name__, n): id(v) for o in owners for n, v in vars(o).items()}
        owners = (LlamaForCausalLM, Trainer, GenerationMixin, SFTTrainer, PeftModel, torch.nn.Module, torch.utils.checkpoint)
        before = members(*owners)
        import hasten
        from hasten import FastLanguageModel, report, restore, patched
        import hasten.testing, hasten.export, hasten.training
        assert members(*owners) == before
        print("same")
        """
    )
    assert out == "same"


def test_unknown_names_say_so() -> None:
    import hasten

    with pytest.raises(AttributeError, match="no attribute 'FastSomethingModel'"):
        _ = hasten.FastSomethingModel
    for name in hasten.__all__:
        assert getattr(hasten, name) is not None
