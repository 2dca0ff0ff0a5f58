"""What the attention kernels share."""
