"""Checkpoints of other code and of this project's former format. Nothing in a checkpoint file is executed.

names.py translates parameter names, load.py reads checkpoint files, backbone.py those of
pretrained backbones, legacy.py upgrades the former format."""
