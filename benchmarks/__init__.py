"""Measurements of speed and memory. Every number about speed in ``docs/`` comes from a program in this folder."""
