"""Bridges to model libraries. Each needs its own extra and is imported by name, never by ``import pyquantattn``."""
