"""What one job computes: attack, defend, sample and measure, from plugin instances to values. No store, no registry."""
