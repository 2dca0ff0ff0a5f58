"""Speaks the protocol of `benchmarks.harness.serve`. Told by one JSON argument:

loss, drift (added per step), seconds a step, peak; die_at: exits at this command; fail_at: answers it with an error;
silent: never answers; log: a file to which it writes when it begins and ends a turn.
"""

import itertools
import json
import sys
import time

told = json.loads(sys.argv[1])
step = itertools.count()


def losses(count: int) -> list[float]:
    return [told.get("loss", 5.0) + told.get("drift", 0.0) * next(step) for _ in range(count)]


def note(word: str) -> None:
    if "log" in told:
        with open(told["log"], "a") as file:
            file.write(f"{told['name']} {word}\n")


print("a library's banner", file=sys.stderr)
if told.get("silent"):
    time.sleep(60)
print(json.dumps({"import_s": 0.5, "load_s": 1.5}), flush=True)
for turn, line in enumerate(sys.stdin):
    command = json.loads(line)
    what = command["do"]
    if what == told.get("die_at"):
        print("segmentation fault, say", file=sys.stderr)
        sys.exit(7)
    if what == told.get("fail_at"):
        print(json.dumps({"error": "OutOfMemoryError: 80 GiB asked for"}), flush=True)
        sys.exit(1)
    note(what)
    if what == "warm":
        answer = {"first_s": 2.5, "losses": losses(command["steps"])}
    else:
        count = command["untimed"] + command["steps"]
        answer = {
            "losses": losses(count),
            "seconds": [told.get("seconds", 0.1)] * command["steps"],
            "peak_gib": told.get("peak", 3.0) + turn,
            "reserved_gib": 4.0,
        }
    print(json.dumps(answer), flush=True)
