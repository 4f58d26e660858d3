"""Accuracy against memory of KV formats on a real model: capture, measure, generate, report."""
