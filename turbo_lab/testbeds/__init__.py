"""Testbeds: a teacher with its data, students and measures; one value each, imported on request."""
