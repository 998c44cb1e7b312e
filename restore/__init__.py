"""Everything around the networks: data, training, evaluation, restoring video."""
