"""A hub repository, through huggingface_hub: small files first, then only the shards that hold wanted tensors."""

from __future__ import annotations

import functools
from pathlib import Path

from swarmlm.errors import ModelNotFound

SMALL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
LIST_SECONDS = 20.0  # for the list of a repository's files
REACH_SECONDS = 5.0  # to open a connection: longer, and the user wonders


class HubRepository:
    """Honours HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME and the user's token, as huggingface_hub does."""

    def __init__(self, name: str, *, revision: str | None, cache_dir: str | None) -> None:
        self.name = name
        self._revision = revision
        self._cache_dir = cache_dir

    @functools.cached_property
    def _reachable(self) -> bool:
        """One quick look: huggingface_hub itself tries an unreachable hub for half a minute."""
        from huggingface_hub import constants, get_session

        if constants.HF_HUB_OFFLINE:
            return False
        try:
            get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
        except Exception:  # of whichever HTTP library huggingface_hub uses
            return False
        return True

    def fetch(self, file: str) -> Path:
        """The file in the local cache, downloaded if it is not there. Raises `ModelNotFound`."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )

        try:
            path = hf_hub_download(
                self.name,
                file,
                revision=self._revision,
                cache_dir=self._cache_dir,
                local_files_only=not self._reachable,
            )
            return Path(path)
        except GatedRepoError:
            reason = "it is gated, and your hub token may not read it"
        except RepositoryNotFoundError:
            reason = "the hub has no such repository, or your token may not see it"
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):
            reason = f"{file} is not in the local cache and the hub cannot be reached"
        except EntryNotFoundError:
            reason = f"the repository has no {file}"
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
        raise ModelNotFound(f"cannot get {self.name} from the hub: {reason}")

    def fetch_small_files(self) -> None:
        """Tokenizer and generation files, as far as the repository has them."""
        for file in SMALL:
            if file in self.files():
                self.fetch(file)

    @functools.cache  # noqa: B019 - a repository object lives as long as its source
    def files(self) -> list[str]:
        """The files of the repository; offline, those in the cache."""
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            if not self._reachable:
                raise OfflineModeIsEnabled
            info = huggingface_hub.HfApi().model_info(self.name, revision=self._revision, timeout=LIST_SECONDS)
            return [sibling.rfilename for sibling in info.siblings or ()]
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            folder = self.fetch("config.json").parent
            present = [str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()]
            return present
