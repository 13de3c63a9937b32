"""Registered operators."""

FORWARD: dict = {}
