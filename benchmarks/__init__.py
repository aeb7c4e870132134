"""Measurements quoted in README, each reproduced by one command."""
