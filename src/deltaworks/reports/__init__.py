"""Pictures and pages of plans and results."""
