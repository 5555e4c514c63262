"""Push a converted checkpoint: check, reload, card, then one commit. Nothing that fails a check is uploaded."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RemoteEntryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..storage.adapters import ADAPTER_NAME, save_adapter
from ..storage.files import CARD_NAME
from ..storage.models import load_checkpoint
from .card import build_card, is_unedited
from .folder import ConvertedFolder, read_folder
from .reload import check_reload


@dataclass
class PushResult:
    """The result of `push`: the commit's URL (None for a dry run), the card, the files, and notes on them."""

    url: str | None
    card: str
    files: list[str]
    notes: list[str] = field(default_factory=list)


def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    overwrite_card: bool = False,
    results: str | Path | list[str | Path] | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    adapter: bool = False,
) -> PushResult:
    """Upload a converted checkpoint folder to the Hub in one commit, with a model card, after a reload check.

    The folder itself is never written to. Hidden files, pickles, training checkpoints and links out of the folder (see
    `list_files`) are not uploaded. A README.md in the folder is uploaded as it is, and one in the repository is kept,
    unless `overwrite_card` is set, or `build_card` or transformers wrote it and nobody has edited it since.

    Args:
        path: the folder that `save_pretrained` wrote; the check runs the Python files in it.
        repo: "owner/name"; created if it does not exist.
        private: create the repository as a private one; an existing public one is refused.
        license, base_model: see `build_card`.
        token: None takes HF_TOKEN or the stored login; it is neither printed nor written.
        revision: a branch, created if it does not exist; None for the main one.
        commit_message: None for "Upload <class> with distattn_hf".
        results: JSON files for the card: what `distattn evaluate FOLDER --out` wrote, or your own results (see
            `read_results`), which the card shows as yours.
        overwrite_card: replace a README.md that somebody wrote or edited.
        dry_run: do all checks and build the card, but create and upload nothing.
        endpoint: None takes HF_ENDPOINT or the Hub.
        adapter: upload a full checkpoint as an adapter, what differs from its base (base_model, or where the model says
            that it came from); a folder that is one is uploaded as it is.

    Raises:
        ValueError: the folder, the licence or the reload check is not in order, or the repository is public; see also
            `save_adapter`.
        OSError: the Hub refused, or could not be reached; names the step. The repository has all files or none.
    """
    validate_repo_id(repo)
    if repo.count("/") != 1:
        raise ValueError(f"repo must be 'owner/name', got {repo!r}")
    folder = read_folder(path)
    if adapter and ADAPTER_NAME not in folder.files:
        with tempfile.TemporaryDirectory(prefix="distattn_adapter_") as staging:
            return push(
                _as_adapter(folder, Path(staging, "adapter"), base_model), repo, private=private, license=license,
                base_model=base_model, token=token, revision=revision, commit_message=commit_message,
                overwrite_card=overwrite_card, results=results, dry_run=dry_run, endpoint=endpoint,
            )  # fmt: skip
    card, notes = choose_card(folder, repo, overwrite_card, license, base_model, token, endpoint, results)
    if folder.left_out:
        notes.append(f"left out of the upload: {', '.join(folder.left_out)}")
    files = {name: folder.path / name for name in folder.files if name != CARD_NAME}
    with tempfile.TemporaryDirectory(prefix="distattn_push_") as staging:
        # Only the files to upload, so that the check fails if one that is left out is needed.
        for name, file in files.items():
            (Path(staging) / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file.resolve(), Path(staging) / name)
        check_reload(staging, folder.auto_class)
    result = PushResult(None, card, sorted([*files, CARD_NAME]), notes)
    if not dry_run:
        message = commit_message or f"Upload {folder.architecture} with distattn_hf"
        own_card = card == _local_card(folder)
        Upload(HfApi(endpoint=endpoint, token=token), repo, token).run(
            result, files, private, revision, message, keep_remote_card=not (overwrite_card or own_card)
        )
    return result


