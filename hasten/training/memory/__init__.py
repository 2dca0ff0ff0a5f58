"""Memory of a training step: its prediction, a plan per layer (save, recompute, offload), and the policy that runs the plan."""
