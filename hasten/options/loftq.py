"""LoftQ initialisation. Its fields are checked with the model by `hasten.training.loftq`."""

from hasten.options.fields import AdapterFields


def check(options: AdapterFields) -> list[str]:
    """LoftQ is asked for by loftq_config, and excludes other ways of initialising."""
    asked = options.init_lora_weights
    found = []
    if asked == "loftq":
        found.append(
            'init_lora_weights="loftq" is what loftq_config={"loftq_bits": 4, "loftq_iter": 1} asks for; pass that'
        )
    if options.loftq_config and asked is not True:
        found.append(
            f"loftq_config initialises by LoftQ, but init_lora_weights={asked!r} asks for another "
            "initialisation; drop one of them"
        )
    return found
