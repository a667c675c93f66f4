"""What a newcomer copies out of the README must run as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_is_the_file_it_names() -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    file = (ROOT / "examples" / "readme_layer.py").read_text()
    assert file.endswith(block.group(1))
    assert 18 <= len(block.group(1).splitlines()) <= 24


def test_the_example_runs_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "examples/readme_layer.py"], cwd=ROOT, env=environment, check=True, timeout=120
    )


def test_files_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:tests|examples|feplb|bench)/[\w/]+\.(?:py|h|cpp))", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
