"""What was made before, in Git and DVC, and whether what is in place is still what would be made now."""
