"""Models in their roles: policy, reference, guide, scorer, critic."""
