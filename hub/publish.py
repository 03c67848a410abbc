# SPDX-FileCopyrightText: 2026 The modeling-flm authors
# SPDX-License-Identifier: Apache-2.0
"""
Publishes a model folder on the Hugging Face Hub, so that others can load it with torch and transformers alone.

    flm-publish --model outputs/fmlm --repo_id me/fmlm
    flm-publish --model outputs/fmlm --repo_id me/fmlm --dry_run assembled

The repository is assembled in a temporary folder. A process without this package loads it from there and generates samples;
then it is uploaded in one commit. Publishing again updates the repository.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

import modeling_flm
from modeling_flm.base_flm import FLMPreTrainedModel

from .card import MARKER, TEMPLATES, build_card, missing_metadata
from .loading import find_damage, load_checked
from .records import (
    DATA_SETTINGS_NAME,
    EVALUATION_NAME,
    ONNX_FILES,
    ONNX_FOLDER,
    TRAINING_NAME,
    is_hub_name,
    read_records,
    to_json,
)
from .spaces import assemble_space


logger = logging.get_logger(__name__)

_NUM_ATTEMPTS = 3

# Loads a folder like a user without this package.
_CHECK = """
import json, sys
folder, output, num_samples = sys.argv[1:]
sys.modules["modeling_flm"] = None  # importing it fails
import torch
from transformers import pipeline
pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
rows = pipe(num_samples=int(num_samples), generator=torch.Generator().manual_seed(0))
with open(output, "w") as file:
    json.dump([row["generated_text"] for row in rows], file)
"""


class PublishError(Exception):
    """Raised if a model cannot be published, with the reason and the state of the repository."""


def _own_files() -> tuple[str, ...]:
    """
    Patterns of the files that publishing writes, and removes from the repository if a new version does not have them: the code of
    the model, and the files of models, tokenizers and trainings.
    """
    code = get_relative_import_files(modeling_flm.modeling_flm.__file__)
    return (
        *("modeling_flm.py", *(Path(path).name for path in code)),
        *("config.json", "generation_config.json", "training_args.bin"),
        *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        *("vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja"),
        *(TRAINING_NAME, EVALUATION_NAME, DATA_SETTINGS_NAME),
        *(f"{ONNX_FOLDER}/{name}*" for name in ONNX_FILES.values()),
    )


def assemble(
    folder: str | Path,
    output: str | Path,
    repo_id: str,
    tokenizer: str | None = None,
    num_samples: int = 3,
    check: bool = True,
    onnx: Sequence[str] = (),
    **card,
):
    """
    Assembles a model repository, and checks that it works without this package.

    Args:
        folder (`str` or `Path`):
            Model folder from `save_pretrained` or a trainer, or adapter folder, whose adapter is merged into its base model. A
            `README.md` that the user has written or changed is kept; otherwise a card is generated.
        output (`str` or `Path`):
            Output folder. It must not exist.
        repo_id (`str`):
            Name of the repository.
        tokenizer (`str`, *optional*):
            Name or folder of the tokenizer. Defaults to the tokenizer in `folder`.
        num_samples (`int`, *optional*, defaults to 3):
            Number of samples to show in the card.
        check (`bool`, *optional*, defaults to `True`):
            Whether to load the result in another process, which also generates the samples. Otherwise the card has none.
        onnx (`Sequence[str]`, *optional*, defaults to `()`):
            Precisions of the ONNX files to add, see [`~modeling_flm.hub.export.export_onnx`].
        card:
            More arguments of [`~modeling_flm.hub.card.build_card`].

    Raises:
        `PublishError`: if something is missing, or the result cannot be loaded. Then `output` is not created.
    """
    folder, output = Path(folder), Path(output)
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME)):
        raise PublishError(f"{folder} is not a model folder: it has no config.json.")
    if output.exists():
        raise PublishError(f"{output} already exists: name another folder.")
    if num_samples < 1:
        raise PublishError(f"`num_samples` must be at least 1, got {num_samples}.")
    if tokenizer is None and not (folder / "tokenizer_config.json").is_file():
        raise PublishError(f"{folder} has no tokenizer: pass the name or folder of one as `tokenizer`.")
    own_card = _read_own_card(folder / "README.md")
    license = card.get("license")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license):
        raise PublishError(
            f"`license` must be a license identifier of the Hub, such as 'mit', 'apache-2.0' or 'other', got {license!r}."
        )
    try:
        validate_repo_id(repo_id)
        records = read_records(folder)
    except ValueError as error:  # `HFValidationError` is one, too
        raise PublishError(str(error)) from error
    model, loaded_tokenizer = _load(folder, folder if tokenizer is None else tokenizer)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        card["adapter"] = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        if card.get("base_model") is None and is_hub_name(model.name_or_path):
            card["base_model"] = model.name_or_path

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        unfinished = Path(scratch, output.name)  # others may read it, unlike a temporary folder
        model.save_pretrained(unfinished)
        loaded_tokenizer.save_pretrained(unfinished)
        shutil.copyfile(TEMPLATES / "LICENSE", unfinished / "LICENSE")
        for name, record in records.items():
            (unfinished / name).write_text(to_json(record, indent=2) + "\n", encoding="utf-8")
        if onnx:
            from .export import ExportError, export_onnx  # here, so that a trainer can be imported without it

            try:
                export_onnx(model, unfinished, onnx)
            except ExportError as error:
                raise PublishError(str(error)) from error
        samples = _check(unfinished, num_samples) if check else []
        if own_card is None:
            card = build_card(records, repo_id, model, samples, onnx=onnx, **card)
            if missing := missing_metadata(card, records):
                logger.warning_once(f"The card of {repo_id} is incomplete. Pass " + "; ".join(missing) + ".")
            if EVALUATION_NAME not in records:
                logger.warning_once(f"The card has no results: run `flm-evaluate --model {folder} --update_card`.")
        else:
            card = own_card
        card.save(unfinished / "README.md")
        unfinished.rename(output)


def _read_own_card(path: Path) -> ModelCard | None:
    """Returns the card at `path` if the user has written or changed it."""
    if not path.is_file():
        return None
    try:
        card = ModelCard.load(path)
    except Exception as error:  # YAML, encoding or metadata
        raise PublishError(f"{path} cannot be read as a model card: {error}") from error
    # The card that peft writes is about the adapter, not about the merged model.
    return None if MARKER in card.content or card.data.library_name == "peft" else card


def _load_merged(folder: Path) -> PreTrainedModel:
    """Loads the base model of an adapter, with the adapter merged into it."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise PublishError(f"{folder} has an adapter, which needs peft: `pip install peft`.") from error
    if (damage := find_damage(folder)) is not None:
        raise PublishError(damage)
    config = PeftConfig.from_pretrained(folder)
    if not config.base_model_name_or_path:
        raise PublishError(
            f"The adapter in {folder} does not name its base model, which was never saved: publish the folder of "
            "`peft_model.merge_and_unload().save_pretrained(folder)`."
        )
    model = load_checked(AutoModel, config.base_model_name_or_path, revision=config.revision, dtype="auto")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # they would have no effect
            return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # files, formats or sizes
        raise PublishError(f"{folder} cannot be loaded: {error}") from error


