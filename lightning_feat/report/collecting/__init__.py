"""From a network and data to a `FeatureSet`."""
