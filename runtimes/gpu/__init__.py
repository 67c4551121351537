"""Everything that needs an NVIDIA GPU. Imported only when an engine or a GPU was chosen."""
