"""What negative prompts do to the models of the small world, counted by its judge."""
