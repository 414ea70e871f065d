"""Runs seeds: `python -m tests.simulation --seeds 0-19 --clients 200 --jobs 2`."""

from __future__ import annotations

from tests.simulation import clock

clock.install()

from tests.simulation.swarm import main  # noqa: E402 - after the clock

main()
