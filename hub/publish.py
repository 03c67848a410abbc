# Copyright 2026 The modeling-flm authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Publishes a model folder as a repository of the Hugging Face Hub, which others load with torch and transformers alone.

    python -m hub.publish --model outputs/fmlm --repo-id me/fmlm
    python -m hub.publish --model outputs/fmlm --repo-id me/fmlm --dry-run assembled

The repository is put together in a temporary folder, where a process that has nothing of this package loads it and
generates; then it is uploaded in one commit. Publishing again updates it.
"""

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from modeling_flm.modeling_flm import FLMPreTrainedModel

from .card import (
    DATA_SETTINGS_NAME,
    EVALUATION_NAME,
    MARKER,
    TEMPLATES,
    TRAINING_NAME,
    build_card,
    is_hub_name,
    read_json,
)


logger = logging.get_logger(__name__)

# What publishing may have written before, and removes where it is no longer there.
_OWN_FILES = (
    *(
        "*.py",
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "training_args.bin",
    ),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja"),
    *(TRAINING_NAME, EVALUATION_NAME, DATA_SETTINGS_NAME),
)

_NUM_ATTEMPTS = 3

# Loads a folder as a user without this package does.
_CHECK = """
import json, sys
folder, output, num_samples = sys.argv[1:]
sys.modules.update(dict.fromkeys(("modeling_flm", "trainers", "hub")))  # importing them fails
import torch
from transformers import pipeline
pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
rows = pipe(num_samples=int(num_samples), generator=torch.Generator().manual_seed(0))
with open(output, "w") as file:
    json.dump([row["generated_text"] for row in rows], file)
