"""Private parts of `transformers.Trainer` that the trainers rely on, and modules that they must not import."""

import inspect
import re
import subprocess
import sys

import pytest
from transformers import Trainer

from modeling_flm.trainers import FMLMTrainer, flm_trainer


METHODS = {
    "_init_training_state": [
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_run_epoch": [
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_save": ["output_dir", "state_dict"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "_move_model_to_device": ["model", "device"],
    "_finish_current_push": [],
}
ATTRIBUTES = {"_signature_columns", "_train_batch_size", "_initial_global_step"}


@pytest.mark.parametrize("name", METHODS)
def test_private_methods_of_trainer(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", *METHODS[name]]


def test_private_parts_of_trainer_are_listed():
    assert set(re.findall(r"`(_\w+)`", flm_trainer.__doc__)) == METHODS.keys() | ATTRIBUTES
    own = FMLMTrainer.__mro__[: FMLMTrainer.__mro__.index(Trainer)]
    overridden = {name for each in own for name in vars(each) if re.match("_[a-z]", name) and hasattr(Trainer, name)}
    assert overridden < METHODS.keys()
    source = inspect.getsource(Trainer)
    assert all(f"self.{name} = " in source for name in ATTRIBUTES)


@pytest.mark.slow
def test_importing_a_trainer_imports_no_server():
    code = (
        "import sys, modeling_flm.trainers; assert not {'http.server', 'modeling_flm.hub.export'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
