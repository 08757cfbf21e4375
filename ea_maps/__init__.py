"""Pictures and measures of evolving attention maps, for all models: ``python -m ea_maps``."""
