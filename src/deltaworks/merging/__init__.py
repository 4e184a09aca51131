"""Many experts to one model: recipe, plan, execution, commit."""
