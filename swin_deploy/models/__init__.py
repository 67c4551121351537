"""The networks: the only folder with torch at module level (windows.py and the checkpoint table stay free of it)."""
