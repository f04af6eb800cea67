"""The small parts that others put into a model: quantised linear layers, adapters' modules, the refinement of keys."""
