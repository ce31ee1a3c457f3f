"""A repository of the hub: the files, `artifact.json` and a model card, in one commit."""

from __future__ import annotations

import os

from edgetune.core.errors import SourceError
from edgetune.publishing.card import model_card
from edgetune.publishing.package import Package
from edgetune.runtime.sources.artifact import INDEX
from edgetune.runtime.sources.credentials import hub_token
from edgetune.runtime.sources.web import HUB_ADDRESS, hub_name

README = "README.md"


def push_to_hub(packed: Package, url: str, *, licence: str | None, private: bool) -> str:
    """Make the repository where there is none, and commit; returns the URL with the commit.

    `$HF_ENDPOINT` and the token are those that huggingface_hub takes. SourceError in one line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, revision = hub_name(url)
    address = os.environ.get("HF_ENDPOINT") or HUB_ADDRESS
    api = HfApi(endpoint=address, token=hub_token())
    added = [
        CommitOperationAdd(file.path, str(packed.folder / file.path))
        for file in packed.artifact.files
    ]
    added.append(CommitOperationAdd(INDEX, packed.manifest))
    if README not in {file.path for file in packed.artifact.files}:  # who wrote one keeps it
        card = model_card(packed, name, licence=licence)
        added.append(CommitOperationAdd(README, card.encode()))
    # of httpx or requests, whichever this huggingface_hub goes through
    lost = tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    refused: tuple[type[BaseException], ...] = (*lost, HfHubHTTPError, OSError, ValueError)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.create_commit(
            name, added, commit_message=f"Push {packed.artifact.digest}", revision=revision
        )
    except refused as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"the hub did not take it: {said[0][:300]}",
            where=url,
            fix="Look at the network, and log in: `hf auth login`, or HF_TOKEN that may write.",
        ) from error
    return f"hf://{name}@{done.oid}"
