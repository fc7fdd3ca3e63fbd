"""What the handlers may call. `app.py` builds it once."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.chat import Chat
from appliance.config import Config
from appliance.providers.local import LocalProvider


@dataclass(frozen=True, slots=True)
class Services:
    """The services behind the HTTP edge."""

    config: Config
    chat: Chat
    local: LocalProvider
