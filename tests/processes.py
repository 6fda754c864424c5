"""Two real processes that train together: gloo, on a CPU."""

import os
import subprocess
import sys
from pathlib import Path


_BEFORE = """
import os, sys
import torch
import torch.distributed as dist

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
"""

# gloo's threads abort now and then when an interpreter ends under them.
_AFTER = """
dist.barrier()
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""


def run_two(script: str, folder: Path, timeout: int = 200) -> None:
    """Run `script` as rank 0 and 1; it has `rank`, `folder`, `torch` and `dist`, and may import the tests' modules."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # What accelerate goes by; the processes have met through a file before it looks.
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-c", _BEFORE + script + _AFTER]
    ranks = []
    for rank in range(2):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([*command, str(rank), str(folder)], env=own, stderr=subprocess.PIPE, text=True))
    try:
        for rank in ranks:
            errors = rank.communicate(timeout=timeout)[1]
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
