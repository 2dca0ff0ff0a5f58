"""Queries, keys and values in one buffer: projected, normed and rotated where they lie."""
