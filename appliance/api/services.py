"""What the handlers may call. `app.py` builds it once."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.access.admission import Admission
from appliance.access.calllog import CallLog
from appliance.access.ledger import Ledger
from appliance.access.plans import Plans
from appliance.chat import Chat
from appliance.config import Config
from appliance.providers.local import LocalProvider
from appliance.store.database import Store


@dataclass(frozen=True, slots=True)
class Services:
    """The services behind the HTTP edge."""

    config: Config
    chat: Chat
    local: LocalProvider
    store: Store
    admission: Admission
    plans: Plans
    ledger: Ledger
    calls: CallLog
