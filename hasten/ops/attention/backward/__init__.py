"""The attention kernels' backward."""