def _load(folder: Path, tokenizer: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model, without missing or unexpected weights, and its tokenizer."""
    try:
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            model = _load_merged(folder)
        else:
            model = load_checked(AutoModel, folder, dtype="auto")
        loaded_tokenizer = load_checked(AutoTokenizer, tokenizer)
    except OSError as error:
        raise PublishError(str(error)) from error
    if not isinstance(model, FLMPreTrainedModel):
        raise PublishError(f"{folder} has a `{type(model).__name__}`, not a flow-based language model.")
    if len(loaded_tokenizer) > model.config.vocab_size:
        raise PublishError(
            f"The tokenizer has {len(loaded_tokenizer)} tokens, but the model has {model.config.vocab_size}: pass the model's "
            "own as `tokenizer`."
        )
    return model, loaded_tokenizer


def _check(folder: Path, num_samples: int) -> list[str]:
    """Generates samples in another process, with the folder and without this package."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "texts.json")
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", _CHECK, str(folder.resolve()), str(result), str(num_samples)]
        process = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if process.returncode != 0:
            raise PublishError(
                f"The repository does not work without this package, and was not published:\n{process.stderr}"
            )
        return json.loads(result.read_text(encoding="utf-8"))


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Publish the model",
    blocking: bool = True,
    **options,
) -> CommitInfo | Future[CommitInfo]:
    """
    Publishes a model folder on the Hub, in one commit.

    Args:
        folder (`str` or `Path`):
            Model folder.
        repo_id (`str`):
            Name of the repository, such as `"me/my-model"`. It is created if it does not exist.
        private (`bool`, *optional*):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch to commit to. It is created if it does not exist. Defaults to `"main"`.
        token (`str`, *optional*):
            Token with write access. Defaults to the token of `hf auth login`.
        commit_message (`str`, *optional*, defaults to `"Publish the model"`):
            First line of the commit message.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the upload. The repository is always assembled before this returns.
        options:
            More arguments of [`assemble`] and [`~modeling_flm.hub.card.build_card`].

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it if not `blocking`.

    Raises:
        `PublishError`: if publishing fails. The files of the repository are unchanged then.
    """
    api = HfApi(token=token, library_name="modeling-flm")
    try:
        validate_repo_id(repo_id)
        account = _with_retries(api.whoami)["name"]
    except HFValidationError as error:
        raise PublishError(f"`repo_id`: {error}") from error
    except Exception as error:
        if isinstance(error, LocalTokenNotFoundError) or _status(error) in (401, 403):
            raise PublishError(
                f"Not logged in to the Hub: log in with `hf auth login`, or pass a valid `token`.\n{error}"
            ) from error
        raise PublishError(f"Could not reach the Hub at {api.endpoint}.\n{_reason(error)}") from error
    if "/" not in repo_id:
        repo_id = f"{account}/{repo_id}"

    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        assembled = Path(scratch, "repository")
        assemble(folder, assembled, repo_id, **options)
        kept = stack.pop_all()  # removed after the upload, which may run in another thread

    def upload() -> CommitInfo:
        with kept:
            return _upload(api, assembled, repo_id, private, revision, commit_message)

    return upload() if blocking else api.run_as_future(upload)


