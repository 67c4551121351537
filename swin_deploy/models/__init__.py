"""The Swin networks in PyTorch, and the loading of their checkpoints."""
