"""The gated activation between LoRA linears, with every thin product that needs its tiles made from the same read."""
