"""How fast the platform is, measured beside the plain way of doing the same."""
