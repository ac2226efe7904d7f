"""Stands for ``train.py`` where only what comes after a run is tested.

Leaves the files that a run leaves; as told by ``FAKE`` in its environment it waits,
fails once, fails always, refuses its config, or is interrupted.
"""

import json
import os
import pathlib
import runpy
import sys
import time

flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
home = pathlib.Path(flags["workdir"])
config = runpy.run_path(flags["config"])["get_config"]().to_dict()
with (home / "starts.txt").open("a") as file:
    file.write("started\n")
told = os.environ.get("FAKE", "")
wide = config["model"]["width"] == 32
if told == "refuse" and wide:
    sys.stderr.write("error: config.model: not today\n")
    sys.exit(2)
if told == "fail" and wide:
    sys.exit("out of luck")
if told == "fail once" and len((home / "starts.txt").read_text().split()) == 1:
    sys.exit("out of luck")
if told == "interrupted":
    sys.exit(130)
(home / "pid.part").write_text(str(os.getpid()))
(home / "pid.part").rename(home / "pid.txt")
time.sleep({"wait": 60, "wait a little": 4}.get(told, 0))

steps, width = config["train"]["steps"], config["model"]["width"]
rows = config["data"]["batch_size"] * config["data"]["seq_len"]
loss = 1 + 50 / width + 1000 / (steps * rows)
masked = config.get("masked")
lines = []
for step in (steps // 2, steps):
    line = {"step": step, "tokens": step * rows, "eval/loss": loss + (step < steps)}
    if masked:  # one matrix, in one half of the run
        opens = masked.get("dense_from") is not None
        density = masked["density"] if (step < steps) == opens else 1.0
        line["masked/density"] = density
        line["masked/density/stacks/0/blocks/0/ffn/up"] = [density]
    if config["model"]["ffn"]["kind"] == "moe":
        line |= {"moe/load_violation": [0.5, 1.5], "moe/dropped": [0.0, 0.0]}
    lines.append(json.dumps(line) + "\n")
(home / "metrics.jsonl").write_text("".join(lines))
card = {
    "fingerprint": home.name,
    "versions": {"python": "3.x", "jax": "0.x"},
    "device": {"kind": "fake", "count": 2},
}
(home / "config.json").write_text(json.dumps(card))
total = 1000 * width
nonzero = total - (800 * width * (1 - masked["density"]) if masked else 0)
summary = {
    "eval/loss": loss,
    "eval/bits_per_byte": loss / 0.69,
    "seconds": 1.0,
    "parameters_total": total,
    "parameters_active": total,
    "parameters_nonzero": nonzero,
    "useful_flops_per_token": 6 * nonzero,
    "attention_density": 1.0,
}
(home / "summary.json").write_text(json.dumps(summary))
