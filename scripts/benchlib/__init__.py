"""The parts of `scripts/bench`: a client of its own, the servers it runs, what it measures, and how it reports it."""