def _upload(
    api: HfApi, folder: Path, repo_id: str, private: bool | None, revision: str | None, commit_message: str
) -> CommitInfo:
    """Creates the repository and the branch if they do not exist, and commits the folder."""
    try:
        _with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not _with_retries(lambda: api.repo_info(repo_id)).private:
            raise PublishError(
                f"{repo_id} exists and is public: make it private in its settings, or leave out `private`."
            )
        if revision is not None:
            _with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        return _with_retries(lambda: _commit(api, folder, repo_id, revision, commit_message))
    except PublishError:
        raise
    except Exception as error:
        raise PublishError(
            f"Nothing was uploaded: the files of {repo_id} are unchanged (if it is new, it is empty). Fix this error, and run "
            f"the command again:\n{_reason(error)}"
        ) from error


def publish_space(
    model: str,
    repo_id: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Publishes the page that runs a model in the browser, as a static Space, which is free of charge.

    Args:
        model (`str`):
            Name of a public model on the Hub that was published with ONNX files, such as `"me/my-model"`. The page can run
            other models as well: `?model=me/another`.
        repo_id (`str`, *optional*):
            Name of the Space. Defaults to the name of the model.
        revision (`str`, *optional*):
            Branch of the model. Defaults to `"main"`.
        token (`str`, *optional*):
            Token with write access. Defaults to the token of `hf auth login`.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        `PublishError`: if publishing fails. The files of the Space are unchanged then.
    """
    api = HfApi(token=token, library_name="modeling-flm")
    repo_id = model if repo_id is None else repo_id
    with tempfile.TemporaryDirectory() as folder:
        assemble_space(folder, model, revision)
        operations = [CommitOperationAdd(path.name, path) for path in sorted(Path(folder).iterdir())]
        try:
            _with_retries(lambda: api.create_repo(repo_id, repo_type="space", space_sdk="static", exist_ok=True))
            return _with_retries(
                lambda: api.create_commit(repo_id, operations, commit_message=f"Show {model}", repo_type="space")
            )
        except Exception as error:
            raise PublishError(f"The Space {repo_id} could not be published.\n{_reason(error)}") from error


def _commit(api: HfApi, folder: Path, repo_id: str, revision: str | None, commit_message: str) -> CommitInfo:
    """Commits all files in `folder` at once."""
    # `upload_folder` may make several commits.
    remote = api.list_repo_files(repo_id, revision=revision)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if "README.md" in remote and MARKER in (folder / "README.md").read_text(encoding="utf-8"):
        card = ModelCard.load(
            api.hf_hub_download(repo_id, "README.md", revision=revision), ignore_metadata_errors=True
        )
        if card.text.strip() and MARKER not in card.content:
            logger.warning(f"The card of {repo_id} was changed on the Hub, and is kept.")
            del paths["README.md"]
    own_files = _own_files()
    stale = [
        name
        for name in remote
        if any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in own_files)
        and not (folder / name).exists()
    ]
    operations = [CommitOperationAdd(name, path) for name, path in paths.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def _with_retries(task: Callable[[], Any]) -> Any:
    """Runs `task`, and tries again after errors of the network or the server."""
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            return task()
        except Exception as error:
            if attempt == _NUM_ATTEMPTS or not _is_transient(error):
                raise
            logger.warning(f"Trying again after {_reason(error)}")
            time.sleep(attempt)


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error comes from the network or the server, rather than from the request."""
    while error is not None:
        if (status := _status(error)) is not None:
            return status == 429 or status >= 500
        # `TransportError` is of the HTTP library, which depends on the version of huggingface_hub.
        if any(base.__name__ == "TransportError" for base in type(error).__mro__):
            return True
        if isinstance(error, (ConnectionError, TimeoutError, json.JSONDecodeError)):
            return True
        error = error.__cause__
    return False


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _reason(error: Exception) -> str:
    """Describes an error. A failed upload of a file is a `RuntimeError` whose cause has the reason."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help="the model folder")
    parser.add_argument("--model", help="the same, as for the other commands")
    parser.add_argument(
        "--repo_id", "--repo-id", required=True, help="the name of the repository, such as me/my-model"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private if it is created")
    parser.add_argument("--revision", help="the branch to commit to (default: main)")
    parser.add_argument("--token", help="a token with write access (default: the one of `hf auth login`)")
    parser.add_argument("--commit_message", "--commit-message", default="Publish the model")
    parser.add_argument(
        "--dry_run", "--dry-run", metavar="OUT", help="write the repository to this folder and upload nothing"
    )
    parser.add_argument("--tokenizer", help="name or folder of the tokenizer (default: the one in the model folder)")
    parser.add_argument(
        "--num_samples", "--num-samples", type=int, default=3, help="samples to show in the card (default: 3)"
    )
    parser.add_argument(
        "--onnx",
        nargs="*",
        choices=[*ONNX_FILES],
        default=(),
        help=f"add the model as ONNX, in these precisions (default: {' '.join(ONNX_FILES)})",
    )
    parser.add_argument(
        "--space",
        nargs="?",
        const=True,
        metavar="NAME",
        help="also publish a page that runs the model in the browser (default: under the name of the model); implies --onnx",
    )
    card = parser.add_argument_group("metadata of the card")
    card.add_argument("--license", help="license of the weights, such as mit (default: the card names none)")
    card.add_argument("--language", nargs="+", help="language codes of the texts")
    card.add_argument("--datasets", nargs="+", help="names of the datasets that the model was trained on")
    card.add_argument("--base_model", "--base-model", help="name of the model that this one was distilled from")
    card.add_argument("--tags", nargs="+", help="more tags")
    return parser


def main(arguments: list[str] | None = None):
    parser = make_parser()
    args = parser.parse_args(arguments)
    names = ("tokenizer", "num_samples", "license", "language", "datasets", "base_model", "tags")
    options = {name: getattr(args, name) for name in names}
    options["onnx"] = [*ONNX_FILES] if args.onnx == [] or args.space and not args.onnx else args.onnx
    if args.model is None:
        parser.error("name the model folder")
    if not Path(args.model).is_dir():
        parser.error(f"--model: there is no folder {args.model}")
    if args.space and args.private:
        parser.error("--space: the page has no account, and cannot show a private model")
    dry_run_space = args.dry_run and f"{Path(args.dry_run)}-space"
    if args.space and dry_run_space and Path(dry_run_space).exists():
        parser.error(f"--dry_run: {dry_run_space} already exists: name another folder")
    if args.dry_run is not None and "/" not in args.repo_id:
        parser.error("--repo_id: for a dry run name the account as well, such as me/my-model")
    print(f"Assembling {args.repo_id}, and checking that it works by itself", flush=True)
    try:
        if args.dry_run is not None:
            assemble(args.model, args.dry_run, args.repo_id, **options)
            print(f"{args.dry_run} has the files that would be uploaded.")
            if args.space:
                assemble_space(dry_run_space, args.repo_id, args.revision)
                print(f"{dry_run_space} has the files of the Space.")
            return
        commit = publish(
            args.model, args.repo_id, args.private or None, args.revision, args.token, args.commit_message, **options
        )
        print(commit.commit_url)
        if args.space:
            space = None if args.space is True else args.space
            print(publish_space(commit.repo_url.repo_id, space, args.revision, args.token).commit_url)
    except PublishError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
