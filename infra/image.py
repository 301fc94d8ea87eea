"""The container image that cluster steps run in."""

import os

IMAGE = os.environ.get("RANKGR_IMAGE", "rankgr/train:0.1.0-python3.11")