def _as_adapter(folder: ConvertedFolder, out: Path, base_model: str | None) -> Path:
    """Write a full checkpoint's adapter to `out`, with the files beside its weights, and return `out`."""
    student, tokenizer = load_checkpoint(folder.path, dtype="auto")
    save_adapter(student, out, base=base_model, tokenizer=tokenizer)
    for name in folder.files:
        if not (name.endswith((".safetensors", ".safetensors.index.json")) or (out / name).exists()):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, out / name)
    return out


def _local_card(folder: ConvertedFolder) -> str | None:
    return (folder.path / CARD_NAME).read_text(encoding="utf-8") if CARD_NAME in folder.files else None


def choose_card(
    folder, repo, overwrite_card, license, base_model, token, endpoint, results=None
) -> tuple[str, list[str]]:
    """Return the folder's README.md where somebody wrote or edited it, else a new card; and notes for the user."""
    own_card = _local_card(folder)
    if own_card is not None and not overwrite_card and not is_unedited(own_card):
        if results:
            raise ValueError(
                f"results={_named(results)} go into a new card, but somebody wrote {CARD_NAME} of the folder; write "
                "them there, or replace it by overwrite_card"
            )
        return own_card, [f"{CARD_NAME} of the folder is uploaded as it is; overwrite_card replaces it"]
    card_options = {"license": license, "base_model": base_model, "results": results}
    return str(build_card(folder.path, repo, **card_options, token=token, endpoint=endpoint)), []


def _named(results) -> str:
    return ", ".join(repr(str(file)) for file in ([results] if isinstance(results, str | Path) else results))


class Upload:
    """The steps on the Hub; the error of a failed one names the step and never shows the token."""

    def __init__(self, api: HfApi, repo: str, token: str | None):
        self.api, self.repo = api, repo
        self.secret = token or get_token()

    def run(self, result: PushResult, files: dict, private: bool, revision, message: str, keep_remote_card: bool):
        """Create the repository and branch if missing, then make one commit; fills in `result`."""
        api, repo = self.api, self.repo
        self.step("creating the repository", api.create_repo, repo, private=private or None, exist_ok=True)
        if private and not self.step("reading the repository", api.model_info, repo).private:
            raise ValueError(f"private=True, but the repository {repo!r} exists and is public; nothing was uploaded")
        if revision is not None:
            self.step("creating the branch", api.create_branch, repo, branch=revision, exist_ok=True)
        additions = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        remote_card = self.step("reading the repository's card", self._remote_card, revision)
        if keep_remote_card and remote_card is not None and not is_unedited(remote_card):
            result.card, result.files = remote_card, sorted(files)
            result.notes.append(
                f"{CARD_NAME} of the repository was kept: somebody wrote it; overwrite_card replaces it"
            )
        else:
            additions.append(CommitOperationAdd(CARD_NAME, result.card.encode()))
        # Not upload_folder: with Xet it commits in batches and splits failed ones, which can leave half a model.
        commit = self.step("uploading", api.create_commit, repo, additions, commit_message=message, revision=revision)
        result.url = commit.commit_url

    def _remote_card(self, revision: str | None) -> str | None:
        with tempfile.TemporaryDirectory(prefix="distattn_card_") as cache:
            try:
                file = self.api.hf_hub_download(self.repo, CARD_NAME, revision=revision, cache_dir=cache)
            except (RemoteEntryNotFoundError, RevisionNotFoundError):
                return None
            return Path(file).read_text(encoding="utf-8")

    def step(self, doing: str, function, *args, **kwargs):
        """Call the Hub; raises `OSError` with the step, the status and the server's message."""
        try:
            return function(*args, **kwargs)
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            text = " ".join(str(cause).split()) or type(cause).__name__
            if self.secret:
                text = text.replace(self.secret, "<token>")
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
                text += "; check the token (HF_TOKEN or `hf auth login`) and that it may write there"
        # Outside the handler: the client's own exception may carry the request, and with it the token.
        raise OSError(f"push to {self.repo!r} failed while {doing}: {text}")
