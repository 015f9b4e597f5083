"""Attainment, results and the load generator: one measure for the simulator and for live servers."""
