"""Makes `ops_kit` importable from the folders of the single ops (pytest puts a conftest's folder on the path)."""