"""


class PublishError(Exception):
    """A model that could not be published; the message says why, and what was left where."""


def assemble(
    folder: str | Path, output: str | Path, repo_id: str, tokenizer: str | None = None, num_samples: int = 3, **card
):
    """
    Puts a model repository together, and checks that it works without this package.

    Args:
        folder (`str` or `Path`):
            A model folder, as `save_pretrained` and the trainers write it. A `README.md` in it that was not generated is
            kept; otherwise a card is made.
        output (`str` or `Path`):
            The folder to write, which must be empty or not exist.
        repo_id (`str`):
            The name that the repository will have.
        tokenizer (`str`, *optional*):
            Name or folder of the tokenizer. The one in `folder` unless given.
        num_samples (`int`, *optional*, defaults to 3):
            The number of texts to show in the card.
        card:
            Further arguments of [`~hub.card.build_card`].

    Raises:
        `PublishError`: if something is missing, or the result cannot be loaded.
    """
    folder, output = Path(folder), Path(output)
    if not (folder / "config.json").is_file():
        raise PublishError(f"{folder} is not a model folder: it has no config.json.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PublishError(f"{output} is not empty: name another folder.")
    if num_samples < 1:
        raise PublishError(f"`num_samples` must be at least 1, got {num_samples}.")
    if tokenizer is None and not (folder / "tokenizer_config.json").is_file():
        raise PublishError(f"{folder} has no tokenizer: pass the name or folder of one as `tokenizer`.")
    try:
        model = AutoModel.from_pretrained(folder, dtype="auto")
        loaded_tokenizer = AutoTokenizer.from_pretrained(folder if tokenizer is None else tokenizer)
    except (OSError, ValueError) as error:
        raise PublishError(f"{folder} cannot be loaded: {error}") from error
    if not isinstance(model, FLMPreTrainedModel):
        raise PublishError(f"{folder} has a `{type(model).__name__}`, not a flow-based language model.")
    if len(loaded_tokenizer) > model.config.vocab_size:
        raise PublishError(
            f"The tokenizer has {len(loaded_tokenizer)} tokens, but the model {model.config.vocab_size}: pass the right one "
            "as `tokenizer`."
        )

    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    loaded_tokenizer.save_pretrained(output)
    shutil.copy(TEMPLATES / "LICENSE", output / "LICENSE")
    for name in (TRAINING_NAME, EVALUATION_NAME):
        if (folder / name).is_file():
            shutil.copy(folder / name, output / name)
    if settings := read_json(folder, DATA_SETTINGS_NAME):
        # Paths of this machine are nobody else's business.
        for name in ("train_file", "validation_file"):
            settings.pop(name, None)
        if not is_hub_name(settings.get("dataset_name")):
            settings.pop("dataset_name", None)
        (output / DATA_SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    samples = _check(output, num_samples)
    own_card = folder / "README.md"
    if own_card.is_file() and MARKER not in own_card.read_text(encoding="utf-8"):
        try:
            ModelCard.load(own_card)
        except ValueError as error:
            raise PublishError(f"{own_card} has metadata that the Hub cannot read: {error}") from error
        shutil.copy(own_card, output / "README.md")
    else:
        build_card(folder, repo_id, model, samples, **card).save(output / "README.md")


def _check(folder: Path, num_samples: int) -> list[str]:
    """Texts that another process generates, which has the folder and nothing of this package."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "texts.json")
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _CHECK, str(folder.resolve()), str(result), str(num_samples)]
        process = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if process.returncode != 0:
            raise PublishError(f"The repository does not work by itself, and was not published:\n{process.stderr}")
        return json.loads(result.read_text(encoding="utf-8"))


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Publish the model",
    **options,
) -> CommitInfo:
    """
    Publishes a model folder on the Hub, in one commit.

    Args:
        folder (`str` or `Path`):
            The model folder.
        repo_id (`str`):
            The name of the repository, such as `"me/my-model"`. It is created if it does not exist.
        private (`bool`, *optional*):
            Whether a repository that is created is private.
        revision (`str`, *optional*):
            The branch to commit to, which is created if it does not exist. `"main"` unless given.
        token (`str`, *optional*):
            A token with the right to write. That of `hf auth login` unless given.
        commit_message (`str`, *optional*, defaults to `"Publish the model"`):
            The first line of the commit message.
        options:
            Further arguments of [`assemble`] and [`~hub.card.build_card`].

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        `PublishError`: if it did not work. The files of the repository then are as they were before.
    """
    api = HfApi(token=token, library_name="modeling-flm")
    try:
        validate_repo_id(repo_id)
        account = api.whoami()["name"]
    except HFValidationError as error:
        raise PublishError(f"`repo_id`: {error}") from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise PublishError(
            f"The Hub does not know who you are: log in with `hf auth login`, or pass a valid `token`.\n{error}"
        ) from error
    if "/" not in repo_id:
        repo_id = f"{account}/{repo_id}"

    with tempfile.TemporaryDirectory() as assembled:
        assemble(folder, assembled, repo_id, **options)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return _upload(api, Path(assembled), repo_id, revision, commit_message)
        except Exception as error:
            raise PublishError(
                f"Nothing was uploaded to {repo_id}, whose files are as they were (if it is new, it is empty): run this "
                f"again, after dealing with\n{_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    """What went wrong. Uploads of single files fail with a `RuntimeError` that does not say why."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _upload(api: HfApi, folder: Path, repo_id: str, revision: str | None, commit_message: str) -> CommitInfo:
    """Everything in `folder` in one commit, tried again where the network or the server failed."""
    # Not `upload_folder`, which may make several commits.
    paths = sorted(folder.iterdir())
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            stale = [
                name
                for name in api.list_repo_files(repo_id, revision=revision)
                if "/" not in name
                and any(fnmatch.fnmatch(name, pattern) for pattern in _OWN_FILES)
                and not (folder / name).exists()
            ]
            operations = [CommitOperationAdd(path.name, path) for path in paths]
            operations += [CommitOperationDelete(name) for name in stale]
            return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
        except Exception as error:
            if attempt == _NUM_ATTEMPTS or not _may_pass(error):
                raise
            logger.warning(f"Uploading failed, trying again. {_reason(error)}")
            time.sleep(attempt)


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error is one of the network or the server, rather than of what was asked for."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code >= 500
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            return False
        error = error.__cause__
    return True


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model folder")
    parser.add_argument("--repo-id", required=True, help="the name of the repository, such as me/my-model")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is created")
    parser.add_argument("--revision", help="the branch to commit to (default: main)")
    parser.add_argument("--token", help="a token with the right to write (default: that of `hf auth login`)")
    parser.add_argument("--commit-message", default="Publish the model")
    parser.add_argument("--dry-run", metavar="OUT", help="write the repository to this folder and upload nothing")
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer (default: the one in the model folder)")
    parser.add_argument("--num-samples", type=int, default=3, help="texts to show in the card (default: 3)")
    card = parser.add_argument_group("metadata of the card")
    card.add_argument("--license", default="apache-2.0", help="the licence of the weights (default: apache-2.0)")
    card.add_argument("--language", nargs="+", help="codes of the languages of the texts")
    card.add_argument("--datasets", nargs="+", help="names of the datasets that the model was trained on")
    card.add_argument("--base-model", help="name of the model that this one was distilled from")
    card.add_argument("--tags", nargs="+", help="further tags")
    args = parser.parse_args(arguments)
    options = {
        name: getattr(args, name)
        for name in ("tokenizer", "num_samples", "license", "language", "datasets", "base_model", "tags")
    }
    print(f"Putting {args.repo_id} together, and checking that it works by itself", flush=True)
    try:
        if args.dry_run is not None:
            assemble(args.model, args.dry_run, args.repo_id, **options)
            print(f"{args.dry_run} is what would be uploaded.")
            return
        commit = publish(
            args.model, args.repo_id, args.private or None, args.revision, args.token, args.commit_message, **options
        )
    except PublishError as error:
        raise SystemExit(f"error: {error}") from None
    print(commit.commit_url)


if __name__ == "__main__":
    main()
