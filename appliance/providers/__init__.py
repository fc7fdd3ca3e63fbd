"""Who answers a completion. A provider is one async generator of chunks; everything else is written once around it."""
