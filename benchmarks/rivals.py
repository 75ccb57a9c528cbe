"""Other simulators on the same device, each a script of peers/ run by this Python where it has what it needs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from measure import markdown_table
from rounds import Load, Setting

PEERS = Path(__file__).parent / "peers"
RIVALS = {  # name: script with its flags, modules that it needs beside torch and numpy
    "bare loop": (("bare.py", "--steps_only"), ()),
    "pfl": (("pfl_simulation.py",), ("pfl",)),
    "pfl, compiled": (("pfl_simulation.py", "--compile"), ("pfl",)),
    "BlazeFL, threads": (("blazefl_simulation.py", "--parallel", "4"), ("blazefl",)),
    "BlazeFL, processes": (("blazefl_simulation.py", "--parallel", "4", "--processes"), ("blazefl",)),
    "JAX, vmapped": (("jax_vit.py",), ("jax",)),
}


def rival_table(setting: Setting, load: Load, device: torch.device, precision: str) -> str:
    """Images a second and seconds to the end of round 1; what is missing says so."""
    rows = []
    for name, (script, modules) in RIVALS.items():
        missing = [module for module in (*modules, "tyro", "psutil") if importlib.util.find_spec(module) is None]
        if missing:
            rows.append((name, f"needs {', '.join(missing)}", ""))
            continue
        rows.append((name, *measured(script, setting, load, device, precision)))
        print(*rows[-1], sep=" | ", flush=True)
    return markdown_table(("rival", "images/s", "first, s"), rows)


def measured(
    script: tuple[str, ...], setting: Setting, load: Load, device: torch.device, precision: str
) -> tuple[str, str]:
    """Run a script in a process of its own; what failed says so in its last line."""
    file, *flags = script
    options = {
        "model_size": setting.size,
        "image_size": setting.pixels,
        "patch_size": setting.patch,
        "clients": load.clients,
        "sampled": load.per_round,
        "local_steps": load.steps,
        "batch_size": load.batch_size,
        "optimizer": "adamw",
        "precision": "bf16" if precision == "bf16" else "fp32",
        "device": device.type,
        "rounds": 6,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    path = os.pathsep.join([str(PEERS.parents[1] / "src"), str(PEERS)])
    command = [sys.executable, str(PEERS / file), *flags, *words]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"round_seconds"')]
    if done.returncode or not lines:
        return f"failed: {(done.stderr.strip().splitlines() or [''])[-1][:80]}", ""
    found = json.loads(lines[-1])
    return f"{load.images_per_round / median(found['round_seconds'][1:]):.0f}", f"{found['first_round_after']:.1f}"
