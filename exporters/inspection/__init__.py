"""Count what graphs and engines contain, compute and move."""
