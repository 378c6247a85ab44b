"""Whether the Hugging Face hub can be reached: asked once, so that nobody waits for the retries of its libraries."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.utils import get_session

SECONDS = 5  # that the hub has to answer


@contextmanager
def asked_once(wanted: bool = True) -> Iterator[str | None]:
    """Where the hub is ``wanted`` and does not answer, only its cache is read. Yields why it is away, or None."""
    was = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = away = was or (wanted and not _answers())
    switch = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    try:
        yield f"the hub cannot be reached{switch}, and the cache lacks its files" if wanted and away else None
    finally:
        constants.HF_HUB_OFFLINE = was


def _answers() -> bool:
    try:
        return bool(get_session().head(constants.ENDPOINT, timeout=SECONDS))
    except Exception:  # the transport's own errors, which differ between versions
        return False
