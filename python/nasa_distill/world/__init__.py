"""A small world of captioned images whose images have an exact judge."""
