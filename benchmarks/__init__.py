"""Measurements, each reproduced by one command."""
