"""A trained adapter made small: rank and bits chosen on validation rows."""
