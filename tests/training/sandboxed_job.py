"""A whole job in a process that may open no socket and write nothing but under OUT: `python sandboxed_job.py BASE OUT`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

ALLOWED = Path(sys.argv[2]).resolve()
SOCKETS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"}
IPV6_PROBE = ("::1", 0)
"""urllib3 binds it once when it is imported, to see whether this machine has IPv6. Nothing is sent."""
WRITES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "shutil.copyfile": 1, "os.symlink": 1, "os.truncate": 0}
violations: list[str] = []


def allowed(path: Any) -> bool:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return True  # a descriptor: it was opened before
    full = Path(os.fsdecode(path)).absolute()
    return full.is_relative_to("/dev") or full.is_relative_to(ALLOWED)


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    refused = None
    if event == "socket.bind" and arguments[1] == IPV6_PROBE:
        return
    if event in SOCKETS:
        refused = f"{event} {arguments[1:]}"
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        refused = None if allowed(arguments[0]) else f"open {arguments[0]} {arguments[1]}"
    elif event == "open" and arguments[1] is None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        refused = None if allowed(arguments[0]) else f"os.open {arguments[0]}"
    elif event in WRITES:
        path = arguments[WRITES[event]]
        refused = None if allowed(path) else f"{event} {path}"
    if refused is not None:
        violations.append(refused)
        raise PermissionError(refused)


def main(base: str, out: Path) -> None:
    from training_kit import chats
    from trl import SFTTrainer

    from hasten.data import check_dataset
    from hasten.model import FastLanguageModel
    from hasten.training import sft_config

    model, tokenizer = FastLanguageModel.from_pretrained(base, max_seq_length=64, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    data = chats(8)
    arguments = sft_config(
        model,
        output_dir=str(out / "run"),
        max_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        assistant_only_loss=True,
        use_cpu=True,
        report_to="none",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=data, eval_dataset=chats(2, 1), processing_class=tokenizer
    )
    counts = check_dataset(data, trainer)
    trainer.train()
    FastLanguageModel.for_inference(model)
    prompt = tokenizer("hello", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    FastLanguageModel.for_training(model)
    model.save_pretrained(out / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record = {"losses": losses, "rows": counts.examples, "new": answer.shape[1] - prompt["input_ids"].shape[1]}
    (out / "record.json").write_text(json.dumps({**record, "violations": violations, "left": os.listdir(".")}))


if __name__ == "__main__":
    sys.addaudithook(watch)
    main(sys.argv[1], Path(sys.argv[2]))
