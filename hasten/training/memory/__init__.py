"""Predicts the memory of a training step, plans what each layer saves, recomputes or offloads, and runs that plan."""
