"""LoftQ initialisation. Its fields are checked with the model by `hasten.training.loftq`."""

from hasten.options.fields import AdapterFields


def check(options: AdapterFields) -> list[str]:
    """Checks that LoftQ is selected by loftq_config, and not together with another initialisation."""
    asked = options.init_lora_weights
    found = []
    if asked == "loftq":
        found.append(
            'init_lora_weights="loftq" is not supported; pass loftq_config={"loftq_bits": 4, "loftq_iter": 1} instead'
        )
    if options.loftq_config and asked is not True:
        found.append(
            f"loftq_config initialises by LoftQ, but init_lora_weights={asked!r} asks for another "
            "initialisation; drop one of them"
        )
    return found
