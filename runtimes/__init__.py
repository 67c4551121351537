"""Run models: every back end behind one interface. Only the PyTorch back end imports torch."""
