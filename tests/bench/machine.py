"""What was measured on: the figures mean little without it."""

import os
import platform
import re
import subprocess
import time
from pathlib import Path


def facts() -> dict[str, str]:
    """For people, in the order of the page."""
    cpu = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": f"{os.cpu_count()} ({cpu[1] if cpu else platform.machine()})",
        "memory": f"{int(memory[1]) >> 20} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "runsc": _first_line("runsc", "--version").removeprefix("runsc version "),
        "Python": platform.python_version(),
        "run as": "root" if os.geteuid() == 0 else "an ordinary user",
        "load average at the start": load(),
    }


def load() -> str:
    """Ours included: two cores are busy with a load of 2."""
    return f"{os.getloadavg()[0]:.2f}"


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _first_line(*command: str) -> str:
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    return shown.partition("\n")[0]
