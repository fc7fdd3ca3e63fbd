"""`python -m tests.limited` is `python -m appliance` with plan limits on, which the product switches on once there are
the commands, settings and pages that go with them."""

from __future__ import annotations

from appliance.access import terms
from appliance.cli import main

if __name__ == "__main__":
    terms.unlimited = terms.limited
    main()
