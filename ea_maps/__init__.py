"""Pictures and figures of how attention evolves, for every model here: ``python -m ea_maps``."""
