"""What each layer stores, recomputes or sends to host memory: costs, plan, policy."""
