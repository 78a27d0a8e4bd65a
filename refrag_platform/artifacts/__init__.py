"""What an artifact is: its bytes' hash, the manifest beside it, its way into its place, copies of its figures."""
