"""The demo: a small language model is made, taught with QLoRA, tested, merged and checked, from nothing but Python itself."""
