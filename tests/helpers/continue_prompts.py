"""Continues prompts in several processes; run by the tests under `accelerate launch`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402
from accelerate import PartialState
from test_steering import continue_prompts


if __name__ == "__main__":
    state = PartialState(cpu=True)
    with state.split_between_processes(list(range(7))) as indices:
        torch.save(continue_prompts(indices), Path(sys.argv[1], f"{state.process_index}.pt"))
    assert state.num_processes == 2
