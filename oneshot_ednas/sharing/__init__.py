"""Which tasks share what: branching (BMTAS) and operator sharing (AutoMTL)."""
