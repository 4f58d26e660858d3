"""Mutations of the kernels that the test suite must notice."""
