"""Reads checkpoints: whatever wrote the weights, what comes out is one Checkpoint with canonical parameter names."""

from swin_deploy.models.checkpoints.base import Checkpoint as Checkpoint
from swin_deploy.models.checkpoints.base import random_checkpoint as random_checkpoint
from swin_deploy.models.checkpoints.huggingface import checkpoint_from_folder as checkpoint_from_folder
from swin_deploy.models.checkpoints.huggingface import checkpoint_from_hub as checkpoint_from_hub
