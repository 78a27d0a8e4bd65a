"""What was made from what, over all versions: looked up both ways, compared, forgotten."""
