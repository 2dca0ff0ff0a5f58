"""Runs the demo: pretrains a small language model, fine-tunes it with QLoRA, evaluates, merges and checks it."""
